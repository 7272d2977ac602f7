"""What stops an export after all has been written: answers that are not right."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from export.errors import ParityError
from export.network import Network
from export.proof.parity import Measurement
from kan_bundle.golden import Golden, excess


def require_parity(measured: Sequence[Measurement], network: Network) -> None:
    """Raise if any runtime is too far off.

    Raises:
        ParityError: With the worst probe of the runtime that is furthest off, and every output and
            group of probes in which any runtime is wrong.
    """
    failed = [m for m in measured if not m.passed]
    if failed:
        m = max(failed, key=lambda m: m.excess)
        blame = "please report it with the checkpoint"
        if network.kan is None:
            blame = (
                "if another layer is to blame (onnxruntime's Elu, LogSigmoid and GRU, for some, "
                "lose digits that torch keeps), write it another way; else please report it"
            )
        if any(getattr(part, "use_nested_tensor", False) for part in network.call.modules()):
            blame = (
                "nn.TransformerEncoder answers 0 at padded positions, in evaluation mode alone: "
                "build it with enable_nested_tensor=False, which leaves its weights as they are; "
                "else please report it"
            )
        raise ParityError(
            f"{m.runtime} does not compute what the network computes, nothing was published: at "
            f"probe {m.worst.row} ({m.worst.group}, batch {m.worst.batch_size}), output "
            f"{network.name_output(m.worst.output)}, expected {m.worst.expected!r} within "
            f"{m.worst.allowed:.2e}, found {m.worst.found!r}. All that is wrong: "
            f"{'; '.join(summarise(m) for m in failed)}. Remedy: {blame}"
        )


def summarise(measurement: Measurement) -> str:
    """List every output and group of probes in which a runtime is wrong."""
    parts = [
        f"{f.output} at {f.group} ({f.wrong:,} of {f.numbers:,} numbers, up to "
        f"{f'{f.excess:.3g} times what is allowed' if math.isfinite(f.excess) else 'NaN'})"
        for f in measurement.failures
    ]
    return f"{measurement.runtime}: {', '.join(parts)}"


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
