"""Packed weights: pieces instead of copies, files of them that are mapped, and models that do not fit into memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from blocks import random_blocks
from click.testing import CliRunner

import edgelm
from edgelm import disk, gguf, packed
from edgelm import free_memory as free
from edgelm.cli import main
from edgelm.errors import FormatError, SourceError
from edgelm.formats import QTensor, by_name
from edgelm.kernels import packing, streamed
from edgelm.kernels.blocks import BLOCKS

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
TOKENS = [1, 2, 3, 5, 8, 13, 21]


def weight(name: str, n_rows: int, n_cols: int) -> QTensor:
    format, rng = by_name(name), np.random.default_rng(1)
    blocks = random_blocks(format, n_rows * n_cols // format.block, rng)
    return QTensor("w", format, (n_rows, n_cols), blocks.view(np.uint8).reshape(n_rows, -1))


@pytest.fixture
def model(tmp_path: Path, cache: Path) -> Path:
    return tiny.tiny("llama-gqa", fmt="Q4_0", folder=tmp_path, intermediate_size=128)


def packed_file(path: Path) -> packed.PackedFile:
    return packed.PackedFile.of(gguf.read(path))


# --- pieces


# sha256 of `packing.LAYOUT` packed weights: what differs is not what older files hold, so the number has to be raised.
LAYOUT = 4
PACKED = {
    "Q8_0 as Q8_0": "3c84b8b14d15cd2b",
    "Q4_0 as Q4_0": "135906bd65bac791",
    "Q4_1 as Q4_1": "60f2f949aa3b5fba",
    "Q5_0 as Q5_0": "d21b7585a3c6a278",
    "Q5_1 as Q5_1": "f0f991e7879c90ef",
    "Q4_K as Q4_K": "0c16d586cb7fdafe",
    "Q5_K as Q5_K": "bdcad90852ec88a9",
    "Q6_K as Q6_K": "3bfdb4be0a8d7736",
    "Q3_K as Q3_K": "f9590c0057e14178",
    "Q2_K as Q2_K": "31bf5d984e1dca8a",
    "IQ4_NL as IQ4_NL": "135906bd65bac791",
    "IQ4_XS as IQ4_XS": "23a12c065fcca8b3",
    "MXFP4 as MXFP4": "fb52e64a5a097103",
    "F32 as F32": "a4696450fedd4bcd",
    "F16 as INT12": "cf751e8e90d08678",
    "F16 as F16": "74dad3fd8614187c",
    "BF16 as INT12": "8d6fbc331b22d3e0",
    "BF16 as BF16": "adc5de9b5afc48c5",
    "TQ2_0 as INT8": "67c3b9281da75e10",
}


@pytest.mark.parametrize("name", [*(name for name in BLOCKS if name != "INT8"), "F32", "F16", "BF16", "TQ2_0"])
def test_the_layout_has_the_number_that_files_know_it_by(name: str) -> None:
    [form] = packing.pack_all([weight(name, 21, 512)])
    digest = hashlib.sha256(form.keep[: form.n_bytes]).hexdigest()[:16]
    assert packing.LAYOUT == LAYOUT
    assert digest == PACKED[f"{name} as {form.format}"], "raise packing.LAYOUT, and write both down here"


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F16", "F32", "TQ2_0"])
def test_groups_of_weights_that_are_read_together_alternate(name: str) -> None:
    """Gate and up: the same bytes as alone, a group of the one and a group of the other in turns."""
    tensors = [weight(name, rows, 512) for rows in (21, 3000, 40, 3000, 40, 16)]
    tensors.append(weight(name, 40, 2048))  # a group of this has more bytes than all that is before it
    tensors[3] = replace(tensors[3], data=tensors[3].data[::-1].copy())
    forms = packing.pack_all(tensors, n_threads=2, pairs=[(3, 1), (0, 2)])
    alone = [packing.pack(tensor) for tensor in tensors]
    for form, expected in zip(forms, alone, strict=True):
        start = form.address - form.keep.ctypes.data
        places = start + form.stride * np.arange(form.n_groups)[:, None] + np.arange(form.group_bytes)
        assert places.max() + 1 == start + form.span <= len(form.keep)
        assert np.array_equal(form.keep[places].reshape(-1), expected.keep[: expected.n_bytes])
    assert [form.stride // form.group_bytes for form in forms] == [1, 2, 1, 2, 1, 1, 1], "those that are alike"
    assert forms[1].address == forms[3].address + forms[3].group_bytes
    assert len(forms[0].keep) < sum(form.n_bytes for form in forms) + 64 * len(forms)


@pytest.mark.parametrize("gives_back", [True, False])
def test_pieces_of_a_file_are_lent_and_forgotten(
    gives_back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pages that can be given back, and through a buffer.

    At most the pieces of two threads are mapped, each of 1 MiB and so in two of the system's windows at most.
    """
    monkeypatch.setattr(gguf, "GIVES_BACK", gives_back)
    tensor = weight("Q8_0", 6000, 4096)
    tiny.write(tmp_path / "m.gguf", {"general.architecture": "none"}, {"w": tensor})
    file = gguf.read(tmp_path / "m.gguf")
    most = 0

    def watch(done: int, total: int) -> None:
        nonlocal most
        most = max(most, mapped_kib(tmp_path / "m.gguf"))

    [form] = packing.pack_all([file.tensors["w"]], n_threads=2, progress=watch, lend=file.lend)
    [expected] = packing.pack_all([tensor])
    assert form.n_bytes > 24 << 20 and np.array_equal(form.keep, expected.keep)
    assert most <= 2 * 2 * gguf._WINDOW >> 10
    assert mapped_kib(tmp_path / "m.gguf") == 0, "no page that was mapped beside what was read is left"


