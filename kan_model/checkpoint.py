"""A checkpoint file, read without running anything in it, to a validated KAN.

This module never unpickles objects: `torch.load` runs with `weights_only=True` and no additions to
its allow-list. What the tensors mean is state_dict.py's.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kan_model.errors import CheckpointError
from kan_model.model import KAN
from kan_model.state_dict import RESAVE, build_network, listed

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")


def load_checkpoint(path: Path, base_activation: Callable[[], nn.Module] = nn.SiLU) -> KAN:
    """Read a plain efficient-KAN state dict into a network.

    Args:
        path: A file written by `torch.save(model.state_dict(), path)`.
        base_activation: Makes the activation of the base path; a state dict does not say which.

    Returns:
        The network in evaluation mode, in the widest dtype found in the file, at least float32.

    Raises:
        CheckpointError: The file cannot be read, is not a state dict, belongs to another family of
            networks, or holds tensors that are missing, misshapen, not finite, or knots that do
            not rise.
    """
    state = read_state_dict(path)
    try:
        return build_network(state, base_activation)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a file that maps names to tensors, and run nothing in it.

    Raises:
        CheckpointError: The file cannot be read or is something else.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            kind = "a folder" if path.is_dir() else "something else"
            raise CheckpointError(f"{path}: expected a checkpoint file, found {kind}")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty; copy or save it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the message below is the one that helps
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the parser fail in any way there is
        raise CheckpointError(f"{path}: {_explain_unreadable(path)}") from error
    return _as_state_dict(path, content, size)


def _explain_unreadable(path: Path) -> str:
    """Say why `torch.load` refused a file, without its traceback or its advice to trust it."""
    try:
        foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not even the list of names can be read
        foreign = []
    classes = {name.rpartition(".")[2] for name in foreign}
    if classes & {"KAN", "KANLinear"}:
        return (
            f"holds a whole pickled module ({', '.join(foreign)}), which only its own code can "
            f"open, so it is not opened; {RESAVE}"
        )
    if foreign:
        return (
            f"holds pickled objects ({', '.join(foreign)}) that would run code when loaded, so it "
            f"is not opened; {RESAVE}"
        )
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"PK":
        return (
            "is damaged, truncated, or an archive that torch.save did not write (TorchScript "
            f"and .pt2 files hold programs, not checkpoints); {RESAVE}"
        )
    return f"is not a checkpoint written by torch.save, or is truncated; {RESAVE}"


def _as_state_dict(path: Path, content: Any, file_size: int) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: expected a state dict (names to tensors), found a "
            f"{type(content).__name__}; {RESAVE}"
        )
    if not content:
        raise CheckpointError(f"{path}: the state dict is empty; {RESAVE}")
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            raise CheckpointError(
                f"{path}: is a training checkpoint with the weights under {wrapper!r}; take them "
                f"out: torch.save(torch.load({path.name!r})[{wrapper!r}], 'weights.pt')"
            )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: expected names to tensors, found {key!r}: {type(value).__name__}; "
                f"{RESAVE}"
            )
        _check_storage(path, key, value, file_size)
    return dict(content)


def _check_storage(path: Path, key: str, tensor: Tensor, file_size: int) -> None:
    """Refuse a tensor that cannot be worked with, before anything looks at its shape or values."""
    where = f"{path}: {listed([key])}"
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
