"""What a network takes: names, types and shapes of its inputs, from flags or from sample files.

This module knows no network: whether the shapes fit is found out by running it.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
from numpy.typing import NDArray

from export.errors import InputError, cause
from kan_bundle.manifest import DATATYPES, TensorSpec
from kan_model.archives import find_directory

DEFAULT_INPUT = "input"

WHOLE_NUMBERS = ("INT64", "INT32", "UINT8")
"""Datatypes of inputs of which a network may accept a range."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_SHAPE = re.compile(
    r"(?:(?P<name>[^=:]*)(?::(?P<datatype>[A-Za-z0-9]+))?=)?"
    r"(?P<batch>(?:batch|-1|N|\?)\s*(?:[,x]\s*|$))?(?P<dims>\d{1,10}(?:\s*[,x]\s*\d{1,10}){0,30})?"
)
Shapes = str | int | Sequence[str] | Sequence[int] | Mapping[str, Sequence[int] | int]
Samples = str | Path | Sequence[str | Path] | NDArray[Any] | Mapping[str, NDArray[Any]]

_LARGEST = 2**31  # elements of one row
_MOST_ARRAYS = 1000  # in a file
_MOST_INFLATED, _SLACK = 64, 2**26  # times the file's bytes, and so many bytes


@dataclass(frozen=True)
class Inputs:
    """The inputs of a network.

    Attributes:
        specs: Name, type and shape of each, the batch first.
        samples: Rows of real data for each, in the same order; None if there are none.
    """

    specs: tuple[TensorSpec, ...]
    samples: tuple[NDArray[Any], ...] | None = None


def parse_shape(text: str) -> TensorSpec:
    """Read `3,224,224`, `image=3,224,224` or `tokens:INT64=128`; the batch is not in it.

    `t:INT64=` without sizes is one number a row, of shape (batch,).

    Raises:
        InputError: It reads otherwise.
    """
    match = _SHAPE.fullmatch(text.strip())
    if match is None or not any(match.group("name", "batch", "dims")):
        raise InputError(
            f"input shape {text!r}: expected the sizes of one row, without the batch, as in "
            "3,224,224 or image=3,224,224 or tokens:INT64=128; NAME= is one number a row"
        )
    name = DEFAULT_INPUT if match["name"] is None else check_name(match["name"].strip())
    datatype = (match["datatype"] or "FP32").upper()
    if datatype not in DATATYPES:
        raise InputError(
            f"input shape {text!r}: expected a type of {', '.join(DATATYPES)}, found {datatype}"
        )
    dims = tuple(int(size) for size in re.findall(r"\d+", match["dims"] or ""))
    if 0 in dims or np.prod(dims, dtype=object) > _LARGEST:
        raise InputError(f"input shape {text!r}: expected sizes of 1 to {_LARGEST} elements in all")
    return TensorSpec(name, datatype, (-1, *dims))


