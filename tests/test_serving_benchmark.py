"""The benchmark of servers: that it believes no wrong answer, and counts right."""

import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import serving, serving_report
from benchmarks.load import Closed, LoadFailed, Target, closed_loop, open_loop
from benchmarks.servers import CONTENDERS, NotStarted, Question, started
from benchmarks.serving_report import STYLES, Measured, Results, Settings
from protos import inference_pb2 as pb
from serving.client.load import Latencies, Opened
from tests.conftest import STATE_DICTS
from tests.ports import free_port

UNIFORM = STATE_DICTS[0]
QUESTION = Question(UNIFORM.x, UNIFORM.y64.astype(np.float32))


def test_only_the_models_answer_is_an_answer() -> None:
    right = QUESTION.expected.astype("<f4")
    assert QUESTION.is_answered_by(right.tobytes(), "http")
    assert QUESTION.is_answered_by(
        pb.ModelInferResponse(raw_output_contents=[right.tobytes()]).SerializeToString(), "grpc"
    )
    for wrong in (right + 0.01, right[:-1], right.T):
        assert not QUESTION.is_answered_by(np.ascontiguousarray(wrong).tobytes(), "http")


def test_our_server_and_the_floor_start_and_answer(repository: Path) -> None:
    bundle = repository / UNIFORM.name / "1"
    for name in ("echo", "echo 4 threads", "echo asyncio", "kanserve", "kanserve standard"):
        with started(CONTENDERS[name], bundle, QUESTION, "0", free_port()) as server:
            assert server.start_s > 0
            assert server.memory_mb() > 10
            found = open_loop(server.target, 200.0, 0.5, threads=4, connections=2, seed=0, cpu=0)
            assert set(found.codes) == {"OK"}
            assert found.offered_per_s == sum(found.codes.values()) / 0.5
            assert found.latencies is not None


def test_a_server_that_answers_wrongly_is_left_out(repository: Path) -> None:
    wrong = Question(QUESTION.x, QUESTION.expected + 1)
    with (
        pytest.raises(NotStarted, match="kanserve gives a wrong answer"),
        started(CONTENDERS["kanserve"], repository / UNIFORM.name / "1", wrong, "0", free_port()),
    ):
        pass


def test_one_that_is_not_installed_is_left_out_with_what_to_do(repository: Path) -> None:
    absent = replace(CONTENDERS["LitServe"], environment=".venv-rival-none")
    with (
        pytest.raises(NotStarted, match=r"run `make .venv-rival-none/installed`"),
        started(absent, repository / UNIFORM.name / "1", QUESTION, "0"),
    ):
        pass


@contextmanager
def http_server(answer: bytes) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_answers_of_another_length_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "payload").write_bytes(b"1234")
    with http_server(b"12345678") as address:
        for size, code in ((8, "OK"), (9, "8 bytes")):
            target = Target(address, "http", str(tmp_path / "payload"), size)
            found = open_loop(target, 100.0, 0.3, threads=2, connections=2, seed=0, cpu=0)
            assert set(found.codes) == {code}
            assert (found.latencies is None) == (code != "OK")


def test_without_h2load_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LoadFailed, match="install util-linux and nghttp2-client"):
        closed_loop(Target("127.0.0.1:1", "grpc", str(tmp_path), 1), 1, 1, 0)


def measured(name: str, per_s: float) -> Measured:
    latencies = Latencies(1.0, 2.0, 3.0)
    opened = Opened(100.0, 100.0, Counter(OK=500), latencies)
    return Measured(name, {1: Closed(per_s, latencies)}, {100.0: opened}, 0.5, 80.0)


def test_tables_and_plot_say_what_was_measured(tmp_path: Path) -> None:
    settings = Settings(rows=(1,), rates=(100.0,), rounds=3)
    found = [measured("echo", v) for v in (4000, 5000, 9000)]
    found += [measured("kanserve", 4500), measured("MLServer", 1500)]
    found.append(Measured("Triton", left_out="it is not installed"))
    results = Results({"cpu": "one"}, settings, found, {1: 9000.0})
    text = serving_report.render(results)
    assert "| echo | 5,000 (2) |" in text  # the median of the rounds
    assert "0.90 of echo, 0.50 of the engine's 9,000 rows" in text
    assert "3.0 times MLServer" in text
    assert "| kanserve | 1 / 2 / 3 |" in text
    assert "- Triton: it is not installed" in text
    serving_report.draw(results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"serving.svg", "serving.png"}


def test_every_server_has_a_style_of_its_own() -> None:
    assert set(STYLES) == set(CONTENDERS)


@pytest.mark.parametrize("arguments", [["--contenders", "none"], ["--rows", "x"], ["--what"]])
def test_wrong_usage_is_said_and_ends_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        serving.main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
