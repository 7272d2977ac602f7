"""Signs a version folder, so that a server can tell who wrote it.

OpenSSF's `model_signing` does it, in the format of kan_bundle/signature.py; the signature is read
back as the server reads it. The library is in an extra of its own and is imported when it is asked
for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import SigningError, cause
from kan_bundle.errors import SignatureError
from kan_bundle.layout import MANIFEST_FILE, SIGNATURE_FILE
from kan_bundle.manifest import read_manifest
from kan_bundle.signature import (
    NOT_INSTALLED,
    PublicKey,
    require_curve,
    require_listed,
    signed_files,
)


@dataclass(frozen=True)
class Signer:
    """A private key, and how to use it.

    Args:
        path: A PEM file.
        password: What it is encrypted with, if it is.
        public: What its signatures are verified with.
    """

    path: Path
    password: str | None
    public: PublicKey

    def sign(self, folder: Path) -> None:
        """Sign all files of a version folder, and write the signature beside them.

        Raises:
            SigningError: It cannot be done.
        """
        from model_signing import hashing, signing

        target = folder / SIGNATURE_FILE
        # Neither constructor says that it returns None, which mypy asks for.
        files = hashing.Config().use_file_serialization(  # type: ignore[no-untyped-call]
            hashing_algorithm="sha256"
        )
        files.set_ignored_paths(paths=[target], ignore_git_paths=False)
        # 1.1.1 hands the password on to cryptography, which takes bytes alone, and says str.
        password: Any = None if self.password is None else self.password.encode()
        try:
            config = signing.Config().use_elliptic_key_signer(  # type: ignore[no-untyped-call]
                private_key=self.path, password=password
            )
            config.set_hashing_config(files).sign(folder, target)
            content = (folder / MANIFEST_FILE).read_bytes()
            signed = signed_files(folder, content, self.public)
            require_listed(folder, read_manifest(folder), signed)
        except OSError:
            raise
        except Exception as error:  # of the library, which has none of its own
            raise SigningError(f"--sign-key: {self.path}: {cause(error)}") from error


def read_signer(path: Path, password: str | None) -> Signer:
    """Read a private key, before anything is exported.

    Args:
        path: A PEM file.
        password: What it is encrypted with, if it is.

    Raises:
        SigningError: It cannot be read or used, or the library is not installed.
    """
    try:
        import model_signing  # noqa: F401 - whether it can be
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise SigningError(f"--sign-key: {NOT_INSTALLED}") from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SigningError(f"--sign-key: {path}: cannot be read: {error.strerror}") from error
    try:
        key = load_pem_private_key(content, None if password is None else password.encode())
    except TypeError as error:  # encrypted without a password, or the reverse
        raise SigningError(
            f"--sign-key: {path}: {str(error).rstrip('.')}; give it with --sign-password-file, or "
            "leave that out"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SigningError(
            f"--sign-key: {path}: expected a private key in PEM, and its password if it has one; "
            f"found neither: {str(error).partition(chr(10))[0]}"
        ) from error
    own = key.public_key() if isinstance(key, EllipticCurvePrivateKey) else key
    try:
        return Signer(path, password, PublicKey(path, require_curve(own, path)))
    except SignatureError as error:
        raise SigningError(f"--sign-key: {error}") from error
