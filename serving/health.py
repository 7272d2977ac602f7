"""grpc.health.v1: whether the server can be sent requests, and whether it lives.

The two are asked for under different names. Who restarts a server asks for `live`, which is SERVING
as long as the process answers and runs requests: one that drains, or has no model, must not be
killed for that.

The servicer of grpcio-health-checking is not used, for two reasons seen in 1.81: it keeps every
service name it was ever asked to watch, so a client can fill the memory, and it cannot end its
watches, so that one watcher makes every shutdown last the whole grace period.
"""

import threading
from collections.abc import Callable, Iterable
from functools import partial

from grpc_health.v1 import health_pb2 as pb

from serving.callers import Callers, address_of
from serving.errors import ModelNotFound, Overloaded, VisibleError
from serving.failures import Failure, failure_of
from serving.gate import Gate
from serving.messages import PROBE_BYTES, SMALL_BYTES, parse
from serving.observability.metrics import Counters
from serving.room import Places, Room
from serving.transport.unary import UnaryCall, UnaryMethod

SERVICE = pb.DESCRIPTOR.services_by_name["Health"].full_name
LIVE = "live"
"""The name by which liveness is asked for."""

_MOST_WATCHERS = 1024
_RESERVE = 0.25  # of the watches, for callers who are known
_RETRY_AFTER_S = 1.0

_SERVING = pb.HealthCheckResponse.SERVING
_NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING
_UNKNOWN = pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVICE_UNKNOWN).SerializeToString()


class Health:
    """The same status for every service, and another for `LIVE`. Safe to call from several threads.

    At first it is not ready. Nothing here waits for a client: of a watcher that does not read, only
    the last status is kept.

    Args:
        services: Names that may be asked for, beside `LIVE`; the empty one stands for the whole
            server.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset({*services, LIVE})
        self._lock = threading.Lock()
        self._status = _status(False)
        self._live = _status(True)
        self._watchers: dict[UnaryCall, str] = {}  # and what they watch

    def set(self, ready: bool) -> None:
        """Change the status and notify every watcher."""
        with self._lock:
            changed = self._status != _status(ready)
            self._status = _status(ready)
            if changed:
                self._notify(lambda service: service != LIVE)

    def set_live(self, live: bool) -> None:
        """Change the status of `LIVE` and notify every watcher."""
        with self._lock:
            changed = self._live != _status(live)
            self._live = _status(live)
            if changed:
                self._notify(lambda service: service == LIVE)

    def close(self) -> None:
        """End every watch."""
        with self._lock:
            watchers = list(self._watchers)
            self._watchers.clear()
        for watcher in watchers:
            watcher.finish()

    def check(self, service: str) -> bytes | None:
        """Return the status of a service, as a message; None if there is none of that name."""
        return self._status_of(service) if service in self._services else None

    def watch(self, service: str, watcher: UnaryCall) -> None:
        """Send a watcher the status of a service, and every change of it.

        Args:
            service: What it watches.
            watcher: Its call.
        """
        if service not in self._services:
            watcher.publish(_UNKNOWN)
            watcher.finish()
            return

        def forget() -> None:
            with self._lock:
                self._watchers.pop(watcher, None)

        with self._lock:
            self._watchers[watcher] = service
            watcher.publish(self._status_of(service))
        if not watcher.add_callback(forget):
            forget()

    def _notify(self, is_concerned: Callable[[str], bool]) -> None:
        for watcher, service in self._watchers.items():
            if is_concerned(service):
                watcher.publish(self._status_of(service))

    def _status_of(self, service: str) -> bytes:
        return self._live if service == LIVE else self._status


def _status(ready: bool) -> bytes:
    kind = _SERVING if ready else _NOT_SERVING
    content: bytes = pb.HealthCheckResponse(status=kind).SerializeToString()
    return content


class HealthHandlers:
    """What handles the calls of `grpc.health.v1.Health`.

    Calls of it and requests never wait for each other.

    Args:
        health: What answers.
        callers: Who is known, for whom some watches are kept.
        probes: Room for calls that are open to everybody.
        peer_share: Part of the watches that one address may have, while it is not known whose.
        counters: Count the calls.

    Attributes:
        methods: By their paths.
    """

    def __init__(
        self,
        health: Health,
        callers: Callers,
        probes: Room,
        peer_share: float,
        counters: Counters,
    ) -> None:
        self._health = health
        self._counters = counters
        self._callers = callers
        self._places = Places(_MOST_WATCHERS, peer_share, _RESERVE if callers.are_named else 0.0)
        self.methods = {
            f"/{SERVICE}/Check": UnaryMethod(self._gate("Check", probes), self._check),
            f"/{SERVICE}/Watch": UnaryMethod(
                self._gate("Watch", probes), self._watch, _MOST_WATCHERS
            ),
        }

    def _gate(self, method: str, probes: Room) -> Gate:
        return Gate(
            probes,
            partial(self._callers.admit, None),
            partial(self._refused, method),
            lambda: _RETRY_AFTER_S,
            SMALL_BYTES,
            always=True,
        )

    def _check(self, raw: bytes, call: UnaryCall) -> None:
        try:
            found = self._health.check(parse(pb.HealthCheckRequest, raw, PROBE_BYTES).service)
            if found is None:
                raise ModelNotFound("there is no such service")
        except VisibleError as error:
            call.fail(self._refused("Check", error))
        else:
            self._counters.count_call("Check", "OK")
            call.answer(found)

    def _watch(self, raw: bytes, call: UnaryCall) -> None:
        peer = address_of(call)
        try:
            service = parse(pb.HealthCheckRequest, raw, PROBE_BYTES).service
            if not self._places.take(peer, known=self._callers.knows(call)):
                raise Overloaded("there is no room for more watches", _RETRY_AFTER_S)
        except VisibleError as error:
            call.fail(self._refused("Watch", error))
            return

        def end() -> None:
            self._places.give_back(peer)
            self._counters.count_call("Watch", "OK" if call.is_finished else "CANCELLED")

        if call.add_callback(end):
            self._health.watch(service, call)
        else:
            end()

    def _refused(self, method: str, error: Exception) -> Failure:
        """Count a call that has no answer, and find how it ends."""
        failure = failure_of(f"{SERVICE}/{method}", None, error)
        self._counters.count_call(method, failure.code.name, failure.reason)
        return failure
