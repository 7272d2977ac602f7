"""A checkpoint file, read without running anything in it, to a validated KAN.

This module never unpickles objects, unless it is told to trust the file: `torch.load` runs with
`weights_only=True`, and what a pickle names beside tensors is answered by inert stand-ins
(pickles.py). What the names mean is stacks.py's, what the tensors mean state_dict.py's.
"""

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal
from zipfile import ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kan_model import pickles
from kan_model.activations import named_in_file
from kan_model.archives import (
    LARGEST_PICKLE,
    UnreadableArchive,
    check_safetensors,
    read_archive,
)
from kan_model.canonical import canonical_state
from kan_model.contents import explain_no_tensors, find_modules, find_states, refuse_nested
from kan_model.errors import ActivationError, CheckpointError
from kan_model.model import KAN
from kan_model.pickle_scan import Findings, scan_archive, scan_legacy
from kan_model.pickle_values import TorchRefuses
from kan_model.stacks import (
    RESAVE,
    Stack,
    StateDict,
    choose_stack,
    clean_name,
    listed,
    with_dot,
)
from kan_model.state_dict import build_network

Format = Literal["torch", "safetensors"]

_OLD_FORMAT = re.compile(rb"\x80[\x02\x03]\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.")  # its magic number
_GLOBALS_LOCK = threading.Lock()
_MAPPED = 2**28  # bytes; larger files are mapped into memory, not copied
_TRUST = (
    "if you trust whoever made the file as you trust a program, --trust-pickle opens it and runs "
    "that code"
)

_NOT_TORCH = (
    "only networks of PyTorch can be exported: copy its weights into one (kan_model.KAN has "
    "efficient-KAN's layers) and save torch.save(network.state_dict(), 'model.pt'); Keras writes "
    "ONNX itself, without this proof"
)


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        path: The file.
        size: Its bytes.
        format: How it is written.
        states: Its state dicts, or what amounts to one, in the order found.
        modules: The modules it holds, made by its own code, by place as in `StateDict`; there are
            some only when that code was trusted.
    """

    path: Path
    size: int
    format: Format
    states: tuple[StateDict, ...]
    modules: Mapping[str, nn.Module] = field(default_factory=dict)

    @cached_property
    def canonical_states(self) -> tuple[StateDict, ...]:
        """Its state dicts with the names and shapes that efficient-KAN gives its layers."""
        return tuple(canonical_state(state, _Total(self.size).add) for state in self.states)

    def find_module(self, prefix: str | None = None) -> nn.Module | None:
        """Find the module that was made by the file's own code.

        Args:
            prefix: The place of the one to take; the only one if None.
        """
        if prefix is not None:
            return self.modules.get(with_dot(prefix))
        return next(iter(self.modules.values())) if len(self.modules) == 1 else None

    def find_kan(self, prefix: str | None = None) -> Stack:
        """Find the KAN in the file.

        Args:
            prefix: The one to take, where there are several or more than a KAN.

        Raises:
            CheckpointError: There is none, there are several, or it is part of a larger network.
        """
        with self._named():
            return choose_stack(self.canonical_states, prefix)

    def build_kan(self, stack: Stack, base_activation: Callable[[], nn.Module] | None) -> KAN:
        """Build the network of a stack of this file; see `load_checkpoint`."""
        with self._named():
            self.check_storages(stack)
            return build_network(stack, base_activation)

    def check_storages(self, stack: Stack) -> None:
        """Refuse tensors that cannot be worked with.

        Raises:
            CheckpointError: Names the tensor.
        """
        total = _Total(self.size)
        for layer in stack.layers.values():
            for name, tensor in layer.tensors.items():
                total.add(layer.stem + name, tensor)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say in every error which file it is about."""
        try:
            yield
        except (CheckpointError, ActivationError) as error:
            raise type(error)(f"{self.path}: {error}") from error


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
    checkpoint = read_checkpoint(path)
    return checkpoint.build_kan(checkpoint.find_kan(prefix), base_activation)


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
        states = tuple(find_states(content))
        refuse_nested(states)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not states:
        raise CheckpointError(f"{path}: {explain_no_tensors(content)}; {RESAVE}")
    return Checkpoint(path, size, "torch", states, find_modules(content))


