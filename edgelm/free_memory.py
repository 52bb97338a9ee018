"""How much more memory this process may take: what the system can give, within the limits of its control groups.

Knows nothing of what it is for.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_LIMITS = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
_CACHED = {1: ("total_inactive_file", "total_active_file"), 2: ("inactive_file", "active_file")}


def free_memory() -> int | None:
    """Bytes that can be taken before somebody has to give something up; None where the system does not tell.

    Pages of files that can be read again count as free.
    """
    try:
        if sys.platform == "win32":
            return _windows()
        if sys.platform == "darwin":
            return _mac()
    except (OSError, AttributeError, ValueError):
        return None
    return min((n for n in (_fields(MEMINFO).get("MemAvailable"), *_left()) if n is not None), default=None)


def control_groups(kind: str) -> Iterator[tuple[int, Path]]:
    """Version and folder of each control group that may limit this process in `kind`, "memory" or "cpu": its own, and
    those around it up to the root."""
    for line in text_of(OWN_CGROUP).splitlines():
        _, kinds, group = line.split(":", 2)
        if kinds and kind not in kinds.split(","):
            continue
        version, root = (1, CGROUPS / kind) if kinds else (2, CGROUPS)
        folder = root / group.lstrip("/")
        for parent in (folder, *folder.parents):
            yield version, parent
            if parent == root:
                break


def _left() -> Iterator[int]:
    """What each limit leaves."""
    for version, group in control_groups("memory"):
        limit, used = (text_of(group / name) for name in _LIMITS[version])
        if limit.isdigit() and used.isdigit():  # not "max"
            stat = _fields(group / "memory.stat")
            yield max(0, int(limit) - int(used) + sum(stat.get(name, 0) for name in _CACHED[version]))


def _fields(path: Path) -> dict[str, int]:
    """The lines "name number" or "name: number kB" of a file, in bytes."""
    found = {}
    for line in text_of(path).splitlines():
        name, *rest = line.split()
        if rest and rest[0].isdigit():
            found[name.rstrip(":")] = int(rest[0]) << (10 if rest[1:] == ["kB"] else 0)
    return found


def text_of(path: Path) -> str:
    """What a file of the system says; nothing if it is not there."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _windows() -> int | None:
    """GlobalMemoryStatusEx: two 32-bit fields, then total and available physical memory, five more."""
    status = (ctypes.c_uint64 * 8)(64)  # its own length comes first
    library = ctypes.CDLL("kernel32")
    return status[2] if library.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def _mac() -> int | None:
    """host_statistics64 of HOST_VM_INFO64: pages that are free, active, inactive, wired, and much more."""
    library, counts, n = ctypes.CDLL(None), (ctypes.c_uint32 * 64)(), ctypes.c_uint32(64)
    if library.host_statistics64(library.mach_host_self(), 4, counts, ctypes.byref(n)):
        return None
    return (counts[0] + counts[2]) * int(library.getpagesize())
