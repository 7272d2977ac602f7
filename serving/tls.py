"""Certificates: the server's own, and those that clients' must be signed by.

They are read again when they change, for connections from then on. A certificate and a key that do
not belong together, as in the moment between writing one and the other, are not used.
"""

import ssl
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc

from serving.errors import StartupError
from serving.watched import Watched

_PAUSE_S = 0.1  # a connection costs a thousand times what looking at three files does
_SETTLE_S = 0.05  # in which gRPC, in C++, certainly takes what it has been given


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
    renewal = Renewal(Watched(files, read, _PAUSE_S).get)
    return grpc.dynamic_ssl_server_credentials(
        renewal.current,
        renewal,  # type: ignore[arg-type]  # None is documented, and missing in the stubs
        require_client_authentication=client_ca is not None,
    )


class Renewal:
    """Gives gRPC a configuration when it has changed, and None at all other handshakes.

    gRPC 1.81 asks at every handshake. It replaces its handshaker factory with what it is given, and
    frees the old one, without a lock: another handshake that is about to use the old one crashes
    the process. So nothing is replaced without need. When it must be, handshakes that have asked
    before get time to start, and those that ask next wait until it is done.

    Args:
        get: Returns the present configuration; the same object as long as nothing changes.
        settle_s: That time, in seconds.
        sleep: Waits for some seconds.

    Attributes:
        current: The configuration that gRPC has.
    """

    def __init__(
        self,
        get: Callable[[], grpc.ServerCertificateConfiguration],
        settle_s: float = _SETTLE_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._get = get
        self._settle_s = settle_s
        self._sleep = sleep
        self._lock = threading.Lock()
        self._replacing = False
        self.current = get()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the configuration if gRPC does not have it yet."""
        if not self._replacing and self._get() is self.current:
            return None
        with self._lock:
            if self._replacing:  # whoever came before has just been given it
                self._sleep(self._settle_s)
                self._replacing = False
            found = self._get()
            if found is self.current:
                return None
            self._replacing = True
            self._sleep(self._settle_s)
            self.current = found
            return found


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
