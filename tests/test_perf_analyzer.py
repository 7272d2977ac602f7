"""Triton's load generator against our server."""

import csv
import os
import subprocess
from pathlib import Path

import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.server import Server
from tests.conftest import ROOT, STATE_DICTS

VENV = ROOT / ".venv-perfanalyzer"
UNIFORM = STATE_DICTS[0]
ROWS = 8
REQUESTS = 200


@pytest.mark.skipif(
    not (VENV / "installed").exists(), reason="`make test` found no perf_analyzer for this machine"
)
@pytest.mark.parametrize("way", [["--sync"], ["--async"], ["--async", "--streaming"]], ids=" ".join)
def test_perf_analyzer_measures_the_server(
    server: Server, stub: GRPCInferenceServiceStub, tmp_path: Path, way: list[str]
) -> None:
    def answered() -> int:
        asked = pb.ModelStatisticsRequest(name=UNIFORM.name)
        (found,) = stub.ModelStatistics(asked).model_stats
        count: int = found.inference_stats.success.count
        return count

    before = answered()
    report = tmp_path / "report.csv"
    arguments = {
        "-i": "grpc",
        "-u": server.address,
        "-m": UNIFORM.name,
        "-b": ROWS,
        "--shape": f"input:{UNIFORM.widths[0]}",
        "--concurrency-range": 2,
        # Not --request-count: what is answered before its measuring begins it never counts, and
        # then it waits for ever for the rest.
        "--measurement-mode": "count_windows",
        "--measurement-request-count": REQUESTS,
        "--stability-percentage": 999,
        "-f": report,
    }
    pairs = [str(word) for pair in arguments.items() for word in pair]
    cuda = next(VENV.glob("lib/python*/site-packages/nvidia/cuda_runtime/lib"))
    done = subprocess.run(
        [VENV / "bin" / "perf_analyzer", *pairs, "--verbose-csv", *way],
        env=os.environ | {"LD_LIBRARY_PATH": f"{VENV / 'lib'}:{cuda}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Avg request latency" in done.stdout  # the server's, from its statistics
    assert answered() - before >= REQUESTS
    (line,) = csv.DictReader(report.read_text().splitlines())
    assert float(line["Inferences/Second"]) > 0
    assert float(line["Server Queue"]) >= 0
    assert float(line["Server Compute Infer"]) > 0
