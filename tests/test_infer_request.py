"""Requests whose headers are known, and those that are not, must be the same to clients."""

from typing import Any

import numpy as np
import pytest

from kan_bundle.manifest import TensorSpec
from protos import inference_pb2 as pb
from serving import infer_request
from serving.errors import InvalidRequest, VisibleError
from serving.infer_request import Arrays, InferRequest, Plan, RequestReader
from serving.value_rules import value_rules
from tests.mutated import run


class Manifest:
    """What the reader looks at."""

    name, version = "m", 3
    inputs = (TensorSpec("x", "FP32", (-1, 4)), TensorSpec("t", "INT64", (-1,)))
    outputs = (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("z", "FP32", (-1, 3, 2)))


def reader(**changes: Any) -> RequestReader:
    manifest: Any = type("Changed", (Manifest,), changes)
    return RequestReader(manifest, value_rules(manifest.inputs))


def message(rows: int = 2, seed: int = 0, **changes: Any) -> pb.ModelInferRequest:
    """A request of two inputs, the second one first."""
    chance = np.random.default_rng(seed)
    x, t = chance.normal(size=(rows, 4)).astype("<f4"), chance.integers(0, 9, rows, "<i8")
    request = pb.ModelInferRequest(model_name="m", **changes)
    request.inputs.add(name="t", datatype="INT64", shape=[rows])
    request.inputs.add(name="x", datatype="FP32", shape=[rows, 4])
    request.raw_input_contents.extend([t.tobytes(), x.tobytes()])
    return request


def read(of: RequestReader, request: pb.ModelInferRequest) -> tuple[InferRequest, Plan, Arrays]:
    found = InferRequest(request.SerializeToString())
    return (found, *of.read(found))


def outputs(rows: int) -> Arrays:
    chance = np.random.default_rng(rows)
    return [chance.normal(size=(rows, *s.shape[1:])).astype("f4") for s in Manifest.outputs]


def test_our_parser_and_protobufs_find_the_same() -> None:
    assert run(20_000, seed=1).keys() == {"same", "invalid", "left to protobuf"}


def test_a_known_header_is_not_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = reader()
    read(ours, message())
    monkeypatch.setattr(infer_request, "parse_inflated", None)
    for seed in range(3):
        found, plan, arrays = read(ours, message(seed=seed, id=f"request {seed}"))
        expected = message(seed=seed)
        assert (found.model_name, found.model_version) == ("m", "")
        assert (found.id, plan.rows) == (f"request {seed}", 2)
        t, x = expected.raw_input_contents
        assert [array.tobytes() for array in arrays] == [x, t]
        assert [(array.shape, array.flags.aligned) for array in arrays] == [
            ((2, 4), True),
            ((2,), True),
        ]


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("asked", [[], ["z"], ["z", "y"]])
def test_answers_are_the_bytes_that_protobuf_writes(rows: int, asked: list[str]) -> None:
    ours, request = reader(), message(rows)
    for name in asked:
        request.outputs.add(name=name)
    for request_id in ("", "7", "ä" * 100):
        request.id = request_id
        found, plan, _ = read(ours, request)
        written = plan.answer(found.id, outputs(rows))
        assert written == plan.response(found.id, outputs(rows)).SerializeToString()
        answer = pb.ModelInferResponse.FromString(written)
        assert (answer.model_name, answer.model_version, answer.id) == ("m", "3", request_id)
        assert [tensor.name for tensor in answer.outputs] == (asked or ["y", "z"])
        of_name = dict(zip(("y", "z"), outputs(rows), strict=True))
        for tensor, content in zip(answer.outputs, answer.raw_output_contents, strict=True):
            assert content == of_name[tensor.name].tobytes()
            assert tuple(tensor.shape) == of_name[tensor.name].shape


def test_outputs_of_another_shape_are_written_as_they_are() -> None:
    _, plan, _ = read(reader(), message(2))
    for rows in (2, 5, 2):
        answer = pb.ModelInferResponse.FromString(plan.answer("", outputs(rows)))
        assert [tuple(tensor.shape) for tensor in answer.outputs] == [(rows, 2), (rows, 3, 2)]
        assert list(answer.raw_output_contents) == [array.tobytes() for array in outputs(rows)]


def wrong_size(request: pb.ModelInferRequest) -> None:
    request.raw_input_contents[1] += b"\0\0\0\0"


def one_too_few(request: pb.ModelInferRequest) -> None:
    del request.raw_input_contents[1]


def none(request: pb.ModelInferRequest) -> None:
    del request.raw_input_contents[:]


def nan(request: pb.ModelInferRequest) -> None:
    request.raw_input_contents[1] = np.full((2, 4), np.nan, "<f4").tobytes()


def no_boolean(request: pb.ModelInferRequest) -> None:
    request.raw_input_contents[0] = b"\2\0"


@pytest.mark.parametrize("damage", [wrong_size, one_too_few, none, nan, no_boolean])
def test_a_known_header_excuses_nothing(damage: Any) -> None:
    x = TensorSpec("x", "FP32", (-1, 4), rejects_nan=True)
    t = TensorSpec("t", "BOOL" if damage is no_boolean else "INT64", (-1,))
    request = message()
    if damage is no_boolean:
        request.inputs[0].datatype = "BOOL"
        request.raw_input_contents[0] = b"\1\0"
    known, fresh = reader(inputs=(x, t)), reader(inputs=(x, t))
    read(known, request)
    damage(request)
    texts = []
    for each in (known, fresh):
        with pytest.raises(VisibleError) as refused:
            read(each, request)
        texts.append((type(refused.value), str(refused.value)))
    assert texts[0] == texts[1]


def test_headers_that_never_come_again_take_no_memory() -> None:
    ours = reader()
    for number in range(5000):
        read(ours, message(parameters={"timeout": pb.InferParameter(int64_param=number + 1)}))
    assert len(ours._plans) <= 512
    assert len(infer_request._names) <= 4096


def test_what_is_no_message_is_invalid() -> None:
    for content in (b"\xff", b"\x0a\x05m", b"\x1a\x01\xff"):
        with pytest.raises(InvalidRequest):
            InferRequest(content)
