"""The compiler: machine code that is kept on disk, found again without Numba, and refused when it would need Python."""

from __future__ import annotations

import ctypes
import io
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_threads import in_threads

from edgelm.kernels import child, compiler, sources
from edgelm.kernels.simd import load_i64, store

HANGS = 600  # seconds: no limit of speed
KERNELS = """
from edgelm.kernels.simd import load_i64, store
def times(op, env, begin, end):
    for i in range(begin, end):
        store(env + 8 * i, load_i64(op + 8 * i) * FACTOR)
"""
RUN = """
import sys, threading, ctypes, numpy as np
sys.path.insert(0, {folder!r})
from edgelm.kernels import compiler
addresses = set()
threads = [threading.Thread(target=lambda: addresses.add(compiler.address('pkg.mod:times'))) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
x, y = np.arange(5), np.zeros(5, np.int64)
ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(addresses.pop())(x.ctypes.data, y.ctypes.data, 1, 4)
print(*y, len(addresses), 'numba' in sys.modules)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a package that has one kernel, and a cache of its own."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "mod.py").write_text(KERNELS.replace("FACTOR", "3"))
    return tmp_path


def run(package: Path, **environment: str) -> str:
    settings = {**os.environ, "NUMBA_CACHE_DIR": str(package / "cache"), **environment}
    command = [sys.executable, "-c", RUN.format(folder=str(package))]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip()


def test_second_process_loads_without_numba(package: Path) -> None:
    assert run(package) == "0 3 6 9 0 0 True"
    assert run(package) == "0 3 6 9 0 0 False"


@pytest.mark.parametrize("usable", [True, False])
def test_llvm_is_only_loaded_where_it_is_needed(package: Path, usable: bool) -> None:
    run(package)
    code = RUN.format(folder=str(package)).replace("addresses = ", f"compiler.elf.USABLE &= {usable}; addresses = ", 1)
    code += "print('llvmlite.binding' in sys.modules, compiler.elf.USABLE)"
    settings = {**os.environ, "NUMBA_CACHE_DIR": str(package / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, timeout=HANGS)
    result, llvm = done.stdout.splitlines()
    assert result == "0 3 6 9 0 0 False"
    assert llvm == ("False True" if usable and compiler.elf.USABLE else "True False")


def test_damaged_code_is_compiled_again(package: Path) -> None:
    run(package)
    (file,) = (package / "cache").rglob("*.o")
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:50] + b"?" + whole[51:]):
        file.write_bytes(damaged)
        assert run(package) == "0 3 6 9 0 0 True"
        assert file.read_bytes() == whole


def test_other_processor_features_have_other_code(package: Path) -> None:
    run(package)
    arm = platform.machine().lower() in ("aarch64", "arm64")
    least, more = ("+neon", "+neon,+crc") if arm else ("+sse2", "+sse2,+sse3")
    other = more if os.environ.get("NUMBA_CPU_FEATURES") == least else least
    assert run(package, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=other) == "0 3 6 9 0 0 True"
    assert len(list((package / "cache").rglob("*.o"))) == 2


def double(op, env, begin, end):
    for i in range(begin, end):
        store(env + 8 * i, load_i64(op + 8 * i) * 2)


def raising(op, env, begin, end):
    if begin > end:
        raise ValueError


def allocating(op, env, begin, end):
    store(env, np.zeros(end, np.int64).sum())


def test_code_follows_its_source(tmp_path: Path) -> None:
    """A kernel outside the package is kept under the hash of its file."""
    for factor in (2, 5):
        (tmp_path / "some_kernels.py").write_text(KERNELS.replace("FACTOR", str(factor)))
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
            "import ctypes, numpy as np, some_kernels\n"
            "from edgelm.kernels import compiler\n"
            "x, y = np.arange(3), np.zeros(3, np.int64)\n"
            "ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(compiler.address(some_kernels.times))"
            "(x.ctypes.data, y.ctypes.data, 0, 3)\n"
            "print(*y)"
        )
        settings = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, timeout=HANGS)
        assert done.stdout.split() == [str(i * factor) for i in range(3)], done.stderr


def test_addresses_are_stable_and_callable() -> None:
    found = in_threads(lambda _: compiler.address(double), 4)
    assert len(set(found)) == 1
    x, y = np.arange(4), np.zeros(4, np.int64)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(found[0])(x.ctypes.data, y.ctypes.data, 0, 4)
    assert np.array_equal(y, 2 * x)
    assert compiler.address("walk:run") == compiler.address("edgelm.kernels.walk:run")


@pytest.mark.parametrize("kernel", [raising, allocating])
def test_kernels_that_need_python_are_refused(kernel: compiler.Kernel) -> None:
    with pytest.raises(TypeError, match="neither raise"):
        compiler.address(kernel)


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    compiler.compile_all([double, "walk:spin", double], lambda *progress: told.append(progress))
    assert list(dict.fromkeys(told))[-2:] == [("compiling kernels", 1, 2), ("compiling kernels", 2, 2)]


SEVERAL = """
import sys, os
sys.path.insert(0, {folder!r})
sys.executable = {executable!r}
from edgelm.kernels import compiler
compiled, inner = [], compiler._compile
compiler._compile = lambda kernel, symbol: compiled.append(kernel.__name__) or inner(kernel, symbol)
names = ["pkg.mod:k%d" % i for i in range(9)]
told = []
compiler.compile_all(names, lambda *progress: told.append(progress), n_processes=lambda: 3)
assert {{(stage, total) for stage, _, total in told}} == {{("compiling kernels", 9)}}
assert [done for i, (_, done, _) in enumerate(told) if i == 0 or done > told[i - 1][1]][-9:] == list(range(1, 10))
assert told[0][1] == (0 if {executable!r} != "/nowhere/python" else 1), "told of while it is waited for"
assert len({{compiler.address(name) for name in names}}) == 9
print(len(compiled))
"""


def compile_several(
    package: Path, executable: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A process that compiles nine kernels; `executable` is what it takes for Python, `folder` where it is."""
    kernels = "".join(f"\ndef k{i}(op, env, begin, end):\n    store(env, begin + {i})\n" for i in range(9))
    (package / "pkg" / "mod.py").write_text("from edgelm.kernels.simd import store\n" + kernels)
    code = SEVERAL.format(folder=str(package), executable=executable)
    settings = {**child.environment(), "NUMBA_CACHE_DIR": str(package / "cache"), **environment}
    command = child.command("-c", code)
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=HANGS, cwd=folder)


