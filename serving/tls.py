"""Certificates: the server's own, and those that clients' must be signed by.

They are read again when they change, for connections from then on. A certificate and a key that do
not belong together, as in the moment between writing one and the other, are not used.
"""

import ssl
from functools import partial
from pathlib import Path

import grpc

from serving.errors import StartupError
from serving.watched import Watched

_PAUSE_S = 0.1  # a connection costs a thousand times what looking at three files does


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """Make what a port with TLS needs.

    Args:
        cert: The chain, PEM, the server's own certificate first.
        key: Its private key, PEM.
        client_ca: Certificates, PEM, one of which must have signed a client's; without it, clients
            need none.

    Raises:
        StartupError: A file cannot be read, or they do not belong together.
    """
    files = [cert, key] + ([client_ca] if client_ca else [])
    read = partial(_configuration, cert, key, client_ca)
    watched = Watched(files, read, _PAUSE_S)
    return grpc.dynamic_ssl_server_credentials(
        watched.get(), watched.get, require_client_authentication=client_ca is not None
    )


def _configuration(
    cert: Path, key: Path, client_ca: Path | None
) -> grpc.ServerCertificateConfiguration:
    """Read the files, and check that they are of use together."""
    contents = _contents("--tls-cert", cert), _contents("--tls-key", key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise StartupError(
            f"--tls-cert {cert} and --tls-key {key}: expected a PEM certificate and its own key "
            f"without a password: {_reason(error)}"
        ) from error
    roots = None
    if client_ca is not None:
        roots = _contents("--tls-client-ca", client_ca)
        try:
            context.load_verify_locations(cadata=roots.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise StartupError(
                f"--tls-client-ca {client_ca}: expected PEM certificates: {_reason(error)}"
            ) from error
    if contents != (_contents("--tls-cert", cert), _contents("--tls-key", key)):
        raise StartupError(f"{cert} and {key} were written to while they were read")
    certificate, private_key = contents
    return grpc.ssl_server_certificate_configuration([(private_key, certificate)], roots)


def _contents(flag: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StartupError(f"{flag} {file}: cannot be read: {error.strerror}") from error


def _no_password() -> str:
    # Without one, OpenSSL would ask at the terminal.
    return ""


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
