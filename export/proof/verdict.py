"""What stops an export after all has been written: answers that are not right."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from export.errors import ParityError
from export.network import Network
from export.proof.parity import Measurement
from kan_bundle.golden import Golden, excess
from kan_bundle.manifest import Precision


def require_parity(
    measured: Sequence[Measurement],
    network: Network,
    precision: Precision,
) -> None:
    """Raise for the runtime that is furthest off, if any is too far.

    Raises:
        ParityError: With the worst probe.
    """
    failed = [m for m in measured if not m.passed]
    if failed:
        m = max(failed, key=lambda m: m.excess)
        blame = "please report it with the checkpoint"
        if precision != "fp32":
            blame = f"{precision} is too coarse for this model; choose a --precision of more bits"
        elif network.kan is None:
            blame = (
                "if another layer is to blame (onnxruntime's Elu, LogSigmoid and GRU, for some, "
                "lose digits that torch keeps), write it another way; else please report it"
            )
        raise ParityError(
            f"{m.runtime} does not compute what the network computes, nothing was published: at "
            f"probe {m.worst.row} ({m.worst.group}, batch {m.worst.batch_size}), output "
            f"{network.name_output(m.worst.output)}, expected {m.worst.expected!r} within "
            f"{m.worst.allowed:.2e}, found {m.worst.found!r}; {blame}"
        )


def require_golden(golden: Golden, answers: NDArray[np.float64]) -> None:
    """Raise if the server would refuse the bundle.

    Raises:
        ParityError: In one batch, in which the server runs them, the answers are others.
    """
    worst = float(excess(answers, golden.outputs, golden.tolerance).max())
    if worst > 1:
        raise ParityError(
            f"onnxruntime is off by {worst:.3g} times what is allowed when it runs {len(answers)} "
            "rows in one batch, nothing was published; please report it with the checkpoint"
        )
