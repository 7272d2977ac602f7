"""A batch and its messages, without a server: what is cut, joined, and not mixed up."""

import numpy as np
import pytest

from protos import inference_pb2 as pb
from serving.client.batches import ROWS, Batch, Wanted
from serving.client.errors import InvalidRequest, Overloaded, ServerFault, TimedOut
from serving.client.models import Model, Tensor

MODEL = Model(
    "m",
    ("1",),
    "",
    (Tensor("x", "FP32", (-1, 2)),),
    (Tensor("y", "FP32", (-1,)),),
    {},
    max_rows=None,
)


def answer(values: list[float], version: str) -> pb.ModelInferResponse:
    content = np.array(values, "<f4")
    return pb.ModelInferResponse(
        model_version=version,
        outputs=[pb.ModelInferResponse.InferOutputTensor(name="y", datatype="FP32", shape=[2])],
        raw_output_contents=[content.tobytes()],
    )


@pytest.fixture
def batch() -> Batch:
    return Batch(MODEL, np.zeros((6, 2)), Wanted(), rows=2)


@pytest.mark.parametrize(
    ("rows", "step", "sizes"),
    [
        pytest.param(0, 4, [0], id="none"),
        pytest.param(8, 4, [4, 4], id="even"),
        pytest.param(9, 4, [4, 4, 1], id="a rest"),
        pytest.param(2 * ROWS + 1, None, [ROWS, ROWS, 1], id="by default"),
    ],
)
def test_every_row_is_in_one_message(rows: int, step: int | None, sizes: list[int]) -> None:
    x = np.arange(2.0 * rows).reshape(rows, 2)
    batch = Batch(MODEL, x, Wanted(), rows=step)
    requests = [batch.request(part) for part in batch.parts]
    assert [request.inputs[0].shape[0] for request in requests] == sizes
    sent = b"".join(request.raw_input_contents[0] for request in requests)
    assert sent == x.astype("<f4").tobytes()


def test_answers_are_joined_in_the_order_of_the_rows_whenever_they_come(batch: Batch) -> None:
    first, second, third = batch.parts
    batch.add(third, answer([5, 6], "1"))
    batch.add(first, answer([1, 2], "1"))
    batch.add(second, answer([3, 4], "1"))
    assert batch.strays() == []
    np.testing.assert_array_equal(batch.answer().outputs["y"], [1, 2, 3, 4, 5, 6])


def test_a_model_that_changes_over_meanwhile_is_asked_again_for_what_the_old_one_said(
    batch: Batch,
) -> None:
    for part, version in zip(batch.parts, ("1", "1", "2"), strict=True):
        batch.add(part, answer([0, 0], version))
    with pytest.raises(ServerFault, match=r"found \['1', '2'\].*name a version"):
        batch.answer()
    assert batch.strays() == batch.parts[:2]
    for part in batch.strays():
        batch.add(part, answer([7, 7], "2"))
    assert batch.answer().version == "2"
    np.testing.assert_array_equal(batch.answer().outputs["y"], [7, 7, 7, 7, 0, 0])


def test_an_answer_with_other_rows_is_none(batch: Batch) -> None:
    response = answer([1, 2, 3], "1")
    response.outputs[0].shape[0] = 3
    with pytest.raises(ServerFault, match=r"expected shape \[2\] for 2 rows, found \[3\]"):
        batch.add(batch.parts[0], response)


def test_only_a_part_of_several_waits_for_room_and_only_in_its_time(batch: Batch) -> None:
    full = Overloaded("full", "RESOURCE_EXHAUSTED", 0.5)
    assert batch.pause_s(full, left_s=0.6) == 0.5
    assert batch.pause_s(full, left_s=0.4) is None
    assert batch.pause_s(TimedOut("late"), left_s=9.0) is None
    assert batch.pause_s(Overloaded("full", "RESOURCE_EXHAUSTED", None), left_s=9.0) is None
    assert Batch(MODEL, np.zeros((1, 2)), Wanted()).pause_s(full, left_s=9.0) is None


@pytest.mark.parametrize(
    ("datatype", "value", "told"),
    [
        ("INT32", 2**31, "from -2147483648 to 2147483647 for INT32"),
        ("UINT8", -1, "from 0 to 255 for UINT8"),
        ("UINT64", -1, "from 0 to 18446744073709551615 for UINT64"),
        ("FP64", 2**53 + 1, "to 9007199254740992 for FP64"),
        ("FP16", 1e6, "from -65504.0 to 65504.0 for FP16"),
    ],
)
def test_no_number_becomes_another_one(datatype: str, value: float, told: str) -> None:
    model = Model("m", (), "", (Tensor("x", datatype, (-1,)),), MODEL.outputs, {}, None)
    batch = Batch(model, np.array([0, value]), Wanted())
    with pytest.raises(InvalidRequest, match=told):
        batch.request(batch.parts[0])
