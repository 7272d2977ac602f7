"""golden.npz: inputs, float64 answers and how far a runtime may be from them.

The exporter picks them from the probes of its parity check; the server replays them on its own
provider before it calls a model ready. Both judge by `excess`.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kan_bundle.errors import IntegrityError


@dataclass(frozen=True)
class Golden:
    """Probes with known answers.

    Attributes:
        inputs: float32, shape (rows, in).
        outputs: The float64 recursion's answers, shape (rows, out).
        tolerance: Largest allowed |y - outputs|, shape (rows, out).
    """

    inputs: NDArray[np.float32]
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


def write_golden(golden: Golden, path: Path) -> None:
    """Write the probes with their answers."""
    np.savez_compressed(
        path, inputs=golden.inputs, outputs=golden.outputs, tolerance=golden.tolerance
    )


def read_golden(content: bytes) -> Golden:
    """Read the probes with their answers from the bytes of `golden.npz`.

    Raises:
        IntegrityError: It is not such a file.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            golden = Golden(archive["inputs"], archive["outputs"], archive["tolerance"])
    except Exception as error:  # a damaged archive makes the parser fail in any way there is
        raise IntegrityError(f"golden.npz: cannot be read: {error}; export again") from error
    shapes = [golden.inputs.shape, golden.outputs.shape, golden.tolerance.shape]
    kinds = [golden.inputs.dtype, golden.outputs.dtype, golden.tolerance.dtype]
    if (
        kinds != [np.float32, np.float64, np.float64]
        or any(len(shape) != 2 for shape in shapes)
        or not shapes[0][0] == shapes[1][0] > 0
        or shapes[1] != shapes[2]
    ):
        raise IntegrityError(
            f"golden.npz: expected float32 (rows, in) and twice float64 (rows, out), found "
            f"{shapes} of {[str(kind) for kind in kinds]}; export again"
        )
    if bool((golden.tolerance < 0).any() or np.isinf(golden.tolerance).any()):
        raise IntegrityError("golden.npz: expected finite tolerances of at least 0; export again")
    return golden
