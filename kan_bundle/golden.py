"""golden.npz: inputs, float64 answers and how far a runtime may be from them.

The exporter picks them from the probes of its parity check; the server replays them on its own
provider before it calls a model ready. Both judge by `excess`.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kan_bundle.errors import IntegrityError
from kan_bundle.manifest import DATATYPES, TensorSpec

_LARGEST = 2**29  # bytes; what is compressed may grow a thousandfold, but no answers do
_MOST_INFLATED, _SLACK = 64, 2**26  # times the file's bytes, and so many bytes
_MOST_ENTRIES = 1000


@dataclass(frozen=True)
class Golden:
    """Probes with known answers.

    Attributes:
        inputs: One array for each input of the model, in the manifest's order, shape (rows, ...).
        outputs: The reference's answers: every output of a row in the manifest's order, flattened
            and side by side, shape (rows, numbers).
        tolerance: Largest allowed |y - outputs|, shape (rows, numbers).
    """

    inputs: tuple[NDArray[np.generic], ...]
    outputs: NDArray[np.float64]
    tolerance: NDArray[np.float64]


def excess(
    found: NDArray[Any], expected: NDArray[np.float64], tolerance: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Express each deviation as a multiple of what is allowed: up to 1 is right, above is wrong.

    NaN matches NaN alone, and an infinity only itself; a mismatch is infinitely wrong.

    Args:
        found: A runtime's outputs.
        expected: The reference, of the same shape.
        tolerance: Largest allowed deviation, of the same shape.

    Returns:
        |found - expected| / tolerance, of the same shape.
    """
    found = found.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.abs(found - expected) / tolerance
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    return np.where(same, 0.0, np.where(np.isnan(ratio), np.inf, ratio))


def side_by_side(outputs: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Bring the outputs of a run into the form of `Golden.outputs`."""
    return np.concatenate([output.reshape(len(output), -1) for output in outputs], axis=1)


def write_golden(golden: Golden, path: Path) -> None:
    """Write the probes with their answers."""
    arrays: dict[str, Any] = {f"input_{i}": array for i, array in enumerate(golden.inputs)}
    np.savez_compressed(path, outputs=golden.outputs, tolerance=golden.tolerance, **arrays)


def read_golden(content: bytes, inputs: Sequence[TensorSpec]) -> Golden:
    """Read the probes with their answers from the bytes of `golden.npz`.

    Args:
        content: The file.
        inputs: What the model takes.

    Raises:
        IntegrityError: It is not such a file.
    """
    try:
        if len(content) > _LARGEST or content.count(b"PK\1\2") > _MOST_ENTRIES:
            raise ValueError(f"expected at most {_MOST_ENTRIES} arrays in {_LARGEST} bytes")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            size = sum(entry.file_size for entry in archive.zip.infolist())
            most = min(_LARGEST, _MOST_INFLATED * len(content) + _SLACK)
            if size > most:
                raise ValueError(f"it holds {size} bytes, expected at most {most}")
            arrays = tuple(archive[f"input_{i}"] for i in range(len(inputs)))
            golden = Golden(arrays, archive["outputs"], archive["tolerance"])
    except Exception as error:  # a damaged archive makes the parser fail in any way there is
        raise IntegrityError(f"golden.npz: cannot be read: {error}; export again") from error
    rows = len(golden.outputs) if golden.outputs.ndim == 2 else 0
    wanted = [(np.dtype(DATATYPES[spec.datatype]), (rows, *spec.shape[1:])) for spec in inputs]
    wanted += [(np.dtype(np.float64), golden.outputs.shape)] * 2
    found = [(a.dtype, a.shape) for a in (*golden.inputs, golden.outputs, golden.tolerance)]
    if rows == 0 or found != wanted:
        raise IntegrityError(
            f"golden.npz: expected at least one row and arrays {_shown(wanted)}, found "
            f"{_shown(found)}; export again"
        )
    if bool((golden.tolerance < 0).any() or np.isinf(golden.tolerance).any()):
        raise IntegrityError("golden.npz: expected finite tolerances of at least 0; export again")
    return golden


def _shown(arrays: Sequence[tuple[np.dtype[Any], tuple[int, ...]]]) -> str:
    return ", ".join(f"{dtype} {shape}" for dtype, shape in arrays)