def mapped_kib(path: Path) -> int:
    """Resident pages of the mapped file, where the system tells: else 0."""
    if not sys.platform.startswith("linux"):
        return 0
    ours, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].endswith(":"):
            total += int(line.split()[1]) if ours and line.startswith("Rss:") else 0
        else:
            ours = line.endswith(str(path))
    return total


def test_a_failure_in_any_thread_ends_all() -> None:
    def lend(rows: np.ndarray) -> Any:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        packing.pack_all([weight("Q8_0", 4000, 1024)], n_threads=3, lend=lend)
    assert packing.pack_all([weight("Q8_0", 40, 1024)], n_threads=3, lend=nullcontext)


# --- behind the caller


@pytest.fixture
def not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is packed behind the caller, and pieces of a first run are small."""
    monkeypatch.setattr(packing.Packing, "start", lambda self: None)
    monkeypatch.setattr(streamed, "BUFFER", 1)


@pytest.mark.parametrize("fmt", ["Q4_0", "Q4_K", "F16", "TQ2_0"])
@pytest.mark.parametrize("arch", ["llama-gqa", "gpt2", "phi3", "qwen2", "bert-mean"])
def test_a_first_run_without_packed_weights_gives_the_same_bits(
    arch: str, fmt: str, tmp_path: Path, cache: Path, not_begun: None
) -> None:
    sizes = {} if by_name(fmt).block > 32 else {"intermediate_size": 128}  # whole units
    path = tiny.tiny(arch, fmt=fmt, folder=tmp_path, **sizes)
    for tokens in (TOKENS[:1], TOKENS):
        with edgelm.load(path, threads=2) as loaded:
            under_way = loaded.runner._resources.packing
            assert (under_way is None) == (fmt == "TQ2_0"), "what has to be transcoded is packed before"
            first, second = (loaded.embed([tokens]) if loaded.is_encoder else loaded.logits(tokens) for _ in range(2))
            np.testing.assert_array_equal(first, second)
            assert under_way is None or under_way.finished


@pytest.mark.parametrize("piece_bytes", [1, packing.LARGE_PIECE])
def test_what_is_packed_when_a_run_comes_is_used(
    piece_bytes: int, model: Path, not_begun: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of a model is packed: nothing, up to any piece (a group of a weight, or all of it), all."""
    monkeypatch.setattr(packing, "LARGE_PIECE", piece_bytes)
    with edgelm.load(model) as loaded:
        expected, n_pieces = loaded.logits(TOKENS), len(loaded.runner._resources.packing._pieces)
    for n in range(0, n_pieces + 1, 1 if piece_bytes > 1 else 7):
        with edgelm.load(model) as loaded:
            under_way = loaded.runner._resources.packing
            pieces, under_way._pieces = under_way._pieces, under_way._pieces[:n]
            under_way._work()
            under_way._pieces = pieces
            np.testing.assert_array_equal(loaded.logits(TOKENS), expected)
            loaded.wait()
            np.testing.assert_array_equal(loaded.logits(TOKENS), expected)


def test_what_fails_behind_the_caller_is_raised_by_the_second_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> int:
        raise OSError("the disk is gone")

    monkeypatch.setattr(packing, "_pack_piece", fail)
    with edgelm.load(model) as loaded, pytest.raises(OSError, match="the disk is gone"):
        for _ in range(2):
            loaded.logits(TOKENS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_packs_for_itself(model: Path) -> None:
    """Threads do not come along: a fork in the middle of packing must not wait for them."""
    script = """
import os, sys, numpy as np, edgelm
from edgelm.kernels import packing
pack_piece = packing._pack_piece
with edgelm.load(sys.argv[1]) as model:
    expected = [model.logits([1, 2, 3]) for _ in range(2)]
packing._pack_piece = lambda *args: (__import__("time").sleep(0.05), pack_piece(*args))[1]
model = edgelm.load(sys.argv[1])
child = os.fork()
found = [model.logits([1, 2, 3]) for _ in range(2)]
assert np.array_equal(found, expected)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script, str(model)], check=True, timeout=60)


def test_a_process_may_end_while_weights_are_packed(model: Path) -> None:
    script = """
import sys, edgelm
from edgelm.kernels import packing
pack_piece = packing._pack_piece
packing._pack_piece = lambda *args: (__import__("time").sleep(0.2), pack_piece(*args))[1]
model = edgelm.load(sys.argv[1])
print(int(model.logits([1]).shape[0]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(model)], check=True, timeout=60, capture_output=True)
    assert (done.stdout, done.stderr) == (b"1\n", b"")


# --- files


@pytest.mark.parametrize("fmt", ["Q4_0", "F16", "TQ2_0"])
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
    assert command("pack", model, elsewhere, "-q") == f"{elsewhere}\n"
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


# --- memory


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


def test_bench_memory_of_a_model_with_a_table_of_positions(tmp_path: Path) -> None:
    model = str(tiny.tiny("gpt2", folder=tmp_path))
    most = json.loads(CliRunner().invoke(main, ["bench", model, "--memory", "-o", "json"]).stdout)["n_ctx"]
    assert most == 128
    result = CliRunner().invoke(main, ["bench", model, "--memory", "-c", "4096"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "4096" in result.stderr and f"{most} positions" in result.stderr


def test_nothing_is_said_about_packed_files_when_all_is_well(model: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edgelm.load(model).close()
