"""`--sign-key`: which keys are taken, and that nothing is published without its signature."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from export import SigningError, export_checkpoint, export_module
from export.signing import Signer
from kan_bundle.layout import BundleFolder
from kan_bundle.signature import read_public_key
from kan_model import KAN
from serving.loading import Admission, load_bundle
from tests.bundles import LIMITS, make_engine
from tests.conftest import GOLDENS, run_module
from tests.security import OTHER_KEYS, Keys, write_keys

MODEL = "uniform_4x8x3"
PASSWORD = "correct horse"


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    (tmp_path / "keys").mkdir()
    return write_keys(tmp_path / "keys", "key", ec.generate_private_key(ec.SECP256R1()))


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
    folder = BundleFolder(MODEL, 1, Path(done.stdout.strip()))
    admission = Admission(signer=read_public_key(keys.public))
    load_bundle(folder, make_engine, LIMITS, admission=admission)


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
    done = run_module("export", checkpoint, "--output", tmp_path / "models", *arguments)
    assert done.returncode == code
    assert reason in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "models").exists()
