"""What tests of the client share: what either client gives, and how right it is."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.client import AsyncKanClient, ClientError, KanClient, Tls, aio, sync
from serving.server import Server
from tests.conftest import STATE_DICTS
from tests.servers import WAIT_S

UNIFORM, ADAPTED = STATE_DICTS[:2]
ROWS = np.random.default_rng(0).uniform(-1, 1, (2500, 4)).astype(np.float32)


@pytest.fixture
def told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients in this process look for the reason why nobody answers until they have it."""
    for module in (sync, aio):
        monkeypatch.setattr(module, "LOOK_S", WAIT_S)


def assert_close(found: NDArray[Any], y64: NDArray[np.float64]) -> None:
    """The tolerance of a float32 model."""
    assert found.shape == y64.shape
    assert (np.abs(found - y64) <= 1e-5 * np.maximum(1, np.abs(y64))).all()


def infers(server: Server) -> float:
    """How many requests have been answered or refused with a message."""
    calls = (
        server.registry.get_sample_value(
            "kanserve_calls_total", {"method": "ModelInfer", "code": code}
        )
        for code in ("OK", "INVALID_ARGUMENT")
    )
    return sum(each or 0 for each in calls)


def both_ways(
    address: str,
    method: str,
    *arguments: Any,
    timeout_s: float = WAIT_S,
    tls: Tls | None = None,
    token: str | None = None,
    **keywords: Any,
) -> list[Any]:
    """What a method gives or raises, of either client."""
    settings: dict[str, Any] = {"timeout_s": timeout_s, "rows_per_message": 7}
    settings |= {"tls": tls, "token": token}

    async def ask() -> Any:
        async with AsyncKanClient(address, **settings) as client:
            return await getattr(client, method)(*arguments, **keywords)

    found: list[Any] = []
    with KanClient(address, **settings) as client:
        calls: tuple[Callable[[], Any], ...] = (
            lambda: getattr(client, method)(*arguments, **keywords),
            lambda: asyncio.run(ask()),
        )
        for call in calls:
            try:
                found.append(call())
            except ClientError as error:
                found.append(error)
    return found
