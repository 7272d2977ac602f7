import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kan_bundle.errors import ManifestError
from kan_bundle.manifest import InputRange, Manifest, read_manifest, write_manifest


@pytest.fixture
def folder(repository: Path) -> Path:
    return repository / "uniform_4x8x3" / "1"


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    return read_manifest(folder)


def write_content(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest with a valid digest, whatever it says."""
    unsigned = (json.dumps(content | {"digest": ""}, indent=2) + "\n").encode()
    digest = hashlib.sha256(unsigned).hexdigest()
    (folder / "manifest.json").write_bytes(unsigned[:-4] + f'{digest}"\n}}\n'.encode())


def test_what_is_written_is_read_back(tmp_path: Path, manifest: Manifest) -> None:
    write_manifest(manifest, tmp_path)
    assert read_manifest(tmp_path) == manifest


def test_it_says_what_was_exported(manifest: Manifest) -> None:
    assert (manifest.name, manifest.version) == ("uniform_4x8x3", 1)
    assert [(layer.name, layer.base_activation) for layer in manifest.layers] == [
        ("layers.0", "silu"),
        ("layers.1", "silu"),
    ]
    assert [(layer.in_features, layer.out_features) for layer in manifest.layers] == [
        (4, 8),
        (8, 3),
    ]
    assert {layer.grid for layer in manifest.layers} == {"uniform"}
    assert manifest.inputs[0].shape == (-1, 4)
    assert manifest.outputs[0].shape == (-1, 3)
    assert manifest.reference == "float64"
    assert manifest.input_range is not None
    assert manifest.input_range.low == pytest.approx([-1.0] * 4)
    assert manifest.input_range.high == pytest.approx([1.0] * 4)
    assert set(manifest.files) == {"model.onnx", "model.ts", "golden.npz", "report.html"}
    assert {record.runtime for record in manifest.parity} == {
        "eager",
        "onnxruntime cpu",
        "onnxruntime cpu, fused",
        "torchscript",
    }
    assert {"torch", "onnx", "kanserve"} <= set(manifest.versions)
    assert manifest.created.endswith("+00:00")


def test_a_changed_byte_anywhere_is_noticed(tmp_path: Path, folder: Path) -> None:
    raw = (folder / "manifest.json").read_bytes()
    for position in range(len(raw)):
        changed = bytearray(raw)
        changed[position] ^= 0x01
        (tmp_path / "manifest.json").write_bytes(changed)
        with pytest.raises(ManifestError):
            read_manifest(tmp_path)


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_truncated_manifest_is_refused(tmp_path: Path, folder: Path, share: float) -> None:
    raw = (folder / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(ManifestError, match="does not end with its digest"):
        read_manifest(tmp_path)


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"format": 3}, "bundle format 3, this version .* reads formats 1 and 2", id="format"
        ),
        pytest.param({"version": 0}, "version: .* greater than or equal to 1", id="version"),
        pytest.param({"version": "1"}, "version: .* valid integer", id="type"),
        pytest.param({"extra": 1}, "extra", id="unknown field"),
        pytest.param({"inputs": []}, "inputs: ", id="no inputs"),
        pytest.param({"files": {}}, "lists no model.onnx", id="no files"),
        pytest.param({"x": [{}] * 100_000}, "expected at most 100,000 values", id="many values"),
        pytest.param({"created": "x" * 2**21}, "at most 2,097,152 bytes", id="long"),
        pytest.param({"lossy_operators": [1] * 100_000}, r"lossy_operators\.0: ", id="many faults"),
        pytest.param(
            {"files": {"../x": {"size_bytes": 1, "sha256": "0" * 64}}}, "files", id="path"
        ),
    ],
)
def test_content_that_is_not_the_contract_is_refused(
    tmp_path: Path, folder: Path, change: dict[str, Any], message: str
) -> None:
    content = json.loads((folder / "manifest.json").read_bytes())
    del content["digest"]  # written anew, at the end
    write_content(tmp_path, content)
    read_manifest(tmp_path)  # the unchanged content passes, so it is the change that is refused
    write_content(tmp_path, content | change)
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path)


def test_a_manifest_too_large_to_be_read_is_not_written(tmp_path: Path, manifest: Manifest) -> None:
    numbers = tuple(i / 3 for i in range(500_000))
    for change, limit in (
        ({"versions": {"x": "y" * 2**21}}, "2,097,152 bytes beside input_range, found 2,.*"),
        ({"input_range": InputRange(numbers, numbers)}, "16,777,216"),
    ):
        large = replace(manifest, **change)
        with pytest.raises(ManifestError, match=f"at most {limit}; export a network with fewer"):
            write_manifest(large, tmp_path)
    assert not list(tmp_path.iterdir())


def test_wide_inputs_fit_into_a_manifest(tmp_path: Path, manifest: Manifest) -> None:
    ends = tuple(i / 3 for i in range(250_000))
    write_manifest(replace(manifest, input_range=InputRange(ends, ends)), tmp_path)
    assert (tmp_path / "manifest.json").stat().st_size > 8 * 2**20
    found = read_manifest(tmp_path).input_range
    assert found is not None
    assert found.high == ends
