"""Files of packed weights, that are mapped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from in_threads import in_threads

import edgelm
from edgelm import disk, gguf, packed
from edgelm.cli import main
from edgelm.errors import FormatError, SourceError

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
TOKENS = [1, 2, 3, 5, 8, 13, 21]


@pytest.fixture
def model(tmp_path: Path, cache: Path) -> Path:
    return tiny.tiny("llama-gqa", fmt="Q4_0", folder=tmp_path, intermediate_size=128)


def packed_file(path: Path) -> packed.PackedFile:
    return packed.PackedFile.of(gguf.read(path))


@pytest.mark.parametrize("fmt", ["Q4_0", "F16", "IQ2_XS"])
@pytest.mark.parametrize("arch", ["llama-gqa", "phi3", "bert-mean"])
def test_a_packed_file_gives_the_same_bits(arch: str, fmt: str, tmp_path: Path, cache: Path) -> None:
    path = tiny.tiny(arch, fmt=fmt, folder=tmp_path)

    def result(**options: Any) -> tuple[np.ndarray, Path | None]:
        with edgelm.load(path, **options) as loaded:
            return (loaded.embed([TOKENS]) if loaded.is_encoder else loaded.logits(TOKENS)), loaded.packed_file

    expected, file = result()
    assert file is None and not cache.exists()
    made, file = result(packed="file")  # makes it
    assert file is not None and file.parent == cache / "packed"
    assert file.stat().st_size == packed.DATA + packed_file(path).n_bytes
    before = file.stat()
    found, again = result()  # finds it
    assert again == file and file.stat().st_mtime_ns == before.st_mtime_ns
    alone, none = result(packed="memory")
    assert none is None
    for other in (made, found, alone):
        np.testing.assert_array_equal(other, expected)


def test_the_command_pack(model: Path, cache: Path, tmp_path: Path) -> None:
    def command(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    beside, elsewhere = model.with_name(model.name + ".packed"), tmp_path / "deeper" / "x.packed"
    assert command("pack", model, "-q") == f"{beside}\n"
    assert json.loads(command("info", model, "--json"))["packed_files"] == {str(beside): "will be used"}
    text = command("run", model, "-p", "hello", "-n", 5, "--temp", 0)
    with edgelm.load(model) as loaded:
        assert loaded.packed_file == beside and loaded.info()["packed_weights"] == str(beside)
    assert command("pack", model, elsewhere, "-q") == command("pack", "-m", model, elsewhere, "-q") == f"{elsewhere}\n"
    assert command("pack", model, "--remove") == f"{beside}\n"
    assert command("run", model, "-p", "hello", "-n", 5, "--temp", 0, "--packed", elsewhere) == text
    assert command("run", model, "-p", "hello", "-n", 5, "--temp", 0, "--no-mmap") == text
    assert "packed_files" not in json.loads(command("info", model, "--json"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([model.name, "deeper"])  # no drafts stay


def replaced(at: int, with_bytes: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + with_bytes + data[at + len(with_bytes) :]


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "does not hold packed weights"),
    "a few bytes": (lambda data: data[:40], "does not hold packed weights"),
    "something else": (lambda data: b"GGUF" + data[4:], "does not hold packed weights"),
    "only a head": (lambda data: data[: packed.DATA], "damaged"),
    "cut short": (lambda data: data[:-1], "damaged"),
    "longer": (lambda data: data + b"\0", "damaged"),
    "another size said": (replaced(12, (1 << 60).to_bytes(8, "little")), "damaged"),
    "another container": (replaced(8, (99).to_bytes(4, "little")), "another version of edgelm"),
    "another layout": (replaced(20, bytes(32)), "another version of edgelm, or for another processor"),
    "another model": (replaced(52, bytes(32)), "another model"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_does_not_fit_is_never_used(name: str, model: Path, cache: Path) -> None:
    change, reason = HOSTILE[name]
    file = packed_file(model)
    path = file.write(file.beside)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FormatError, match=reason):
        edgelm.load(model, packed=str(path))
    with pytest.warns(UserWarning, match=f"{reason}.*edgelm pack"), edgelm.load(model) as loaded:
        assert loaded.packed_file is None
    assert reason in packed_file(model).there()[path]
    result = CliRunner().invoke(main, ["pack", str(model), "-q"])  # as it was told
    assert result.exit_code == 0
    with edgelm.load(model) as loaded:
        assert loaded.packed_file == path


def test_models_that_are_changed_or_exchanged_need_new_files(tmp_path: Path, cache: Path) -> None:
    model, other = tiny.tiny("llama-gqa", fmt="Q4_0", folder=tmp_path), tmp_path / "other.gguf"
    file = packed_file(model)
    file.write(file.beside)
    data = np.fromfile(model, np.uint8)
    data[len(data) // 2 :: 50] ^= 1  # other weights under the same names
    data.tofile(other)
    shutil.copy(file.beside, packed_file(other).beside)
    with pytest.raises(FormatError, match="made for another model"):
        edgelm.load(other, packed=str(packed_file(other).beside))
    now = file.beside.stat().st_mtime_ns
    os.utime(model, ns=(now + 10**9, now + 10**9))
    with pytest.raises(FormatError, match="the model is newer"):
        edgelm.load(model, packed=str(file.beside))


def test_weights_are_not_looked_at_for_a_file_that_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = packed_file(model)
    path = file.write(tmp_path / "elsewhere")
    monkeypatch.delattr(packed.PackedFile, "_sampled")
    with edgelm.load(model, packed=str(path)) as loaded:
        assert loaded.packed_file == path


@pytest.mark.parametrize("place", ["beside", "cached"])
def test_weights_are_only_looked_at_if_the_model_may_be_another_one(
    place: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = packed_file(model)
    path = file.write(getattr(file, place))
    sampled, looked_at = packed.PackedFile._sampled, list[Path]()

    def spy(self: packed.PackedFile) -> bytes:
        looked_at.append(self.file.paths[0])
        return sampled(self)

    monkeypatch.setattr(packed.PackedFile, "_sampled", spy)
    assert packed_file(model).found() == path and not looked_at
    before = model.stat().st_mtime_ns - 10**9
    os.utime(model, ns=(before, before))
    assert packed_file(model).found() == path and looked_at == [model]
    data = np.fromfile(model, np.uint8)
    data[len(data) // 2 :: 50] ^= 1
    os.remove(model)
    data.tofile(model)
    os.utime(model, ns=(before, before))
    if place == "beside":
        with pytest.warns(UserWarning, match="made for another model"):
            assert packed_file(model).found() is None
    else:
        assert packed_file(model).found() is None


def test_a_model_from_a_clock_that_is_ahead_can_be_packed(model: Path) -> None:
    file, tomorrow = packed_file(model), model.stat().st_mtime_ns + 86400 * 10**9
    os.utime(model, ns=(tomorrow, tomorrow))
    path = file.write(file.beside)
    with edgelm.load(model) as loaded:
        assert loaded.packed_file == path


KILLED = """
import os, sys
from edgelm import gguf, packed
def progress(stage, done, total):
    if stage == "packing weights": os.kill(os.getpid(), 9)
