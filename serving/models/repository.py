"""What is served at this moment: the versions of every model, and why others are not.

Requests read it without a lock. One writer at a time replaces the versions of a model all at once,
so that nobody ever sees half of a change; a version that a request has found stays alive until the
request has its answer. This module knows no folders, no engines and no gRPC.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from kan_bundle.layout import parse_version
from serving.errors import ModelNotFound, ModelNotReady
from serving.models.loading import LoadedModel

State = Literal["READY", "LOADING", "UNAVAILABLE"]
"""In the words of Triton's index."""


@dataclass(frozen=True)
class Version:
    """What is known of one version of a model.

    Args:
        model: What answers for it, if it is served.
        reason: Why it is not, or why what lies in its folder now is not; for clients. Empty if all
            is well.
        remedy: What makes it served, for who asks for it; empty if the reason says all there is.
        loading: Whether what lies in its folder is being loaded.
        unloaded: Whether a client has asked to unload it.
    """

    model: LoadedModel | None
    reason: str = ""
    remedy: str = ""
    loading: bool = False
    unloaded: bool = False

    @property
    def is_exempt(self) -> bool:
        """Whether it is known however many others there are."""
        return self.model is not None or self.loading or self.unloaded

    @property
    def state(self) -> State:
        """READY as long as it is served, whatever else is happening."""
        if self.model is not None:
            return "READY"
        return "LOADING" if self.loading else "UNAVAILABLE"


Versions = Mapping[int, Version]

MOST_UNSERVED = 32
"""Versions of a model that are known without being served, loading or unloaded; the newest."""

MOST_IDLE_MODELS = 128
"""Models that are known though no version of them was ever served, is loading or was unloaded."""


class Repository:
    """The models that are served. Safe to read from several threads.

    Folders that have never served anything cost no more than a line each in the log, however many
    they are: only some of them are known here, and the rest are a number.

    Attributes:
        failed: Versions that have failed their checks, known here or not.
    """

    def __init__(self) -> None:
        self._models: Mapping[str, Versions] = MappingProxyType({})
        self._newest: Mapping[str, LoadedModel] = MappingProxyType({})
        self._served: Sequence[LoadedModel] = ()
        self._idle: dict[str, bool] = {}  # by name: whether it has failed
        self._proven: set[str] = set()  # served at some time, and still known
        self.failed = 0

    @property
    def models(self) -> Mapping[str, Versions]:
        """All models by name, their versions by number; what is read does not change later."""
        return self._models

    @property
    def served(self) -> Sequence[LoadedModel]:
        """List every version that answers requests."""
        return self._served

    def replace(self, name: str, versions: Versions) -> None:
        """Replace all that is known of a model at once; with no versions it is unknown.

        Versions that are served, loading or unloaded are all kept. Of the others, the newest
        `MOST_UNSERVED` of a model are kept, and, of models that were never served, the first
        `MOST_IDLE_MODELS`; those that failed make room for others. Only one thread may call this
        at a time.
        """
        unserved = [number for number, version in versions.items() if not version.is_exempt]
        if len(unserved) > MOST_UNSERVED:
            left_out = set(sorted(unserved)[:-MOST_UNSERVED])
            versions = {n: version for n, version in versions.items() if n not in left_out}
        self._idle.pop(name, None)
        if versions and not self._has_room(name, versions):
            versions = {}
        if any(version.model for version in versions.values()):
            self._proven.add(name)
        elif not versions:
            self._proven.discard(name)
        if not versions and name not in self._models:
            return
        models, newest = dict(self._models), dict(self._newest)
        models.pop(name, None)
        newest.pop(name, None)
        if versions:
            models[name] = MappingProxyType(dict(versions))
        served = {number: v.model for number, v in versions.items() if v.model}
        if served:
            newest[name] = served[max(served)]
        self._models, self._newest = MappingProxyType(models), MappingProxyType(newest)
        self._served = tuple(v.model for of in models.values() for v in of.values() if v.model)

    def _has_room(self, name: str, versions: Versions) -> bool:
        """Tell whether a model may be known; count it if it was never served."""
        if name in self._proven or any(version.is_exempt for version in versions.values()):
            return True
        has_failed = not any(version.remedy for version in versions.values())
        if len(self._idle) >= MOST_IDLE_MODELS:
            failed = [] if has_failed else [name for name, bad in self._idle.items() if bad]
            if not failed:
                return False
            self.replace(failed[-1], {})
        self._idle[name] = has_failed
        return True

    def find(self, name: str, version: str) -> LoadedModel:
        """Find the version that answers a request.

        Args:
            name: Model name.
            version: A version's number in decimal, or empty for the newest that is served.

        Raises:
            ModelNotFound: There is no such model or version.
            ModelNotReady: It is there, and not served.
        """
        if not version and (newest := self._newest.get(name)) is not None:
            return newest
        versions = self._versions(name)
        if version:
            number = parse_version(version)
            if number is None or number not in versions:
                served = ", ".join(map(str, self.served_versions(name)))
                raise ModelNotFound(
                    f"model {name!r} has no version {version[:32]!r}; "
                    f"{f'it serves {served}' if served else 'none of it is served'}"
                )
        else:
            number = max(versions)
        found = versions[number]
        if found.model is None:
            others = bool(version) and name in self._newest
            raise ModelNotReady(
                f"version {number} of model {name!r} is not served: {_why_not(found, others)}"
            )
        return found.model

    def served_versions(self, name: str) -> list[int]:
        """List the versions of a model that answer requests, ascending.

        Raises:
            ModelNotFound: There is no such model.
        """
        return sorted(n for n, version in self._versions(name).items() if version.model)

    def _versions(self, name: str) -> Versions:
        versions = self._models.get(name)
        if versions is None:
            raise ModelNotFound(f"there is no model {name[:128]!r}")
        return versions


def _why_not(version: Version, others: bool) -> str:
    """Say why a version is not served, and what to do: also to ask for another, if one is."""
    if not version.reason:
        return "it is still being loaded; ask again in a moment"
    remedy = version.remedy
    if remedy and others:
        remedy = f"leave the version out, or {remedy}"
    return f"{version.reason}; {remedy}" if remedy else version.reason
