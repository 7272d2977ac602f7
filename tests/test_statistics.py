"""ModelStatistics, against what was asked."""

import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.observability.statistics import Spent, Statistics
from tests.conftest import STATE_DICTS
from tests.servers import served
from tests.wire import raw_request

UNIFORM = STATE_DICTS[0]


def tell(stub: GRPCInferenceServiceStub, name: str = "") -> dict[str, pb.ModelStatistics]:
    found = stub.ModelStatistics(pb.ModelStatisticsRequest(name=name)).model_stats
    return {statistics.name: statistics for statistics in found}


def test_requests_runs_and_rows_are_counted(repository: Path) -> None:
    x = np.zeros((1000, UNIFORM.widths[0]), np.float32)
    rows = [1, 7, 7, 0, 1000]
    before_ms = time.time_ns() // 10**6
    with served(repository, max_batch_rows=400) as (_, stub):
        for count in rows:
            stub.ModelInfer(raw_request(x[:count]))
        for bad in (raw_request(x[:, :-1]), raw_request(x, model_version="9")):
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(bad)
        everything = tell(stub)
        (only,) = tell(stub, UNIFORM.name).values()
        version = stub.ModelStatistics(pb.ModelStatisticsRequest(name=UNIFORM.name, version="1"))
    assert everything[UNIFORM.name] == only == version.model_stats[0]
    assert set(everything) == {golden.name for golden in STATE_DICTS}
    assert everything[STATE_DICTS[1].name].inference_stats.success.count == 0
    assert (only.name, only.version) == (UNIFORM.name, "1")
    assert only.inference_count == sum(rows)
    # One after the other, so by themselves; the last in three parts.
    assert {run.batch_size: run.compute_infer.count for run in only.batch_stats} == {
        0: 1,
        1: 1,
        7: 2,
        200: 1,
        400: 2,
    }
    assert only.execution_count == 7
    assert before_ms <= only.last_inference <= time.time_ns() // 10**6
    times = only.inference_stats
    assert times.fail.count == 1  # no version 9 is not a version's
    parts = (times.queue, times.compute_input, times.compute_infer, times.compute_output)
    assert {part.count for part in (times.success, *parts)} == {len(rows)}
    assert 0 < sum(part.ns for part in parts) <= times.success.ns
    in_runs = sum(run.compute_infer.ns for run in only.batch_stats)
    assert 0 < in_runs <= times.compute_infer.ns


def test_a_request_in_company_is_counted_for_itself_and_the_run_once() -> None:
    statistics = Statistics("m", 3)
    statistics.count_run(5, 100e-9)
    spent = Spent(200e-9, 20e-9, 10e-9, 5e-9, 100e-9, 30e-9)
    statistics.count_answers((2, 3), (spent, spent))
    statistics.count_failure(7e-9)
    found = statistics.message()
    assert (found.name, found.version) == ("m", "3")
    assert (found.inference_count, found.execution_count) == (5, 1)
    assert found.inference_stats == pb.InferStatistics(
        success=pb.StatisticDuration(count=2, ns=400),
        fail=pb.StatisticDuration(count=1, ns=7),
        queue=pb.StatisticDuration(count=2, ns=20),
        compute_input=pb.StatisticDuration(count=2, ns=40),
        compute_infer=pb.StatisticDuration(count=2, ns=200),
        compute_output=pb.StatisticDuration(count=2, ns=60),
    )
    (run,) = found.batch_stats
    assert (run.batch_size, run.compute_infer.count, run.compute_infer.ns) == (5, 1, 100)


@pytest.mark.parametrize(("name", "version"), [("nope", ""), (UNIFORM.name, "9"), ("", "1")])
def test_of_what_is_not_there_nothing_is_told(
    stub: GRPCInferenceServiceStub, name: str, version: str
) -> None:
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelStatistics(pb.ModelStatisticsRequest(name=name, version=version))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
