"""Certificates and tokens for servers and clients in tests, and keys that sign bundles."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa


@dataclass(frozen=True)
class Authority:
    """Somebody who signs certificates, and files of what it has signed for the server."""

    ca: trustme.CA
    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Authority":
        folder.mkdir(exist_ok=True)
        authority = cls(trustme.CA(), folder)
        authority.ca.cert_pem.write_to_path(authority.roots)
        authority.renew()
        return authority

    @property
    def cert(self) -> Path:
        return self.folder / "server.pem"

    @property
    def key(self) -> Path:
        return self.folder / "server.key"

    @property
    def roots(self) -> Path:
        return self.folder / "ca.pem"

    def renew(self) -> None:
        """Give the server another certificate."""
        leaf = self.ca.issue_cert("127.0.0.1", "localhost")
        self.cert.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        self.key.write_bytes(leaf.private_key_pem.bytes())

    def write_client(self, name: str) -> tuple[Path, Path]:
        """Give a client a certificate and its key."""
        leaf = self.ca.issue_cert(name)
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        leaf.cert_chain_pems[0].write_to_path(cert)
        leaf.private_key_pem.write_to_path(key)
        return cert, key

    def settings(self, *, mutual: bool = False) -> dict[str, Path]:
        own = {"tls_cert": self.cert, "tls_key": self.key}
        return own | ({"tls_client_ca": self.roots} if mutual else {})

    def channel(self, address: str, client: str | None = None) -> grpc.Channel:
        """A channel that trusts this authority, with a client's certificate of that name."""
        pair: tuple[bytes | None, bytes | None] = (None, None)
        if client is not None:
            cert, key = self.write_client(client)
            pair = key.read_bytes(), cert.read_bytes()
        credentials = grpc.ssl_channel_credentials(self.roots.read_bytes(), *pair)
        return grpc.secure_channel(address, credentials)


def write_access(
    file: Path,
    *,
    tokens: Mapping[str, Sequence[str]] | None = None,
    certificates: Mapping[str, Sequence[str]] | None = None,
    anyone: Sequence[str] = (),
) -> Path:
    """Write who may call what, by group."""
    lines = []
    for group in ("inference", "admin"):
        hashes = [hashlib.sha256(t.encode()).hexdigest() for t in (tokens or {}).get(group, ())]
        names = list((certificates or {}).get(group, ()))
        if hashes or names or group in anyone:
            lines += [f"[{group}]", f"tokens_sha256 = {hashes}", f"certificates = {names}"]
            lines += [f"anyone = {'true' if group in anyone else 'false'}"]
    partial_file = file.with_name(f".{file.name}")
    partial_file.write_text("\n".join(lines) + "\n")
    partial_file.replace(file)
    return file


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@dataclass(frozen=True)
class Keys:
    """A pair of keys, as PEM files."""

    private: Path
    public: Path


def write_keys(folder: Path, name: str, key: Any, password: str | None = None) -> Keys:
    keys = Keys(folder / f"{name}.pem", folder / f"{name}.pub.pem")
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password.encode())
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    keys.private.write_bytes(key.private_bytes(pem, form, encryption))
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    keys.public.write_bytes(key.public_key().public_bytes(pem, public))
    return keys


OTHER_KEYS: dict[str, Callable[[], Any]] = {
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
}
"""Kinds of keys that sign no bundle."""
