"""The messages of a stream, which say whether they ended because one was too large.

gRPC ends such a stream by itself, and shows its handler the same end as that of a client that has
sent all it wanted. This is a private part of grpc.server; where it is not as it was in the versions
that were tried, the two ends are not told apart.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from grpc import _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]


class _Messages(_server._RequestIterator):
    """gRPC's own iterator, which sees how each message was received.

    Args:
        messages: gRPC's own.
    """

    def __init__(self, messages: Any) -> None:
        super().__init__(messages._state, messages._call, messages._request_deserializer)
        self.is_too_large = False

    def _raise_or_start_receive_message(self) -> None:
        state: Any = self._state
        if state.client is _server._CANCELLED or state.statused:
            super()._raise_or_start_receive_message()  # which raises
            return
        take = _server._receive_message(state, self._call, self._request_deserializer)

        def received(event: Any) -> Any:
            self.is_too_large = not event.success
            return take(event)

        self._call.start_server_batch(
            (cygrpc.ReceiveMessageOperation(_server._EMPTY_FLAGS),), received
        )
        state.due.add(_server._RECEIVE_MESSAGE_TOKEN)


def watched(messages: Iterator[bytes]) -> Iterator[bytes]:
    """Return the messages so that `is_too_large` can be asked of them, if gRPC allows it."""
    with suppress(Exception):
        return _Messages(messages)
    return messages


def is_too_large(messages: object) -> bool:
    """Whether messages of a stream have ended because one was too large."""
    return isinstance(messages, _Messages) and messages.is_too_large
