"""Rows in files: .npy, .npz and CSV. Nothing in a file is executed, and none is half written.

What a file is, its first bytes tell; what is to be written, the name does. A CSV is lines of
numbers with commas between, with or without a line of names in front.
"""

import io
import os
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from serving.client.errors import InvalidRequest
from serving.client.models import DTYPES, Model, Tensor
from serving.client.tensors import checked

Header = Literal["auto", "yes", "no"]
Form = Literal["npy", "npz", "csv"]

_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"
_OTHER_MARKS = {";": "semicolons", "\t": "tabs", " ": "spaces"}
_LARGE = 2**24  # bytes of a file that is not read all at once


def read_inputs(source: str, model: Model, header: Header = "auto") -> dict[str, NDArray[Any]]:
    """Read the inputs of a model.

    Args:
        source: A file, or - for stdin: an .npy or a CSV for a model with one input, or an .npz
            with an array for each input, by its name.
        model: What takes them.
        header: Whether the first line of a CSV holds names.

    Raises:
        InvalidRequest: The file does not hold what the model takes.
        OSError: It cannot be read.
    """
    try:
        if source == "-":
            found = _read(sys.stdin.buffer.read(), None, model, header)
        else:
            path = Path(source)
            with path.open("rb") as file:
                start = file.read(len(_NPY))
                is_large_array = start == _NPY and path.stat().st_size >= _LARGE
                content = b"" if is_large_array else start + file.read()
            found = _read(content, path if is_large_array else None, model, header)
        return checked(found, model)
    except InvalidRequest as error:
        raise InvalidRequest(f"{_shown(source)}: {error}") from error


def _read(
    content: bytes, mapped: Path | None, model: Model, header: Header
) -> NDArray[Any] | dict[str, NDArray[Any]]:
    try:
        if mapped is not None:
            array: NDArray[Any] = np.load(mapped, mmap_mode="r", allow_pickle=False)
            return array
        if content.startswith(_NPY):
            array = np.load(io.BytesIO(content), allow_pickle=False)
            return array
        if content.startswith(_ZIP):
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                if not all(name.endswith(".npy") for name in archive.zip.namelist()):
                    raise InvalidRequest(
                        "expected an .npy, an .npz or a CSV of numbers, found a zip of other files"
                    )
                return dict(archive)
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        kind = ".npz" if content.startswith(_ZIP) else ".npy"
        line = str(error).partition("\n")[0]
        raise InvalidRequest(
            f"expected an {kind} of numbers, found a damaged one: {line}"
        ) from error
    if len(model.inputs) != 1:
        names = [spec.name for spec in model.inputs]
        raise InvalidRequest(f"expected inputs {names}, found a CSV; give an .npz with these names")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest("expected an .npy, an .npz or a CSV, found other bytes") from error
    return _read_csv(text.splitlines(), model.inputs[0], header)


def _read_csv(lines: Sequence[str], spec: Tensor, header: Header) -> NDArray[Any]:
    kind = DTYPES[spec.datatype].kind if spec.datatype in DTYPES else ""
    if len(spec.shape) > 2 or kind not in "fiu":
        raise InvalidRequest(f"expected {spec}, found a CSV, which cannot hold it; give an .npy")
    first = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    if first < len(lines) and _is_header(lines[first], first + 1, header):
        first += 1
    rows = [line for line in lines[first:] if line.strip()]
    if not rows:
        raise InvalidRequest(f"expected lines of numbers, found none{_parted(lines)}")
    dtype = {"f": np.float64, "i": np.int64, "u": np.uint64}[kind]
    columns = spec.shape[1] if len(spec.shape) == 2 else 1
    if columns < 0:
        columns = rows[0].count(",") + 1
    fault = None
    try:
        with warnings.catch_warnings():
            # Older numpy takes 3.7 for a whole number, with a warning.
            warnings.simplefilter("error", DeprecationWarning)
            array: NDArray[Any] = np.loadtxt(rows, dtype, delimiter=",", comments=None, ndmin=2)
    except (ValueError, DeprecationWarning) as error:
        array, fault = np.empty((0, 0)), str(error)
    if fault is not None or array.shape[1] != columns:
        where = _fault(lines, first, columns, int if kind in "iu" else float)
        raise InvalidRequest(where or f"expected lines of {columns} numbers: {fault}")
    return array[:, 0] if len(spec.shape) == 1 else array