def check_name(name: str) -> str:
    """Return `name` if a tensor can have it.

    Raises:
        InputError: It cannot.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"tensor name {name!r}: expected a letter or '_', then letters, digits or '_', at most "
            "64 in all"
        )
    return name


def read_inputs(input_shape: Shapes | None, samples: Samples | None) -> Inputs | None:
    """Bring what is said about a network's inputs together.

    Args:
        input_shape: Sizes of one row, as `3,224,224` or (3, 224, 224); for several inputs, in the
            network's order, `["image=3,224,224", "age=1"]` or {"image": (3, 224, 224), "age": [1]};
            {"t:INT64": ()} is one whole number a row.
        samples: Rows of data: an .npy file or an array; for several inputs an .npz file,
            `["image=x.npy", "age=y.npy"]` or {"image": x, "age": y}.

    Returns:
        None if nothing is said.

    Raises:
        InputError: Something cannot be read, or contradicts the rest.
    """
    arrays: dict[str | None, NDArray[Any]] = {}
    for name, array in read_arrays(samples, "samples"):
        if name in arrays:
            raise InputError(
                f"samples: found rows for {name or 'an input without a name'} twice; give every "
                "input once, as NAME=FILE"
            )
        arrays[name] = array
    return _join(list(_parse_shapes(input_shape)), arrays)


def _parse_shapes(given: Shapes | None) -> Iterator[TensorSpec]:
    if given is None:
        return
    if isinstance(given, str | int):
        yield parse_shape(str(given))
    elif isinstance(given, Mapping):
        for name, sizes in given.items():
            sizes = [sizes] if isinstance(sizes, int) else sizes
            yield parse_shape(f"{name}={','.join(str(size) for size in sizes)}")
    elif any(isinstance(part, str) for part in given):
        for part in given:
            yield parse_shape(str(part))
    elif given:
        yield parse_shape(",".join(str(size) for size in given))


def read_arrays(given: Samples | None, what: str) -> Iterator[tuple[str | None, NDArray[Any]]]:
    """Read arrays by name: of inputs, or of outputs; the name of a lone one may be None.

    Args:
        given: As `read_inputs` takes samples.
        what: They are, for messages.

    Raises:
        InputError: One cannot be read.
    """
    if given is None:
        return
    if isinstance(given, Mapping):
        for name, array in given.items():
            yield check_name(str(name)), _as_array(array, f"{what} {name}")
    elif hasattr(given, "__array__"):  # also a tensor of torch's
        yield None, _as_array(given, what)
    elif isinstance(given, str | Path):
        yield from _read_file(str(given), what)
    else:
        for part in given:
            if not isinstance(part, str | Path):
                raise InputError(
                    f"{what}: expected files, an array, or arrays by name, found a list with a "
                    f"{type(part).__name__}"
                )
            yield from _read_file(str(part), what)


def _as_array(value: Any, what: str) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except Exception as error:  # a tensor may be on a device, or have a gradient
        raise InputError(
            f"{what}: expected an array, found a {type(value).__name__} that makes none: "
            f"{cause(error)}; of a tensor give tensor.detach().cpu().numpy()"
        ) from error


def split_name(text: str) -> tuple[str, str]:
    """Split NAME=FILE; the name is empty where there is none, or a file is called all of it."""
    name, equals, place = text.partition("=")
    return ("", text) if not equals or Path(text).exists() else (name, place)


def _read_file(text: str, what: str) -> Iterator[tuple[str | None, NDArray[Any]]]:
    """Read `x.npy`, `image=x.npy`, or an .npz file with one array for each input."""
    name, place = split_name(text)
    try:
        with Path(place).open("rb") as file:
            _require_modest(file, f"{what} {place!r}")
            content = np.load(file, allow_pickle=False)
            arrays = dict(content) if isinstance(content, np.lib.npyio.NpzFile) else None
    except OSError as error:
        raise InputError(
            f"{what} {place!r}: cannot be read: {error.strerror or error}; check the path"
        ) from error
    except InputError:
        raise
    except Exception as error:  # a damaged file makes the parser fail in any way there is
        remedy = "save it again"
        if place.lower().endswith((".csv", ".txt", ".tsv")):
            remedy = "save its numbers: numpy.save('x.npy', numpy.loadtxt('x.csv', delimiter=','))"
        raise InputError(
            f"{what} {place!r}: is not an array saved by numpy.save, or is damaged; {remedy}"
        ) from error
    if arrays is None:
        yield (check_name(name) if name else None), content
    else:
        for key, array in arrays.items():
            yield check_name(key), array


def _require_modest(file: BufferedReader, where: str) -> None:
    """Refuse an .npz file that inflates to far more than it is, or holds arrays without end.

    Raises:
        InputError: It does.
        BadZipFile: It is damaged.
    """
    size = os.fstat(file.fileno()).st_size
    if file.peek(2)[:2] != b"PK":
        return
    find_directory(file, size)
    entries = ZipFile(file).infolist()
    claimed = sum(entry.file_size for entry in entries)
    most = _MOST_INFLATED * size + _SLACK
    if len(entries) > _MOST_ARRAYS or claimed > most:
        raise InputError(
            f"{where}: holds {len(entries):,} arrays of {claimed:,} bytes in a file of {size:,}, "
            f"expected at most {_MOST_ARRAYS:,} arrays of {most:,}; save them with numpy.savez"
        )
    if any(entry.compress_type not in (ZIP_STORED, ZIP_DEFLATED) for entry in entries):
        raise InputError(f"{where}: is compressed in a way that numpy does not; use numpy.savez")
    file.seek(0)


def _join(
    shapes: Sequence[TensorSpec], samples: Mapping[str | None, NDArray[Any]]
) -> Inputs | None:
    """Bring the shapes asked for and the samples together.

    Args:
        shapes: From flags, in the network's order.
        samples: Rows by input name.

    Returns:
        The inputs; None if nothing is said about them.

    Raises:
        InputError: They contradict each other.
    """
    names = [spec.name for spec in shapes]
    if len(set(names)) != len(names):
        raise InputError(
            f"input shapes: expected a name of its own for each, found {', '.join(names)}; write "
            "NAME=SIZES"
        )
    if not samples:
        return Inputs(tuple(shapes)) if shapes else None
    if len(samples) == 1 and None in samples:  # a lone file belongs to the lone input
        samples = {names[0] if len(names) == 1 else DEFAULT_INPUT: samples[None]}
    if None in samples or (names and set(names) != set(samples)):
        raise InputError(
            f"samples: expected arrays for the inputs {', '.join(names) or 'by name'}, found "
            f"{', '.join(str(name) for name in samples)}; write NAME=FILE"
        )
    order = names or [str(name) for name in samples]
    arrays = {name: _as_input(name, samples[name]) for name in order}
    specs = tuple(
        TensorSpec(name, _datatype(array), (-1, *array.shape[1:]))  # type: ignore[arg-type]
        for name, array in arrays.items()
    )
    for asked, found in zip(shapes, specs, strict=False):
        if asked != found:
            raise InputError(
                f"samples {found.name}: expected {asked.datatype} of shape "
                f"{shown(asked.shape)}, found {found.datatype} of {shown(found.shape)}"
            )
    rows = {name: len(array) for name, array in arrays.items()}
    if len(set(rows.values())) > 1:
        raise InputError(
            f"samples: expected as many rows for every input, found {rows}; {_for_rows(arrays)}"
        )
    return Inputs(specs, tuple(arrays.values()))


def _for_rows(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Say what to do about inputs with other numbers of rows than the first one."""
    count = len(next(iter(arrays.values())))
    turned = [
        name
        for name, array in arrays.items()
        if len(array) != count and array.ndim > 2 and array.shape[1] == count
    ]
    if turned:
        return (
            f"{', '.join(turned)} may have the batch second, as the states of an LSTM: give it "
            "first, and export a module around the network that gives it "
            f"{turned[0]}.transpose(0, 1).contiguous(), and returns such outputs with "
            ".transpose(0, 1)"
        )
    return (
        "what has no rows, as the edge_index of a graph, is no input: export a module around the "
        "network that holds it as a buffer"
    )


