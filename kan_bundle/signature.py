"""model.sig: who wrote a version, in the format of OpenSSF Model Signing (OMS).

The file is a Sigstore bundle: an envelope (DSSE) around a statement (in-toto) that lists the files
of the version folder, each with its SHA-256, signed with a key on an elliptic curve. The exporter
has it written by `model_signing`, OpenSSF's own tool, which verifies it too; the same tool can sign
a version that is there already. The server verifies with `cryptography` alone, because that tool
brings clients of several network services into its process.

Why what is signed is what is loaded: `manifest.json` is read once. Those bytes are compared with
the hash that the signature gives for them, and those bytes are parsed. They hold the size and the
hash of every other file, and each file is compared with that as it is read, once; of the weights,
which onnxruntime opens itself, the server takes a copy. Nobody gains anything by changing a file
between two looks, because nothing is looked at twice. The signature's hashes of the other files
must agree with the manifest's, so nothing passes here that OpenSSF's tool would refuse, but for
further files in the folder, which nobody reads.

The manifest does not list the signature, which covers the manifest; it also says which model and
version it is, so a signed version cannot pass for another. That it is the newest one, a signature
does not say. `config.pbtxt`, which Triton reads and the server does not, is not signed.
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from kan_bundle.errors import SignatureError
from kan_bundle.layout import MANIFEST_FILE, SIGNATURE_FILE, open_regular
from kan_bundle.manifest import Manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

NOT_INSTALLED = (
    "signatures need a library that is not installed; "
    "install kanserve's extra signing: pip install '.[signing]' in its checkout"
)

_LARGEST = 2**20  # bytes; a hundred for each file
_PAYLOAD = "application/vnd.in-toto+json"
_CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
"""Curves of the format, each with its hash."""


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are verified with.

    Args:
        path: Where it was read from, for messages.
        key: The key, on one of the format's curves.
    """

    path: Path
    key: "EllipticCurvePublicKey"


@dataclass(frozen=True)
class _Signature:
    sig: str


@dataclass(frozen=True)
class _Envelope:
    payload: str
    payload_type: Annotated[str, Field(alias="payloadType")]
    signatures: Annotated[tuple[_Signature, ...], Field(min_length=1, max_length=1)]


@dataclass(frozen=True)
class _Bundle:
    envelope: Annotated[_Envelope, Field(alias="dsseEnvelope")]


@dataclass(frozen=True)
class _Resource:
    name: str
    algorithm: str
    digest: str


@dataclass(frozen=True)
class _Serialization:
    method: Literal["files"]


@dataclass(frozen=True)
class _Predicate:
    serialization: _Serialization
    resources: tuple[_Resource, ...]


@dataclass(frozen=True)
class _Statement:
    kind: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")]
    predicate_kind: Annotated[
        Literal["https://model_signing/signature/v1.0"], Field(alias="predicateType")
    ]
    predicate: _Predicate


_BUNDLE = TypeAdapter(_Bundle)
_STATEMENT = TypeAdapter(_Statement)


def read_public_key(path: Path) -> PublicKey:
    """Read a public key from a PEM file.

    Raises:
        SignatureError: It cannot be read, is none, or `cryptography` is not installed.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise SignatureError(f"{path}: {NOT_INSTALLED}") from error
    try:
        with open_regular(path) as file:
            key = load_pem_public_key(file.read(_LARGEST))
    except OSError as error:
        raise SignatureError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(
            f"{path}: expected a public key in PEM, found something else; `openssl ec -in KEY.pem "
            "-pubout` makes one of a private key"
        ) from error
    return PublicKey(path, require_curve(key, path))


def require_curve(key: object, path: Path) -> "EllipticCurvePublicKey":
    """Return a public key if signatures of the format can be made with it.

    Args:
        key: A public key of any kind.
        path: Where it is from, for messages.

    Raises:
        SignatureError: They cannot.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        found = getattr(getattr(key, "curve", None), "name", type(key).__name__)
        raise SignatureError(
            f"{path}: expected a key on one of the curves {', '.join(_CURVES)}, found {found}; "
            "`openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem` makes one"
        )
    return key


