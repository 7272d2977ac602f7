"""Versions that come, change and go while the server runs, seen from the wire."""

import io
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from rich.console import Console

from export import export_checkpoint
from export.report import Report
from kan_model import KAN
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.client import ModelNotFound, Unavailable
from tests.bundles import CLOSE, publish, run_onnx
from tests.clients import both_ways
from tests.conftest import Shared, run_module
from tests.servers import WAIT_S, await_true, served
from tests.wire import raw_output, raw_request

X = np.linspace(-0.9, 0.9, 12, dtype=np.float32).reshape(3, 4)
HEALTH = health_pb2.HealthCheckResponse


@dataclass(frozen=True)
class Bundles:
    """Two bundles of the same shape and other numbers: what odd and even versions are made of."""

    odd: Path
    even: Path

    def publish(self, root: Path, version: int, name: str = "m") -> Path:
        return publish(self.odd if version % 2 else self.even, root / name, version)

    def answer(self, version: int) -> NDArray[np.float32]:
        (answer,) = run_onnx(self.odd if version % 2 else self.even, X)
        return answer


@pytest.fixture(scope="session")
def bundles(shared: Shared) -> Bundles:
    root = shared("two", _export_two)
    return Bundles(root / "m" / "1", root / "m" / "2")


def _export_two(root: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save(KAN([4, 8, 3]).state_dict(), root / "m.pt")
        export_checkpoint(
            root / "m.pt",
            output=root,
            activation="silu",
            report=Report(Console(file=io.StringIO())),
        )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def load(stub: GRPCInferenceServiceStub, name: str = "m", **parameters: Any) -> None:
    request = pb.RepositoryModelLoadRequest(model_name=name)
    for key, value in parameters.items():
        request.parameters[key].string_param = value
    stub.RepositoryModelLoad(request, timeout=WAIT_S)


def index(stub: GRPCInferenceServiceStub, *, ready: bool = False) -> dict[tuple[str, str], str]:
    listed = stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=ready)).models
    assert all(model.reason == "" for model in listed if model.state == "LOADING")
    return {(model.name, model.version): model.state for model in listed}


def test_clients_load_and_unload_models(root: Path, bundles: Bundles) -> None:
    bundles.publish(root, 1)
    bundles.publish(root, 1, "other")
    with served(root, model_control="explicit") as (_, stub):
        assert not stub.ServerReady(pb.ServerReadyRequest()).ready
        assert index(stub) == {}
        load(stub)
        assert stub.ServerReady(pb.ServerReadyRequest()).ready
        assert index(stub) == {("m", "1"): "READY"}
        bundles.publish(root, 2)
        np.testing.assert_allclose(
            raw_output(stub.ModelInfer(raw_request(X, "m"))), bundles.answer(1), **CLOSE
        )
        load(stub)
        assert index(stub) == {("m", "1"): "UNAVAILABLE", ("m", "2"): "READY"}
        assert index(stub, ready=True) == {("m", "2"): "READY"}
        answer = stub.ModelInfer(raw_request(X, "m"))
        assert answer.model_version == "2"
        np.testing.assert_allclose(raw_output(answer), bundles.answer(2), **CLOSE)
        stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="m"))
        assert set(index(stub).values()) == {"UNAVAILABLE"}
        with pytest.raises(grpc.RpcError) as gone:
            stub.ModelInfer(raw_request(X, "m"))
        assert gone.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "unloaded" in str(gone.value.details())
        load(stub)
        assert stub.ModelReady(pb.ModelReadyRequest(name="m")).ready


def test_a_version_that_fails_its_checks_leaves_the_old_one_and_says_why(
    root: Path, bundles: Bundles
) -> None:
    bundles.publish(root, 1)
    with served(root, model_control="explicit", load_models=("m",)) as (_, stub):
        model = bundles.publish(root, 2) / "model.onnx"
        model.write_bytes(model.read_bytes()[:-1])
        with pytest.raises(grpc.RpcError) as failed:
            load(stub)
        assert failed.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "version 2 of model 'm': it failed its checks" in str(failed.value.details())
        assert str(root) not in str(failed.value.details())
        answer = stub.ModelInfer(raw_request(X, "m"))
        assert answer.model_version == "1"
        np.testing.assert_allclose(raw_output(answer), bundles.answer(1), **CLOSE)
        (refused,) = (
            entry
            for entry in stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
            if entry.version == "2"
        )
        assert (refused.state, bool(refused.reason)) == ("UNAVAILABLE", True)
        assert str(root) not in refused.reason