class _Total:
    """Bytes that tensors claim together.

    Args:
        file_size: Bytes of the file.
    """

    def __init__(self, file_size: int) -> None:
        self._file_size = file_size
        self._claimed = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor that can be worked with.

        Raises:
            CheckpointError: As `check_storage`; or all of them claim more than the file can hold.
        """
        check_storage(name, tensor, self._file_size)
        self._claimed += tensor.numel() * tensor.element_size()
        if self._claimed > _most_claimed(self._file_size):
            raise CheckpointError(
                f"{listed([name])}: tensors up to this one claim {self._claimed} bytes, the file "
                f"has {self._file_size}; {RESAVE}"
            )


def _most_claimed(file_size: int) -> int:
    """Bytes that tensors of a file may have: one row of knots may stand for many."""
    return 4 * file_size + 2**24


def check_storage(name: str, tensor: Tensor, file_size: int) -> None:
    """Refuse a tensor that cannot be worked with, before anything looks at its shape or values.

    Raises:
        CheckpointError: Names the tensor.
    """
    where = listed([name])
    kinds = {
        "quantized": tensor.is_quantized,
        "valueless": tensor.is_meta,
        "sparse": tensor.layout is not torch.strided,
    }
    for kind, found in kinds.items():
        if found:
            raise CheckpointError(f"{where}: expected a dense tensor, found a {kind} one")
    # A stride of zero lets a file of a few bytes claim any size.
    claimed = tensor.numel() * tensor.element_size()
    if claimed > _most_claimed(file_size):
        raise CheckpointError(
            f"{where}: shape {tuple(tensor.shape)} is {claimed} bytes, the file has {file_size}; "
            f"{RESAVE}"
        )


def require_file(path: Path) -> None:
    """Let a path pass if what is there, if anything is, can be read as a file.

    Raises:
        CheckpointError: It is a folder, or something that would be waited for, as a pipe.
    """
    with suppress(OSError):  # reading it says what is wrong
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "something else"
            raise CheckpointError(f"{path}: expected a checkpoint file, found {kind}")


def _measure(path: Path) -> tuple[int, bytes]:
    """Take a file's size and its first bytes."""
    require_file(path)
    try:
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
        check_safetensors(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
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
    tensors = {clean_name(key): tensor for key, tensor in tensors.items()}
    name = told.get("base_activation", told.get("activation"))
    if name is None:
        return StateDict("", tensors)
    stems = [k.removesuffix("base_weight") for k in tensors if k.endswith("base_weight")]
    return StateDict("", tensors, {stem.removesuffix("."): named_in_file(name) for stem in stems})


def _unpickle_inert(path: Path, size: int, head: bytes) -> Any:
    """Load a file of torch.save's with stand-ins for every class it names."""
    foreign: set[str] = set()
    findings = Findings()
    try:
        if head[:2] == b"PK":
            archive = read_archive(path, size)
            # An opcode that torch refuses is reported below.
            with suppress(Exception), _only_default_globals():
                foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            findings = scan_archive(archive, foreign, size)
            del archive
        elif _OLD_FORMAT.match(head):
            with path.open("rb") as file:
                scan_legacy(file.read(LARGEST_PICKLE), size)
        else:
            raise CheckpointError(_explain_pickle(path, head, foreign))
    except UnreadableArchive as error:
        raise CheckpointError(f"{path}: {_explain_unreadable(path, head)}") from error
    except TorchRefuses as error:
        raise CheckpointError(f"{path}: {_explain_pickle(path, head, foreign)}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    allowed = pickles.stand_ins(foreign, findings.mappings, findings.lists)
    try:
        with (
            warnings.catch_warnings(),
            _only_default_globals(),
            torch.serialization.safe_globals(allowed),
        ):
            warnings.simplefilter("ignore")  # the message below is the one that helps
            mapped = size > _MAPPED and head[:2] == b"PK"
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickles.RefusedCall as error:
        raise CheckpointError(
            f"{path}: calls {error} when it is loaded, so it is not opened; {RESAVE}; {_TRUST}"
        ) from error
    except UnpicklingError as error:
        raise CheckpointError(f"{path}: {_explain_pickle(path, head, foreign)}") from error
    except Exception as error:  # damaged files make the parser fail in any way there is
        raise CheckpointError(f"{path}: {_explain_unreadable(path, head)}") from error


@contextmanager
def _only_default_globals() -> Iterator[None]:
    """Set aside the classes that other code has allowed torch to load, and restore them.

    torch keeps one list per process. Reads of checkpoints take turns, and additions by other
    threads are kept; a `torch.load` in another thread misses its own additions meanwhile.
    """
    with _GLOBALS_LOCK:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            yield
        finally:
            torch.serialization.add_safe_globals(before)


def _unpickle_trusted(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=False)
    except (Exception, SystemExit) as error:  # the file's own code may fail in any way
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{path}: its own code failed: {line}; run the export where the classes it needs can "
            "be imported"
        ) from error


def _explain_pickle(path: Path, head: bytes, foreign: set[str]) -> str:
    """Say why torch's restricted reader refused a pickle, without its advice to trust it."""
    if foreign:
        return (
            f"holds pickled objects ({listed(sorted(foreign))}) that cannot be read without "
            f"running code, so it is not opened; {RESAVE}; {_TRUST}"
        )
    if _OLD_FORMAT.match(head):
        return (
            "holds more than tensors in torch's format from before 1.6, so it is not opened; "
            f"{RESAVE}"
        )
    if head[:2] == b"PK":
        return (
            "is pickled with another protocol than torch.save's own (pickle_protocol=2), or is "
            f"damaged; {RESAVE}"
        )
    if head[:1] == b"\x80":
        return f"is a pickle that torch.save did not write; {RESAVE}"
    return _explain_unreadable(path, head)


def _explain_unreadable(path: Path, head: bytes) -> str:
    """Say what a file seems to be that torch cannot read at all."""
    if head.startswith(b"\x89HDF"):
        return f"is an HDF5 file, as Keras writes its weights; {_NOT_TORCH}"
    if head[:2] == b"PK":
        with suppress(Exception), ZipFile(path) as archive:
            if "config.json" in archive.namelist():
                return f"is a Keras model; {_NOT_TORCH}"
        return (
            "is damaged, truncated, or an archive that torch.save did not write (TorchScript, "
            f".pt2 and .npz files are others); {RESAVE}"
        )
    return f"is not a checkpoint written by torch.save, or is truncated; {RESAVE}"
