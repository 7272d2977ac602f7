"""Who wrote a bundle: signed here and by OpenSSF's tool, verified here and by it."""

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from rich.console import Console

from export import SigningError, export_checkpoint, export_module
from export.conversion import onnx_graph
from export.report import Report
from export.signing import read_signer
from kan_bundle.errors import BundleError, SignatureError
from kan_bundle.integrity import record_file
from kan_bundle.layout import BundleFolder
from kan_bundle.manifest import Manifest, read_manifest, write_manifest
from kan_bundle.signature import read_public_key, read_signature
from kan_model import KAN
from protos import inference_pb2 as pb
from serving.engine import Engine
from serving.models.loading import Admission, load_bundle
from tests.bundles import CLOSE, run_onnx
from tests.conftest import GOLDENS
from tests.loading import LIMITS, make_engine, unreached
from tests.servers import WAIT_S, served
from tests.signing import Keys, keys, load, write_keys
from tests.wire import raw_output, raw_request

__all__ = ["keys", "unreached"]

MODEL = "uniform_4x8x3"
X = np.linspace(-0.9, 0.9, 12, dtype=np.float32).reshape(3, 4)


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Those of somebody else."""
    key = ec.generate_private_key(ec.SECP256R1())
    return write_keys(tmp_path_factory.mktemp("others"), "key", key)


@pytest.fixture(scope="session")
def signed(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Path:
    """A version that was exported signed. Read only."""
    root = tmp_path_factory.mktemp("signed")
    report = Report(Console(file=io.StringIO()))
    checkpoint = GOLDENS / f"{MODEL}.pt"
    export_checkpoint(
        checkpoint, output=root, activation="silu", sign_key=keys.private, report=report
    )
    return root / MODEL / "1"


@pytest.fixture
def folder(signed: Path, tmp_path: Path) -> BundleFolder:
    """A copy of it, for an attacker."""
    shutil.copytree(signed, tmp_path / MODEL / "1")
    return BundleFolder(MODEL, 1, tmp_path / MODEL / "1")


def openssf(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run OpenSSF's own tool."""
    return subprocess.run(
        [sys.executable, "-m", "model_signing", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def sign_with_tool(folder: Path, keys: Keys, *options: str | Path) -> None:
    place = ("--signature", folder / "model.sig", "--private_key", keys.private)
    done = openssf("sign", "key", folder, *place, *options)
    assert done.returncode == 0, done.stderr


def verify_with_tool(folder: Path, keys: Keys) -> subprocess.CompletedProcess[str]:
    place = ("--signature", folder / "model.sig", "--public_key", keys.public)
    return openssf("verify", "key", folder, *place)


def reseal(folder: Path, **changes: Any) -> None:
    """Write a manifest with true hashes, as an attacker would."""
    manifest = read_manifest(folder)
    files = {name: record_file(folder / name) for name in manifest.files}
    write_manifest(replace(manifest, files=files, **changes), folder)


def test_what_is_exported_signed_is_served(folder: BundleFolder, keys: Keys) -> None:
    (found,) = load(folder, keys).engine.run([X])
    np.testing.assert_allclose(found, run_onnx(folder.path, X)[0], **CLOSE)
    assert "model.sig" not in read_manifest(folder.path).files


def test_openssfs_tool_verifies_what_is_exported(folder: BundleFolder, keys: Keys) -> None:
    done = verify_with_tool(folder.path, keys)
    assert done.returncode == 0, done.stderr
    (folder.path / "model.ts").write_bytes(b"other")
    assert verify_with_tool(folder.path, keys).returncode == 1


def test_what_openssfs_tool_signs_is_served(
    repository: Path, tmp_path: Path, keys: Keys, others: Keys
) -> None:
    shutil.copytree(repository / MODEL, tmp_path / MODEL)
    folder = BundleFolder(MODEL, 1, tmp_path / MODEL / "1")
    sign_with_tool(folder.path, keys)
    assert load(folder, keys).engine.run([X])[0].shape == (3, 3)
    with pytest.raises(SignatureError, match="not signed by the owner of"):
        load(folder, others)


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_every_curve_of_the_format_is_taken(
    folder: BundleFolder, tmp_path: Path, curve: ec.EllipticCurve
) -> None:
    keys = write_keys(tmp_path, "own", ec.generate_private_key(curve))
    (folder.path / "model.sig").unlink()
    read_signer(keys.private, None).sign(folder.path)
    load(folder, keys)
    assert verify_with_tool(folder.path, keys).returncode == 0


def forge(folder: Path) -> None:
    """Take the signature apart, name other hashes, and put it together again."""
    path = folder / "model.sig"
    bundle = json.loads(path.read_bytes())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    for resource in payload["predicate"]["resources"]:
        if resource["name"] == "manifest.json":
            resource["digest"] = digest
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    path.write_text(json.dumps(bundle))


def sign_as_another(folder: Path, others: Keys) -> None:
    (folder / "model.sig").unlink()
    read_signer(others.private, None).sign(folder)


def replace_model(folder: Path, others: Keys) -> None:
    (folder / "model.onnx").write_bytes(b"evil")
    reseal(folder)


def replace_model_and_hash(folder: Path, others: Keys) -> None:
    replace_model(folder, others)
    forge(folder)


def replace_by_pipe(folder: Path, others: Keys) -> None:
    (folder / "model.sig").unlink()
    os.mkfifo(folder / "model.sig")


ATTACKS: dict[str, tuple[Callable[[Path, Keys], object], str]] = {
    "unsigned": (
        lambda folder, _: (folder / "model.sig").rename(folder / "other.sig"),
        r"model\.sig: cannot be read: .*; only signed versions are served: sign it",
    ),
    "another model with true hashes": (
        replace_model,
        r"signed for a manifest\.json of SHA-256 \w+, found one of",
    ),
    "another model and its hash in the signature": (
        replace_model_and_hash,
        "not signed by the owner of .*, or changed since",
    ),
    "signed by somebody else": (sign_as_another, "not signed by the owner of"),
    "another manifest": (
        lambda folder, _: reseal(folder, created="1970-01-01T00:00:00+00:00"),
        r"signed for a manifest\.json of",
    ),
    "a pipe": (replace_by_pipe, "regular file"),
    "a signature without end": (
        lambda folder, _: os.truncate(folder / "model.sig", 2**40),
        "it has more than 1048576 bytes",
    ),
    "lists in lists": (
        lambda folder, _: (folder / "model.sig").write_bytes(b"[" * 500_000),
        "no signature in OpenSSF's format",
    ),
    "nothing": (
        lambda folder, _: (folder / "model.sig").write_bytes(b""),
        "no signature in OpenSSF's format",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.usefixtures("unreached")
def test_what_is_not_signed_is_not_loaded(
    folder: BundleFolder, keys: Keys, others: Keys, attack: str
) -> None:
    do, reason = ATTACKS[attack]
    do(folder.path, others)
    with pytest.raises(SignatureError, match=reason):
        load(folder, keys)


@pytest.mark.usefixtures("unreached")
def test_a_signed_version_cannot_pass_for_another(folder: BundleFolder, keys: Keys) -> None:
    with pytest.raises(BundleError, match="cannot be renamed"):
        load(replace(folder, version=2), keys)


@pytest.mark.parametrize("name", ["model.onnx", "model.ts", "golden.npz"])
@pytest.mark.usefixtures("unreached")
def test_a_file_that_was_swapped_is_not_loaded(folder: BundleFolder, keys: Keys, name: str) -> None:
    content = bytearray((folder.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder.path / name).write_bytes(content)
    with pytest.raises(BundleError, match="expected SHA-256"):
        load(folder, keys)


@pytest.mark.usefixtures("unreached")
def test_a_version_that_was_damaged_before_it_was_signed_is_not_loaded(
    folder: BundleFolder, keys: Keys
) -> None:
    (folder.path / "model.ts").write_bytes(b"damaged")
    sign_with_tool(folder.path, keys)
    with pytest.raises(SignatureError, match=r"model\.ts: manifest\.json gives it SHA-256"):
        load(folder, keys)
    (folder.path / "model.sig").unlink()
    with pytest.raises(SigningError, match="signed after it was changed"):
        read_signer(keys.private, None).sign(folder.path)


@pytest.mark.parametrize("seed", range(3))
def test_any_bytes_are_a_signature_or_refused(signed: Path, keys: Keys, seed: int) -> None:
    rng = np.random.default_rng(seed)
    content = (signed / "model.sig").read_bytes()
    signer = read_public_key(keys.public)
    expected = read_signature(content, signer, signed)
    assert set(expected) == {*read_manifest(signed).files, "manifest.json"}
    for _ in range(200):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            changed[place] = int(rng.choice([*b'{}[]":,0a\\\x00\xff', int(rng.integers(256))]))
        for tried in (bytes(changed), content[: rng.integers(0, len(content))], rng.bytes(50)):
            reason = ""
            try:
                assert read_signature(tried, signer, signed) == expected
            except SignatureError as error:
                reason = str(error)
            assert "\n" not in reason


@pytest.fixture(scope="session")
def beside(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Path:
    """A signed version whose weights lie beside the graph. Read only."""
    root = tmp_path_factory.mktemp("beside")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "LARGEST_INLINE", 100)
        export_module(KAN([4, 8, 3]), name="m", output=root, sign_key=keys.private)
    return root / "m"


def test_weights_are_served_as_they_were_signed(beside: Path, tmp_path: Path, keys: Keys) -> None:
    """onnxruntime opens their file itself: between the hash and that, and while it is served."""
    shutil.copytree(beside, tmp_path / "m")
    folder = BundleFolder("m", 1, tmp_path / "m" / "1")
    (expected,) = run_onnx(folder.path, X)
    weights = folder.path / "model.onnx.data"
    places = []

    def make_engine_late(model: bytes, manifest: Manifest, place: Path) -> Engine:
        weights.write_bytes(bytes(weights.stat().st_size))
        places.append(place)
        return make_engine(model, manifest, place)

    admission = Admission(signer=read_public_key(keys.public))
    model = load_bundle(folder, make_engine_late, LIMITS, admission=admission)
    assert not places[0].exists()
    np.testing.assert_allclose(model.engine.run([X])[0], expected, **CLOSE)
    with pytest.raises(BundleError, match=r"model\.onnx\.data: expected SHA-256"):
        load(folder, keys)


def test_without_room_for_the_weights_it_says_so(
    beside: Path, tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(BundleError, match=r"cannot be copied .*: set TMPDIR to a folder with \d+"):
        load(BundleFolder("m", 1, beside / "1"), keys)


def test_an_unsigned_version_leaves_the_signed_one_serving(
    folder: BundleFolder, keys: Keys, repository: Path
) -> None:
    root = folder.path.parent.parent
    settings: dict[str, Any] = {"model_control": "explicit", "load_models": (MODEL,)}
    with served(root, require_signature=keys.public, **settings) as (_, stub):
        before = raw_output(stub.ModelInfer(raw_request(X)))
        shutil.copytree(repository / MODEL / "1", root / MODEL / "2")
        reseal(root / MODEL / "2", version=2)
        request = pb.RepositoryModelLoadRequest(model_name=MODEL)
        with pytest.raises(grpc.RpcError) as refused:
            stub.RepositoryModelLoad(request, timeout=WAIT_S)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "failed its checks" in str(refused.value.details())
        assert "model.sig" not in str(refused.value.details())
        answer = stub.ModelInfer(raw_request(X))
        assert answer.model_version == "1"
        np.testing.assert_array_equal(raw_output(answer), before)
        (folder.path / "model.sig").unlink()  # the one that serves goes on, too
        with pytest.raises(grpc.RpcError):
            stub.RepositoryModelLoad(request, timeout=WAIT_S)
        np.testing.assert_array_equal(raw_output(stub.ModelInfer(raw_request(X))), before)


def test_without_the_setting_a_signature_is_not_asked_for(folder: BundleFolder) -> None:
    (folder.path / "model.sig").write_bytes(b"no signature")
    load_bundle(folder, make_engine, LIMITS)
