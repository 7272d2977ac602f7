"""Triton's load generator against our server."""

import csv
import subprocess
from pathlib import Path

import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.server import Server
from tests.conftest import ROOT, STATE_DICTS

PERF_ANALYZER = ROOT / ".venv-perfanalyzer" / "bin" / "perf_analyzer"
UNIFORM = STATE_DICTS[0]
ROWS = 8
REQUESTS = 200


@pytest.mark.skipif(not PERF_ANALYZER.exists(), reason="there is no perf_analyzer for this machine")
@pytest.mark.parametrize("way", [["--sync"], ["--async"], ["--async", "--streaming"]], ids=" ".join)
def test_perf_analyzer_measures_the_server(
    server: Server, stub: GRPCInferenceServiceStub, tmp_path: Path, way: list[str]
) -> None:
    def answered() -> int:
        asked = pb.ModelStatisticsRequest(name=UNIFORM.name)
        (found,) = stub.ModelStatistics(asked).model_stats
        return found.inference_stats.success.count

    before = answered()
    report = tmp_path / "report.csv"
    done = subprocess.run(
        [
            PERF_ANALYZER,
            *("-i", "grpc", "-u", server.address, "-m", UNIFORM.name, "-b", str(ROWS)),
            *("--shape", f"input:{UNIFORM.widths[0]}", "--concurrency-range", "2"),
            *("--request-count", str(REQUESTS), "--verbose-csv", "-f", report, *way),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Server:" in done.stdout
    assert answered() - before >= REQUESTS
    (line,) = csv.DictReader(report.read_text().splitlines())
    assert float(line["Inferences/Second"]) > 0
    assert float(line["Server Queue"]) >= 0
    assert float(line["Server Compute Infer"]) > 0
