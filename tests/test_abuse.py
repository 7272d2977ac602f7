"""Clients that do what no client should, byte by byte: they are cut off, and others are served."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from hyperframe.frame import Frame, GoAwayFrame, RstStreamFrame

from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.server import Server
from serving.settings import Settings
from tests.conftest import STATE_DICTS
from tests.servers import WAIT_S, served
from tests.wire import raw_output, raw_request

UNIFORM = STATE_DICTS[0]
ROW = raw_request(UNIFORM.x[:1])
HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/inference.GRPCInferenceService/ModelInfer"),
    (":authority", "localhost"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]
_HEADER_BYTES = 9  # of a frame


class Rude:
    """A connection whose frames are written by hand."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=WAIT_S)
        self.h2 = H2Connection(H2Configuration(client_side=True))
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def frames(self) -> Iterator[Frame]:
        """Every frame that comes until the server closes the connection."""
        data = b""
        with suppress(ConnectionResetError):
            while more := self.socket.recv(65536):
                data += more
                while len(data) >= _HEADER_BYTES:
                    frame, length = Frame.parse_frame_header(memoryview(data[:_HEADER_BYTES]))
                    if len(data) < _HEADER_BYTES + length:
                        break
                    frame.parse_body(memoryview(data[_HEADER_BYTES : _HEADER_BYTES + length]))
                    data = data[_HEADER_BYTES + length :]
                    yield frame


@contextmanager
def rude(address: str) -> Iterator[Rude]:
    client = Rude(address)
    try:
        yield client
    finally:
        client.socket.close()


def answer(stub: GRPCInferenceServiceStub) -> None:
    response = stub.ModelInfer(ROW, timeout=WAIT_S)
    np.testing.assert_allclose(raw_output(response), UNIFORM.y64[:1], rtol=1e-5, atol=1e-5)


def test_who_pings_without_end_is_cut_off(server: Server, stub: GRPCInferenceServiceStub) -> None:
    with rude(server.address) as client:
        with suppress(BrokenPipeError, ConnectionResetError):
            for number in range(100):
                client.h2.ping(number.to_bytes(8))
                client.flush()
        ends = [frame for frame in client.frames() if isinstance(frame, GoAwayFrame)]
        assert [end.error_code for end in ends] == [ErrorCodes.ENHANCE_YOUR_CALM]
        answer(stub)
    answer(stub)


def test_who_opens_and_resets_without_end_holds_nobody_up(
    server: Server, stub: GRPCInferenceServiceStub
) -> None:
    calls = Settings.model_fields["max_connection_calls"].default
    with rude(server.address) as client:
        for number in range(5 * calls):
            stream = client.h2.get_next_available_stream_id()
            client.h2.send_headers(stream, HEADERS)
            client.h2.reset_stream(stream, ErrorCodes.CANCEL)
            client.flush()
            if number % 500 == 0:
                answer(stub)
        client.socket.shutdown(socket.SHUT_WR)
        resets = [frame for frame in client.frames() if isinstance(frame, RstStreamFrame)]
    # It has had as many calls as one connection may have; the others never came to anything.
    assert [frame.error_code for frame in resets] == [ErrorCodes.ENHANCE_YOUR_CALM] * 4 * calls
    answer(stub)


def test_small_bytes_that_become_large_are_refused(
    server: Server, stub: GRPCInferenceServiceStub
) -> None:
    zeros = raw_request(np.zeros((10**6, 4), np.float32))  # 16 MB; the server takes 1
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(zeros, timeout=WAIT_S, compression=grpc.Compression.Gzip)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    answer(stub)


def test_metadata_that_is_too_large_is_refused(stub: GRPCInferenceServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(ROW, metadata=(("x-much", "x" * 20_000),), timeout=WAIT_S)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    answer(stub)


def test_a_connection_that_is_old_is_asked_to_come_anew(repository: Path) -> None:
    with (
        served(repository, max_connection_age_s=0.2, grace_s=10) as (server, stub),
        rude(server.address) as client,
    ):
        end = next(frame for frame in client.frames() if isinstance(frame, GoAwayFrame))
        assert end.error_code == ErrorCodes.NO_ERROR
        answer(stub)
