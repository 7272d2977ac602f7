"""Clients of the servers in containers: whether they are ready, and requests without a pause."""

import threading
from dataclasses import dataclass, field

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from serving.client import ClientError, KanClient
from tests.bundles import CLOSE
from tests.servers import WAIT_S, await_true

SERVING = health_pb2.HealthCheckResponse.SERVING


@dataclass(frozen=True)
class Images:
    """Test images of digits, with what the trained network says of them in eager PyTorch."""

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    labels: NDArray[np.int64]


def is_ready(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            return bool(check(health_pb2.HealthCheckRequest(), timeout=1).status == SERVING)
        except grpc.RpcError:
            return False


def await_ready(address: str) -> None:
    await_true(lambda: is_ready(address))


@dataclass
class Load:
    """Requests to several servers without a pause, in threads."""

    addresses: list[str]
    images: Images
    answered: int = 0
    failures: list[ClientError] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._ending, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(4)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def await_more(self, count: int) -> None:
        enough = self.answered + count
        await_true(lambda: self.answered > enough)

    def _ask(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        with KanClient(self.addresses, timeout_s=WAIT_S) as client:
            while not self._ending.is_set():
                rows = random.integers(0, len(self.images.x), 16)
                try:
                    y = client.infer("digits", self.images.x[rows])
                except ClientError as error:
                    self.failures.append(error)
                    continue
                np.testing.assert_allclose(y, self.images.y[rows], **CLOSE)
                with self._lock:
                    self.answered += 1
