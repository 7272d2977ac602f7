"""A checkpoint file, read without running anything in it, to a validated KAN.

This module never unpickles objects, unless it is told to trust the file: `torch.load` runs with
`weights_only=True`, and what a pickle names beside tensors is answered by inert stand-ins
(pickles.py). What the names mean is stacks.py's, what the tensors mean state_dict.py's.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kan_model import pickles
from kan_model.activations import resolve_activation
from kan_model.errors import ActivationError, CheckpointError
from kan_model.model import KAN
from kan_model.stacks import RESAVE, Stack, StateDict, choose_stack, listed
from kan_model.state_dict import build_network

Format = Literal["torch", "safetensors"]

_DEEPEST = 32  # dicts within dicts
_MAPPED = 2**28  # bytes; larger files are mapped into memory, not copied
_TRUST = (
    "if you trust whoever made the file as you trust a program, --trust-pickle opens it and runs "
    "that code"
)


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        path: The file.
        size: Its bytes.
        format: How it is written.
        states: Its state dicts, or what amounts to one, in the order found.
        module: The module it holds, made by its own code; only ever set when that was trusted.
    """

    path: Path
    size: int
    format: Format
    states: tuple[StateDict, ...]
    module: nn.Module | None = None

    def find_kan(self, prefix: str | None = None) -> Stack:
        """Find the KAN in the file.

        Args:
            prefix: The one to take, where there are several or more than a KAN.

        Raises:
            CheckpointError: There is none, there are several, or it is part of a larger network.
        """
        try:
            stack = choose_stack(self.states, prefix)
            for layer in stack.layers.values():
                for name, tensor in layer.tensors.items():
                    check_storage(layer.stem + name, tensor, self.size)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        return stack


def load_checkpoint(
    path: Path,
    base_activation: Callable[[], nn.Module] | None = None,
    *,
    prefix: str | None = None,
) -> KAN:
    """Read a trained efficient-KAN into a network.

    Args:
        path: A state dict, a trainer's checkpoint or a whole module, written by `torch.save`, or a
            safetensors file.
        base_activation: Makes the activation of the base path, where the file does not tell it;
            SiLU if None.
        prefix: The KAN to take, where the file holds several or more than a KAN.

    Returns:
        The network in evaluation mode, in the widest dtype found in the file, at least float32.

    Raises:
        CheckpointError: The file cannot be read, holds no KAN or several, belongs to another family
            of networks, or holds tensors that are missing, misshapen, not finite, or knots that do
            not rise.
        ActivationError: The file tells another activation.
    """
    return build_kan(read_checkpoint(path), base_activation, prefix)


def build_kan(
    checkpoint: Checkpoint, base_activation: Callable[[], nn.Module] | None, prefix: str | None
) -> KAN:
    """Do what `load_checkpoint` does, with a file that has been read."""
    stack = checkpoint.find_kan(prefix)
    try:
        return build_network(stack, base_activation)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    except ActivationError as error:
        raise ActivationError(f"{checkpoint.path}: {error}") from error


