"""NVIDIA's own client against our server; its versions clash with ours, so it runs in its own
environment."""

import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor

from protos import inference_pb2, model_config_pb2
from tests.conftest import GOLDENS, ROOT, STATE_DICTS, Golden
from tests.security import Authority, write_access
from tests.servers import served

PYTHON = ROOT / ".venv-tritonclient" / "bin" / "python"
UNIFORM = STATE_DICTS[0]
Said = dict[str, Any]


def run_session(address: str, **channel: Any) -> Said:
    """Run all of tritonclient_session.py. More arguments are those of its clients."""
    assert PYTHON.exists(), "run `make test`, which makes the environment"
    samples = {golden.name: str(GOLDENS / f"{golden.name}.npz") for golden in STATE_DICTS}
    given = {"address": address, "channel": channel, "samples": samples}
    done = subprocess.run(
        [PYTHON, ROOT / "tests" / "tritonclient_session.py", json.dumps(given)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said: Said = json.loads(done.stdout)
    return said


@pytest.fixture(scope="module")
def said(repository: Path) -> Iterator[Said]:
    models = tuple(golden.name for golden in STATE_DICTS)
    with served(repository, model_control="explicit", load_models=models) as (server, _):
        yield run_session(server.address)


def assert_right(found: Any, golden: Golden) -> None:
    off = np.abs(np.array(found) - golden.y64)
    assert (off <= 1e-5 * np.maximum(1, np.abs(golden.y64))).all()


def test_it_gets_upstreams_numbers_in_every_way(said: Said) -> None:
    for golden in STATE_DICTS:
        found = said["answers"][golden.name]
        assert len(found) == 6  # three compressions, twice
        for y in found:
            assert_right(y, golden)
    assert said["options"]["id"] == "7"
    assert said["options"]["version"] == "1"
    assert {"batch_rows", "model_sha256", "queue_us"} <= set(said["options"]["parameters"])
    assert_right(said["options"]["y"], UNIFORM)
    assert said["callbacks"] == [[number, None] for number in range(20)]
    assert len(said["shared_channel"]) == 60
    for row, *y in said["shared_channel"]:
        np.testing.assert_allclose(y, UNIFORM.y64[row], rtol=1e-5, atol=1e-5)


def test_it_learns_what_the_server_and_the_models_are(said: Said) -> None:
    found = said["server"]
    for key in ("live", "ready", "model_ready", "version_ready"):
        assert found[key] is True, key
    assert found["metadata"]["name"] == "kanserve"
    model = said["model"]
    assert model["metadata"]["versions"] == ["1"]
    assert model["metadata"]["inputs"] == [
        {"name": "input", "datatype": "FP32", "shape": ["-1", str(UNIFORM.widths[0])]}
    ]
    assert model["config"]["config"]["name"] == UNIFORM.name
    assert model["config"]["config"]["max_batch_size"] >= 1
    (statistics,) = model["statistics"]["model_stats"]
    assert (statistics["name"], statistics["version"]) == (UNIFORM.name, "1")
    counted = statistics["inference_stats"]
    # Of `answers`, `options`, `callbacks`, `shared_channel`, `stream` and `stream_aio`.
    assert counted["success"]["count"] == str(6 + 1 + 20 + 60 + 24 + 24)
    assert counted["queue"]["count"] == counted["success"]["count"]
    assert int(counted["fail"]["count"]) > 0


def test_its_streams_keep_their_order(said: Said) -> None:
    for found in (said["stream"], said["stream_aio"]):
        assert len(found) == 30
        for number, answer in enumerate(found):
            if number % 5 == 3:
                assert "expected shape [-1, 4]" in answer
            else:
                assert answer == [str(number), number % 7, ["triton_final_response"]]
    assert said["strict_stream"] == ["StatusCode.NOT_FOUND", "there is no model 'nope'"]


TENSORS = "tensors travel in the messages"
REFUSALS = {
    "unknown model": ("NOT_FOUND", "there is no model 'nope'"),
    "unknown version": ("NOT_FOUND", f"model '{UNIFORM.name}' has no version '9'; it serves 1"),
    "wrong width": ("INVALID_ARGUMENT", "expected shape [-1, 4]"),
    "wrong type": ("INVALID_ARGUMENT", "expected datatype FP32, found 'FP64'"),
    "no time": ("DEADLINE_EXCEEDED", "the deadline leaves no time"),
    "classification": (
        "UNIMPLEMENTED",
        "output parameter 'classification' is not offered: ask for the output itself, and sort it",
    ),
    "shared memory": ("UNIMPLEMENTED", f"is not offered: {TENSORS}"),
    "shared memory of an output": ("UNIMPLEMENTED", f"is not offered: {TENSORS}"),
    "sequence": ("UNIMPLEMENTED", "is not offered: requests know nothing of each other"),
    "named sequence": ("UNIMPLEMENTED", "is not offered: requests know nothing of each other"),
    "priority": ("UNIMPLEMENTED", "request parameter 'priority' is offered as 0 alone"),
    "parameter": ("UNIMPLEMENTED", "request parameter 'temperature' is not offered; there are"),
    "readiness of no model": ("NOT_FOUND", "there is no model 'nope'"),
    "statistics of no model": ("NOT_FOUND", "there is no model 'nope'"),
    "TraceSetting": ("UNIMPLEMENTED", "TraceSetting is not offered: --otlp-endpoint is set"),
    "LogSettings": ("UNIMPLEMENTED", "LogSettings is not offered: --log-level is set"),
    "load with a configuration": ("UNIMPLEMENTED", "parameter 'config' is not offered"),
} | {
    f"{kind}SharedMemory{verb}": ("UNIMPLEMENTED", f"{verb} is not offered: {TENSORS}")
    for kind in ("System", "Cuda")
    for verb in ("Status", "Register", "Unregister")
}


def test_it_is_told_what_is_wrong_and_what_is_not_offered(said: Said) -> None:
    assert set(said["refusals"]) == set(REFUSALS)
    for what, (code, details) in REFUSALS.items():
        found_code, found_details = said["refusals"][what]
        assert found_code == code, what
        assert details in found_details, what


def test_it_loads_and_unloads_models(said: Said) -> None:
    ready = {golden.name: "READY" for golden in STATE_DICTS}
    model = said["administration"]["model"]
    assert said["administration"]["found"] == [
        ready,
        ready | {model: "UNAVAILABLE"},
        False,
        ready,
        True,
    ]


THE_STANDARDS_ALONE = {
    "inference.ModelMetadataResponse.properties",
    "inference.ModelMetadataResponse.PropertiesEntry.key",
    "inference.ModelMetadataResponse.PropertiesEntry.value",
}


def test_the_protocol_is_tritons(said: Said) -> None:
    """Ours is a part of it: each method, and each field with its number and type."""
    theirs = said["protocol"]
    service = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    ours = {method.name for method in service.methods}
    assert ours <= set(theirs["methods"])
    # What is not ours is refused with a reason: see REFUSALS.
    assert set(theirs["methods"]) - ours == set(theirs["methods"]) & set(REFUSALS)
    described = [
        *inference_pb2.DESCRIPTOR.message_types_by_name.values(),
        *model_config_pb2.DESCRIPTOR.message_types_by_name.values(),
    ]
    for message in with_nested(described):
        for field in message.fields:
            of = field.message_type.full_name if field.message_type else None
            found = theirs["messages"].get(message.full_name, {}).get(field.name)
            expected = (
                None if field.full_name in THE_STANDARDS_ALONE else [field.number, field.type, of]
            )
            assert found == expected, field.full_name
    assert dict(model_config_pb2.DataType.items()).items() <= theirs["datatypes"].items()


def with_nested(messages: Iterable[Descriptor]) -> Iterator[Descriptor]:
    for message in messages:
        yield message
        yield from with_nested(message.nested_types)


def test_it_works_over_mutual_tls(repository: Path, tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ca")
    cert, key = authority.write_client("triton.example")
    access = write_access(
        tmp_path / "access.toml",
        certificates={"inference": ["triton.example"], "admin": ["triton.example"]},
    )
    models = tuple(golden.name for golden in STATE_DICTS)
    with served(
        repository,
        model_control="explicit",
        load_models=models,
        access=access,
        **authority.settings(mutual=True),
    ) as (server, _):
        said = run_session(
            server.address,
            ssl=True,
            root_certificates=str(authority.roots),
            private_key=str(key),
            certificate_chain=str(cert),
        )
    for golden in STATE_DICTS:
        for y in said["answers"][golden.name]:
            assert_right(y, golden)
    assert len(said["stream_aio"]) == 30
