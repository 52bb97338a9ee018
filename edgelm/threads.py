"""How many threads to use: the physical, fast cores that this process may have. Knows nothing of what they do."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from .free_memory import control_groups, free_memory, text_of

CPUS = Path("/sys/devices/system/cpu")
SLOW_CPUS = Path("/sys/devices/cpu_atom/cpus")  # of Intel's hybrid processors, which tell no capacities


def default_threads() -> int:
    """Physical performance cores; on Linux within the affinity mask and the CPU quota of this process; at least 1.

    Two hardware threads of one core share the units that kernels keep busy, and a slow core that meets fast ones at
    every operation makes them wait.
    """
    if sys.platform == "darwin":
        return max(1, _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or (os.cpu_count() or 2) // 2)
    if hasattr(os, "sched_getaffinity"):
        cores = _fast_cores(os.sched_getaffinity(0))
        quota = _quota()
        return max(1, cores if quota is None else min(cores, quota))
    count = os.cpu_count() or 2
    return max(1, count // 2 if count > 2 else count)


def processes(n_bytes: int) -> int:
    """How many processes of `n_bytes` each may work beside this one: as many as threads, if they fit into memory; at
    least 1."""
    free = free_memory()
    return max(1, default_threads() if free is None else min(default_threads(), free // n_bytes))


def _fast_cores(cpus: set[int]) -> int:
    """Distinct cores among `cpus`, without those that are much slower than the fastest."""
    cpus = cpus - _cpu_list(text_of(SLOW_CPUS)) or cpus
    capacities = {cpu: _number(CPUS / f"cpu{cpu}" / "cpu_capacity") or 0 for cpu in cpus}
    fastest = max(capacities.values(), default=0)
    cores = set()
    for cpu in cpus:
        if 2 * capacities[cpu] >= fastest:
            cores.add(text_of(CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu))
    return len(cores)


def _quota() -> int | None:
    """CPUs that the control groups let this process use, rounded up; None when unlimited."""
    limits = []
    for version, group in control_groups("cpu"):
        if version == 2:
            quota, _, period = text_of(group / "cpu.max").partition(" ")
        else:
            quota, period = (text_of(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):  # not "max", not -1
            limits.append(int(quota) / int(period))
    return max(1, -int(-min(limits) // 1)) if limits else None


def _cpu_list(text: str) -> set[int]:
    """The kernel's way to write a set: "0-3,8"."""
    ranges = [part.partition("-") for part in text.split(",") if part]
    return {cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)}


def _number(path: Path) -> int | None:
    text = text_of(path)
    try:
        return int(text) if text else None
    except ValueError:
        return None


def _sysctl(name: str) -> int | None:
    """An integer that macOS knows by name."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    try:
        failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    except (OSError, AttributeError):
        return None
    return None if failed else value.value
