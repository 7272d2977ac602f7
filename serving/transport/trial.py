"""Calls by a completion queue, tried at start with what grpcio there is."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import grpc
import structlog

from serving.callers import Caller
from serving.failures import Failure
from serving.gate import Gate
from serving.messages import AS_SENT
from serving.room import Room, peer_of
from serving.transport.completion_queue import CompletionQueueTransport
from serving.transport.unary import UnaryCall, UnaryMethod

TRIED = ("1.81", "1.82", "1.83", "1.84", "1.85")
"""Versions of grpcio that this was tried with."""

_log = structlog.get_logger()


@cache
def is_usable() -> bool:
    """Whether calls can come by a completion queue: they do with this grpcio, and it is known."""
    if grpc.__version__.rsplit(".", 1)[0] not in TRIED:
        reason = f"grpcio {grpc.__version__} is not among {', '.join(TRIED)}"
    else:
        try:
            _try()
            return True
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    _log.warning("completion_queue_not_used", effect="calls go by threads", reason=reason)
    return False


_SERVICE = "kanserve.Trial"
_TRIAL_S = 5.0
_TRIAL_BYTES = 2**16  # more than one frame


def _try() -> None:
    """Have calls answered, failed, cancelled and watched, with all that handlers look at.

    Raises:
        Exception: Something is not as it was in the versions that were tried.
    """
    admitted: list[Any] = []
    ended = threading.Event()
    failure = Failure(grpc.StatusCode.NOT_FOUND, "there is none", "invalid", retry_after_s=1.0)

    def admit(caller: Caller) -> None:
        _require(peer_of(caller.peer()) == "127.0.0.1", "the address of a caller")
        names = {"transport_security_type", "security_level"}  # which there are without TLS as well
        found = dict(caller.invocation_metadata())["k"], set(caller.auth_context()) - names
        admitted.append(found)

    def answer(message: bytes, call: UnaryCall) -> None:
        # gRPC rounds what is left up, so that it may be more than what was given.
        _require(0 < call.time_remaining() < 2 * _TRIAL_S, "a deadline")
        call.answer(message)

    def watch_once(message: bytes, call: UnaryCall) -> None:
        call.add_callback(ended.set)
        call.publish(b"")
        call.publish(message)

    gate = Gate(Room(8, _TRIAL_S), admit, lambda error: failure, lambda: 0.0, 2**20)
    begun: dict[str, Callable[[bytes, UnaryCall], None]] = {
        "Answer": answer,
        "Fail": lambda message, call: call.fail(failure),
        "Watch": watch_once,
    }
    methods = {
        f"/{_SERVICE}/{name}": UnaryMethod(gate, begin, watchers=int(name == "Watch"))
        for name, begin in begun.items()
    }
    server = grpc.server(ThreadPoolExecutor(1), options=[AS_SENT])
    transport = CompletionQueueTransport(server, methods, {})
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
    try:
        transport.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            message = bytes(_TRIAL_BYTES)
            metadata = (("k", "v"),)

            def call(name: str) -> Any:
                method: Any = channel.unary_stream(f"/{_SERVICE}/{name}")
                return method(message, timeout=_TRIAL_S, metadata=metadata)

            _require(list(call("Answer")) == [message], "an answer")
            failed = call("Fail")
            _require(failed.code() is failure.code, "a status")
            _require(failed.details() == failure.details, "a status's details")
            _require(set(failure.trailing) <= set(failed.trailing_metadata()), "metadata")
            watch = call("Watch")
            _require(list(itertools.islice(watch, 2)) == [b"", message], "several answers")
            watch.cancel()
            _require(ended.wait(_TRIAL_S), "the end of a call that is cancelled")
        _require(all(found == ("v", set()) for found in admitted), "what a caller has sent")
        _require(not transport.has_failed, "that nothing failed")
    finally:
        server.stop(0)  # which does not wait, as None would


def _require(is_so: bool, what: str) -> None:
    if not is_so:
        raise RuntimeError(f"a trial of the completion queue: expected {what}")
