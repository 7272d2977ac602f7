"""An open loop of load: requests at moments drawn beforehand, whatever the servers do.

The time of a request counts from the moment when it was to be sent: a server that stalls pays for
everyone who would have come meanwhile. A closed loop would not send them, and so not count them.
"""

import itertools
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

OK = "OK"

Ask = Callable[[], str]
"""Sends one request, waits for its answer, and tells how it ended: OK, or what else there was."""

_SWITCH_S = 1e-4  # how long a thread may hold the others up
_AHEAD_S = 0.2  # for threads to start before the first request is due


@dataclass(frozen=True)
class Latencies:
    """Milliseconds that half, 99 and 99.9 in 100 requests do not exceed."""

    p50: float
    p99: float
    p999: float


@dataclass(frozen=True)
class Trace:
    """Every request of an open loop.

    Attributes:
        moments: When each was to be sent, in seconds of the system's monotonic clock.
        times_ms: How long it took from then on.
        codes: How it ended, OK and others.
    """

    moments: Sequence[float]
    times_ms: Sequence[float]
    codes: Sequence[str]


@dataclass(frozen=True)
class Opened:
    """What an open loop found.

    Attributes:
        offered_per_s: Requests in a second that were to be sent.
        per_s: Right answers in a second.
        codes: How requests ended, OK and others.
        latencies: Of right answers, from when they were to be sent; None if there are none.
    """

    offered_per_s: float
    per_s: float
    codes: Mapping[str, int]
    latencies: Latencies | None


def latencies_of(milliseconds: Sequence[float]) -> Latencies:
    """Sum up times of requests."""
    p50, p99, p999 = np.percentile(milliseconds, [50, 99, 99.9])
    return Latencies(float(p50), float(p99), float(p999))


def poisson_moments(per_s: float, seconds: float, seed: int) -> list[float]:
    """Draw when requests are to be sent, in seconds from the start.

    Args:
        per_s: Requests in a second, on average.
        seconds: For how long.
        seed: Of the moments.
    """
    gaps = np.random.default_rng(seed).exponential(1 / per_s, math.ceil(2 * per_s * seconds) + 10)
    moments = gaps.cumsum()
    found: list[float] = moments[moments < seconds].tolist()
    return found


def open_loop(asks: Sequence[Ask], moments: Sequence[float]) -> Trace:
    """Send requests when they are due, each by whichever thread is free.

    Args:
        asks: One for each thread, so as many as may be under way; when all are, the next requests
            are late, which counts.
        moments: When they are due, in seconds from the start, in order.
    """
    numbers = itertools.count()
    results: list[list[tuple[float, float, str]]] = [[] for _ in asks]
    start = time.monotonic() + _AHEAD_S

    def client(ask: Ask, found: list[tuple[float, float, str]]) -> None:
        for number in numbers:
            if number >= len(moments):
                return
            moment = start + moments[number]
            with suppress(ValueError):  # it is too late to wait
                time.sleep(moment - time.monotonic())
            code = ask()
            found.append((moment, 1000 * (time.monotonic() - moment), code))

    running = [
        threading.Thread(target=client, args=pair, daemon=True)
        for pair in zip(asks, results, strict=True)
    ]
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        sys.setswitchinterval(before_s)
    every = [one for found in results for one in found]
    return Trace(
        [moment for moment, _, _ in every],
        [ms for _, ms, _ in every],
        [code for _, _, code in every],
    )


def opened(trace: Trace, seconds: float) -> Opened:
    """Sum up an open loop.

    Args:
        trace: Its requests.
        seconds: For how long it sent.
    """
    ok_ms = [ms for ms, code in zip(trace.times_ms, trace.codes, strict=True) if code == OK]
    ends = [at + ms / 1000 for at, ms in zip(trace.moments, trace.times_ms, strict=True)]
    took_s = max(max(ends) - min(trace.moments), seconds) if ends else seconds
    return Opened(
        offered_per_s=len(trace.codes) / seconds,
        per_s=len(ok_ms) / took_s,
        codes=dict(Counter(trace.codes)),  # which asdict could not copy
        latencies=latencies_of(ok_ms) if ok_ms else None,
    )