def odd_samples(inputs: Inputs) -> list[str]:
    """Tell of samples with NaN or infinity in them."""
    found = []
    for spec, array in zip(inputs.specs, inputs.samples or (), strict=False):
        odd = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
        if odd.any():
            found.append(
                f"samples {spec.name}: {odd.sum():,} of {len(odd):,} rows hold NaN or infinity, "
                f"row {odd.argmax()} first; what matters, and what lies outside of the grid, is "
                "told without those numbers"
            )
    return found


def notes_on_numbers(inputs: Inputs) -> list[str]:
    """Report whole-number inputs that are only known to take 0 and 1."""
    if inputs.samples is not None:
        return []
    return [
        f"input {spec.name}: no range of whole numbers that it must lie in was found; the network "
        "is compared at 0 and 1 alone, as for a mask; for others give rows of data with --samples"
        for spec in inputs.specs
        if spec.datatype in ("INT64", "INT32") and spec.allowed is None
    ]


def shown(shape: Sequence[int]) -> str:
    """Show a shape with its batch by name, as [batch, 3, 224, 224]."""
    return "[" + ", ".join("batch" if size == -1 else str(size) for size in shape) + "]"


def _datatype(array: NDArray[Any]) -> str:
    return {np.dtype(dtype): name for name, dtype in DATATYPES.items()}[array.dtype]


def _as_input(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Check an array of samples, and bring halves and doubles to single precision."""
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    known = {np.dtype(dtype) for dtype in DATATYPES.values()}
    if array.dtype not in known or array.ndim < 1 or 0 in array.shape:
        raise InputError(
            f"samples {name}: expected at least one row of "
            f"{', '.join(str(dtype) for dtype in sorted(known, key=str))}, found "
            f"{array.dtype} of shape {array.shape}"
        )
    return array
