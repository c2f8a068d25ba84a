"""How much memory a process of this machine can still take.

In:  the kernel's counts.  Out: bytes.
Knows nothing of what the memory is for.

A container's limit (cgroup, version 2 or 1) counts where it is tighter than the machine. Its use includes files that
the kernel only caches; those it gives back when asked, so the inactive ones count as free.
"""

from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_NAMES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of version 2 and of version 1: folder below the root, limit, use, key of memory.stat."""


def free_memory() -> int:
    """Return the bytes that this machine, or this process's container if that is tighter, has free."""
    free = psutil.virtual_memory().available
    in_container = free_in_cgroup(_CGROUPS, _OWN_CGROUP)
    return free if in_container is None else min(free, in_container)


def free_in_cgroup(root: Path, own: Path) -> int | None:
    """Return what the tightest limit over the process leaves free; none where there is no limit."""
    free: list[int] = []
    for folder, limit, use, reclaimable in _NAMES:
        for group in _groups(root / folder, own, version_1=bool(folder)):
            bound, used = _read_number(group / limit), _read_number(group / use)
            if bound is not None and used is not None:
                free.append(max(0, bound - used + _read_statistic(group / "memory.stat", reclaimable)))
    return min(free, default=None)


def _groups(root: Path, own: Path, *, version_1: bool) -> list[Path]:
    """Return the process's group and every group above it, as far as they can be seen from here."""
    groups = [root]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return groups
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if ("memory" in controllers.split(",")) if version_1 else not controllers:
            for part in Path(path.lstrip("/")).parts:
                groups.append(groups[-1] / part)
    return groups


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or `max`
        return None


def _read_statistic(path: Path, key: str) -> int:
    try:
        entries = dict(line.split() for line in path.read_text().splitlines())
        return int(entries[key])
    except (OSError, ValueError, KeyError):
        return 0