def read_checkpoint(path: Path, *, trust_pickle: bool = False) -> Checkpoint:
    """Read a file's tensors and their names.

    Args:
        path: The file.
        trust_pickle: Run the code in the file. Only for files from people whose programs you run.

    Raises:
        CheckpointError: The file cannot be read, holds no tensors, or would have to run code.
    """
    size, head = _measure(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return Checkpoint(path, size, "safetensors", (_read_safetensors(path),))
    content = _unpickle_trusted(path) if trust_pickle else _unpickle_inert(path, size, head)
    try:
        states = tuple(_find_states(content, ""))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not states:
        raise CheckpointError(f"{path}: {_explain_no_tensors(content)}; {RESAVE}")
    module = content if isinstance(content, nn.Module) else None
    return Checkpoint(path, size, "torch", states, module)


def check_storage(name: str, tensor: Tensor, file_size: int) -> None:
    """Refuse a tensor that cannot be worked with, before anything looks at its shape or values.

    Raises:
        CheckpointError: Names the tensor.
    """
    where = listed([name])
    kinds = {
        "nested": tensor.is_nested,
        "quantized": tensor.is_quantized,
        "valueless": tensor.is_meta,
        "sparse": tensor.layout is not torch.strided,
    }
    for kind, found in kinds.items():
        if found:
            raise CheckpointError(f"{where}: expected a dense tensor, found a {kind} one")
    # A stride of zero lets a file of a few bytes claim any size.
    claimed = tensor.numel() * tensor.element_size()
    if claimed > 64 * file_size + 2**26:
        raise CheckpointError(
            f"{where}: shape {tuple(tensor.shape)} is {claimed} bytes, the file has {file_size}; "
            f"{RESAVE}"
        )


def _measure(path: Path) -> tuple[int, bytes]:
    """Take a file's size and its first bytes."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            kind = "a folder" if path.is_dir() else "something else"
            raise CheckpointError(f"{path}: expected a checkpoint file, found {kind}")
        with path.open("rb") as file:
            head = file.read(16)
            size = file.seek(0, os.SEEK_END)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty; copy or save it again")
    return size, head


def _read_safetensors(path: Path) -> StateDict:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            told = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: is not a whole safetensors file: {str(error).partition(chr(10))[0]}; copy or "
            "save it again"
        ) from error
    if not tensors:
        raise CheckpointError(f"{path}: the file holds no tensors; save it again")
    name = told.get("base_activation", told.get("activation"))
    if name is None:
        return StateDict("", tensors)
    activation = _activation_from_metadata(path, name)
    stems = [k.removesuffix("base_weight") for k in tensors if k.endswith("base_weight")]
    return StateDict("", tensors, {stem.removesuffix("."): activation() for stem in stems})


def _activation_from_metadata(path: Path, name: str) -> Callable[[], nn.Module]:
    """Find an activation named in a file, which may not make us import what it likes."""
    if ":" in name and not name.startswith("torch.nn:"):
        raise CheckpointError(
            f"{path}: its metadata names the base activation {name!r}, and only torch.nn's are "
            "taken from a file; name it with --activation and take it out of the metadata"
        )
    try:
        return resolve_activation(name)
    except ActivationError as error:
        raise CheckpointError(f"{path}: in its metadata: {error}") from error


def _unpickle_inert(path: Path, size: int, head: bytes) -> Any:
    """Load a file of torch.save's with stand-ins for every class it names."""
    foreign: set[str] = set()
    with suppress(Exception):  # a damaged file or an older format; the next step says which
        foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    mapped = size > _MAPPED and head[:2] == b"PK"
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals(pickles.stand_ins(foreign)),
        ):
            warnings.simplefilter("ignore")  # the message below is the one that helps
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickles.RefusedCall as error:
        raise CheckpointError(
            f"{path}: calls {error} when it is loaded, so it is not opened; {RESAVE}; {_TRUST}"
        ) from error
    except Exception as error:  # damaged files make the parser fail in any way there is
        raise CheckpointError(f"{path}: {_explain_unreadable(head, foreign)}") from error


def _unpickle_trusted(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # the file's own code may fail in any way
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{path}: its own code failed: {line}; run the export where the classes it needs can "
            "be imported"
        ) from error


def _explain_unreadable(head: bytes, foreign: set[str]) -> str:
    """Say why `torch.load` refused a file, without its traceback or its advice to trust it."""
    if foreign:
        return (
            f"holds pickled objects ({listed(sorted(foreign))}) that would run code when loaded, "
            f"so it is not opened; {RESAVE}; {_TRUST}"
        )
    if head.startswith(b"\x89HDF"):
        return (
            "is an HDF5 file, as Keras writes its weights; Keras ports of KAN cannot be exported: "
            "export it from its own project"
        )
    if head[:2] == b"PK":
        return (
            "is damaged, truncated, or an archive that torch.save did not write (TorchScript, "
            f".pt2, .keras and .npz files are others); {RESAVE}"
        )
    return f"is not a checkpoint written by torch.save, or is truncated; {RESAVE}"


def _find_states(content: Any, place: str, depth: int = 0) -> Iterator[StateDict]:
    """Find every state dict in what a file holds, from the outside in."""
    if depth > _DEEPEST:
        raise CheckpointError(f"{place}: nested more than {_DEEPEST} deep; {RESAVE}")
    if isinstance(content, pickles.Record):
        if pickles.is_module(content):
            yield _state_of_record(content, place)
    elif isinstance(content, nn.Module):  # only where the pickle was trusted
        yield StateDict(place, content.state_dict())
    elif isinstance(content, Mapping):
        tensors = {
            key: value
            for key, value in content.items()
            if isinstance(key, str) and isinstance(value, Tensor)
        }
        if tensors:
            yield StateDict(place, tensors)
        for key, value in content.items():
            yield from _find_states(value, f"{place}{key}.", depth + 1)
    elif isinstance(content, list | tuple):
        for i, value in enumerate(content):
            yield from _find_states(value, f"{place}{i}.", depth + 1)


def _state_of_record(record: pickles.Record, place: str) -> StateDict:
    hooked = pickles.hooked(record)
    if hooked:
        raise CheckpointError(
            f"the pickled module has hooks at {listed(hooked)}, which change what it computes and "
            f"are not run from the file; remove them where it was trained and {RESAVE}"
        )
    return StateDict(
        place,
        pickles.tensors_of(record),
        pickles.activations_of(record),
        {name: module.class_name for name, module in pickles.walk(record)},
    )


def _explain_no_tensors(content: Any) -> str:
    if isinstance(content, Mapping) and not content:
        return "the state dict is empty"
    kind = content.class_name if isinstance(content, pickles.Record) else type(content).__name__
    return f"expected a state dict (names to tensors), found a {kind} without any"
