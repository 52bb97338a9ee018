"""The default number of threads, on machines that are folders of text files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgelm import free_memory, threads


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux machine without CPUs or control groups."""
    monkeypatch.setattr(threads.sys, "platform", "linux")
    monkeypatch.setattr(threads, "CPUS", tmp_path / "cpu")
    monkeypatch.setattr(threads, "SLOW_CPUS", tmp_path / "cpu_atom/cpus")
    monkeypatch.setattr(free_memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(free_memory, "OWN_CGROUP", tmp_path / "own")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def may_use(monkeypatch: pytest.MonkeyPatch, *cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cpus), raising=False)


def test_two_hardware_threads_are_one_core(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(8):
        write(machine / f"cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}")
    may_use(monkeypatch, *range(8))
    assert threads.default_threads() == 4
    may_use(monkeypatch, 0, 4, 5)
    assert threads.default_threads() == 2


def test_slow_cores_are_left_out(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, capacity in enumerate([400, 400, 400, 400, 870, 870, 1024]):
        write(machine / f"cpu/cpu{cpu}/cpu_capacity", str(capacity))
    may_use(monkeypatch, *range(7))
    assert threads.default_threads() == 3
    may_use(monkeypatch, 0, 1)
    assert threads.default_threads() == 2


def test_slow_cores_of_a_hybrid_processor_are_left_out(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(machine / "cpu_atom/cpus", "4-5,7")
    may_use(monkeypatch, *range(8))
    assert threads.default_threads() == 5
    may_use(monkeypatch, 4, 7)
    assert threads.default_threads() == 2


def test_nothing_known_counts_every_cpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_use(monkeypatch, 1, 3, 5)
    assert threads.default_threads() == 3


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000"}, 16),
        ({"a/b/cpu.max": "250000 100000"}, 3),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 1),
        ({"a/b/cpu.max": "900000 100000", "a/cpu.max": "400000 100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ({"cpu/v1/cpu.cfs_quota_us": "250000", "cpu/v1/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/v1/b/cpu.cfs_quota_us": "100000", "cpu/v1/b/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/elsewhere/cpu.cfs_quota_us": "100000", "cpu/elsewhere/cpu.cfs_period_us": "100000"}, 16),
        ({"a/b/cpu.max": "nonsense"}, 16),
        ({"a/b/cpu.max": "0 0"}, 16),
    ],
)
def test_quota(machine: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, str], expected: int) -> None:
    write(machine / "own", "12:cpuset:/elsewhere\n4:cpu,cpuacct:/v1/b\n0::/a/b")
    for name, text in limits.items():
        write(machine / "cgroup" / name, text)
    may_use(monkeypatch, *range(16))
    assert threads.default_threads() == expected


@pytest.mark.parametrize(
    ("known", "expected"),
    [({"hw.perflevel0.physicalcpu": 4, "hw.physicalcpu": 8}, 4), ({"hw.physicalcpu": 6}, 6), ({}, 5)],
)
def test_performance_cores_of_a_mac(known: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.sys, "platform", "darwin")
    monkeypatch.setattr(threads, "_sysctl", known.get)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert threads.default_threads() == expected


@pytest.mark.parametrize(("count", "expected"), [(16, 8), (2, 2), (1, 1), (None, 2)])
def test_half_of_what_windows_counts(count: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.sys, "platform", "win32")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert threads.default_threads() == expected


def test_at_least_one(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_use(monkeypatch)
    assert threads.default_threads() == 1


@pytest.mark.parametrize(("available_kb", "expected"), [(1 << 30, 4), (2500, 2), (10, 1)])
def test_no_more_processes_than_fit(
    machine: Path, monkeypatch: pytest.MonkeyPatch, available_kb: int, expected: int
) -> None:
    write(machine / "meminfo", f"MemAvailable: {available_kb} kB")
    monkeypatch.setattr(free_memory, "MEMINFO", machine / "meminfo")
    may_use(monkeypatch, 0, 1, 2, 3)
    assert threads.processes(1 << 20) == expected


def test_this_machine() -> None:
    assert 1 <= threads.default_threads() <= (os.cpu_count() or 1)
