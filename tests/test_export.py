"""The exporter as its users meet it: the command, what it writes, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import text_format

from export import export_checkpoint, export_module
from export.conversion import onnx_graph
from export.conversion.torchscript import METADATA_FILE
from export.errors import ParityError
from export.network import Call
from export.report import Report
from export.runtimes import load_torchscript
from kan_bundle.errors import LayoutError
from kan_bundle.integrity import record_file
from kan_bundle.manifest import read_manifest
from kan_model import KAN, CheckpointError
from protos import model_config_pb2
from tests import zoo
from tests.conftest import GOLDENS, ROOT, Golden

UNIFORM = GOLDENS / "uniform_4x8x3.pt"


class Branching(torch.nn.Module):
    """Cannot be traced: it branches on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def bundle(repository: Path, golden: Golden) -> Path:
    return repository / golden.name / "1"


def assert_right(found: np.ndarray, golden: Golden) -> None:
    """The design's tolerance for float32, against upstream's float64 answers."""
    assert (np.abs(found - golden.y64) <= 1e-5 * np.maximum(1, np.abs(golden.y64))).all()


def test_model_onnx_gives_upstreams_numbers(repository: Path, golden: Golden) -> None:
    session = onnxruntime.InferenceSession(bundle(repository, golden) / "model.onnx")
    assert_right(session.run(["output"], {"input": golden.x})[0], golden)


def test_model_ts_gives_upstreams_numbers(repository: Path, golden: Golden) -> None:
    run = load_torchscript(bundle(repository, golden) / "model.ts")
    assert_right(run([golden.x])[0], golden)


def test_the_graph_is_what_the_design_asks_for(repository: Path, golden: Golden) -> None:
    folder = bundle(repository, golden)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20), ("kanserve", 1)]
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    widths = golden.widths
    assert shapes == {"input": ["batch", widths[0]], "output": ["batch", widths[-1]]}
    assert not any(onnx.external_data_helper.uses_external_data(t) for t in model.graph.initializer)
    notes = {p.key: p.value for p in model.metadata_props}
    assert notes["kanserve.source_sha256"] == record_file(golden.checkpoint).sha256
    layers = json.loads(notes["kanserve.layers"])
    assert [layer["spline_order"] for layer in layers] == [golden.order] * 2
    assert {layer["base_activation"] for layer in layers} == {golden.activation}


def test_the_files_tell_nothing_of_the_machine_they_were_made_on(
    repository: Path, golden: Golden
) -> None:
    for file in bundle(repository, golden).iterdir():
        content = file.read_bytes()
        assert str(ROOT).encode() not in content, file.name
        assert str(Path.home()).encode() + b"/" not in content, file.name


def test_torchscript_carries_the_metadata(repository: Path, golden: Golden) -> None:
    extra = {METADATA_FILE: ""}
    with pytest.warns(DeprecationWarning, match="torch.jit.load"):
        torch.jit.load(bundle(repository, golden) / "model.ts", _extra_files=extra)
    assert json.loads(extra[METADATA_FILE])["kanserve.model"] == golden.name


def test_adapted_grids_are_told_from_uniform_ones(repository: Path) -> None:
    def grids(name: str) -> set[str]:
        return {layer.grid for layer in read_manifest(repository / name / "1").layers}

    assert grids("adapted_5x7x3") == {"adapted"}
    assert grids("uniform_4x8x3") == {"uniform"}