def _is_header(line: str, number: int, header: Header) -> bool:
    """Tell whether a line holds names; one that could be either is not guessed at."""
    if header != "auto":
        return header == "yes"
    cells = [cell.strip().strip('"') for cell in line.split(",")]
    numbers = sum(_is_number(cell) for cell in cells)
    counted = len(cells) > 1 and cells == [str(i) for i in range(len(cells))]  # pandas' own names
    if counted or 0 < numbers < len(cells):
        raise InvalidRequest(
            f"line {number}: expected either names or numbers, found {line[:40]!r}; say which "
            f"with --header yes or --header no{_parted([line])}"
        )
    return numbers == 0


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _fault(lines: Sequence[str], first: int, columns: int, number: type[int | float]) -> str | None:
    """Find the line of a CSV that is not as it should be."""
    for i, line in enumerate(lines[first:], first + 1):
        cells = line.split(",")
        if line.strip() and len(cells) != columns:
            told = f"line {i}: expected {columns} numbers, found {len(cells)}"
            return told + _parted([line])
        for cell in cells if line.strip() else ():
            try:
                number(cell)
            except ValueError:
                kind = "whole number" if number is int else "number"
                told = f"line {i}: expected a {kind}, found {cell.strip()[:40]!r}"
                return told + _parted([line])
    return None


def _parted(lines: Sequence[str]) -> str:
    """Say what seems to part the fields of a CSV in place of commas, if something does."""
    line = next((line.strip() for line in lines if line.strip()), "")
    mark = next((mark for mark in _OTHER_MARKS if mark in line), None)
    if mark is None or ("," in line and mark != ";"):  # beside a semicolon, decimals have commas
        return ""
    point = ", and write decimals with a point" if "," in line else ""
    return f"; {_OTHER_MARKS[mark]} seem to part its fields: put commas there{point}"


def output_form(target: str) -> Form:
    """Tell in which form a file is to be written; stdout is CSV.

    Raises:
        ValueError: Its name does not say.
    """
    suffix = ".csv" if target == "-" else Path(target).suffix.lower()
    forms: dict[str, Form] = {".npy": "npy", ".npz": "npz", ".csv": "csv"}
    if suffix not in forms:
        raise ValueError(f"{target}: expected a name that ends with .npy, .npz or .csv")
    return forms[suffix]


def require_form(target: str, outputs: Sequence[Tensor]) -> None:
    """See that outputs can be written there, before they are computed.

    Raises:
        InvalidRequest: They cannot.
    """
    form = output_form(target)
    names = [spec.name for spec in outputs]
    if form != "npz" and len(outputs) != 1:
        raise InvalidRequest(
            f"{_shown(target)}: expected one output, found {names}; choose with --output-tensor, "
            "or write an .npz"
        )
    if form == "csv" and any(len(spec.shape) > 2 for spec in outputs):
        raise InvalidRequest(
            f"{_shown(target)}: expected rows of numbers, found {outputs[0]}; write an .npy"
        )


@contextmanager
def output_file(target: str) -> Iterator[IO[bytes]]:
    """Open a file that is there when all of it is, or not at all; pipes are written to at once.

    Args:
        target: The file, or - for stdout.

    Raises:
        OSError: It cannot be written.
    """
    if target == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(target)
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as stream:
                yield stream
            return
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as stream:
            try:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), target) from error


def write_outputs(stream: IO[bytes], form: Form, outputs: Mapping[str, NDArray[Any]]) -> None:
    """Write what a model has answered.

    Args:
        stream: Where to.
        form: How; all but npz take one output.
        outputs: By name. In a CSV, floats have the digits that tell them apart.
    """
    if form == "npz":
        np.savez(stream, **outputs)  # type: ignore[arg-type]  # no name is allow_pickle
        return
    (array,) = outputs.values()
    if form == "npy":
        np.save(stream, array, allow_pickle=False)
    else:
        digits = "%.9g" if array.dtype.itemsize <= 4 else "%.17g"
        fmt = digits if array.dtype.kind == "f" else "%d"
        np.savetxt(stream, array, fmt, delimiter=",")


def _shown(name: str) -> str:
    return "stdin or stdout" if name == "-" else name
