"""The two ways in: a checkpoint's file, and a network that is in memory.

What was asked for is checked before anything is read, as a file may take minutes.
"""

import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from export.building import read_network
from export.conversion.onnx_graph import DEFAULT_OPSET
from export.errors import InputError
from export.inputs import Samples, Shapes, read_inputs
from export.network import copy_module
from export.options import TorchScript, check_options
from export.pipeline import size_of, write_bundle
from export.report import Report
from kan_bundle.integrity import record_file
from kan_bundle.manifest import Manifest, Precision, Source
from kan_model.checkpoint import require_file


def export_checkpoint(
    checkpoint: Path | str,
    *,
    output: Path | str = "models",
    name: str | None = None,
    version: int | None = None,
    activation: str | None = None,
    prefix: str | None = None,
    model: str | Callable[[], nn.Module] | None = None,
    input_shape: Shapes | None = None,
    samples: Samples | None = None,
    trust_pickle: bool = False,
    opset: int = DEFAULT_OPSET,
    precision: Precision = "fp32",
    prune: float | None = None,
    inline: bool = False,
    benchmark: bool = False,
    torchscript: TorchScript = "auto",
    sign_key: Path | str | None = None,
    sign_password: str | None = None,
    force: bool = False,
    report: Report | None = None,
) -> Manifest:
    """Turn a checkpoint into a verified bundle, as `python -m export` does.

    Args:
        checkpoint: The file: a state dict, a trainer's checkpoint, a whole module, or safetensors.
        output: The model repository.
        name: Model name; None takes the file's stem.
        version: Model version; None takes the next free one.
        activation: Base activation, where the file does not tell it; None assumes
            `DEFAULT_ACTIVATION` and warns.
        prefix: The KAN to take, where the file holds several or more than a KAN.
        model: `package.module:factory`, or the function itself, which builds the network that the
            weights belong to. None for a KAN.
        input_shape: Sizes of one row of each input, as `read_inputs` takes them.
        samples: Rows of real data, as `read_inputs` takes them.
        trust_pickle: Run the code in the file. Only for files from people whose programs you run.
        opset: Version of ONNX's standard operators to write.
        precision: Of the KAN layers' weights and products; below float32 an approximation, which
            has its own tolerance (`export.conversion.precision`).
        prune: Leave out the KAN layers' edges whose importance is at most this share of the largest
            in their layer (`export.sparsity`); what is written is then another function, and is
            compared with that. None leaves out none.
        inline: Write KANLinear layers as standard operators alone, for runtimes that do not know
            model-local functions.
        benchmark: Time every runtime at several batch sizes, for the report.
        torchscript: `on` demands a TorchScript file, `off` leaves it out, `auto` writes it unless
            only TorchScript fails, and then warns with the reason.
        sign_key: PEM file of the private key to sign the bundle with; None leaves it unsigned.
        sign_password: What that file is encrypted with, if it is.
        force: Whether an existing version may be replaced.
        report: Is told each stage, the measurements and the warnings; None only warns.

    Returns:
        The manifest of the bundle, which lies in OUTPUT/NAME/VERSION.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ActivationError: The base activation cannot be had, or contradicts the file.
        InputError: What the network takes is not known, or does not fit it.
        NetworkError: The network cannot be built, or its weights do not fit it.
        LayoutError: The name cannot be used or the version exists.
        ConversionError: A file could not be written as asked for, or not be run.
        ParityError: A file does not compute what the checkpoint computes.
        SigningError: The key cannot be used.
        OSError: Something could not be written.
    """
    path = Path(checkpoint)
    report = report or Report.silent()
    require_file(path)  # the stem of a folder may be no name
    options = check_options(
        path.stem if name is None else name,
        output=output,
        version=version,
        opset=opset,
        precision=precision,
        prune=prune,
        inline=inline,
        benchmark=benchmark,
        torchscript=torchscript,
        sign_key=sign_key,
        sign_password=sign_password,
        force=force,
    )
    inputs = read_inputs(input_shape, samples)
    with report.stage("read the checkpoint", size_of(path)) as advance:
        module = read_network(
            path,
            activation=activation,
            prefix=prefix,
            model=model,
            trust_pickle=trust_pickle,
            report=report,
        )
        file = os.fsencode(path.name).decode(errors="replace")
        source = Source(file, record_file(path, advance).sha256)
    return write_bundle(module, inputs, options, source, report)


def export_module(
    module: nn.Module,
    *,
    name: str,
    output: Path | str = "models",
    version: int | None = None,
    input_shape: Shapes | None = None,
    samples: Samples | None = None,
    opset: int = DEFAULT_OPSET,
    precision: Precision = "fp32",
    prune: float | None = None,
    inline: bool = False,
    benchmark: bool = False,
    torchscript: TorchScript = "auto",
    sign_key: Path | str | None = None,
    sign_password: str | None = None,
    force: bool = False,
    report: Report | None = None,
) -> Manifest:
    """Turn a network that is in memory into a verified bundle.

    Args:
        module: A KAN, or any network with or without KANLinear layers, ours or another project's.
            It is copied, and not changed.
        name: Model name.
        output: As in `export_checkpoint`, as every argument below.
        version: As above.
        input_shape: As above. A KAN needs none.
        samples: As above.
        opset: As above.
        precision: As above.
        prune: As above.
        inline: As above.
        benchmark: As above.
        torchscript: As above.
        sign_key: As above.
        sign_password: As above.
        force: As above.
        report: As above.

    Returns:
        The manifest of the bundle, which lies in OUTPUT/NAME/VERSION.

    Raises:
        InputError: What the network takes is not known, or does not fit it.
        NetworkError: The network cannot be exported as it is.
        LayoutError: The name cannot be used or the version exists.
        ConversionError: A file could not be written as asked for, or not be run.
        ParityError: A file does not compute what the network computes.
        SigningError: The key cannot be used.
        OSError: Something could not be written.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"module: expected a torch.nn.Module, found {type(module).__name__}")
    options = check_options(
        name,
        output=output,
        version=version,
        opset=opset,
        precision=precision,
        prune=prune,
        inline=inline,
        benchmark=benchmark,
        torchscript=torchscript,
        sign_key=sign_key,
        sign_password=sign_password,
        force=force,
    )
    inputs = read_inputs(input_shape, samples)
    own = copy_module(module).cpu().eval()
    return write_bundle(own, inputs, options, None, report or Report.silent())
