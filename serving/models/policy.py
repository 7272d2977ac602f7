"""What an operator may choose of versions: which are served, and when they are looked for."""

from dataclasses import dataclass
from typing import Literal

Control = Literal["none", "poll", "explicit"]
"""When versions are looked for: at the start, again and again, or when a client asks."""


@dataclass(frozen=True)
class VersionPolicy:
    """Which versions of a model are served.

    Args:
        latest: How many, the newest that pass their checks; None for all there are.
        specific: Only these, if there are any.
    """

    latest: int | None = 1
    specific: frozenset[int] = frozenset()

    def __str__(self) -> str:
        if self.specific:
            return f"specific:{','.join(map(str, sorted(self.specific)))}"
        return "all" if self.latest is None else f"latest:{self.latest}"

    def considers(self, version: int) -> bool:
        """Whether a version may be served at all."""
        return not self.specific or version in self.specific

    def wants_more(self, served: int) -> bool:
        """Whether another version is to be served besides so many newer ones."""
        return bool(self.specific) or self.latest is None or served < self.latest


def parse_policy(text: str) -> VersionPolicy:
    """Read `latest:N`, `all` or `specific:1,3`.

    Raises:
        ValueError: It is none of them.
    """
    kind, _, rest = text.partition(":")
    numbers = [int(part) for part in rest.split(",") if part.isascii() and part.isdecimal()]
    if text == "all":
        return VersionPolicy(latest=None)
    if 0 not in numbers and len(numbers) == len(rest.split(",")):
        if kind == "specific":
            return VersionPolicy(latest=None, specific=frozenset(numbers))
        if kind == "latest" and len(numbers) == 1:
            return VersionPolicy(latest=numbers[0])
    raise ValueError(f"expected latest:N, all or specific:1,3, found {text!r}")