@pytest.mark.parametrize(("executable", "expected"), [(sys.executable, 0), ("/nowhere/python", 9)])
def test_many_are_compiled_by_several_processes(package: Path, executable: str, expected: int) -> None:
    """Helpers compile all; without any, this process does."""
    done = compile_several(package, executable)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected}\n", "")
    assert len(list((package / "cache").rglob("*.o"))) == 9


def test_nothing_in_the_current_folder_is_executed(package: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where somebody else's files lie, under names that Python and edgelm import."""
    folder = tmp_path_factory.mktemp("downloaded")
    for name in ("hashlib", "numpy", "numba", "edgelm", "re"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\n")
    done = compile_several(package, sys.executable, folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", ""), "helpers compile, also from there"
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(("asked", "expected"), [(3, 3), (1, 1), (100, 4), (None, 2)])
def test_how_many_processes_compile(asked: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may, one for two kernels at most; if nothing is said, one for each core that is ours."""
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **settings: object) -> None:
            self.stdin = io.BytesIO()
            started.append(command)

        def poll(self) -> int:
            return 1  # it has failed

        def terminate(self) -> None: ...
        def wait(self) -> None: ...

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(subprocess, "Popen", Process)
    found: list[str] = []
    monkeypatch.setattr(compiler, "address", found.append)
    kernels = [f"nowhere:kernel_{i}" for i in range(8)]
    if asked is None:
        compiler.compile_all(kernels)
    else:
        compiler.compile_all(kernels, n_processes=lambda: asked)
    assert len(started) == expected
    assert found == kernels


def test_a_process_stays_with_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels of a module have in common is compiled once."""

    class Lines(io.RawIOBase):
        def __init__(self) -> None:
            self.lines: list[bytes] = []

        def write(self, line: Any) -> None:
            self.lines.append(line)

    class Process:
        poll = terminate = wait = lambda self: None

        def __init__(self, *command: object, **settings: object) -> None:
            self.stdin = Lines()
            started.append(self)

        @property
        def given(self) -> list[str]:
            return [line.decode().strip() for line in self.stdin.lines]

    started: list[Process] = []
    looks = Counter[str]()

    def is_compiled(name: str) -> bool:  # soon after it was given to a process
        looks[name] += any(name in process.given for process in started)
        return looks[name] > 5

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(compiler, "is_compiled", is_compiled)
    monkeypatch.setattr(compiler, "address", lambda name: 0)
    kernels = [f"{module}:{i}" for i in range(3) for module in "abc"]
    compiler.compile_all(kernels, n_processes=lambda: 2)
    first, second = (process.given for process in started)
    assert sorted(first + second) == sorted(kernels)
    assert (first[:3], second[:3]) == (["a:0", "a:1", "a:2"], ["b:0", "b:1", "b:2"])


def test_processes_of_this_one_find_the_same_code(tmp_path: Path) -> None:
    """Whatever edgelm does to the environment, which they inherit."""
    script = "from edgelm.kernels import bandwidth, compiler; print(compiler.cache_dir()); "
    again = "import subprocess, sys; subprocess.run([sys.executable, '-P', '-c', sys.argv[1]], check=True)"
    settings = {name: value for name, value in child.environment().items() if name != "NUMBA_CACHE_DIR"}
    command = child.command("-c", script + "sys.stdout.flush()".join(["import sys; ", "; "]) + again, script)
    done = subprocess.run(
        command, capture_output=True, text=True, env={**settings, "XDG_CACHE_HOME": str(tmp_path)}, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = done.stdout.split()
    assert ours == theirs


def test_folders_that_another_process_makes_or_prunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same time, between two steps of this one."""
    path, read_bytes = tmp_path / "processor" / "k.o", Path.read_bytes

    def made(self: Path) -> bool:
        monkeypatch.undo()
        self.mkdir()
        return False  # it was not, a moment ago

    monkeypatch.setattr(Path, "is_dir", made)
    compiler._write(path, b"code")
    assert compiler._read(path) == b"code" and [file.name for file in path.parent.iterdir()] == ["k.o"]

    def removed(self: Path) -> bytes:
        data = read_bytes(self)
        self.unlink()
        return data

    monkeypatch.setattr(Path, "read_bytes", removed)
    assert compiler._read(path) == b"code"


def test_cache_that_cannot_be_written(package: Path) -> None:
    """What is compiled goes to a temporary folder, by all processes, which is gone in the end; it is told once."""
    (package / "cache").write_text("a file where a folder should be")
    (package / "tmp").mkdir()
    done = compile_several(package, sys.executable, TMPDIR=str(package / "tmp"))
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    assert done.stderr.count("cannot be written to") == 1
    assert not list((package / "tmp").iterdir())


def test_code_that_nobody_uses_is_removed(tmp_path: Path) -> None:
    """Of any version of edgelm; nothing of others, whose folder it may be, too."""
    folder = compiler.cache_dir().name
    ours = [tmp_path / folder / "cpu", tmp_path / "cpython-39-win32-AMD64-0123abcd-v0" / "cpu"]
    theirs = [tmp_path, tmp_path / "build", tmp_path / "cpython-311-x86_64-linux-gnu"]
    for place in (*ours, *theirs):
        place.mkdir(parents=True, exist_ok=True)
        for name, days in (("old.o", 40), ("old.o.part", 40), ("recent.o", 1), ("other.txt", 400)):
            file = place / name
            file.write_text("code")
            then = file.stat().st_mtime - days * 86400
            os.utime(file, (then, then))
    compiler.prune(tmp_path)
    for place in ours:
        assert sorted(p.name for p in place.iterdir()) == ["other.txt", "recent.o"]
    for place in theirs:
        assert len([p for p in place.iterdir() if p.is_file()]) == 4, place


def test_source_hash_sees_what_is_imported(tmp_path: Path) -> None:
    """A kernel's code depends on every file of edgelm that its module imports from, at any distance."""
    files, todo = set(), [str(Path(compiler.__file__).with_name("elementwise_kernels.py"))]
    while todo:
        file = todo.pop()
        if file not in files:
            files.add(file)
            todo.extend(sources.imports(file)[1])
    names = {Path(file).name for file in files}
    assert {"elementwise_kernels.py", "abi.py", "simd.py", "vector_math.py"} <= names
    assert not {"walk.py", "executor.py", "compiler.py"} & names
