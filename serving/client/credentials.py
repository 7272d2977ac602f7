"""Whom a client trusts, and how it shows who it is: certificates, and bearer tokens.

Files are checked when they are read, because gRPC takes any bytes and fails at the handshake. No
message shows a token or a key.
"""

import re
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from serving.client.errors import WrongSetting

_VISIBLE = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class Tls:
    """How a server is recognised, and this client by it.

    Attributes:
        ca: Certificates of those who vouch for the server, as PEM; by default gRPC's own list of
            public ones.
        certificate: This client's, as PEM with those that lead to it, for a server that wants one.
        key: What belongs to the certificate, as PEM without a password.
        server_name: The name that the server's certificate is for, if it is not in the address.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Raises:
            WrongSetting: One cannot be read, is not what it should be, or does not fit another.
        """
        if (self.certificate is None) != (self.key is None):
            given, missing = ("certificate", "key") if self.certificate else ("key", "certificate")
            raise WrongSetting(f"expected a certificate and its key, found only the {given}; "
                               f"give the {missing} too")  # fmt: skip
        ca = _read(self.ca) if self.ca is not None else None
        if ca is not None:
            try:
                ssl.create_default_context(cadata=ca.decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                raise WrongSetting(
                    f"{self.ca}: expected certificates as PEM, found something else"
                ) from error
        if self.certificate is None or self.key is None:
            return grpc.ssl_channel_credentials(ca)
        certificate, key = _read(self.certificate), _read(self.key)
        try:
            # The password is asked for on the terminal unless there is one.
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
                self.certificate, self.key, password=""
            )
        except ssl.SSLError as error:
            raise WrongSetting(
                f"{self.certificate} and {self.key}: expected a certificate and its key as PEM, "
                f"without a password, found no such pair ({error.reason})"
            ) from error
        return grpc.ssl_channel_credentials(ca, key, certificate)


@dataclass(frozen=True)
class Token:
    """A bearer token. A file is read at every call, because whoever issues tokens renews them.

    Args:
        text: The token itself; None if it is in a file.
        file: Where it is; spaces and line ends around it do not count.
    """

    text: str | None = None
    file: Path | None = None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Give what goes with a call.

        Raises:
            WrongSetting: There is no token, or it cannot be sent in a header.
        """
        if self.file is not None:
            where = str(self.file)
            token = _read(self.file).decode("utf-8", "replace").strip()
        else:
            where, token = "token", self.text or ""
        if not _VISIBLE.fullmatch(token):
            found = "other characters" if token else "nothing"
            raise WrongSetting(
                f"{where}: expected a token of visible ASCII characters, found {found}"
            )
        return (("authorization", f"Bearer {token}"),)


class Bearer(grpc.AuthMetadataPlugin):
    """Has gRPC itself send a token, over TLS alone, also when it watches a server's health.

    Args:
        token: Read anew for every call.
    """

    def __init__(self, token: Token) -> None:
        self._token = token

    def __call__(
        self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback
    ) -> None:
        """Tell gRPC what goes with a call; called by it."""
        try:
            callback(self._token.metadata(), None)
        except WrongSetting as error:
            callback((), error)


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise WrongSetting(f"{path}: cannot be read: {error.strerror or error}") from error
