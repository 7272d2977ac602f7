"""Who may call what: bearer tokens and client certificates, for each group of calls.

A file, read again when it changes, has a table for each group:

    [inference]
    tokens_sha256 = ["9f86d081884c7d65..."]   # of tokens that callers send
    certificates = ["dns:client.example.com"] # names in certificates; "*" is every verified one

    [admin]
    tokens_sha256 = ["60303ae22b998861..."]

    # anyone = true in a table lets everybody call what is in the group

Only hashes of tokens are in it, so whoever reads it cannot call. A group without a table is closed.
A name in a certificate has a type, because whoever may get a certificate for one type of name may
not get one for another: `dns:`, `uri:`, `cn:` (the common name), `email:` or `ip:`. A name without
a type is that of a host or a common name; it has neither a colon nor an `@`, and is no IP address.

`admin` is what changes which models are served; `inference` is the rest. Health and reflection are
in no group: they tell nothing of models, and probes have no tokens. This module knows no gRPC.
"""

import hashlib
import ipaddress
import re
import tomllib
from collections.abc import Iterable, Mapping, Set
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError

from serving.errors import Forbidden, StartupError, Unauthenticated, VisibleError
from serving.watched import Watched

Group = Literal["inference", "admin"]

UNKNOWN_CALLER = "expected `authorization: Bearer TOKEN` with a token known here"
NOT_ALLOWED = "this caller may not call what is in the group [{group}]"

_BEARER = "bearer "
_EVERY_CERTIFICATE = "*"
# Types of names in a certificate, and gRPC's properties with them. The untyped property
# x509_subject_alternative_name has all of them together.
_PROPERTIES = {
    "dns": "peer_dns",
    "uri": "peer_uri",
    "cn": "x509_common_name",
    "email": "peer_email",
    "ip": "peer_ip",
}
_CERTIFICATE = "x509_pem_cert"
_URI_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_HOST_TYPES = ("dns", "cn")  # of a name that is written without a type


def certificate_names(auth_context: Mapping[str, Iterable[bytes]]) -> frozenset[str]:
    """List the names in a caller's verified certificate, each with its type, such as `dns:a.b`.

    Args:
        auth_context: What gRPC knows of a connection, by property; without TLS, or without a
            certificate of the client, it has none of a certificate.

    Returns:
        The names, and "*", which stands for every verified certificate; empty without one.
    """
    names = {
        # Bytes that are no UTF-8 become what no name in a file can be.
        _typed(kind, value.decode(errors="surrogateescape"))
        for kind, key in _PROPERTIES.items()
        for value in auth_context.get(key, ())
    }
    if names or auth_context.get(_CERTIFICATE):
        names.add(_EVERY_CERTIFICATE)
    return frozenset(names)


def _typed(kind: str, name: str) -> str:
    return f"{kind}:{name.lower() if kind == 'dns' else name}"


def _as_written(entry: str) -> str:
    """Check a name as the file has it.

    Raises:
        ValueError: It has no type that is known, or nothing follows it, or it has no type and
            cannot be the name of a host.
    """
    kind, colon, name = entry.partition(":")
    if kind in _PROPERTIES and name:
        if kind == "ip":
            try:
                return f"ip:{ipaddress.ip_address(name)}"
            except ValueError as error:
                raise ValueError(
                    f"expected an IP address after ip:, found {name[:100]!r}"
                ) from error
        return _typed(kind, name)
    if colon or "@" in entry or not entry or _is_address(entry):
        types = ", ".join(f"{each}:" for each in _PROPERTIES)
        raise ValueError(
            f"expected one of {types} before a name, found {entry[:100]!r}{_remedy(entry)}"
        )
    return entry


def _remedy(entry: str) -> str:
    """Tell how to write an entry that has no type that is known."""
    kind, colon, name = entry.partition(":")
    host, _, port = entry.rpartition(":")
    if not name and (not entry or kind in _PROPERTIES):
        return "; write the name after the type, such as dns:client.example.com"
    if _is_address(entry):
        typed = f"ip:{entry.strip('[]')}"
    elif colon and kind.lower() in _PROPERTIES:
        typed = f"{kind.lower()}:{name}"
    elif port.isdecimal():
        typed = f"ip:{host.strip('[]')}" if _is_address(host) else host
        return f"; write {typed[:100]}, because names in certificates have no port"
    elif _URI_SCHEME.fullmatch(kind) and colon:
        typed = f"uri:{entry}"
    elif "@" in entry:
        typed = f"email:{entry}"
    else:
        typed = f"cn:{entry}"
    common = "" if typed.startswith("cn:") else f", or cn:{entry[:100]} if that is the common name"
    return f"; write {typed[:100]}{common}"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


