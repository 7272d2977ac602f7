"""The open loop: who waits, pays, and nobody is left out."""

import threading
import time
from dataclasses import astuple

import numpy as np
import pytest

from serving.client.load import OK, Ask, Trace, open_loop, opened, poisson_moments


def test_moments_are_those_of_a_poisson_process() -> None:
    moments = np.array(poisson_moments(1000.0, 20.0, seed=1))
    assert ((moments > 0) & (moments < 20)).all()
    gaps = np.diff(moments)
    assert (gaps >= 0).all()
    # 20,000 gaps: mean and deviation are both 1 ms, each within 5 of its own deviations.
    assert abs(gaps.mean() - 1e-3) < 5e-3 / np.sqrt(len(gaps))
    assert abs(gaps.std() - 1e-3) < 5e-3 * np.sqrt(2 / len(gaps))
    assert poisson_moments(1000.0, 20.0, seed=1) == moments.tolist()
    assert poisson_moments(1000.0, 20.0, seed=2) != moments.tolist()


def test_time_counts_from_when_a_request_was_to_be_sent() -> None:
    """One thread and three requests due together: the later ones wait for the earlier."""
    spans: list[tuple[float, float]] = []

    def ask() -> str:
        begun = time.monotonic()
        while time.monotonic() < begun + 0.01:  # a request takes as long
            pass
        spans.append((begun, time.monotonic()))
        return OK

    trace = open_loop([ask], [0.0, 0.0, 0.0])
    assert len(set(trace.moments)) == 1
    for moment, took_ms, (_, end) in zip(trace.moments, trace.times_ms, spans, strict=True):
        assert took_ms >= 1000 * (end - moment)
    assert sorted(trace.times_ms) == list(trace.times_ms)
    assert trace.times_ms[2] >= 1000 * sum(end - begun for begun, end in spans)


def test_every_request_is_sent_once_by_whoever_is_free() -> None:
    together = threading.Barrier(4)
    counts = [0] * 4

    def asker(number: int) -> Ask:
        def ask() -> str:
            if not counts[number]:
                together.wait(60)  # all four are under way at a time
            counts[number] += 1
            return OK if number else "UNAVAILABLE"

        return ask

    trace = open_loop([asker(number) for number in range(4)], [i / 1e4 for i in range(500)])
    assert sum(counts) == len(trace.codes) == 500
    assert all(counts)
    assert list(trace.codes).count("UNAVAILABLE") == counts[0]


def test_a_sum_tells_right_answers_from_others() -> None:
    trace = Trace([0.0, 0.5, 1.0, 1.5], [10.0, 20.0, 30.0, 9999.0], [OK, OK, OK, "UNAVAILABLE"])
    found = opened(trace, 2.0)
    assert found.offered_per_s == 2.0
    assert found.per_s == pytest.approx(3 / (1.5 + 9.999))  # until the last has ended
    assert found.codes == {OK: 3, "UNAVAILABLE": 1}
    assert found.latencies is not None
    assert astuple(found.latencies) == pytest.approx((20.0, 29.8, 29.98))
    assert opened(Trace([0.0], [1.0], ["INTERNAL"]), 1.0).latencies is None
    assert opened(Trace([], [], []), 2.0).per_s == 0