def signed_files(folder: Path, manifest: bytes, signer: PublicKey) -> Mapping[str, str]:
    """Verify the signature of a version folder, and that it is for these bytes of its manifest.

    Args:
        folder: Where the signature lies.
        manifest: What was read from `manifest.json`.
        signer: Whose signature it must be.

    Returns:
        The SHA-256 of each signed file, by name.

    Raises:
        SignatureError: There is none, it is another's, or for other bytes.
    """
    path = folder / SIGNATURE_FILE
    try:
        with open_regular(path) as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise SignatureError(
            f"{path}: cannot be read: {error.strerror}; only signed versions are served: sign it, "
            "or export again with --sign-key"
        ) from error
    files = read_signature(content, signer, path)
    found = hashlib.sha256(manifest).hexdigest()
    if files.get(MANIFEST_FILE) != found:
        raise SignatureError(
            f"{path}: signed for a {MANIFEST_FILE} of SHA-256 {files.get(MANIFEST_FILE)}, found "
            f"one of {found}: changed since it was signed; copy it or export again"
        )
    return files


def read_signature(content: bytes, signer: PublicKey, path: Path) -> Mapping[str, str]:
    """Verify the bytes of a signature.

    Args:
        content: The bytes.
        signer: Whose signature it must be.
        path: Where they are from, for messages.

    Returns:
        The SHA-256 of each signed file, by name.

    Raises:
        SignatureError: They are no signature, or another's.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    try:
        if len(content) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        envelope = _BUNDLE.validate_json(content).envelope
        payload, signature = map(_decoded, (envelope.payload, envelope.signatures[0].sig))
        kind = envelope.payload_type
        # DSSE's encoding of what is signed: github.com/secure-systems-lab/dsse, protocol.md
        encoded = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
        algorithm: hashes.HashAlgorithm = getattr(hashes, _CURVES[signer.key.curve.name])()
        signer.key.verify(signature, encoded, ECDSA(algorithm))
        # From here on it is the signer's word.
        if kind != _PAYLOAD:
            raise ValueError(f"expected a payload of type {_PAYLOAD}, found {kind[:64]!r}")
        resources = _STATEMENT.validate_json(payload).predicate.resources
        if any(resource.algorithm != "sha256" for resource in resources):
            raise ValueError("expected hashes by sha256 alone")
        files = {resource.name: resource.digest for resource in resources}
        if len(files) != len(resources):
            raise ValueError("expected each file once")
    except InvalidSignature as error:
        raise SignatureError(
            f"{path}: not signed by the owner of {signer.path}, or changed since; sign it with "
            "that key, or require the key that it was signed with"
        ) from error
    except ValueError as error:  # pydantic's too
        raise SignatureError(
            f"{path}: no signature in OpenSSF's format: {_first_fault(error)}; sign it anew"
        ) from error
    return files


def require_listed(folder: Path, manifest: Manifest, signed: Mapping[str, str]) -> None:
    """Compare the signature's hashes with the manifest's.

    Args:
        folder: Of the version, for messages.
        manifest: What lists the files.
        signed: From `signed_files`.

    Raises:
        SignatureError: They differ for a file, or it is not signed.
    """
    for name, record in manifest.files.items():
        if signed.get(name) != record.sha256:
            raise SignatureError(
                f"{folder / name}: {MANIFEST_FILE} gives it SHA-256 {record.sha256}, "
                f"{SIGNATURE_FILE} {signed.get(name)}: signed after it was changed; export again"
            )


def _decoded(text: str) -> bytes:
    return base64.b64decode("".join(text.split()), validate=True)


def _first_fault(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
    return str(error)
