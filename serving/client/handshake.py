"""Why a TLS handshake with a server fails, found out with Python's own TLS.

gRPC reports the last address that it tried alone: where a name has two addresses, "connection
refused" of one hides a certificate that was not accepted at the other; and of a server that wants a
client's certificate it reports a closed socket. So once no server has answered, this module
connects to each address by itself, and sends neither a request nor a token.
"""

import socket
import ssl
from collections.abc import Sequence
from typing import Any

from serving.client.credentials import Tls

Endpoint = tuple[str, int]
"""A host and a port."""

# OpenSSL's X509_V_ERR_* and X509_V_FLAG_*, which the module ssl has no names for.
_NOT_VALID_NOW = (9, 10)  # not yet, no longer
_OTHER_NAME = (62, 64)  # of a host, of an IP address
_NO_CHECK_TIME = 0x200000
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")
_MAX_NAMES = 5
_MAX_ISSUER = 200  # characters

_GIVE_CA = (
    "give the certificate of the authority that signed it (--ca FILE, Tls(ca=...)), or the address "
    "of another server"
)
_GIVE_CERTIFICATE = (
    "give a certificate of this client that the server accepts, and its key (--cert FILE --key "
    "FILE, Tls(certificate=..., key=...))"
)


def find_tls_fault(
    endpoints: Sequence[Endpoint], tls: Tls | None, name: str | None, timeout_s: float
) -> str | None:
    """Find the reason why TLS, or its absence, keeps a client from a server.

    Args:
        endpoints: Where the servers are; all addresses of each host are tried.
        tls: How the client recognises them; None if it speaks without TLS.
        name: What their certificates must be for, if that is not the host.
        timeout_s: Time for one connection, in seconds.

    Returns:
        Where, what was expected, what was found and what to do, of the first address where there
        is such a reason; None if there is none, or no address answers.
    """
    for host, port in endpoints:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            continue
        for *_, address in found:
            place = (str(address[0]), port)
            if tls is None:
                fault = _fault_without_tls(place, timeout_s)
            else:
                fault = _fault_with_tls(place, tls, name or host, timeout_s)
            if fault is not None:
                return f"[{host}]:{port}: {fault}" if ":" in host else f"{host}:{port}: {fault}"
    return None


def _fault_without_tls(place: Endpoint, timeout_s: float) -> str | None:
    context = _trusting_any()
    try:
        with socket.create_connection(place, timeout_s) as plain:
            context.wrap_socket(plain, server_hostname=place[0]).close()
    except ssl.SSLEOFError:
        return None  # as anything may end a connection
    except ssl.SSLError as error:
        if error.reason in _NO_TLS or "ALERT" not in (error.reason or ""):
            return None
    except OSError:
        return None
    return (
        "the server speaks TLS, the client does not; give the certificate of the authority that "
        "signed the server's (--ca FILE, tls=Tls(ca=...)), or --tls (tls=Tls()) if that is a "
        "public one"
    )


def _fault_with_tls(place: Endpoint, tls: Tls, name: str, timeout_s: float) -> str | None:
    try:
        with (
            socket.create_connection(place, timeout_s) as plain,
            _trusting(tls).wrap_socket(plain, server_hostname=name) as secured,
        ):
            if secured.selected_alpn_protocol() != "h2":
                return (
                    "the server speaks TLS, but does not offer HTTP/2 (ALPN h2), which gRPC needs; "
                    "give the address of the port for gRPC"
                )
            return _fault_after_handshake(secured, tls)
    except ssl.SSLCertVerificationError as error:
        return _unaccepted(place, tls, name, error, timeout_s)
    except ssl.SSLError as error:
        if error.reason in _NO_TLS:
            return (
                "the server does not speak TLS; leave out --tls and the certificates (tls=None), "
                "or give the address of one that does"
            )
        return (
            f"the TLS handshake failed ({error.reason}); if the server asks for certificates of "
            f"clients, {_GIVE_CERTIFICATE}"
        )
    except (OSError, ValueError):  # of a name that stands in no certificate
        return None


def _fault_after_handshake(secured: ssl.SSLSocket, tls: Tls) -> str | None:
    """Wait for the server's first bytes; in TLS 1.3 it looks at the client's certificate late."""
    try:
        if secured.recv(1):
            return None
        ended = "it ended the connection"
    except TimeoutError:
        return None  # it waits for the client
    except ssl.SSLError as error:
        ended = str(error.reason)
    except OSError:
        ended = "it reset the connection"
    if tls.certificate is None:
        expected, found = "the server expects a certificate of the client", "none was given"
    else:
        expected = f"the server does not accept the client's certificate {tls.certificate}"
        found = "it is not of an authority that the server trusts, or has expired"
    return f"after the TLS handshake, {expected}: {found} ({ended}); {_GIVE_CERTIFICATE}"


def _unaccepted(
    place: Endpoint, tls: Tls, name: str, error: ssl.SSLCertVerificationError, timeout_s: float
) -> str:
    """Describe a certificate that the client does not accept."""
    certificate = _certificate(place, name, timeout_s)
    names, issuer = _names(certificate), _issuer(certificate)
    of = f" for {names}" if names else ""
    if error.verify_code in _OTHER_NAME:
        found = f"one for {names}" if names else "one for others"
        return (
            f"TLS: expected the server's certificate to be for {name!r}, found {found}; give one "
            "of its names (--server-name NAME, Tls(server_name=...)), or the address that it is for"
        )
    if error.verify_code in _NOT_VALID_NOW:
        until = certificate.get("notAfter")
        dates = f", valid from {certificate['notBefore']} to {until}" if until else ""
        return (
            f"TLS: expected the server's certificate to be valid now, found one{of}{dates} "
            f"({error.verify_message}); have it renewed, or set this machine's clock; if it is the "
            "authority's own that has expired, give the new one (--ca FILE, Tls(ca=...))"
        )
    trusted = f"an authority in {tls.ca}" if tls.ca is not None else "a public authority"
    by = f" by {issuer}" if issuer else " by another"
    return (
        f"TLS: expected the server's certificate to be signed by {trusted}, found one{of} signed"
        f"{by} ({error.verify_message}); {_GIVE_CA}"
    )


def _trusting(tls: Tls) -> ssl.SSLContext:
    """Make a context that trusts the same authorities as gRPC does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["h2"])
    if tls.ca is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(tls.ca)
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key, password="")
    return context


def _trusting_any() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _certificate(place: Endpoint, name: str, timeout_s: float) -> dict[str, Any]:
    """Read a certificate that is not accepted; empty if it cannot be had.

    Python tells what is in a certificate only if it accepts it, so the second connection accepts
    this one alone.
    """
    try:
        with (
            socket.create_connection(place, timeout_s) as plain,
            _trusting_any().wrap_socket(plain, server_hostname=name) as secured,
        ):
            content = secured.getpeercert(binary_form=True)
        context = _trusting_any()
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
        context.load_verify_locations(cadata=content)
        with (
            socket.create_connection(place, timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=name) as secured,
        ):
            return dict(secured.getpeercert() or {})
    except (OSError, ValueError):
        return {}


def _names(certificate: dict[str, Any]) -> str:
    """List the names that a certificate is for."""
    names = [value for kind, value in certificate.get("subjectAltName", ())]
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(repr(name) for name in names[:_MAX_NAMES]) + more


def _issuer(certificate: dict[str, Any]) -> str:
    """Name who has signed a certificate."""
    parts = [value for part in certificate.get("issuer", ()) for _, value in part]
    return repr(", ".join(parts)[:_MAX_ISSUER]) if parts else ""
