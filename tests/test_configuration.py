"""Flags, environment, file, defaults: which one counts, and how what is wrong is told."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_module

FILE = """
model_repository = "models"
grpc_port = 1001
metrics_port = 1002
log_level = "warning"
model_control = "explicit"
load_models = ["a", "b"]

[model_limits.digits]
max_batch_rows = 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kanserve.toml"
    path.write_text(FILE)
    return path


def printed(*arguments: str | Path, environment: dict[str, str] | None = None) -> str:
    done = run_module("serving", "--print-config", *arguments, environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_flags_win_over_the_environment_over_the_file_over_defaults(file: Path) -> None:
    text = printed(
        "--config", file, "--grpc-port", "3001",
        environment={"KANSERVE_GRPC_PORT": "2001", "KANSERVE_METRICS_PORT": "2002"},
    )  # fmt: skip
    found = tomllib.loads(text)
    assert found["grpc_port"] == 3001
    assert found["metrics_port"] == 2002
    assert found["log_level"] == "warning"
    assert found["drain_s"] == 0.5
    assert found["load_models"] == ["a", "b"]
    assert found["model_limits"] == {"digits": {"max_batch_rows": 7}}
    sources = {
        line.split(" = ")[0]: line.rpartition("  # ")[2]
        for line in text.splitlines()
        if "  # " in line
    }
    assert sources["grpc_port"] == "flag"
    assert sources["metrics_port"] == "environment"
    assert sources["log_level"] == "file"
    assert sources["drain_s"] == "default"


def test_what_is_printed_is_a_file_that_says_the_same(file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.toml"
    again.write_text(printed("--config", file, "--max-wait-ms", "2"))
    assert tomllib.loads(printed("--config", again)) == tomllib.loads(again.read_text())


def test_the_environment_names_a_file_too(file: Path) -> None:
    assert tomllib.loads(printed(environment={"KANSERVE_CONFIG": str(file)}))["grpc_port"] == 1001


def test_a_flag_changes_one_limit_of_a_model_and_keeps_the_others(file: Path) -> None:
    limits = '{"digits": {"max_wait_ms": 3}}'
    found = tomllib.loads(printed("--config", file, "--model-limits", limits))
    assert found["model_limits"]["digits"] == {"max_batch_rows": 7, "max_wait_ms": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("grpc_port = 70000",
                     "--grpc-port (KANSERVE_GRPC_PORT), in the file of --config: Input should be",
                     id="value"),
        pytest.param('grpc_port = "x"', "--grpc-port (KANSERVE_GRPC_PORT), in the file", id="type"),
        pytest.param("grcp_port = 1", "--grcp-port (KANSERVE_GRCP_PORT), in the file of --config: "
                     "Extra inputs are not permitted", id="unknown"),
        pytest.param("[model_limits.digits]\nmax_rows = 1",
                     "--model-limits (KANSERVE_MODEL_LIMITS).digits.max_rows, in the file",
                     id="nested"),
        pytest.param("grpc_port =", "FILE: expected TOML", id="no TOML"),
        pytest.param("\xe9", "FILE: expected TOML", id="no text"),
        pytest.param("a = " + "[" * 9999, "FILE: expected TOML", id="nested without end"),
        pytest.param("a = " + "{a=" * 9999, "FILE: expected TOML", id="tables without end"),
        pytest.param("a = " + "9" * 9999, "FILE: expected TOML", id="digits without end"),
        pytest.param('config = "other"', "FILE: config cannot be set in a file", id="config"),
        pytest.param('load_models = ["a"]', "--load-models needs --model-control explicit; with "
                     "none every model", id="no use"),
        pytest.param('tls_cert = "a"', "--tls-cert and --tls-key: expected both", id="together"),
        pytest.param('model_control = "explicit"\nhost = "0.0.0.0"', "needs --access", id="open"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_told_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_bytes(text.encode("latin-1"))
    done = run_module("serving", "--config", path, "--model-repository", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    event: dict[str, Any] = json.loads(line)
    assert event["event"] == "wrong_setting"
    assert message.replace("FILE", str(path)) in event["reason"]


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    done = run_module("serving", "--config", tmp_path / "none.toml", "--model-repository", ".")
    assert done.returncode == 2
    assert f"--config {tmp_path}/none.toml: cannot be read" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "place"),
    [
        (["--grpc-port=lots"], {}, "as a flag"),
        ([], {"KANSERVE_GRPC_PORT": "lots"}, "in the environment"),
    ],
)
def test_a_wrong_value_is_told_with_where_it_was_given(
    arguments: list[str], environment: dict[str, str], place: str
) -> None:
    done = run_module("serving", "--model-repository", ".", *arguments, environment=environment)
    assert f"--grpc-port (KANSERVE_GRPC_PORT), {place}: " in done.stderr
    assert "found 'lots'" in done.stderr


def test_variables_that_no_setting_has_are_told_and_passed_over(tmp_path: Path) -> None:
    environment = {
        "KANSERVE_GRPC_PROT": "8009",
        "KANSERVE_SERVICE_HOST": "10.0.0.1",  # of Kubernetes
        "KANSERVE_EMPTY": "",
    }
    done = run_module("serving", "--model-repository", tmp_path, environment=environment)
    *warnings, refused = map(json.loads, done.stderr.splitlines())
    assert "no bundle found" in refused["reason"]
    assert {(line["event"], line["level"]) for line in warnings} == {
        ("unknown_variable", "warning")
    }
    assert {line["variable"]: line["nearest"] for line in warnings} == {
        "KANSERVE_GRPC_PROT": "KANSERVE_GRPC_PORT",
        "KANSERVE_SERVICE_HOST": None,
    }