_Hash = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$", to_lower=True)]
_Name = Annotated[str, AfterValidator(_as_written)]


class _Callers(BaseModel):
    """Who may call what is in one group."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens_sha256: frozenset[_Hash] = frozenset()
    certificates: frozenset[_Name] = frozenset()
    anyone: bool = False

    def include(self, token: str | None, names: Set[str]) -> bool:
        """Whether a caller is among them."""
        return self.anyone or self.name(token, names)

    def name(self, token: str | None, names: Set[str]) -> bool:
        """Whether a caller is among them because of who it is."""
        return token in self.tokens_sha256 or not self._typed_names.isdisjoint(names)

    @cached_property
    def _typed_names(self) -> frozenset[str]:
        """The names as `certificate_names` has them."""
        return frozenset(
            typed
            for entry in self.certificates
            for typed in (
                [entry]
                if ":" in entry or entry == _EVERY_CERTIFICATE
                else [_typed(kind, entry) for kind in _HOST_TYPES]
            )
        )


_NOBODY = _Callers()


class _Rules(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inference: _Callers = _NOBODY
    admin: _Callers = _NOBODY


class Access:
    """The rules of a file, as they are now. Safe to call from several threads.

    Args:
        file: As above.

    Raises:
        StartupError: It cannot be read, or is none.
    """

    def __init__(self, file: Path) -> None:
        self._rules = Watched([file], partial(_read, file))

    @property
    def asks_for_certificates(self) -> bool:
        """Whether a rule names certificates, so that the names of a caller's are read."""
        rules = self._rules.get()
        return bool(rules.inference.certificates or rules.admin.certificates)

    def refusal(
        self, group: Group, authorization: str | None, names: Set[str] = frozenset()
    ) -> VisibleError | None:
        """Tell why a caller may not call what is in a group; None if it may.

        Args:
            group: Of the call.
            authorization: What the caller sent under that name, if it did.
            names: Of its verified certificate, as `certificate_names` lists them.
        """
        rules = self._rules.get()
        token = _token_hash(authorization)
        callers: _Callers = getattr(rules, group)
        if callers.include(token, names):
            return None
        if names or token in rules.inference.tokens_sha256 | rules.admin.tokens_sha256:
            return Forbidden(NOT_ALLOWED.format(group=group))
        return Unauthenticated(UNKNOWN_CALLER)

    def knows(self, authorization: str | None, names: Set[str] = frozenset()) -> bool:
        """Tell whether a caller may call anything because of who it is; see `refusal`."""
        rules = self._rules.get()
        token = _token_hash(authorization)
        return any(callers.name(token, names) for callers in (rules.inference, rules.admin))


def _token_hash(authorization: str | None) -> str | None:
    """Hash the token of `Bearer TOKEN`.

    Looking a hash up takes a time that tells of the hash alone, from which nobody finds a token.
    """
    if authorization is None or authorization[: len(_BEARER)].lower() != _BEARER:
        return None
    token = authorization[len(_BEARER) :].strip()
    return hashlib.sha256(token.encode()).hexdigest() if token else None


def _read(file: Path) -> _Rules:
    """Read the file.

    Raises:
        StartupError: It cannot be read, or is none.
    """
    try:
        with file.open("rb") as content:
            tables = tomllib.load(content)
    except OSError as error:
        raise StartupError(f"--access {file}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise StartupError(f"--access {file}: expected TOML: lists or tables too deep") from error
    except ValueError as error:  # also of text that is not UTF-8, and of numbers too long to read
        raise StartupError(f"--access {file}: expected TOML: {error}") from error
    try:
        return _Rules.model_validate(tables)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise StartupError(f"--access {file}: {place}: {fault['msg']}") from error
    except (ValueError, RecursionError) as error:  # tomllib's own, and Python's
        raise StartupError(f"--access {file}: expected TOML: {error}") from error
