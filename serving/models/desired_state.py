"""The desired state: which versions are served, with which content, and why others are not.

`ModelLifecycle` decides it, a `ModelHost` makes it so. It crosses to worker processes as JSON.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kan_bundle.layout import BundleFolder


@dataclass(frozen=True)
class PinnedVersion:
    """A version with the exact content to serve.

    Args:
        name: Model name.
        version: Its number.
        path: Its folder.
        digest: SHA-256 of its manifest, which lists the hashes of all other files; empty if the
            manifest cannot be read, so that loading it fails.
        attempt: Number of the attempt to load it.
    """

    name: str
    version: int
    path: str
    digest: str
    attempt: int

    @property
    def folder(self) -> BundleFolder:
        """Its place in the repository."""
        return BundleFolder(self.name, self.version, Path(self.path))


@dataclass(frozen=True)
class VersionPlan:
    """The desired state of one version.

    Args:
        pinned: The content that serves; None if the version is not served.
        reason: Why it is not served, or why the present content of its folder is not; for clients.
        remedy: What makes it served; empty if the reason says all there is.
        loading: Whether the present content of its folder is being loaded.
        unloaded: Whether a client unloaded it.
    """

    pinned: PinnedVersion | None
    reason: str = ""
    remedy: str = ""
    loading: bool = False
    unloaded: bool = False


Plans = Mapping[int, VersionPlan]
"""The desired state of a model, by version."""


@dataclass(frozen=True)
class LoadFailure:
    """Why a version could not be loaded.

    Args:
        reason: For the log.
        public: For clients; it reveals nothing internal.
        transient: Whether the same files may load at another time: memory, a disk, a process.
    """

    reason: str
    public: str
    transient: bool


class ModelHost(Protocol):
    """What loads and serves versions: this process or all workers."""

    def load(self, version: PinnedVersion) -> LoadFailure | None:
        """Load and verify a version beside those that serve; return why it failed, if it did.

        Raises:
            StartupError: The provider is not available.
        """

    def publish(self, name: str, plans: Plans) -> None:
        """Make a model what the plans say, at once. Versions that it pins are loaded."""

    def set_failed(self, count: int) -> None:
        """Report how many versions of the repository have failed."""

    def cancel(self) -> None:
        """End loads that are under way, and those to come."""


def plans_from_json(content: Mapping[str, Any]) -> Plans:
    """Read plans that were written as JSON."""
    return {
        int(number): VersionPlan(
            **{**plan, "pinned": plan["pinned"] and PinnedVersion(**plan["pinned"])}
        )
        for number, plan in content.items()
    }
