"""What an operator asks of the start: settings, places, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kan_bundle import __version__
from serving.server import Server
from serving.settings import Settings
from tests.conftest import ROOT, run_module
from tests.processes import Process, serving


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        pytest.param([], {}, 2, "--model-repository (KANSERVE_MODEL_REPOSITORY): missing; give "
                     "--model-repository, folder of MODEL/VERSION/ bundles", id="none"),
        pytest.param(["--model-repository", "/none"], {}, 1, "/none: cannot be read", id="missing"),
        pytest.param(["--model-repository", "REPO", "--grpc-port", "70000"], {}, 2,
                     "--grpc-port (KANSERVE_GRPC_PORT)", id="port"),
        pytest.param(["--model-repository", "/none", "--grpc-port", "8101", "--metrics-port",
                      "8101"], {}, 2, "--grpc-port and --metrics-port: expected two ports, found "
                     "8101 for both; choose another", id="two ports"),
        pytest.param(["--model-repository", "/none", "--health-port", "8002"], {}, 2,
                     "--metrics-port and --health-port: expected two ports", id="health port"),
        pytest.param(["--model-repository", "REPO"], {"KANSERVE_GRPC_PORT": "x"}, 2,
                     "--grpc-port (KANSERVE_GRPC_PORT)", id="environment"),
        pytest.param(["--model-repository", "REPO", "--provider", "tpu"], {}, 2,
                     "--provider (KANSERVE_PROVIDER)", id="provider"),
        pytest.param(["--model-repository", "REPO", "--provider", "cuda"], {}, 1,
                     "provider cuda was asked for", id="cuda"),
        pytest.param(["--model-repository", "REPO", "--host", "192.0.2.1"], {}, 1,
                     "cannot listen on 192.0.2.1:8001", id="host"),
        pytest.param(["--model-repository", "EMPTY"], {}, 1, "no bundle found", id="empty"),
        pytest.param(["--model-repository", "REPO", "--drain-s", "inf"], {}, 2,
                     "--drain-s (KANSERVE_DRAIN_S)", id="for ever"),
        pytest.param(["--model-repository", "REPO", "--engine-threads", "100000000000"], {}, 2,
                     "--engine-threads (KANSERVE_ENGINE_THREADS)", id="threads"),
        pytest.param(["--model-repository", "REPO", "--address-file", "."], {}, 2,
                     "--address-file (KANSERVE_ADDRESS_FILE)", id="address folder"),
        pytest.param([], {"KANSERVE_MODEL_REPOSITORY": ""}, 2, "--model-repository", id="unset"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_one_reason(
    repository: Path,
    tmp_path: Path,
    arguments: list[str],
    environment: dict[str, str],
    code: int,
    message: str,
) -> None:
    places = {"REPO": str(repository), "EMPTY": str(tmp_path)}
    done = run_module("serving", *(places.get(a, a) for a in arguments), environment=environment)
    assert done.returncode == code, done.stderr
    *before, line = [json.loads(text) for text in done.stderr.splitlines()]
    assert {event["event"] for event in before} <= {"model_ready"}
    assert message in line["reason"]
    assert line["level"] == "error"
    assert done.stdout == ""


def test_a_port_in_use_is_refused(server: Server, repository: Path) -> None:
    port = server.address.rpartition(":")[2]
    done = run_module("serving", "--model-repository", repository, "--grpc-port", port)
    assert done.returncode == 1
    assert (
        f"cannot listen on 127.0.0.1:{port}" in json.loads(done.stderr.splitlines()[-1])["reason"]
    )


def test_environment_sets_what_flags_do_not(repository: Path) -> None:
    environment = {"KANSERVE_MODEL_REPOSITORY": str(repository), "KANSERVE_LOG_LEVEL": "info"}
    with serving(environment=environment) as process:
        assert process.address.startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--no-such-flag"], ""),
        (["models"], ""),
        (["--model-repositry", "models"], "; did you mean --model-repository?"),
        (["--model-repo=models", "--grcp-port=1"],
         "; did you mean --model-repository, --grpc-port?"),
    ],
)  # fmt: skip
def test_an_unknown_flag_is_wrong_usage(words: list[str], meant: str) -> None:
    done = run_module("serving", *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    told = json.loads(line)["reason"]
    assert told == f"unrecognized arguments: {' '.join(words)}{meant}; --help lists the flags"


@pytest.mark.parametrize("control", ["none", "poll", "explicit"])
@pytest.mark.parametrize(("inside", "what"), [("m", "a model"), ("m/1", "a version")])
def test_a_folder_inside_of_a_repository_is_told_from_one(
    tmp_path: Path, control: str, inside: str, what: str
) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "manifest.json").touch()
    place = tmp_path / inside
    done = run_module("serving", "--model-repository", place, "--model-control", control)
    assert done.returncode == 1
    told = json.loads(done.stderr.splitlines()[-1])["reason"]
    expected = f"{place}: expected a model repository, found {what}; its repository is {tmp_path}"
    assert told == expected


@pytest.mark.parametrize("program", ["serving", "serving.client"])
@pytest.mark.parametrize("flag", ["--kanserve-version", "--version"])
def test_the_version_is_printed_whatever_else_is_wrong(program: str, flag: str) -> None:
    done = run_module(program, flag, environment={"KANSERVE_GRPC_PORT": "x"})
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kanserve {__version__}\n", "")


def test_help_names_every_setting() -> None:
    done = run_module("serving", "--help")
    assert done.returncode == 0
    for name in (*Settings.model_fields, "kanserve_version", "print_completion"):
        assert f"--{name.replace('_', '-')}" in done.stdout


def test_the_address_file_is_gone_after_the_end(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "address"
    with serving(
        "--model-repository", repository, "--address-file", file, "--drain-s", "0"
    ) as process:
        assert json.loads(file.read_text())["grpc"] == process.address
        process.popen.terminate()
        process.until("stopped")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_as_address_file_is_written_to_and_not_replaced(
    repository: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with serving("--model-repository", repository, "--address-file", pipe) as process:
        assert json.loads(os.read(reader, 1000))["grpc"] == process.address
        assert pipe.is_fifo()
    os.close(reader)


def test_folders_that_are_no_bundles_are_skipped_and_logged(
    repository: Path, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    shutil.copytree(repository, root)
    for folder in ("lost+found", "digits/latest", ".hidden"):
        (root / folder).mkdir(parents=True)
    with serving("--model-repository", root) as process:
        skipped = [Path(e["path"]).name for e in process.events if e["event"] == "folder_skipped"]
        assert sorted(skipped) == ["latest", "lost+found"]


@pytest.mark.parametrize("home", ["fresh", "/proc/none"])
def test_nothing_is_sent_or_kept_about_the_user(
    repository: Path, tmp_path: Path, home: str
) -> None:
    """onnxruntime's telemetry is off: it would keep a database below HOME, or complain."""
    folder = tmp_path if home == "fresh" else Path(home)
    own = ("HOME", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    command = [sys.executable, "-m", "serving", "--model-repository", str(repository)]
    with subprocess.Popen(
        [*command, "--grpc-port", "0", "--metrics-port", "0", "--drain-s", "0"],
        cwd=ROOT,
        env=inherited | {"HOME": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
    ) as popen:
        process = Process(popen, "")
        process.until("listening")  # every line up to here was JSON
        popen.terminate()
        process.until("stopped")
    if home == "fresh":
        assert list(tmp_path.iterdir()) == []