def test_config_pbtxt_is_tritons_text_format(repository: Path, golden: Golden) -> None:
    text = (repository / golden.name / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    manifest = read_manifest(bundle(repository, golden))
    assert config.name == manifest.name
    assert config.platform == "onnxruntime_onnx"
    assert config.default_model_filename in manifest.files
    assert config.max_batch_size > 1
    for kind in ("input", "output"):
        ours = [(t.name, f"TYPE_{t.datatype}", t.shape) for t in getattr(manifest, f"{kind}s")]
        found = [
            (t.name, model_config_pb2.DataType.Name(t.data_type), (-1, *t.dims))
            for t in getattr(config, kind)
        ]
        assert found == ours
    assert config.HasField("dynamic_batching")


def test_versions_count_up_and_none_is_overwritten(tmp_path: Path, quiet: Report) -> None:
    def export(version: int | None) -> int:
        return export_checkpoint(
            UNIFORM, output=tmp_path, name="m", version=version, activation="silu"
        ).version

    assert [export(None) for _ in range(2)] == [1, 2]
    before = record_file(tmp_path / "m" / "2" / "manifest.json")
    with pytest.raises(LayoutError, match="exists"):
        export(2)
    assert record_file(tmp_path / "m" / "2" / "manifest.json") == before


def test_failed_parity_publishes_nothing(
    tmp_path: Path, quiet: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter that is a little wrong, in one layer, is caught from the file it wrote."""
    write = onnx_graph.write_onnx

    def write_wrong(call: Call, *arguments: object, **options: object) -> frozenset[str]:
        weight = call.get_buffer("module.layers.1.product.weight")
        kept = weight.clone()
        weight[4 * 8, 0] += 1e-2  # the fourth function of the first of eight features
        fused = write(call, *arguments, **options)  # type: ignore[arg-type]
        weight.copy_(kept)  # the other converter is right
        return fused

    monkeypatch.setattr("export.pipeline.write_onnx", write_wrong)
    with pytest.raises(
        ParityError, match=r"onnxruntime cpu(, fused)? does not compute .* expected"
    ):
        export_checkpoint(UNIFORM, output=tmp_path / "models", report=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_publishes_nothing(
    tmp_path: Path, quiet: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "golden.npz")

    monkeypatch.setattr("export.pipeline.write_golden", fail)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(UNIFORM, output=tmp_path / "models", report=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_no_utf8_does_not_stop_a_proven_export(
    tmp_path: Path, quiet: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = os.fsdecode(b"m\xff.pt")
    shutil.copy(UNIFORM, tmp_path / odd)
    monkeypatch.chdir(tmp_path)
    options = {"name": "m", "activation": "silu", "output": tmp_path / "models", "report": quiet}
    manifest = export_checkpoint(odd, trust_pickle=True, **options)  # type: ignore[arg-type]
    assert "report.html" in manifest.files
    assert any(r"the code in 'm\udcff.pt' was RUN" in warning for warning in quiet.warnings)

    monkeypatch.setattr("export.pipeline.render_page", lambda told: odd)
    manifest = export_checkpoint(odd, **options)  # type: ignore[arg-type]
    assert manifest.version == 2
    assert (tmp_path / "models" / "m" / "2" / "report.html").read_text() == "m?.pt"


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export", str(UNIFORM), "--output", str(tmp_path / "models")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "ASSUMED" in line:  # the checkpoint is read and the staging folder opens
                process.send_signal(signal.SIGTERM)
                break
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_kan_can_be_exported_from_python_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = KAN([3, 4, 2])
    manifest = export_module(network, name="m", output=tmp_path)
    assert manifest == read_manifest(tmp_path / "m" / "1")
    assert manifest.source is None
    assert {record.runtime for record in manifest.parity} == {
        "eager",
        "onnxruntime cpu",
        "onnxruntime cpu, fused",
        "torchscript",
    }


def test_a_kan_may_take_sequences(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for network in (zoo.KAN([3, 2]), KAN([3, 4, 2])):
        manifest = export_module(network, name="m", output=tmp_path, input_shape=(5, 3))
        assert manifest.outputs[0].shape == (-1, 5, 2)


def test_a_float64_checkpoint_is_compared_in_its_own_precision(
    tmp_path: Path, quiet: Report
) -> None:
    torch.manual_seed(0)
    torch.save(KAN([3, 4, 2]).double().state_dict(), tmp_path / "double.pt")
    done = export_checkpoint(tmp_path / "double.pt", output=tmp_path, report=quiet)
    assert 0 < done.parity[0].max_relative <= done.parity[0].tolerance


@pytest.mark.parametrize(
    ("order", "activation"),
    [
        *((order, "silu") for order in range(6)),
        *((order, name) for order in (0, 3) for name in ("gelu", "relu", "tanh", "identity")),
    ],
)
def test_every_order_and_activation_exports_with_parity(
    tmp_path: Path, order: int, activation: str
) -> None:
    torch.manual_seed(order)
    network = KAN([2, 3, 2], spline_order=order, enable_standalone_scale_spline=order % 2 == 0)
    torch.save(network.state_dict(), tmp_path / "m.pt")
    manifest = export_checkpoint(tmp_path / "m.pt", output=tmp_path, activation=activation)
    runtimes = {"eager", "onnxruntime cpu", "torchscript"}
    fused = {"onnxruntime cpu, fused"} if order else set()
    assert {record.runtime for record in manifest.parity} == runtimes | fused
    assert {layer.operator for layer in manifest.layers} == {"KANLinear1" if order else None}


def test_an_activation_with_weights_exports(tmp_path: Path, quiet: Report) -> None:
    network = KAN([2, 3, 1], base_activation=torch.nn.PReLU)
    torch.save(network.state_dict(), tmp_path / "m.pt")
    manifest = export_checkpoint(
        tmp_path / "m.pt", output=tmp_path, activation="torch.nn:PReLU", report=quiet
    )
    assert manifest.layers[0].base_activation == "PReLU(num_parameters=1)"
    with pytest.raises(CheckpointError, match="base activation's tensors"):
        export_checkpoint(tmp_path / "m.pt", output=tmp_path, report=quiet)


def test_a_model_adapted_to_a_constant_feature_exports(tmp_path: Path, quiet: Report) -> None:
    """Its knots are 8e-5 apart there, where float32 loses digits in every implementation."""
    torch.manual_seed(0)
    network = KAN([3, 4, 2])
    x = torch.randn(500, 3)
    x[:, 1] = 0.5
    network(x, update_grid=True)
    torch.save(network.state_dict(), tmp_path / "m.pt")
    done = export_checkpoint(tmp_path / "m.pt", output=tmp_path, report=quiet)
    assert {layer.grid for layer in done.layers} == {"adapted"}


@pytest.mark.parametrize("name", ["../escaped", "a/b", "", ".hidden"])
def test_a_bundle_stays_in_its_repository(tmp_path: Path, name: str) -> None:
    with pytest.raises(LayoutError, match="model name"):
        export_module(KAN([3, 2]), name=name, output=tmp_path / "models", version=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", [0, -1, 10**19])
def test_a_version_is_a_positive_integer(tmp_path: Path, version: int) -> None:
    with pytest.raises(LayoutError, match="expected a positive integer"):
        export_module(KAN([3, 2]), name="m", output=tmp_path, version=version)
