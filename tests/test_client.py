"""`KanClient` and `AsyncKanClient` against real servers: what they ask, give and refuse."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.client import (
    AsyncKanClient,
    Closed,
    InvalidRequest,
    KanClient,
    ModelNotFound,
    ServerFault,
)
from serving.server import Server
from tests.bare import A, Bare, N, answering, received
from tests.bundles import publish
from tests.clients import ADAPTED, ROWS, UNIFORM, assert_close, both_ways, infers
from tests.conftest import STATE_DICTS, Golden
from tests.servers import WAIT_S, await_true, served
from tests.wire import raw_output, raw_request


def test_answers_are_the_models(server: Server, golden: Golden) -> None:
    for found in both_ways(server.address, "infer", golden.name, golden.x.astype(np.float64)):
        assert found.dtype == np.float32
        assert_close(found, golden.y64)


def test_a_batch_in_messages_has_the_same_bits_as_in_one(
    server: Server, stub: GRPCInferenceServiceStub
) -> None:
    whole = raw_output(stub.ModelInfer(raw_request(ROWS)))
    told: list[int] = []
    with KanClient(server.address) as client:
        answer = client.infer_all(UNIFORM.name, ROWS, progress=told.append)
    assert told == [1024, 1024, 452]
    np.testing.assert_array_equal(answer.outputs["output"], whole)
    for found in both_ways(server.address, "infer", UNIFORM.name, ROWS[:500]):
        np.testing.assert_allclose(found, whole[:500], rtol=1e-5, atol=1e-6)


def test_no_message_has_more_rows_than_the_server_takes(
    repository: Path, stub: GRPCInferenceServiceStub
) -> None:
    with (
        served(repository, max_message_bytes=2**13) as (server, _),
        KanClient(server.address, rows_per_message=2**20) as client,
    ):
        assert client.metadata(UNIFORM.name).max_rows == (2**13 - 1024) // 16
        found = client.infer(UNIFORM.name, ROWS)
    expected = raw_output(stub.ModelInfer(raw_request(ROWS)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_no_rows_and_one_row_are_batches_too(server: Server) -> None:
    for rows in (0, 1):
        for found in both_ways(server.address, "infer", UNIFORM.name, UNIFORM.x[:rows]):
            assert_close(found, UNIFORM.y64[:rows])
            found += 1  # the caller's own


def test_what_is_asked_for_comes_with_the_answer(server: Server) -> None:
    for answer in both_ways(
        server.address, "infer_all", UNIFORM.name, UNIFORM.x[:10], version=1, details=True
    ):
        assert answer.version == "1"
        assert [details["provider"] for details in answer.details] == ["cpu", "cpu"]  # 7 and 3
        assert all(details["batch_rows"] >= 3 for details in answer.details)


def test_models_are_listed_and_described(server: Server) -> None:
    for found in both_ways(server.address, "models"):
        assert [(one.name, one.version, one.state) for one in found] == [
            (name, "1", "READY") for name in sorted(golden.name for golden in STATE_DICTS)
        ]
    for model in both_ways(server.address, "metadata", ADAPTED.name):
        assert [str(spec) for spec in model.inputs] == ["input FP32 [-1, 5]"]
        assert [str(spec) for spec in model.outputs] == ["output FP32 [-1, 3]"]
        assert model.versions == ("1",)
        assert model.max_rows == (2**20 - 1024) // 20
    assert both_ways(server.address, "is_ready") == [True, True]
    assert both_ways(server.address, "is_ready", UNIFORM.name, 1) == [True, True]
    for error in both_ways(server.address, "is_ready", UNIFORM.name, 2):
        assert isinstance(error, ModelNotFound)


@pytest.mark.parametrize(
    ("x", "told"),
    [
        pytest.param(UNIFORM.x[:, :3], "expected shape [-1, 4]", id="columns"),
        pytest.param(UNIFORM.x[0], "one row is x[np.newaxis]", id="one row"),
        pytest.param(UNIFORM.x.astype(complex), "found complex128", id="complex"),
        pytest.param([["a", "b", "c", "d"]], "found <U1", id="text"),
        pytest.param([[1, 2, 3, 4], [5]], "expected an array", id="ragged"),
        pytest.param({"x": UNIFORM.x}, "expected inputs ['input'], found ['x']", id="name"),
        pytest.param([[0, 0, 0, 2**24 + 1]], "from -16777216 to 16777216", id="whole number"),
        pytest.param([[0, 0, 0, 1e39]], "for FP32, found 0.0 to 1e+39", id="range"),
    ],
)
def test_what_does_not_fit_is_told_before_it_is_sent(server: Server, x: Any, told: str) -> None:
    before = infers(server)
    for error in both_ways(server.address, "infer", UNIFORM.name, x):
        assert isinstance(error, InvalidRequest)
        assert told in str(error)
    assert infers(server) == before


@pytest.mark.parametrize(
    "x",
    [
        pytest.param([[1, -2, 2**24, 0]], id="whole numbers"),
        pytest.param(np.array([[1, 0, 255, 3]], np.uint8), id="bytes"),
        pytest.param(np.array([[True, False, True, True]]), id="booleans"),
        pytest.param(np.asfortranarray(ROWS[:9].astype(">f4")), id="another order of bytes"),
        pytest.param(np.array([[np.nan, np.inf, -np.inf, 1e-60]]), id="floats that are no numbers"),
        pytest.param(ROWS[:20:3, ::-1], id="a view"),
    ],
)
def test_what_loses_nothing_is_converted(
    server: Server, stub: GRPCInferenceServiceStub, x: Any
) -> None:
    expected = raw_output(stub.ModelInfer(raw_request(np.array(x, np.float32))))
    for found in both_ways(server.address, "infer", UNIFORM.name, x):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_several_tensors_go_by_their_names() -> None:
    servicer = Bare()
    inputs = {"n": N.astype(np.int32), "a": A.astype(np.float64)}
    with answering(servicer) as port:
        address = f"127.0.0.1:{port}"
        for answer in both_ways(address, "infer_all", "pair", inputs):
            np.testing.assert_array_equal(answer.outputs["total"], A + N[:, None])
            np.testing.assert_array_equal(answer.outputs["twice"], 2 * A)
        for found in both_ways(address, "infer", "pair", inputs, output="twice"):
            np.testing.assert_array_equal(found, 2 * A)
        sent = len(servicer.requests)
        for told, output, passed in (
            ("expected one output, found ['total', 'twice']", None, inputs),
            ("expected an output of ['total', 'twice'], found 'half'", "half", inputs),
            ("pass a mapping of names to arrays", "total", A),
            ("whole numbers for INT64, found float64", "total", {"a": A, "n": N / 1}),
            ("the same number of rows", "total", {"a": A, "n": N[:2]}),
        ):
            for error in both_ways(address, "infer", "pair", passed, output=output):
                assert isinstance(error, InvalidRequest)
                assert told in str(error)
    assert len(servicer.requests) == sent
    assert [output.name for output in servicer.requests[-1].outputs] == ["twice"]
    np.testing.assert_array_equal(received(servicer.requests[-1])["n"], N)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: r.raw_output_contents.pop(), "expected 2 outputs as raw bytes, found 1"),
        (lambda r: r.outputs[0].shape.__setitem__(0, 9), "found 24 bytes"),
        (lambda r: setattr(r.outputs[0], "name", "half"), "found ['half', 'twice']"),
        (lambda r: setattr(r.outputs[0], "datatype", "BYTES"), "found 24 bytes"),
    ],
)
def test_what_is_no_answer_is_not_taken_for_one(change: Callable[[Any], None], told: str) -> None:
    with answering(Bare(change=change)) as port:
        for error in both_ways(f"127.0.0.1:{port}", "infer_all", "pair", {"a": A, "n": N}):
            assert isinstance(error, ServerFault)
            assert told in str(error)


def test_there_is_no_such_model_is_told_with_where_to_look(server: Server) -> None:
    for version in ("", 1):
        for error in both_ways(server.address, "infer", "none", UNIFORM.x, version=version):
            assert isinstance(error, ModelNotFound)
            assert error.code == "NOT_FOUND"
            assert str(error).startswith(f"{server.address}: ")
            assert str(error).count("model 'none'") == 1
            assert "`kan-client models` lists what there is" in str(error)


def test_a_model_that_takes_something_else_by_now_is_asked_about_again(
    repository: Path, tmp_path: Path
) -> None:
    publish(repository / UNIFORM.name / "1", tmp_path / "m", 1)
    with (
        served(tmp_path, model_control="poll", poll_s=0.01) as (server, _),
        KanClient(server.address) as client,
    ):
        assert_close(client.infer("m", UNIFORM.x), UNIFORM.y64)
        publish(repository / ADAPTED.name / "1", tmp_path / "m", 2)
        await_true(
            lambda: [one.version for one in client.models() if one.state == "READY"] == ["2"]
        )
        with pytest.raises(InvalidRequest, match=r"expected shape \[-1, 5\]"):
            client.infer("m", UNIFORM.x)
        assert_close(client.infer("m", ADAPTED.x), ADAPTED.y64)


def test_a_model_that_gives_something_else_by_now_is_asked_about_again() -> None:
    servicer = Bare(outputs=("twice",))
    with answering(servicer) as port, KanClient(f"127.0.0.1:{port}") as client:
        np.testing.assert_array_equal(client.infer("pair", {"a": A, "n": N}), 2 * A)
        servicer.outputs = ("total",)
        with pytest.raises(ServerFault, match="the model may have changed meanwhile"):
            client.infer("pair", {"a": A, "n": N})
        np.testing.assert_array_equal(client.infer("pair", {"a": A, "n": N}), A + N[:, None])


def test_an_event_loop_has_many_calls_at_a_time(server: Server, golden: Golden) -> None:
    async def ask() -> list[NDArray[Any]]:
        async with AsyncKanClient(server.address) as client:
            calls = [client.infer(golden.name, golden.x) for _ in range(20)]
            return list(await asyncio.gather(*calls))

    for found in asyncio.run(ask()):
        assert_close(found, golden.y64)


def test_threads_share_a_client(server: Server) -> None:
    found: list[NDArray[Any]] = []
    with KanClient(server.address, rows_per_message=5) as client:

        def ask() -> None:
            for golden in STATE_DICTS:
                found.append(client.infer(golden.name, golden.x))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4 * len(STATE_DICTS)


CALLS: list[tuple[str, tuple[Any, ...]]] = [
    *(("infer", ("m", A)), ("infer_all", ("m", A)), ("metadata", ("m",))),
    *(("models", ()), ("is_ready", ())),
]


def test_a_client_that_was_closed_says_so() -> None:
    async def ask_all() -> None:
        client = AsyncKanClient("127.0.0.1:1")
        await client.close()
        for method, arguments in CALLS:
            with pytest.raises(Closed, match="the client was closed; make another"):
                await getattr(client, method)(*arguments)
        await client.close()

    asyncio.run(ask_all())
    client = KanClient("127.0.0.1:1")
    client.close()
    for method, arguments in CALLS:
        with pytest.raises(Closed, match="the client was closed; make another"):
            getattr(client, method)(*arguments)
    client.close()


@dataclass
class Held:
    """Holds the answers of a server back."""

    asked: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def __call__(self, response: pb.ModelInferResponse) -> None:
        self.asked.set()
        assert self.go_on.wait(WAIT_S)


@pytest.mark.parametrize("rows", [1, 5])  # in a message; several are asked for in another way
def test_what_is_under_way_when_a_client_is_closed_is_told_so(rows: int) -> None:
    held = Held()
    with answering(Bare(change=held)) as port, ThreadPoolExecutor(1) as pool:
        client = KanClient(f"127.0.0.1:{port}", rows_per_message=rows)
        asked = pool.submit(client.infer_all, "pair", {"a": A, "n": N})
        assert held.asked.wait(WAIT_S)
        client.close()
        with pytest.raises(Closed):
            asked.result(WAIT_S)
        held.go_on.set()


def test_a_closed_client_is_told_from_a_task_that_is_cancelled() -> None:
    held = Held()

    async def ask(port: int) -> None:
        client = AsyncKanClient(f"127.0.0.1:{port}")
        closed, cancelled = (
            asyncio.create_task(client.infer_all("pair", {"a": A, "n": N})) for _ in range(2)
        )
        assert await asyncio.to_thread(held.asked.wait, WAIT_S)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await client.close()
        with pytest.raises(Closed):
            await closed
        held.go_on.set()

    with answering(Bare(change=held)) as port:
        asyncio.run(ask(port))
