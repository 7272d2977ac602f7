"""Who may call what: bearer tokens and client certificates, for each group of calls.

A file, read again when it changes, has a table for each group:

    [inference]
    tokens_sha256 = ["9f86d081884c7d65..."]   # of tokens that callers send
    certificates = ["client.example.com"]     # names in certificates; "*" is every verified one

    [admin]
    tokens_sha256 = ["60303ae22b998861..."]

    # anyone = true in a table lets everybody call what is in the group

Only hashes of tokens are in it, so whoever reads it cannot call. A group without a table is closed.
`admin` is what changes which models are served; `inference` is the rest. Health and reflection are
in no group: they tell nothing of models, and probes have no tokens. This module knows no gRPC.
"""

import hashlib
import tomllib
from collections.abc import Set
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from serving.errors import Forbidden, StartupError, Unauthenticated, VisibleError
from serving.watched import Watched

Group = Literal["inference", "admin"]

UNKNOWN_CALLER = "expected `authorization: Bearer TOKEN` with a token known here"
NOT_ALLOWED = "this caller may not call what is in the group [{group}]"

_BEARER = "bearer "
_EVERY_CERTIFICATE = "*"
_Hash = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$", to_lower=True)]


class _Callers(BaseModel):
    """Who may call what is in one group."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens_sha256: frozenset[_Hash] = frozenset()
    certificates: frozenset[str] = frozenset()
    anyone: bool = False

    def include(self, token: str | None, names: Set[str]) -> bool:
        """Whether a caller is among them."""
        return self.anyone or self.name(token, names)

    def name(self, token: str | None, names: Set[str]) -> bool:
        """Whether a caller is among them because of who it is."""
        return token in self.tokens_sha256 or bool(
            names and self.certificates & (names | {_EVERY_CERTIFICATE})
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
        """Whether certificates matter, which are not known before a call is taken in."""
        rules = self._rules.get()
        return bool(rules.inference.certificates or rules.admin.certificates)

    def refusal(
        self, group: Group, authorization: str | None, names: Set[str] = frozenset()
    ) -> VisibleError | None:
        """Tell why a caller may not call what is in a group; None if it may.

        Args:
            group: Of the call.
            authorization: What the caller sent under that name, if it did.
            names: In its verified certificate, if it has shown one.
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
            return _Rules.model_validate(tomllib.load(content))
    except OSError as error:
        raise StartupError(f"--access {file}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise StartupError(f"--access {file}: {place}: {fault['msg']}") from error
    except (ValueError, RecursionError) as error:  # tomllib's own, and Python's
        raise StartupError(f"--access {file}: expected TOML: {error}") from error
