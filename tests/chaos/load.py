"""The load: clients that ask all the time, who check every answer, and a tally of what they saw.

The answers that are right are float64's, by upstream or by construction, never the server's own.
A request is troubled if it has failed or took longer than `SLOW_S`; things are well again when
the last troubled request has ended.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serving.client import ClientError, KanClient, Tls

SLOW_S = 0.5

CLIENTS = 12
PER_S = 240.0
"""Requests a second of all clients together: half of what one core answers beside the others."""


@dataclass(frozen=True)
class Question:
    """Rows for a model, and what its versions say to them.

    Args:
        model: Its name.
        x: Rows.
        y64: The right answer of every version that may be served; "" for any version.
    """

    model: str
    x: NDArray[np.float32]
    y64: Mapping[str, NDArray[np.float64]]

    def is_right(self, rows: slice, y: NDArray[np.float32], version: str) -> bool:
        """Whether an answer is what float64 says, to float32's precision."""
        wanted = self.y64.get(version, self.y64.get(""))
        if wanted is None or y.shape != wanted[rows].shape:
            return False
        # Goldens are of the order of 1: see tests/bundles.py.
        return bool(np.allclose(y, wanted[rows], rtol=1e-5, atol=1e-5))


@dataclass(frozen=True)
class Asked:
    """How one request has ended.

    Args:
        start: When it was sent, by the monotonic clock.
        took_s: How long it took.
        code: OK, WRONG, or gRPC's.
    """

    start: float
    took_s: float
    code: str

    @property
    def end(self) -> float:
        return self.start + self.took_s

    @property
    def is_troubled(self) -> bool:
        return self.code != "OK" or self.took_s > SLOW_S


@dataclass(frozen=True)
class Tally:
    """What clients saw.

    Args:
        requests: How many were asked.
        wrong: Answers that were not right.
        failed: Requests without an answer, by gRPC's code.
        recovered_s: From the last fault to the end of the last troubled request.
        slowest_s: The longest that a request took.
    """

    requests: int
    wrong: int
    failed: Mapping[str, int]
    recovered_s: float
    slowest_s: float


@dataclass
class Load:
    """Clients under way.

    Args:
        addresses: Of the way.
        questions: What they ask, at random.
        per_s: Requests a second, of all of them, unless they have to wait for answers.
        timeout_s: Of each request.
    """

    addresses: Sequence[str]
    questions: Sequence[Question]
    per_s: float
    timeout_s: float
    _stop: threading.Event = field(default_factory=threading.Event)
    _asked: list[Asked] = field(default_factory=list)
    _faults: list[float] = field(default_factory=list)
    messages: set[str] = field(default_factory=set)

    def fault(self) -> None:
        """Note that something happens now."""
        self._faults.append(time.monotonic())

    def go_on(self, seconds: float) -> None:
        """Let clients ask for a while: the subject of the test, not a wait for a condition."""
        assert not self._stop.wait(seconds)

    def tally(self) -> Tally:
        asked = list(self._asked)
        codes = Counter(one.code for one in asked)
        last = max(self._faults, default=0.0)
        troubled = [one.end for one in asked if one.is_troubled and one.end > last]
        return Tally(
            len(asked),
            codes["WRONG"],
            {code: n for code, n in sorted(codes.items()) if code not in ("OK", "WRONG")},
            max(troubled, default=last) - last,
            max((one.took_s for one in asked), default=0.0),
        )

    def count(self) -> int:
        """How many requests have been answered, right or wrong or not."""
        return len(self._asked)

    def ask_again_and_again(self, client: KanClient, seed: int, clients: int) -> None:
        """Be one of the clients, until the end."""
        chance = random.Random(seed)
        while not self._stop.wait(chance.expovariate(self.per_s / clients)):
            self._asked.append(self._ask(client, chance))

    def _ask(self, client: KanClient, chance: random.Random) -> Asked:
        question = chance.choice(self.questions)
        first = chance.randrange(len(question.x))
        rows = slice(first, first + chance.choice((1, 1, 1, 4, 16)))
        start = time.monotonic()
        try:
            answer = client.infer_all(question.model, question.x[rows], timeout_s=self.timeout_s)
        except ClientError as error:
            self.messages.add(str(error))
            return Asked(start, time.monotonic() - start, error.code or type(error).__name__)
        took_s = time.monotonic() - start
        (y,) = answer.outputs.values()
        right = question.is_right(rows, y, answer.version)
        return Asked(start, took_s, "OK" if right else "WRONG")

    def end(self) -> None:
        self._stop.set()


@contextmanager
def load(
    addresses: Sequence[str],
    questions: Sequence[Question],
    *,
    clients: int = CLIENTS,
    per_s: float = PER_S,
    timeout_s: float = 20.0,
    tls: Tls | None = None,
) -> Iterator[Load]:
    """Clients that ask, from when each model has answered until the end of the block.

    Args:
        addresses: Of the way.
        questions: What they ask.
        clients: How many ask at a time.
        per_s: How often, together.
        timeout_s: Of each request.
        tls: How they recognise servers.
    """
    with KanClient(addresses, tls=tls) as client:
        for question in questions:
            client.infer(question.model, question.x[:1], timeout_s=60)
        running = Load(addresses, questions, per_s, timeout_s)
        threads = [
            threading.Thread(target=running.ask_again_and_again, args=(client, seed, clients))
            for seed in range(clients)
        ]
        for thread in threads:
            thread.start()
        try:
            yield running
        finally:
            running.end()
            for thread in threads:
                thread.join()