file = packed.PackedFile.of(gguf.read(sys.argv[1]))
file.write(getattr(file, sys.argv[2]), 1, progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to a process here")
def test_what_a_process_has_left_that_was_killed_is_removed(model: Path, tmp_path: Path, cache: Path) -> None:
    file = packed_file(model)
    file.cached.parent.mkdir(parents=True)

    def drafts() -> list[Path]:
        return [path for folder in (tmp_path, file.cached.parent) for path in folder.glob(".*")]

    def killed() -> None:
        for place in ("beside", "cached"):
            done = subprocess.run([sys.executable, "-c", KILLED, str(model), place], capture_output=True, text=True)
            assert done.returncode == -9, done.stderr

    killed()
    assert len(drafts()) == 2
    with disk.replacing(file.beside.with_name("other")):  # whatever else is written is left alone
        assert len(drafts()) == 3
    with disk.replacing(file.beside) as live:
        assert len(drafts()) == 2, "the one beside was left, and is gone"
        in_threads(lambda _: file.write(file.beside), 1)
        assert Path(live.name) in drafts(), "somebody is at it"
    file.write(file.cached)
    assert not drafts()
    killed()
    left = drafts()
    removed = file.remove()
    assert set(removed) == {file.beside, file.cached, *left} and not drafts()
    assert removed[file.beside] == 0 and removed[file.cached] == packed.DATA + file.n_bytes


def test_paths_that_cannot_be(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be opened"):
        edgelm.load(model, packed=str(tmp_path / "missing"))
    with pytest.raises(SourceError, match="cannot be opened"):
        edgelm.load(model, packed=str(tmp_path))
    result = CliRunner().invoke(main, ["pack", str(model), str(model / "x"), "-q"])
    assert result.exit_code == 2 and "cannot write" in result.stderr


def test_no_disk_space_is_said_before(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = packed_file(model)
    monkeypatch.setattr(disk, "SPARE_DISK", shutil.disk_usage(model.parent).total)
    with pytest.raises(SourceError, match="make room"):
        file.write(file.beside)
    assert not file.beside.exists()


@linux
def test_a_file_that_cannot_be_finished_is_not_there(model: Path) -> None:
    """The system refuses to make it as large as it has to be."""
    program = (
        "import resource, sys; from edgelm import gguf, packed\n"
        "file = packed.PackedFile.of(gguf.read(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (packed.DATA + 1000,) * 2)\n"
        "try: file.write(file.beside)\n"
        "except packed.SourceError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(model)], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert [p.name for p in model.parent.iterdir() if ".packed" in p.name] == []


def test_nothing_is_said_about_packed_files_when_all_is_well(model: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edgelm.load(model).close()
