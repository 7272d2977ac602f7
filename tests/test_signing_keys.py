"""Keys that sign and verify: which are taken, and what is said of those that are not."""

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from export import SigningError, export_checkpoint, export_module
from export.signing import Signer, read_signer
from kan_bundle.errors import SignatureError
from kan_bundle.layout import BundleFolder
from kan_bundle.signature import read_public_key, read_signature
from kan_model import KAN
from serving.server import running
from serving.settings import Settings
from tests.conftest import GOLDENS, run_export, run_module
from tests.signing import Keys, keys, load, write_keys

__all__ = ["keys"]

MODEL = "uniform_4x8x3"
PASSWORD = "correct horse"


def own_signature(key: ec.EllipticCurvePrivateKey, kind: str, statement: Any) -> bytes:
    """Sign anything at all, as the owner of a key could."""
    from cryptography.hazmat.primitives import hashes

    payload = json.dumps(statement).encode()
    encoded = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": [
            {"sig": base64.b64encode(key.sign(encoded, ec.ECDSA(hashes.SHA256()))).decode()}
        ],
    }
    return json.dumps({"dsseEnvelope": envelope}).encode()


IN_TOTO = "application/vnd.in-toto+json"
ENTRY = {"name": "manifest.json", "algorithm": "sha256", "digest": "0" * 64}
STATEMENT: dict[str, Any] = {
    "_type": "https://in-toto.io/Statement/v1",
    "predicateType": "https://model_signing/signature/v1.0",
    "predicate": {"serialization": {"method": "files"}, "resources": [ENTRY]},
}


@pytest.mark.parametrize(
    ("kind", "statement", "reason"),
    [
        pytest.param("text/plain", STATEMENT, "a payload of type", id="something else"),
        pytest.param(
            IN_TOTO,
            STATEMENT | {"predicateType": "https://slsa.dev/provenance/v1"},
            "predicateType",
            id="another statement",
        ),
        pytest.param(
            IN_TOTO,
            STATEMENT
            | {"predicate": {"serialization": {"method": "shards"}, "resources": [ENTRY]}},
            "method: Input should be 'files'",
            id="parts of files",
        ),
        pytest.param(
            IN_TOTO,
            STATEMENT
            | {
                "predicate": {
                    "serialization": {"method": "files"},
                    "resources": [ENTRY | {"algorithm": "blake2b"}],
                }
            },
            "hashes by sha256 alone",
            id="other hashes",
        ),
        pytest.param(
            IN_TOTO,
            STATEMENT
            | {"predicate": {"serialization": {"method": "files"}, "resources": [ENTRY, ENTRY]}},
            "each file once",
            id="a file twice",
        ),
    ],
)
def test_the_same_key_signs_other_things_too(
    tmp_path: Path, kind: str, statement: Any, reason: str
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    signer = read_public_key(write_keys(tmp_path, "key", key).public)
    right = own_signature(key, IN_TOTO, STATEMENT)
    assert read_signature(right, signer, tmp_path) == {"manifest.json": "0" * 64}
    with pytest.raises(SignatureError, match=reason):
        read_signature(own_signature(key, kind, statement), signer, tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(None, "cannot be read: No such file", id="missing"),
        pytest.param(b"no key", "expected a public key in PEM, found something else", id="text"),
        pytest.param("private", "expected a public key in PEM, found something", id="private"),
        pytest.param("rsa", "on one of the curves secp256r1, .*, found", id="rsa"),
        pytest.param("ed25519", "on one of the curves", id="ed25519"),
        pytest.param("secp256k1", "on one of the curves .*, found secp256k1", id="another curve"),
    ],
)
def test_a_key_that_is_none_stops_the_start(
    tmp_path: Path, keys: Keys, content: bytes | str | None, reason: str
) -> None:
    path = tmp_path / "key.pub.pem"
    match content:
        case bytes():
            path.write_bytes(content)
        case "private":
            path.write_bytes(keys.private.read_bytes())
        case str():
            path = write_keys(tmp_path, "key", OTHER_KEYS[content]()).public
    settings = Settings(
        model_repository=tmp_path, grpc_port=0, metrics_port=0, require_signature=path
    )
    with pytest.raises(SignatureError, match=reason), running(settings):
        pass


