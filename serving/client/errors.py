"""What a client is told when there is no answer, by who can do something about it.

ClientError
├── WrongSetting       the caller: an address, a certificate, a token or a file cannot be used
├── Closed             the caller: the client was closed, before or meanwhile
├── Forked             the caller: the client was used before this process was forked
├── InvalidRequest     the caller: what was passed is not what the model takes
│   └── ModelNotFound    there is no such model, or no such version of it
├── Refused            the operator: the server does not do this, or not for this client
├── Unavailable        nobody: there is no answer now; later there may be
│   ├── Overloaded       the server has no room; tells when to ask again
│   └── TimedOut         the answer did not come in time
└── ServerFault        the server: it failed, or what came is no answer

Messages say where, what was expected, what was found and what to do. The status codes of gRPC are
in one table, here.
"""

from collections.abc import Iterable
from typing import Any

import grpc

_PUSHBACK = "grpc-retry-pushback-ms"  # when the server wants to be asked again
_TOO_LARGE = "larger than max"  # as gRPC words it on either side
_OTHER_PROTOCOL = "Expected SETTINGS frame"  # the same, of what is no HTTP/2
_NO_TLS = "WRONG_VERSION_NUMBER"  # as BoringSSL words it, of what is no TLS
_TLS = ("Tls handshake failed", "Hostname Verification Check failed")  # as gRPC words it
_SAYS_WHAT_TO_DO = (" is not served: ", "the server is stopping; ")  # as our server words it
_MOST_SHOWN = 500


class ClientError(Exception):
    """There is no answer.

    Attributes:
        code: The name of gRPC's status, empty if nothing was sent.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class WrongSetting(ClientError):
    """An address, a certificate, a token or a file cannot be used; nothing was sent."""


class Closed(ClientError):
    """The client was closed, before or meanwhile.

    Args:
        where: Who was to be asked.
    """

    def __init__(self, where: str) -> None:
        super().__init__(f"{where}: the client was closed; make another, or close it later")


class Forked(ClientError):
    """gRPC was used before this process was forked, which it does not survive."""


class InvalidRequest(ClientError):
    """What was passed is not what the model takes."""


class ModelNotFound(InvalidRequest):
    """There is no such model, or no such version of it."""


class Refused(ClientError):
    """The server does not do this, or not for this client."""


class Unavailable(ClientError):
    """There is no answer now; later there may be."""


class Overloaded(Unavailable):
    """The server has no room.

    Attributes:
        retry_after_s: When it wants to be asked again, in seconds; None if it does not say.
    """

    def __init__(self, message: str, code: str, retry_after_s: float | None) -> None:
        super().__init__(message, code)
        self.retry_after_s = retry_after_s


class TimedOut(Unavailable):
    """The answer did not come in time."""


class ServerFault(ClientError):
    """The server failed, or what came is no answer to what was asked."""


_KINDS: dict[grpc.StatusCode, tuple[type[ClientError], str]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (InvalidRequest, ""),
    grpc.StatusCode.NOT_FOUND: (ModelNotFound, "`kan-client models` lists what there is"),
    grpc.StatusCode.UNAUTHENTICATED: (Refused, ""),  # by whether there was a token
    grpc.StatusCode.PERMISSION_DENIED: (Refused, "ask the server's operator for the right to it"),
    grpc.StatusCode.FAILED_PRECONDITION: (Refused, ""),
    grpc.StatusCode.UNIMPLEMENTED: (Refused, "ask a server that offers it"),
    grpc.StatusCode.UNAVAILABLE: (Unavailable, "see that the server is up and serves the model"),
    grpc.StatusCode.CANCELLED: (Unavailable, "the server ended the call; ask again"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (TimedOut, "give it more time, or see what keeps it"),
}


def translated(
    error: grpc.RpcError, where: str, model: str = "", *, has_token: bool
) -> ClientError:
    """Say what a call has ended with.

    Args:
        error: As gRPC raised it, of a synchronous call or another.
        where: Who was asked, for the message.
        model: For which model, if it was for one.
        has_token: Whether a token was sent.
    """
    code = error.code()
    details = " ".join((error.details() or "").split())[:_MOST_SHOWN] or code.name
    which = f"model {model!r}"
    told = (
        f"{where}: {which}: {details}" if model and which not in details else f"{where}: {details}"
    )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if _TOO_LARGE in details:
            return InvalidRequest(f"{told}; send fewer rows in a message", code.name)
        return Overloaded(told, code.name, _pushback_s(error.trailing_metadata()))
    kind, remedy = _KINDS.get(code, (ServerFault, ""))
    if code is grpc.StatusCode.UNAUTHENTICATED and has_token:
        remedy = (
            "the server does not know the token that was sent; give a token that the server takes "
            "(token, token_file, --token-file)"
        )
    elif code is grpc.StatusCode.UNAUTHENTICATED:
        remedy = "no token was sent; give one (token, token_file, --token-file)"
    elif code is grpc.StatusCode.UNAVAILABLE and _OTHER_PROTOCOL in details:
        told = f"{where}: this looks like another protocol"
        remedy = "perhaps it is the metrics port, or wants TLS: give the one for gRPC, or --ca"
    elif code is grpc.StatusCode.UNAVAILABLE and _NO_TLS in details:
        told = f"{where}: the server does not speak TLS"
        remedy = "leave out --tls and the certificates, or give the address of one that does"
    elif code is grpc.StatusCode.UNAVAILABLE and any(words in details for words in _TLS):
        remedy = (
            "see that the server's certificate is one that --ca (Tls(ca=...)) vouches for, for the "
            "name in the address or that of --server-name (Tls(server_name=...))"
        )
    elif any(words in details for words in _SAYS_WHAT_TO_DO):
        remedy = ""
    return kind(f"{told}; {remedy}" if remedy else told, code.name)


def never_reached(told: TimedOut, reason: ClientError, tls_fault: str | None) -> TimedOut:
    """Say why nobody has ever answered.

    Args:
        told: What was said without knowing it.
        reason: What a call has ended with that did not wait.
        tls_fault: Why TLS, or its absence, keeps the client from the server; None if it does not.
    """
    if type(reason) is not Unavailable:
        return told
    return TimedOut(f"no server has answered in time: {tls_fault or reason}", told.code)


def _pushback_s(trailing: Iterable[Any] | None) -> float | None:
    for key, value in trailing or ():
        if key == _PUSHBACK and str(value).isdigit():
            return int(value) / 1000
    return None
