"""Memory of this process: how much there may be, how much it holds, and how to give some back.

Limits are those of control groups (cgroups of Linux), where a container's limit is; without one,
the machine's memory is the limit. This module knows nothing else of the project.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_PAGES = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def memory_limit(groups: Path = _GROUPS, own_groups: Path = _OWN_GROUPS) -> int:
    """Return the bytes of memory that this process and its siblings may have together.

    Args:
        groups: Where control groups are mounted.
        own_groups: File that lists those of this process.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES
    return min([machine, *_group_limits(groups, own_groups)])


def resident_bytes() -> int | None:
    """Return the bytes of memory that this process holds; None where the system does not say."""
    try:
        return int(_PAGES.read_bytes().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return None


def release_free_memory() -> bool:
    """Return what the C library keeps for later to the system; tell whether it can (glibc)."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return False
    trim(0)
    return True


def _group_limits(groups: Path, own_groups: Path) -> Iterator[int]:
    """Find the limits of this process's control groups and of the groups around them."""
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2
            root, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        # A container sees its own group as the root, though the path may be that of the host.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            with suppress(OSError, ValueError):  # there is no such file, or it says "max"
                yield int((folder / name).read_text())
