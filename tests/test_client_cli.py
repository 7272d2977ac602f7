"""`kan-client`: files in, files out, tables, loads, and what a shell is told when it goes wrong."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from protos import inference_pb2 as pb
from serving.client import commands
from serving.client.__main__ import main
from serving.server import Server
from tests.bare import Bare, received
from tests.clients import told_why
from tests.conftest import STATE_DICTS, run_module
from tests.shells import Shell, bare, shell, without_waiting

__all__ = ["bare", "shell", "told_why"]

UNIFORM = STATE_DICTS[0]
MODEL = ("--model", "m")


def test_models_are_listed(server: Server, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    shell = Shell(server.address, Bare(), capsysbinary)
    found = json.loads(shell("models", "--json"))
    assert [one["name"] for one in found] == sorted(golden.name for golden in STATE_DICTS)
    table = shell("models").decode()
    for one in found:
        assert one["state"] == "READY"
        assert one["inputs"][0]["name"] == "input"
        (line,) = (line for line in table.splitlines() if one["name"] in line)
        assert f"input FP32 {one['inputs'][0]['shape']}" in line
    assert shell.error == ""


def bench(*arguments: object) -> Sequence[object]:
    return ("--model", "pair", "--rate", "100,200", "--seconds", "0.5", "--rows", 3, *arguments)


def test_bench_tells_how_long_requests_took(shell: Shell, bare: Bare, tmp_path: Path) -> None:
    file, plot = tmp_path / "b.json", tmp_path / "b.svg"
    table = shell("bench", *bench("--json", file, "--plot", plot, "--seed", 3)).decode()
    told = json.loads(file.read_text())
    assert [sum(one["codes"].values()) for one in told["loads"]] == [
        one["codes"]["OK"] for one in told["loads"]
    ]
    first, second = (one["codes"]["OK"] for one in told["loads"])
    assert len(bare.requests) == first + second + 4  # one more on each connection, to connect
    _, head, _, *lines = table.splitlines()
    assert "offered of --rate, /s" in head
    for one, rate, line in zip(told["loads"], (100, 200), lines, strict=False):
        assert one["offered_per_s"] == one["codes"]["OK"] / 0.5
        assert 0 < one["latencies"]["p50"] <= one["latencies"]["p99"] <= one["latencies"]["p999"]
        offered = f"{one['offered_per_s']:,.0f} of {rate}"
        assert line.strip().startswith(f"{offered} ")
        assert f"{offered} requests/s for 0.5 s\n" in shell.error
    sent = received(bare.requests[0])["a"]
    assert sent.shape == (3, 2)
    assert (np.abs(sent) <= 1).all()
    assert all(request == bare.requests[0] for request in bare.requests)
    assert plot.read_text().startswith("<?xml")


def test_bench_counts_errors_by_their_codes(shell: Shell, bare: Bare) -> None:
    def refuse(response: pb.ModelInferResponse) -> None:
        raise AssertionError

    bare.change = refuse
    table = shell("bench", *bench(), code=1).decode()
    assert "UNKNOWN" in table
    assert "no request was answered (UNKNOWN)" in shell.error


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = run_module("serving.client", "models", "--address", "127.0.0.1:1", "--timeout-s", "0.8")
    error = without_waiting(done.stderr)
    assert done.returncode == 1
    assert done.stdout == ""
    assert error.startswith("error: no server has answered in time: 127.0.0.1:1: ")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("told_why")
@pytest.mark.parametrize(
    "command", [["models"], ["infer", *MODEL, "--input", "x"], ["bench", *MODEL, "--rate", "1"]]
)
def test_who_waits_for_a_server_is_told_for_whom(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "_SILENT_S", 0.0)
    assert main([*command, "--address", "127.0.0.1:1", "--timeout-s", "1.5"]) == 1
    waiting, error = capsys.readouterr().err.splitlines()
    assert waiting == "waiting for 127.0.0.1:1 (1.5 s)"
    assert error.startswith("error: no server has answered in time: 127.0.0.1:1: ")


@pytest.mark.parametrize(
    ("command", "timeout_s"),
    [
        pytest.param("models", "2", id="models"),  # which waits for a server as long as that
        pytest.param("health", "30", id="health"),  # which ends with the first failure
    ],
)
def test_the_metrics_port_is_told_from_a_server(
    server: Server, command: str, timeout_s: str
) -> None:
    place = server.metrics_address
    done = run_module("serving.client", command, "--address", place, "--timeout-s", timeout_s)
    assert done.returncode == 1
    assert "this looks like another protocol; perhaps it is the metrics port" in done.stderr
    assert "SETTINGS" not in done.stderr


def test_what_is_not_installed_is_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shell("bench", *bench("--plot", "b.svg"), code=1)
    hint = (
        "is not installed; install kanserve's extra client: pip install '.[client]' in its "
        "checkout\n"
    )
    assert shell.error == f"error: matplotlib {hint}"
    monkeypatch.setitem(sys.modules, "rich", None)
    shell.infer("--input", "x.npy", code=1)
    assert shell.error == f"error: rich {hint}"
    assert not shell.servicer.seen


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["infer", "--model", "m"], "--input"),
        (["infer", "--model", "m", "--input", "x", "--output", "y.txt"], ".npy, .npz or .csv"),
        (["bench", "--model", "m", "--rate", "1,0"], "expected a number above 0, found '0'"),
        (["bench", "--model", "m", "--rate", "1", "--rows", "x"], "expected a whole number"),
        (["bench", "--model", "m", "--rate", "1", "--plot", "b.png"], "ends with .svg"),
        (["models", "--timeout-s", "nan"], "expected a number above 0"),
        ([], "COMMAND"),
        (["infer", "--modle", "m"], "arguments: --modle; did you mean --model?"),
        (["bench", "--model=m", "--rats=1"], "arguments: --rats; did you mean --rate?"),
        (["health", "--quiet"], "arguments: --quiet\n"),
    ],
)
def test_wrong_usage_is_said_and_ends_with_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--address", "kan"], "address 'kan': expected host:port"),
        (["--ca", "none.pem"], "none.pem: cannot be read"),
        (["--cert", "c.pem"], "give the key too"),
        (["--token-file", "none"], "none: cannot be read"),
    ],
)
def test_flags_without_a_usable_value_end_with_2(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", *flags]) == 2
    assert told in capsys.readouterr().err
