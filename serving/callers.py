"""Who calls, as gRPC tells it: a token in the metadata, names in a certificate, an address."""

from collections.abc import Set
from typing import Any, Protocol

from serving.access import Access, Group, certificate_names
from serving.errors import TooLarge
from serving.room import peer_of

_AUTHORIZATION = "authorization"
_ENTRY_BYTES = 32  # that HTTP/2 counts for each entry beside its name and value


class Caller(Protocol):
    """What gRPC knows of a call before its message is read."""

    def invocation_metadata(self) -> Any:
        """Return the metadata that the client sent: pairs of a key and a value."""

    def auth_context(self) -> Any:
        """Return what gRPC knows of the connection's client: lists of bytes, by property."""

    def peer(self) -> str:
        """Return the connection, as gRPC names it."""


class Callers:
    """Decides who may call what, before a message is read. Safe to call from several threads.

    Args:
        access: The rules; None if everybody may call everything.
        max_metadata_bytes: Largest metadata of a call, as HTTP/2 counts it.
    """

    def __init__(self, access: Access | None, max_metadata_bytes: int) -> None:
        self._access = access
        self._max_metadata_bytes = max_metadata_bytes

    @property
    def are_named(self) -> bool:
        """Whether callers can show who they are."""
        return self._access is not None

    def admit(self, group: Group | None, caller: Caller) -> None:
        """Let a call in.

        Args:
            group: Of the call; None if it is in none.
            caller: The call, as gRPC describes it.

        Raises:
            TooLarge: gRPC holds only those to the limit who say that they have read it.
            Unauthenticated: The caller has not said who it is, or is not known.
            Forbidden: It may not call this.
        """
        metadata = caller.invocation_metadata()
        size = sum([len(key) + len(value) + _ENTRY_BYTES for key, value in metadata])
        if size > self._max_metadata_bytes:
            raise TooLarge(
                f"expected metadata of at most {self._max_metadata_bytes} bytes, found {size}"
            )
        if self._access is not None and group is not None:
            error = self._access.refusal(group, *self._shown(caller))
            if error is not None:
                raise error

    def knows(self, caller: Caller) -> bool:
        """Tell whether a caller has shown who it is, and may call something because of it."""
        return self._access is not None and self._access.knows(*self._shown(caller))

    def _shown(self, caller: Caller) -> tuple[str | None, Set[str]]:
        """Find what a caller has shown: what it sent as authorization, and names."""
        sent = [
            value
            for key, value in caller.invocation_metadata()
            if key == _AUTHORIZATION and isinstance(value, str)
        ]
        names: Set[str] = frozenset()
        if self._access is not None and self._access.asks_for_certificates:
            found: Any = caller.auth_context()  # lists of bytes by key, whatever its types say
            names = certificate_names(found)
        return (sent[0] if len(sent) == 1 else None), names


def address_of(caller: Caller) -> str:
    """Find from where a call comes; see `peer_of`."""
    return peer_of(caller.peer())