@pytest.mark.parametrize(
    ("control", "request_", "code"),
    [
        ("none", pb.RepositoryModelLoadRequest(model_name="m"), "FAILED_PRECONDITION"),
        ("poll", pb.RepositoryModelUnloadRequest(model_name="m"), "FAILED_PRECONDITION"),
        ("explicit", pb.RepositoryModelLoadRequest(model_name="none"), "NOT_FOUND"),
        ("explicit", pb.RepositoryModelLoadRequest(model_name="../m"), "NOT_FOUND"),
        ("explicit", pb.RepositoryModelLoadRequest(), "NOT_FOUND"),
        ("explicit", pb.RepositoryModelUnloadRequest(model_name="none"), "NOT_FOUND"),
        (
            "explicit",
            pb.RepositoryModelLoadRequest(
                model_name="m",
                parameters={"config": pb.ModelRepositoryParameter(string_param="{}")},
            ),
            "UNIMPLEMENTED",
        ),
    ],
)
def test_what_clients_may_not_ask_for_is_refused(
    root: Path, bundles: Bundles, control: str, request_: Any, code: str
) -> None:
    bundles.publish(root, 1)
    with served(root, model_control=control) as (_, stub):
        loads = isinstance(request_, pb.RepositoryModelLoadRequest)
        with pytest.raises(grpc.RpcError) as refused:
            (stub.RepositoryModelLoad if loads else stub.RepositoryModelUnload)(request_)
        assert refused.value.code().name == code
        assert str(root) not in str(refused.value.details())


def test_a_model_to_load_that_is_not_there_stops_the_start(root: Path) -> None:
    done = run_module(
        *("serving", "--model-repository", root, "--model-control", "explicit"),
        *("--load-models", '["none"]'),
    )
    assert done.returncode == 1
    assert "--load-models: there is no model 'none'" in done.stderr


def test_a_folder_that_is_polled_is_served_as_it_changes(root: Path, bundles: Bundles) -> None:
    with served(root, model_control="poll", poll_s=0.01) as (server, stub):
        with grpc.insecure_channel(server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == HEALTH.NOT_SERVING
            live = health.Check(health_pb2.HealthCheckRequest(service="live"))
            assert live.status == HEALTH.SERVING  # nobody need restart a server that waits
            bundles.publish(root, 1)
            assert next(watch).status == HEALTH.SERVING
            bundles.publish(root, 2)
            await_true(lambda: index(stub).get(("m", "2")) == "READY")
            answer = stub.ModelInfer(raw_request(X, "m"))
            np.testing.assert_allclose(raw_output(answer), bundles.answer(2), **CLOSE)
            shutil.rmtree(root / "m")
            assert next(watch).status == HEALTH.NOT_SERVING
        await_true(lambda: index(stub) == {})  # it may have been looked at half removed


def test_the_policy_says_which_versions_answer(root: Path, bundles: Bundles) -> None:
    for version in (1, 2, 3):
        bundles.publish(root, version)
    with served(root, version_policy="specific:1,3") as (_, stub):
        assert stub.ModelInfer(raw_request(X, "m")).model_version == "3"
        for version in (1, 3):
            answer = stub.ModelInfer(raw_request(X, "m", model_version=str(version)))
            np.testing.assert_allclose(raw_output(answer), bundles.answer(version), **CLOSE)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(raw_request(X, "m", model_version="2"))
        assert str(refused.value.details()).endswith(
            "the version policy is specific:1,3; leave the version out, or start the server with "
            "--version-policy all"
        )


def test_clients_are_told_what_to_do_about_a_version_that_is_not_served(
    root: Path, bundles: Bundles
) -> None:
    for version in (1, 2):
        bundles.publish(root, version)
    (root / "m" / "2" / "golden.npz").write_bytes(b"damaged")
    bundles.publish(root, 1, "other")  # clients wait for a server that serves nothing
    with served(root, model_control="explicit", load_models=("m", "other")) as (server, stub):

        def told(version: str) -> str:
            error, other = both_ways(server.address, "metadata", "m", version)
            assert type(error) is type(other) is Unavailable
            return str(error).removeprefix(f"{server.address}: ")

        assert told("2") == (
            "version 2 of model 'm' is not served: it failed its checks at load; the server's log "
            "says more"
        )
        stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="m"))
        for which in ("1", ""):
            assert told(which).endswith("it was unloaded; have it loaded again")
        for error in both_ways(server.address, "metadata", "m", "7"):
            assert isinstance(error, ModelNotFound)
            assert "has no version '7'; none of it is served; `kan-client models`" in str(error)


@dataclass
class Load:
    """Clients that ask for a model again and again, and check every answer."""

    stub: GRPCInferenceServiceStub
    bundles: Bundles
    versions: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def run(self, stop: threading.Event) -> None:
        expected = {odd: self.bundles.answer(odd) for odd in (0, 1)}
        while not stop.is_set():
            try:
                answer = self.stub.ModelInfer(raw_request(X, "m"), timeout=WAIT_S)
            except grpc.RpcError as error:
                self.failures.append(str(error))
                return
            version = int(answer.model_version)
            off = np.abs(raw_output(answer) - expected[version % 2]).max()
            if off > 1e-5:
                self.failures.append(f"version {version} is off by {off}")
            self.versions.append(version)


def test_swaps_under_load_lose_nothing_and_mix_nothing(root: Path, bundles: Bundles) -> None:
    bundles.publish(root, 1)
    swaps = 20
    with served(root, model_control="explicit", load_models=("m",)) as (_, stub):
        stop = threading.Event()
        clients = Load(stub, bundles)
        threads = [threading.Thread(target=clients.run, args=(stop,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for version in range(2, swaps + 2):
            bundles.publish(root, version)
            load(stub)
            assert stub.ModelInfer(raw_request(X, "m")).model_version == str(version)
            shutil.rmtree(root / "m" / str(version - 1))
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)
        assert clients.failures == []
        assert set(clients.versions) >= {2, swaps}  # the load was there all the time
