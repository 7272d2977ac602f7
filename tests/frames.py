"""Connections of HTTP/2 whose frames are written one by one, for what no client does."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import StreamEnded, StreamReset
from h2.exceptions import StreamClosedError

WAIT_S = 60.0  # for what happens at once unless something is wrong


class Frames:
    """A connection.

    Args:
        address: Of the server.
        source: From where.
        acknowledge: Whether it reads the server's settings, and says so.
        tls: How it speaks TLS; None without.
    """

    def __init__(
        self,
        address: str,
        source: str = "127.0.0.1",
        *,
        acknowledge: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection(
            (host, int(port)), timeout=WAIT_S, source_address=(source, 0)
        )
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname=host)
        config = H2Configuration(
            client_side=True, header_encoding="utf-8", validate_outbound_headers=False
        )
        self.h2 = H2Connection(config)
        self._statuses: list[str] = []
        self._ended: set[int] = set()  # calls
        self.h2.initiate_connection()
        self.flush()
        if acknowledge:
            self.h2.receive_data(self.socket.recv(65_536))
            self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def call(self, method: str, *metadata: tuple[str, str], encoding: str = "gzip") -> int:
        """Send the headers of a call, and nothing more."""
        stream: int = self.h2.get_next_available_stream_id()
        headers = [
            *((":method", "POST"), (":scheme", "http"), (":path", method)),
            *((":authority", "localhost"), ("te", "trailers")),
            *(("content-type", "application/grpc"), ("grpc-encoding", encoding)),
        ]
        self.h2.send_headers(stream, [*headers, *metadata])
        self.flush()
        return stream

    def send(
        self, stream: int, content: bytes, *, compressed: bool, claimed: int | None = None
    ) -> None:
        """Send the message of a call, and end it.

        Args:
            stream: Of the call.
            content: Of the message.
            compressed: Whether it says that it is.
            claimed: Bytes that it says it has, and then does not end; by default those it has.
        """
        length = len(content) if claimed is None else claimed
        frame = bytes([compressed]) + length.to_bytes(4, "big") + content
        for start in range(0, len(frame), 16_384):
            part = frame[start : start + 16_384]
            while self.h2.local_flow_control_window(stream) < len(part):
                if any(_ends(event, stream) for event in self.read()):
                    return  # the server wants no more of it
            last = start + len(part) == len(frame) and claimed is None
            self.h2.send_data(stream, part, end_stream=last)
            self.flush()

    def cancel(self, stream: int) -> None:
        """Reset a call, unless it has ended by now."""
        with suppress(StreamClosedError):
            self.h2.reset_stream(stream, 8)  # CANCEL
        self.flush()

    def read(self) -> list[Any]:
        """Read what comes next; an empty list is never returned.

        Raises:
            ConnectionError: The server has closed the connection.
        """
        data = self.socket.recv(65_536)
        if not data:
            raise ConnectionError("closed")
        events: list[Any] = self.h2.receive_data(data)
        for event in events:
            headers = getattr(event, "headers", None) or ()
            status = [value for key, value in headers if key == "grpc-status"]
            if isinstance(event, StreamReset) and event.stream_id not in self._ended:
                status = ["reset"]
            if status:
                self._statuses += status
                self._ended.add(event.stream_id)
        self.flush()
        return events

    def statuses(self, count: int) -> list[str]:
        """Read how so many calls end: with a status, or reset. Some may have ended before."""
        while len(self._statuses) < count:
            self.read()
        found, self._statuses = self._statuses, []
        return found


def _ends(event: Any, stream: int) -> bool:
    return isinstance(event, StreamEnded | StreamReset) and event.stream_id == stream


@contextmanager
def frames(address: str, source: str = "127.0.0.1", **options: Any) -> Iterator[Frames]:
    connection = Frames(address, source, **options)
    try:
        yield connection
    finally:
        connection.socket.close()
