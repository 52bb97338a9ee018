"""Models that do not fit into memory, and what a process takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner

from edgelm import free_memory as free
from edgelm.cli import main

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def model(tmp_path: Path, cache: Path) -> Path:
    return tiny.tiny("llama-gqa", fmt="Q4_0", folder=tmp_path, intermediate_size=128)


MEMINFO = "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  600 kB\n"
NO_GROUPS: dict[str, str] = {}
V2 = {
    "own": "0::/a/b\n",
    "a/memory.max": "500000\n", "a/memory.current": "450000\n", "a/memory.stat": "active_file 100\ninactive_file 900\n",
    "a/b/memory.max": "max\n", "a/b/memory.current": "1\n",
}  # fmt: skip
V1 = {
    "own": "9:cpu,cpuacct:/x\n4:memory:/x\n",
    "memory/x/memory.limit_in_bytes": "400000", "memory/x/memory.usage_in_bytes": "100000",
    "memory/x/memory.stat": "cache 5\ntotal_active_file 1000\ntotal_inactive_file 2000\n",
    "memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "5",
}  # fmt: skip


@linux
@pytest.mark.parametrize(("files", "expected"), [
    (NO_GROUPS, 600 << 10), (V2, 51_000), (V1, 303_000), ({"own": "0::/gone\n"}, 600 << 10),
    ({**V2, "a/memory.current": "900000\n"}, 0),
])  # fmt: skip
def test_free_memory(files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"meminfo": MEMINFO, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(free, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free, "CGROUPS", tmp_path)
    monkeypatch.setattr(free, "OWN_CGROUP", tmp_path / "own")
    assert free.free_memory() == expected


class OtherSystem:
    """The functions that macOS and Windows have for it."""

    def mach_host_self(self) -> int:
        return 0

    def host_statistics64(self, host: int, flavor: int, counts: Any, n: Any) -> int:
        counts[0], counts[1], counts[2] = 5, 1000, 7  # pages free, active, inactive
        return 0

    def getpagesize(self) -> int:
        return 4096

    def GlobalMemoryStatusEx(self, status: Any) -> int:
        assert status._obj[0] & 0xFFFFFFFF == 64, "its own length"
        status._obj[2] = 123 << 20
        return 1


@pytest.mark.parametrize(("platform", "expected"), [("darwin", 12 * 4096), ("win32", 123 << 20)])
def test_free_memory_elsewhere(platform: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free.sys, "platform", platform)
    monkeypatch.setattr(free.ctypes, "CDLL", lambda name: OtherSystem())
    found = free.free_memory()
    monkeypatch.undo()
    assert found == expected


def test_free_memory_of_this_machine() -> None:
    n = free.free_memory()
    assert n is None or 1 << 20 < n < 1 << 50


ANSWER = """
import sys, warnings
from pathlib import Path
import edgelm
from edgelm import free_memory
from edgelm.footprint import footprint
free_memory.MEMINFO = Path(sys.argv[2])
warnings.simplefilter("always")
with edgelm.load(sys.argv[1], ctx_size=512) as model:
    text = model.generate("The capital of France is", max_tokens=8, temperature=0)
print(footprint()["anonymous"], model.packed_file, text, sep="|")
"""


@linux
def test_a_model_that_does_not_fit_runs_from_a_file_and_says_so(
    gemma3_path: Path, tmp_path: Path, cache: Path
) -> None:
    def answer(available_kb: int) -> tuple[int, str, str, str]:
        (tmp_path / "meminfo").write_text(f"MemAvailable: {available_kb} kB\n")
        command = [sys.executable, "-c", ANSWER, str(gemma3_path), str(tmp_path / "meminfo")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        anonymous, file, text = done.stdout.rstrip("\n").split("|")
        return int(anonymous), file, text, done.stderr

    answer(1 << 30)  # compiles
    roomy, file, text, said = answer(1 << 30)
    assert file == "None" and said == ""
    tight, file, same_text, said = answer(300 << 10)
    assert file.startswith(str(cache)) and same_text == text
    assert "GB of memory are needed and 0.3 GB are free" in said and file in said
    assert tight < roomy - (200 << 20)  # 235 MiB of weights
    again, same_file, same_text, said = answer(300 << 10)
    assert (same_file, same_text, said) == (file, text, "") and again < roomy - (200 << 20)


def control_group(limit: int) -> Path | None:
    """A new control group with so many bytes of memory, where this machine lets us make one."""
    for root, name in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        folder = Path(root) / f"edgelm-test-{os.getpid()}"
        if not (Path(root) / "cgroup.procs").exists():
            continue
        try:
            folder.mkdir()
        except OSError:
            continue
        if (folder / name).exists():  # else the group has another kind of limits
            (folder / name).write_text(str(limit))
            return folder
        folder.rmdir()
    return None


@linux
def test_a_model_larger_than_the_memory_there_is(gemma3_path: Path, cache: Path, tmp_path: Path) -> None:
    """In a control group with less memory than the weights take: the system takes pages away all the time."""
    own = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"']
    program = [sys.executable, "-c", ANSWER, str(gemma3_path), "/proc/meminfo"]
    expected = subprocess.run(program, capture_output=True, text=True, check=True).stdout.split("|")
    group = control_group(200 << 20)
    if group is None:
        pytest.skip("needs the right to make control groups")
    try:
        done = subprocess.run([*own, str(group), *program], capture_output=True, text=True)
    finally:
        group.rmdir()
    assert done.returncode == 0, done.stderr
    anonymous, file, text = done.stdout.split("|")
    assert text == expected[2] and file.startswith(str(cache)) and int(anonymous) < 200 << 20
    assert "GB are free" in done.stderr


def test_bench_says_what_a_process_takes(model: Path) -> None:
    result = CliRunner().invoke(main, ["bench", str(model), "--memory", "-c", "100", "-o", "json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["n_ctx"] == facts["n_tokens"] == 100 and facts["packed_file"] is None
    assert facts["estimate"]["total"] == sum(n for name, n in facts["estimate"].items() if name != "total")
    assert facts["answered"]["peak"] >= facts["loaded"]["peak"] > 10 << 20
    for step in ("loaded", "answered"):
        if "anonymous" in facts[step]:
            assert facts[step]["anonymous"] + facts[step]["files"] <= facts[step]["resident"] <= facts[step]["peak"]
    table = CliRunner().invoke(main, ["bench", str(model), "--memory", "-c", "100"]).stdout
    assert "| context 100 | peak |" in table and "after 100 tokens" in table and "estimate" in table


@pytest.mark.parametrize("flags", [("--memory", "-c", "32"), ("--startup", "-r", "1")])
def test_what_is_measured_executes_nothing_in_the_current_folder(
    flags: tuple[str, ...], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name in ("edgelm", "json", "numpy"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\n")
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(main, ["bench", str(model), *flags, "-o", "json"])
    assert not (folder / "executed").exists()
    assert result.exit_code == 0, result.output


def test_bench_memory_of_a_model_with_a_table_of_positions(tmp_path: Path) -> None:
    model = str(tiny.tiny("gpt2", folder=tmp_path))
    most = json.loads(CliRunner().invoke(main, ["bench", model, "--memory", "-o", "json"]).stdout)["n_ctx"]
    assert most == 128
    result = CliRunner().invoke(main, ["bench", model, "--memory", "-c", "4096"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "4096" in result.stderr and f"{most} positions" in result.stderr