OTHER_KEYS: dict[str, Callable[[], Any]] = {
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
}


def test_the_server_says_in_one_line_what_is_wrong_with_a_key(
    repository: Path, tmp_path: Path
) -> None:
    flags = ("--require-signature", tmp_path / "none.pem")
    done = run_module("serving", "--model-repository", repository, *flags)
    assert done.returncode == 1
    (event,) = map(json.loads, done.stderr.splitlines())
    assert event["event"] == "refused_to_start"
    assert "none.pem: cannot be read" in event["reason"]


def test_without_the_library_it_says_what_to_install(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("cryptography", "model_signing"):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(SignatureError, match=r"pip install '\.\[signing\]'"):
        read_public_key(keys.public)
    with pytest.raises(SigningError, match=r"pip install '\.\[signing\]'"):
        read_signer(keys.private, None)


# The exporter.


def test_a_password_is_read_from_a_file(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    keys = write_keys(tmp_path, "key", key, PASSWORD)
    (tmp_path / "password").write_text(f"{PASSWORD}\nnot this\n")
    done = run_module(
        *("export", GOLDENS / f"{MODEL}.pt", "--output", tmp_path / "models"),
        *("--activation", "silu", "--sign-key", keys.private),
        *("--sign-password-file", tmp_path / "password"),
    )
    assert done.returncode == 0, done.stderr
    load(BundleFolder(MODEL, 1, Path(done.stdout.strip())), keys)


@pytest.mark.parametrize(
    ("kind", "password", "reason"),
    [
        ("encrypted", None, "Password was not given.*--sign-password-file"),
        ("encrypted", "wrong", "expected a private key in PEM, and its password"),
        ("plain", "needless", "Password was given.*or leave that out"),
        ("text", None, "expected a private key in PEM"),
        ("public", None, "expected a private key in PEM"),
        ("missing", None, "cannot be read: No such file"),
        ("rsa", None, "on one of the curves secp256r1"),
        ("secp256k1", None, "on one of the curves .*, found secp256k1"),
    ],
)
def test_a_key_that_cannot_sign_is_refused_before_anything_is_written(
    tmp_path: Path, keys: Keys, kind: str, password: str | None, reason: str
) -> None:
    path = tmp_path / "key.pem"
    match kind:
        case "encrypted":
            key = ec.generate_private_key(ec.SECP256R1())
            path = write_keys(tmp_path, "own", key, PASSWORD).private
        case "plain":
            path = keys.private
        case "text":
            path.write_text("no key")
        case "public":
            path = keys.public
        case "rsa" | "secp256k1":
            path = write_keys(tmp_path, "own", OTHER_KEYS[kind]()).private
    with pytest.raises(SigningError, match=rf"--sign-key: .*{reason}") as refused:
        export_checkpoint(
            GOLDENS / f"{MODEL}.pt",
            output=tmp_path / "models",
            activation="silu",
            sign_key=path,
            sign_password=password,
        )
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "models").exists()


def test_a_version_that_cannot_be_signed_is_not_published(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(signer: Signer, folder: Path) -> None:
        assert (folder / "manifest.json").exists()
        raise SigningError("the key is gone")

    monkeypatch.setattr(Signer, "sign", fail)
    with pytest.raises(SigningError, match="the key is gone"):
        export_module(KAN([3, 2]), name="m", output=tmp_path / "models", sign_key=keys.private)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("--sign-password-file", "p"), 2, "give both or neither"),
        (
            ("--sign-key", "none.pem", "--sign-password-file", "none"),
            1,
            "--sign-password-file: none: cannot be read",
        ),
    ],
)
def test_the_command_refuses_in_a_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, reason: str
) -> None:
    checkpoint = GOLDENS / f"{MODEL}.pt"
    done = run_export(checkpoint, "--output", tmp_path / "models", *arguments)
    assert done.returncode == code
    assert reason in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "models").exists()
