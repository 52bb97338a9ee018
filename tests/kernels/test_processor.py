"""The name of the processor is LLVM's, and is asked for again when it might be another one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from edgelm.kernels import processor

CPUINFO = "\n".join(f"{name}\t: {name} {{0}}" for name in (*processor._FACTS, "cpu MHz")) + "\n\nprocessor\t: 1\n"


class LLVM:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def get_host_cpu_name(self) -> str:
        self.asked += 1
        return f"cpu{self.asked}"

    def get_host_cpu_features(self) -> Any:
        return self

    def flatten(self) -> str:
        return "+sse2"


@pytest.fixture
def llvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LLVM:
    """One that is asked for a machine whose files are in `tmp_path`."""
    fake = LLVM()
    monkeypatch.setattr(processor, "llvm", lambda: fake)
    for name, text in (("CPUS", CPUINFO.format("one")), ("BOOT", "first")):
        monkeypatch.setattr(processor, name, tmp_path / name)
        (tmp_path / name).write_text(text)
    for variable in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        monkeypatch.delenv(variable, raising=False)
    return fake


def folder(n: int) -> str:
    return f"cpu{n}-{hashlib.sha256(b'+sse2').hexdigest()[:8]}"


@pytest.mark.skipif(not processor._machine(), reason="this system does not tell enough of its processor")
def test_real_name_is_that_of_llvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        monkeypatch.delenv(variable, raising=False)
    found = processor.find(tmp_path).folder
    assert found.startswith(processor.llvm().get_host_cpu_name() + "-")
    assert processor.find(tmp_path).folder == found
    assert (tmp_path / "processor").read_text().split()[1] == found


def test_asked_once_until_something_changes(llvm: LLVM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [processor.find(tmp_path).folder for _ in range(3)] == [folder(1)] * 3
    (tmp_path / "CPUS").write_text(CPUINFO.format("one").replace("MHz one", "MHz two"))
    assert processor.find(tmp_path).folder == folder(1)
    for n, change in enumerate(
        (
            lambda: (tmp_path / "CPUS").write_text(CPUINFO.format("two")),
            lambda: (tmp_path / "BOOT").write_text("second"),
            lambda: monkeypatch.setattr(processor, "_numpy_features", lambda: [("AVX2", False)]),  # an emulator
            lambda: (tmp_path / "processor").write_text("damaged"),
            lambda: (tmp_path / "processor").write_bytes(b"\xff"),
        ),
        2,
    ):
        change()
        assert [processor.find(tmp_path).folder for _ in range(2)] == [folder(n)] * 2


def test_asked_each_time_where_too_little_is_known(llvm: LLVM, tmp_path: Path) -> None:
    (tmp_path / "CPUS").write_text("processor\t: 0\nHardware\t: a board\n\n")
    assert [processor.find(tmp_path).folder for _ in range(2)] == [folder(1), folder(2)]
    (tmp_path / "CPUS").unlink()
    assert processor.find(tmp_path).folder == folder(3)
    assert not (tmp_path / "processor").exists()


def test_what_is_chosen_is_not_kept(llvm: LLVM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CPU_NAME", "haswell")
    assert processor.find(tmp_path).folder.startswith("haswell-")
    assert not (tmp_path / "processor").exists()
    monkeypatch.delenv("NUMBA_CPU_NAME")
    assert processor.find(tmp_path).folder == folder(1)


def test_pairs_are_kept_too(llvm: LLVM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(processor.find(tmp_path).adds_pairs for _ in range(2))
    (tmp_path / "processor").unlink()
    monkeypatch.setattr(llvm, "flatten", lambda: "+sse2,+avx512bf16")
    assert all(processor.find(tmp_path).adds_pairs for _ in range(2)) and llvm.asked == 2


def test_a_cache_that_cannot_be_written(llvm: LLVM, tmp_path: Path) -> None:
    assert processor.find(tmp_path / "nowhere").folder == folder(1)
