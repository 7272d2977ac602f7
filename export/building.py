"""From a file to the network in it, with what its user should know about the way."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from export.arguments import DEFAULT_ACTIVATION
from export.errors import InputError
from export.expected import ChosenActivation
from export.factory import build_module
from export.report import Report
from export.weights import load_weights
from kan_model import resolve_activation
from kan_model.checkpoint import Checkpoint, read_checkpoint
from kan_model.folding import describe_folds, fold_reparametrizations
from kan_model.stacks import Stack, listed, neighbours, printable


def read_network(
    path: Path,
    *,
    activation: str | None,
    prefix: str | None,
    model: str | Callable[[], nn.Module] | None,
    trust_pickle: bool,
    report: Report,
) -> nn.Module:
    """Make the network of a file: the user's own, the file's own, or a KAN.

    Args:
        path: As in `export_checkpoint`, as every argument below.
        activation: As above.
        prefix: As above.
        model: As above.
        trust_pickle: As above.
        report: As above.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ActivationError: The base activation cannot be had, or contradicts the file.
        InputError: It is given for a network that has its own.
        NetworkError: The network cannot be built, or its weights do not fit it.
    """
    # The file is not kept: a large one is mapped, and its pages count until all tensors let go.
    module = _build(
        read_checkpoint(path, trust_pickle=trust_pickle), activation, prefix, model, report
    )
    if trust_pickle:
        report.warn(
            f"--trust-pickle: the code in {printable(str(path))} was RUN, as a program of yours"
        )
    return module


def _build(
    file: Checkpoint,
    activation: str | None,
    prefix: str | None,
    model: str | Callable[[], nn.Module] | None,
    report: Report,
) -> nn.Module:
    module = file.find_module(prefix) if model is None else build_module(model)
    if module is not None:
        if activation is not None:
            raise InputError(
                "--activation: the network says itself which activations it has; leave it out"
            )
        module.eval()
        lines = load_weights(module, file, prefix) if model is not None else []
        lines += describe_folds(fold_reparametrizations(module), listed)
        for line in lines:
            report.say(line)
        return module.cpu()

    stack = file.find_kan(prefix)
    kan = file.build_kan(stack, None if activation is None else resolve_activation(activation))
    if stack.prefix:
        report.say(f"KAN behind the prefix {stack.prefix!r}")
    for line in describe_folds(stack.folded, listed):
        report.say(line)
    if stack.around:
        report.warn(
            f"the file holds a pickled {', '.join(stack.around)}; what it does besides the KAN "
            f"at {stack.prefix!r} is code, which is not in the file: the KAN ALONE is exported; to "
            "export the whole, give the network with --model package.module:factory"
        )
    left_out = neighbours(file.states, stack)
    if left_out and prefix is None:
        report.warn(
            f"the file also holds tensors at {listed(left_out)}; the KAN ALONE is exported. If "
            "they belong to one network, give it with --model package.module:factory"
        )
    note_activation(stack, activation, report)
    return kan


def note_activation(stack: Stack, activation: str | None, report: Report) -> None:
    """Note the base activation that is taken where the file does not tell it."""
    if any(layer.activation is None for layer in stack.layers.values()):
        name = DEFAULT_ACTIVATION if activation is None else activation
        report.activation = ChosenActivation(name, assumed=activation is None)
