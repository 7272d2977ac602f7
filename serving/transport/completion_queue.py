"""Calls of one message by a completion queue of our own, beside that of grpc.server.

grpc.server gives every call a state, locks and a thread, which cost more than a small model does on
one CPU. Here its core server gets a second queue, which one thread of ours reads: a call is
admitted or rejected, then its message is read, then its answer is sent, each by one operation of
gRPC's core. Ports, TLS, limits, keepalive, streams and reflection stay those of grpc.server.
`python -m benchmarks.serving` measures both ways.

gRPC's Cython layer is private, so it is used only where it was tried (`trial.py`). Should it fail
later, calls go by threads.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import structlog
from grpc import _common, _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from serving.budget import ANSWER_COPIES
from serving.failures import NO_MESSAGE, Failure
from serving.transport.unary import Deadline, Metadata, UnaryCall, UnaryMethod

_LOOK_S = 1.0
_WAIT_S = 0.01  # while calls are held up
_PAST = 0.0  # a deadline: do not wait
_MOST_EVENTS = 64  # before work is done while events keep coming
_MOST_FAILURES = 100  # in a row
_NO_FLAGS = 0

_log = structlog.get_logger()


OK = Failure(grpc.StatusCode.OK, "", "")
"""The status of a call that has its answer."""


class _Call(UnaryCall):
    """A call that came by a completion queue.

    Args:
        transport: Which it came by.
        method: What handles it.
        event: Which it came with.
    """

    # As most calls are until they end; a call has only what differs of its own.
    _connection: str | None = None
    _callbacks: list[Callable[[], None]] | None = None
    _is_cancelled: bool | None = None  # known once gRPC has ended it
    _is_ended = False  # nothing more is to be sent
    _is_watched = False  # gRPC reports its end
    _is_started = False  # something has been sent
    _is_sending = False
    _is_final = False  # the status goes with what is pending
    _is_finished = False
    _awaits_message = False
    _lacks_message = False
    _pending: bytes | None = None

    def __init__(self, transport: "CompletionQueueTransport", method: UnaryMethod, event: Any):
        self.method = method
        self.transport = transport
        self._room = method.gate.room
        self._call = event.call
        self._metadata: Metadata = event.invocation_metadata
        self._deadline = Deadline(event.call_details.deadline - time.time())
        self._lock = threading.RLock()  # what fails to be sent ends the call

    @property
    def runs_short(self) -> bool:
        return self.transport.runs_short

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        try:
            found = cygrpc.auth_context(self._call) or {}
            return {_common.decode(key): value for key, value in found.items()}
        except Exception as error:
            self.transport.fall_back(error)
            raise

    def peer(self) -> str:
        if self._connection is None:
            try:
                self._connection = _common.decode(self._call.peer())
            except Exception as error:
                self.transport.fall_back(error)
                raise
        return self._connection

    connection = property(peer)

    def time_remaining(self) -> float:
        return self._deadline.remaining()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        with self._lock:
            if self._is_ended:
                return False
            if self._callbacks is None:
                self._callbacks = [callback]
            else:
                self._callbacks.append(callback)
            return True

    def hold(self, size: int) -> bool:
        return self._room.hold(self, size)

    def answer(self, content: bytes) -> None:
        if self._end():
            self._callbacks = None  # and what they hold
            self._room.answer(self, ANSWER_COPIES * len(content))
            self._send(content, OK)

    def fail(self, failure: Failure) -> None:
        if self._end():
            self._callbacks = None
            self._room.answer(self)
            self._send(None, failure)

    def give_up(self, *, late: bool) -> None:
        """End, because no message has come, or because its answer is not taken."""
        if self._is_ended:
            self._call.cancel()
        else:
            self.fail(self.method.gate.silent(late=late))

    def publish(self, content: bytes) -> None:
        with self._lock:
            if not self._is_ended:
                self.watch()
                self._pending = content
                self._send_pending()

    def watch(self) -> None:
        """Have gRPC report its end before its answer is sent; the status brings the report, too."""
        with self._lock:
            if self._is_ended or self._is_watched:
                return
            self._is_watched = True
        try:
            self._start(_Call.closed, cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS))
        except Exception as error:
            self._fall_back(error)

    def finish(self) -> None:
        with self._lock:
            if not self._is_ended:
                self._is_ended = self._is_final = self._is_finished = True
                self._send_pending()

    @property
    def is_finished(self) -> bool:
        return self._is_finished

    def reject(self, failure: Failure) -> None:
        """End it before its message is read, as one that is not admitted."""
        self._is_ended = True
        self._send(None, failure)

    def receive(self) -> None:
        """Have gRPC read the message."""
        self._awaits_message = True
        try:
            self._start(_Call.received, cygrpc.ReceiveMessageOperation(_NO_FLAGS))
        except Exception as error:
            self._fall_back(error)

    def received(self, event: Any) -> None:
        """Take the message, if there is one."""
        self._awaits_message = False
        self._receive(event)
        if self._is_cancelled is not None:  # that gRPC has ended the call was heard before
            self._leave()

    def _receive(self, event: Any) -> None:
        message = event.batch_operations[0].message()
        gate = self.method.gate
        if not self._room.hear(self, len(message or b"")):
            return  # it was given up
        if message is not None:
            self.method.take(message, self)
            if not self._is_ended:
                self.transport.watch_soon(self)
        elif not event.success:  # gRPC ends it, because the message is too large
            gate.too_large()
            self.watch()
            self._end()
            self._room.answer(self)
        else:  # its client has ended its side or has gone, which is known when gRPC has ended it
            with self._lock:
                self._lacks_message = True
                is_cancelled = self._is_cancelled
            if is_cancelled is None:
                self.fail(NO_MESSAGE)
            else:
                gate.no_message(cancelled=is_cancelled)

    def closed(self, event: Any) -> None:
        """Note that gRPC has ended it: its client has all of the answer, or has gone."""
        is_cancelled = event.batch_operations[-1].cancelled()
        with self._lock:
            self._is_ended = True
            self._is_cancelled = is_cancelled
            lacks_message = self._lacks_message
            callbacks, self._callbacks = self._callbacks or (), None
        if not self._awaits_message:
            self._leave()
        if lacks_message:
            self.method.gate.no_message(cancelled=is_cancelled)
        for callback in callbacks:
            try:
                callback()
            except Exception as error:  # the others are called all the same
                _log.error("callback_failed", exc_info=error)

    def _leave(self) -> None:
        self._room.leave(self)
        self.transport.forget(self)

    def sent(self, event: Any) -> None:
        """Send what has been published meanwhile."""
        with self._lock:
            self._is_sending = False
            if event.success:
                self._send_pending()

    def abandon(self) -> None:
        """End it without an answer, because gRPC cannot be used as it was."""
        self._end()
        self._leave()
        try:
            self._call.cancel(cygrpc.StatusCode.unavailable, "the call could not be answered")
        except Exception:
            with suppress(Exception):
                self._call.cancel()

    def _end(self) -> bool:
        """Have nothing more sent; return False if it had ended."""
        with self._lock:
            was_ended, self._is_ended = self._is_ended, True
        return not was_ended

    def _send_pending(self) -> None:
        """Send what is pending unless something is under way; the lock is held."""
        if self._is_sending:
            return
        content, self._pending = self._pending, None
        is_final, self._is_final = self._is_final, False
        if content is not None or is_final:
            self._is_sending = True
            self._send(content, OK if is_final else None)

    def _send(self, content: bytes | None, status: Failure | None) -> None:
        operations = []
        try:
            if not self._is_started:
                self._is_started = True
                operations.append(cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS))
            if content is not None:
                operations.append(cygrpc.SendMessageOperation(content, _NO_FLAGS))
            if status is None:
                self._start(_Call.sent, *operations)
                return
            operations.append(cygrpc.SendStatusFromServerOperation(*_arguments(status), _NO_FLAGS))
            if self._is_watched:
                self._start(_Call.sent, *operations)
            else:  # one event for both
                self._is_watched = True
                operations.append(cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS))
                self._start(_Call.closed, *operations)
        except Exception as error:
            self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        self.transport.fall_back(error)
        self.abandon()

    def _start(self, then: "Callable[[_Call, Any], None]", *operations: Any) -> None:
        """Have gRPC begin operations, and call something with their event when they are done."""
        error = self._call.start_server_batch(operations, (then, self))
        if error:
            raise RuntimeError(f"gRPC has not begun operations: error {error}")


def _arguments(failure: Failure) -> tuple[Any, ...]:
    """Return what gRPC is told of a status: metadata, its own code, and details."""
    if failure is OK:
        return None, cygrpc.StatusCode.ok, b""
    code = _common.STATUS_CODE_TO_CYGRPC_STATUS_CODE[failure.code]
    return failure.trailing, code, failure.details.encode()


class Work(Protocol):
    """What is done between events; see `Dispatcher`."""

    @property
    def has_work(self) -> bool:
        """Whether there is something to do."""

    def run_short(self) -> None:
        """Do it."""


@dataclass(frozen=True)
class NoWork:
    """Nothing to do."""

    has_work: bool = False

    def run_short(self) -> None:
        """Do nothing."""


class CompletionQueueTransport:
    """Brings calls of some methods to what handles them, from a thread of its own.

    Args:
        server: Has not started yet. It must not have handlers of the methods.
        methods: What handles calls, by the path of the method.
        by_threads: gRPC's handlers of the same methods, for calls if gRPC fails.
        work: Done in this thread when no event waits.

    Attributes:
        runs_short: Whether its thread does work.
        is_dead: Whether calls are no longer taken though the server has not stopped.
    """

    def __init__(
        self,
        server: grpc.Server,
        methods: Mapping[str, UnaryMethod],
        by_threads: "Mapping[str, grpc.RpcMethodHandler[Any, Any]]",
        work: Work | None = None,
    ) -> None:
        self._state: Any = server._state  # type: ignore[attr-defined]
        self._stopped = self._started = self._state.stage
        self._core: Any = self._state.server
        self._methods = methods
        self._by_threads = by_threads
        self._work = work or NoWork()
        self.runs_short = work is not None
        self._queue: Any = cygrpc.CompletionQueue()
        self._core.register_completion_queue(self._queue)
        for path in methods:
            self._core.register_method(path)
        self._posted = 0
        self._open: set[_Call] = set()
        self._unwatched: list[_Call] = []
        self._arrivals: deque[_Call] = deque()
        self._held_up: deque[_Call] = deque()
        self._has_failed = False
        self.is_dead = False

    @property
    def has_failed(self) -> bool:
        """Whether calls go by threads, because gRPC has failed."""
        return self._has_failed

    def start(self) -> None:
        """Take calls; the server has started."""
        self._started = self._state.stage
        for path in self._methods:
            self._post(path)  # once, so that messages come between calls
        threading.Thread(target=self._serve, name="calls", daemon=True).start()

    def fall_back(self, error: Exception) -> None:
        """Have calls go by threads from now on, because gRPC has failed."""
        if self._has_failed:
            return
        self._has_failed = True
        _log.error("completion_queue_failed", effect="calls go by threads", exc_info=error)
        state = self._state
        try:
            with state.lock:
                state.registered_method_handlers.update(self._by_threads)
                if state.stage is self._started:
                    for path in self._by_threads:
                        _server._request_registered_call(state, path)
        except Exception as error:
            self.is_dead = True
            _log.error("calls_not_taken", exc_info=error)

    def forget(self, call: _Call) -> None:
        """Wait no longer for the end of a call: the server cannot stop before its calls end."""
        self._open.discard(call)

    def watch_soon(self, call: _Call) -> None:
        """Have the end of a call reported unless it is answered by what this thread does next."""
        if self._work.has_work:
            self._unwatched.append(call)
        else:
            call.watch()

    def _serve(self) -> None:
        """Take events until the server has stopped, and with it all calls."""
        failures, is_serving = 0, True
        work, since_work = self._work, 0  # events since there is work
        while is_serving and failures < _MOST_FAILURES:
            try:
                pause_s = _WAIT_S if self._held_up else _LOOK_S
                event = self._queue.poll(_PAST if work.has_work else time.time() + pause_s)
                tag = event.tag
                if type(tag) is tuple:  # as most are
                    self._take(event, *tag)
                elif tag is not None:
                    is_serving = self._take_other(event)
                    self._admit_arrivals()
                if self._held_up:
                    self._admit_held_up()
                if not work.has_work:
                    since_work = 0
                elif tag is None or since_work >= _MOST_EVENTS:
                    self._do_work()
                    since_work = 0
                else:
                    since_work += 1
                if not self._posted:  # which they are as long as the server takes calls
                    is_serving = is_serving and self._is_serving()
                event = tag = None  # gRPC spins as long as there is an event of a call that is over
                failures = 0
            except Exception as error:
                self.fall_back(error)
                failures += 1
        self.is_dead |= is_serving

    def _do_work(self) -> None:
        self._work.run_short()
        for call in self._unwatched:
            call.watch()
        self._unwatched.clear()

    def _is_serving(self) -> bool:
        if self._has_failed:
            return bool(self._state.stage is not self._stopped)
        return bool(self._open or self._held_up)

    def _take(self, event: Any, then: "Callable[[_Call, Any], None]", call: _Call) -> None:
        """Take an event of a call."""
        try:
            then(call, event)
        except Exception as error:
            self.fall_back(error)
            call.abandon()

    def _take_other(self, event: Any) -> bool:
        """Take a new call, or an event of one that goes by threads; return False after the last."""
        if not isinstance(event.tag, str):
            return bool(_server._process_event_and_continue(self._state, event))
        self._posted -= 1
        call = self._arrived(event)
        if call is not None:
            self._arrivals.append(call)
        elif self._has_failed:
            try:
                self._hand_over(event)
            except Exception:
                event.call.cancel()  # so that its client hears of it
                raise
        return True

    def _hand_over(self, event: Any) -> None:
        """Have a call that came go by threads."""
        state, path = self._state, event.tag
        method = _server._RegisteredMethod(path, self._by_threads[path])
        with state.lock:
            rpc_state, _ = _server._handle_call(
                *(event, method, state.interceptor_pipeline, state.thread_pool, False)
            )
            if rpc_state is not None:
                state.rpc_states.add(rpc_state)

    def _arrived(self, event: Any) -> _Call | None:
        """Make a call of an event; None if it goes by threads."""
        path = event.tag
        call = None
        try:
            if not self._has_failed:
                self._post(path)
                if event.success:  # or there is none, because the server stops
                    call = _Call(self, self._methods[path], event)
        except Exception as error:
            self.fall_back(error)
        return call

    def _admit_arrivals(self) -> None:
        """Admit or reject the calls that have arrived.

        While the room is crowded or the next call is held up, messages that have come are read
        first: their events may wait behind those of arrivals, and each makes room.
        """
        events = 0
        while self._arrivals:
            gate = self._arrivals[0].method.gate
            is_held_up = not gate.always and gate.room.is_held_up
            if (gate.room.is_crowded or is_held_up) and events < _MOST_EVENTS:
                event = self._queue.poll(_PAST)
                if type(event.tag) is tuple:
                    self._take(event, *event.tag)
                elif event.tag is not None:
                    self._take_other(event)
                else:
                    events = _MOST_EVENTS
                events += 1
            elif is_held_up:
                self._held_up.append(self._arrivals.popleft())
            else:
                self._admit(self._arrivals.popleft())

    def _admit_held_up(self) -> None:
        while self._held_up and not self._held_up[0].method.gate.room.is_held_up:
            self._admit(self._held_up.popleft())

    def _admit(self, call: _Call) -> None:
        """Have gRPC read the message of a call, or reject it before."""
        self._open.add(call)
        gate = call.method.gate
        refusal = gate.refusal(call)
        if refusal is None and not gate.room.enter(call):
            refusal = gate.full()
        if refusal is None:
            call.receive()
        else:
            call.reject(refusal)

    def _post(self, path: str) -> None:
        """Have gRPC report the next call of a method."""
        with self._state.lock:  # so that the server does not stop meanwhile
            if self._state.stage is self._started:
                error = self._core.request_registered_call(self._queue, self._queue, path, path)
                if error:
                    raise RuntimeError(f"gRPC does not take a request for calls: error {error}")
                self._posted += 1
