"""Certificates and tokens for servers and clients in tests."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID


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

    def write_named(
        self, *names: x509.GeneralName, common_name: str | None = None
    ) -> tuple[Path, Path]:
        """Give a client a certificate with names of any types."""
        key = ec.generate_private_key(ec.SECP256R1())
        signer = x509.load_pem_x509_certificate(self.ca.cert_pem.bytes())
        signing = load_pem_private_key(self.ca.private_key_pem.bytes(), None)
        assert isinstance(signing, ec.EllipticCurvePrivateKey)
        subject = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else []
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(signer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(signer.not_valid_before_utc)
            .not_valid_after(signer.not_valid_after_utc)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(signing, SHA256())
        files = self.folder / "named.pem", self.folder / "named.key"
        files[0].write_bytes(certificate.public_bytes(Encoding.PEM))
        files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return files

    def settings(self, *, mutual: bool = False) -> dict[str, Path]:
        own = {"tls_cert": self.cert, "tls_key": self.key}
        return own | ({"tls_client_ca": self.roots} if mutual else {})

    def channel(
        self, address: str, client: str | None = None, *, files: tuple[Path, Path] | None = None
    ) -> grpc.Channel:
        """A channel that trusts this authority, with a client's certificate of that name."""
        pair: tuple[bytes | None, bytes | None] = (None, None)
        if client is not None or files is not None:
            cert, key = files or self.write_client(str(client))
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
