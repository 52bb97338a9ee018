"""Packing: the bytes of packed weights, pieces instead of copies, a first run that does not wait for it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from blocks import random_blocks

import edgelm
from edgelm import gguf, mapped_file
from edgelm.errors import SourceError, TemplateError
from edgelm.formats import QTensor, by_name
from edgelm.kernels import compiler, packing, streamed, tiles, weight_layout
from edgelm.kernels.records import MAX_TOKENS
from edgelm.kernels.units import UNITS

TOKENS = [1, 2, 3, 5, 8, 13, 21]
HANGS = 600  # seconds: no limit of speed


def weight(name: str, n_rows: int, n_cols: int) -> QTensor:
    format, rng = by_name(name), np.random.default_rng(1)
    blocks = random_blocks(format, n_rows * n_cols // format.block, rng)
    return QTensor("w", format, (n_rows, n_cols), blocks.view(np.uint8).reshape(n_rows, -1))


@pytest.fixture
def model(tmp_path: Path, cache: Path) -> Path:
    return tiny.tiny("llama-gqa", fmt="Q4_0", folder=tmp_path, intermediate_size=128)


# sha256 of packed weights of this number: what differs is not what older files hold, so the number has to be raised.
LAYOUT = 5
PACKED = {
    "Q8_0 as Q8_0": "3c84b8b14d15cd2b",
    "Q4_0 as Q4_0": "135906bd65bac791",
    "Q4_1 as Q4_1": "60f2f949aa3b5fba",
    "Q5_0 as Q5_0": "4fd3d0372ac8e724",
    "Q5_1 as Q5_1": "b189709fd5523d82",
    "Q4_K as Q4_K": "0c16d586cb7fdafe",
    "Q5_K as Q5_K": "c08dbcd5676585c8",
    "Q6_K as Q6_K": "645ea11f8bc9d8ee",
    "Q3_K as Q3_K": "26c4ea3e2e0dbe43",
    "Q2_K as Q2_K": "31bf5d984e1dca8a",
    "IQ4_NL as IQ4_NL": "135906bd65bac791",
    "IQ4_XS as IQ4_XS": "23a12c065fcca8b3",
    "MXFP4 as MXFP4": "fb52e64a5a097103",
    "Q8_1 as Q8_1": "dcf7a9bb2c0c9b6d",
    "Q8_K as Q8_K": "882d3b85247c697e",
    "Q1_0 as Q1_0": "8110fd394786ee67",
    "Q2_0 as Q2_0": "ad78d9c0e069d2cc",
    "TQ2_0 as TQ2_0": "e034de636e33e336",
    "TQ1_0 as TQ1_0": "3e3c1297076bc579",
    "NVFP4 as NVFP4": "d5de6943a70dd6bf",
    "IQ1_S as IQ1_S": "47c4cfbac11a8df4",
    "IQ1_M as IQ1_M": "59a464b35dc4e7f9",
    "IQ2_XXS as IQ2_XXS": "b033107981a7b887",
    "IQ2_XS as IQ2_XS": "58b4c220c5ad3203",
    "IQ2_S as IQ2_S": "673138c8b3abbf8a",
    "IQ3_XXS as IQ3_XXS": "70aeaedbeab22da3",
    "IQ3_S as IQ3_S": "024d859ce5b31ddc",
    "F32 as F32": "a4696450fedd4bcd",
    "F16 as INT12": "cf751e8e90d08678",
    "F16 as F16": "74dad3fd8614187c",
    "BF16 as INT12": "8d6fbc331b22d3e0",
    "BF16 as BF16": "adc5de9b5afc48c5",
}


def test_every_unit_has_code_and_bits_for_its_quants() -> None:
    assert tiles.BLOCKS.keys() == UNITS.keys()
    for unit in UNITS.values():
        bits = [(f.vector, f.at + i) for fields in unit.fields for f in fields for i in range(f.bits)]
        assert sorted(bits) == [(vector, bit) for vector in range(unit.stored) for bit in range(8)], "each once"
        for fields in unit.fields:
            assert sorted(f.to + i for f in fields for i in range(f.bits)) == list(range(unit.stored))
        assert 1 << unit.stored == (1 << unit.bits if unit.table is None else len(unit.table))


@pytest.mark.parametrize("name", [*UNITS, "F32", "F16", "BF16"])
def test_the_layout_has_the_number_that_files_know_it_by(name: str) -> None:
    [form] = packing.pack_all([weight(name, 21, 512)])
    digest = hashlib.sha256(form.keep[: form.n_bytes]).hexdigest()[:16]
    assert weight_layout.LAYOUT == LAYOUT
    assert digest == PACKED[f"{name} as {form.format}"], "raise weight_layout.LAYOUT, and write both down here"


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F16", "F32", "TQ1_0"])
def test_groups_of_weights_that_are_read_together_alternate(name: str) -> None:
    """Gate and up: the same bytes as alone, a group of the one and a group of the other in turns."""
    tensors = [weight(name, rows, 512) for rows in (21, 3000, 40, 3000, 40, 16)]
    tensors.append(weight(name, 40, 2048))  # a group of this has more bytes than all that is before it
    tensors += [weight(name, 5, 512), weight(name, 16, 512), weight(name, 16, 512)]  # a pair of single groups
    for i in (3, 9):
        tensors[i] = replace(tensors[i], data=tensors[i].data[::-1].copy())
    forms = packing.pack_all(tensors, n_threads=2, pairs=[(3, 1), (0, 2), (8, 9)])
    alone = [packing.pack(tensor) for tensor in tensors]
    for form, expected in zip(forms, alone, strict=True):
        start = form.address - form.keep.ctypes.data
        places = start + form.stride * np.arange(form.n_groups)[:, None] + np.arange(form.group_bytes)
        assert places.max() + 1 == start + form.span <= len(form.keep)
        assert np.array_equal(form.keep[places].reshape(-1), expected.keep[: expected.n_bytes])
    assert [form.stride // form.group_bytes for form in forms] == [1, 2, 1, 2, 1, 1, 1, 1, 2, 2], "those that are alike"
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

    def watch(stage: str, done: int, total: int) -> None:
        nonlocal most
        most = max(most, mapped_kib(tmp_path / "m.gguf"))

    [form] = packing.pack_all([file.tensors["w"]], n_threads=2, progress=watch, lend=file.lend)
    [expected] = packing.pack_all([tensor])
    assert form.n_bytes > 24 << 20 and np.array_equal(form.keep, expected.keep)
    assert most <= 2 * 2 * mapped_file.WINDOW >> 10
    assert mapped_kib(tmp_path / "m.gguf") == 0, "no page that was mapped beside what was read is left"


def test_a_file_is_lent_whatever_became_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pages are not given back: the path may be relative, and lead to another file by now."""
    monkeypatch.setattr(gguf, "GIVES_BACK", False)
    tensor = weight("Q8_0", 64, 4096)
    for name, data in (("m.gguf", tensor), ("other.gguf", replace(tensor, data=tensor.data ^ 1))):
        tiny.write(tmp_path / name, {"general.architecture": "none"}, {"w": data})
    monkeypatch.chdir(tmp_path)
    file = gguf.read("m.gguf")
    rows = file.tensors["w"].data[3:9]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    if sys.platform != "win32":  # which exchanges no file that is mapped
        os.replace(tmp_path / "other.gguf", tmp_path / "m.gguf")
    with file.lend(rows) as data:
        assert np.array_equal(data, tensor.data[3:9])


@pytest.mark.skipif(sys.platform == "win32", reason="files that are mapped are not cut short here")
def test_a_file_that_was_cut_short_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "GIVES_BACK", False)
    path = tmp_path / "m.gguf"
    tiny.write(path, {"general.architecture": "none"}, {"w": weight("Q8_0", 64, 4096)})
    file = gguf.read(path)
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(SourceError, match="cannot be read any more"), file.lend(file.tensors["w"].data[3:]):
        pass


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
    monkeypatch.setattr(packing.Packing, "start", lambda self, progress=None: None)
    monkeypatch.setattr(streamed, "BUFFER", 1)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group of a weight is packed behind the caller by itself, where the file is read."""
    if not packing.read_address():
        pytest.skip("the file is mapped")
    monkeypatch.setattr(packing, "LARGE_PIECE", 1)


@pytest.mark.parametrize("fmt", ["Q4_0", "Q4_K", "F16", "TQ1_0"])
@pytest.mark.parametrize("arch", ["llama-gqa", "gpt2", "phi3", "qwen2", "bert-mean"])
def test_a_first_run_without_packed_weights_gives_the_same_bits(
    arch: str, fmt: str, tmp_path: Path, cache: Path, not_begun: None
) -> None:
    sizes = {} if by_name(fmt).block > 32 else {"intermediate_size": 128}  # whole units
    path = tiny.tiny(arch, fmt=fmt, folder=tmp_path, **sizes)
    for tokens in (TOKENS[:1], TOKENS):
        with edgelm.load(path, threads=2) as loaded:
            under_way = loaded.runner._resources.packing
            assert (under_way is None) == (fmt == "TQ1_0"), "what has to be transcoded is packed before"
            first, second = (loaded.embed([tokens]) if loaded.is_encoder else loaded.logits(tokens) for _ in range(2))
            np.testing.assert_array_equal(first, second)
            assert under_way is None or under_way.finished


@pytest.mark.parametrize("fmt", ["Q4_0", "F16"])
def test_a_first_run_of_more_tokens_than_a_unit_of_work_has(
    fmt: str, tmp_path: Path, cache: Path, not_begun: None
) -> None:
    """Through the matrix unit, where there is one."""
    path = tiny.tiny("llama-gqa", fmt=fmt, folder=tmp_path, intermediate_size=128, max_position_embeddings=512)
    tokens = TOKENS * 45
    assert len(tokens) > MAX_TOKENS
    with edgelm.load(path, threads=2) as loaded:
        np.testing.assert_array_equal(*(loaded.logits(tokens) for _ in range(2)))


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
            under_way._work(under_way._ending)
            under_way._pieces = pieces
            np.testing.assert_array_equal(loaded.logits(TOKENS), expected)
            loaded.wait()
            np.testing.assert_array_equal(loaded.logits(TOKENS), expected)


def test_a_first_run_reads_the_file_or_its_pages(
    model: Path, not_begun: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where C's `pread` is known it is used, and what it gives is what mapped pages hold."""
    found = []
    for address in (packing.read_address(), 0):
        monkeypatch.setattr(packing, "read_address", lambda address=address: address)
        with edgelm.load(model) as loaded:
            found.append(loaded.logits(TOKENS))
            assert not loaded.runner._resources.packing.finished
    np.testing.assert_array_equal(*found)


@pytest.mark.skipif(not packing.read_address(), reason="the file is mapped")
@pytest.mark.parametrize("behind", [True, False])
def test_a_file_that_cannot_be_read_any_more(
    behind: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has become shorter, or its descriptor is none: an error, and no logits of something else."""
    if not behind:
        monkeypatch.setattr(packing.Packing, "start", lambda self, progress=None: None)
    with (tmp_path / "empty").open("w+b") as empty:
        for descriptor in (empty.fileno(), 9999):
            monkeypatch.setattr(gguf.GGUF, "find", lambda self, rows, descriptor=descriptor: (descriptor, 0))
            with edgelm.load(model) as loaded, pytest.raises(SourceError, match="cannot be read any more"):
                loaded.wait() if behind else loaded.logits(TOKENS)


@pytest.mark.skipif(not packing.read_address(), reason="files are mapped here")
def test_rows_that_cannot_be_read_are_told(model: Path, tmp_path: Path) -> None:
    """Those of an embedding, which a first run asks for before all others."""
    tensors = [gguf.read(model).tensors["token_embd.weight"]]
    forms, n_bytes = weight_layout.arrange(tensors)
    with (tmp_path / "empty").open("w+b") as empty:
        some = packing.Packing(packing.Memory(n_bytes), tensors, forms, find=lambda rows: (empty.fileno(), 0))
        with pytest.raises(SourceError, match="cannot be read any more"):
            some.pack_rows(0, [3])


def test_what_fails_behind_the_caller_is_raised_by_the_second_run(
    model: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run needs no other thread."""
    find, failed = gguf.GGUF.find, threading.Event()

    def fail(self: gguf.GGUF, rows: np.ndarray) -> Any:
        if threading.current_thread() is threading.main_thread():
            return find(self, rows)
        failed.set()
        raise OSError("the disk is gone")

    monkeypatch.setattr(gguf.GGUF, "find", fail)
    with edgelm.load(model, threads=2) as loaded:
        assert failed.wait(HANGS) and len(loaded.logits(TOKENS))
        with pytest.raises(OSError, match="the disk is gone"):
            loaded.logits(TOKENS)


def test_an_interrupt_ends_the_waiting_and_not_the_packing(
    model: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edgelm.load(model) as loaded:
        expected = loaded.logits(TOKENS)
    find, interrupted, caught = gguf.GGUF.find, threading.Event(), threading.Event()

    def interrupt(self: gguf.GGUF, rows: np.ndarray) -> Any:
        if not interrupted.is_set():
            interrupted.set()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            caught.wait(HANGS)
        return find(self, rows)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    try:
        monkeypatch.setattr(gguf.GGUF, "find", interrupt)
        with edgelm.load(model, threads=1) as loaded:
            with pytest.raises(KeyboardInterrupt):
                loaded.wait()
            caught.set()
            np.testing.assert_array_equal(loaded.logits(TOKENS), expected)
            loaded.wait()
            np.testing.assert_array_equal(loaded.logits(TOKENS), expected)
    finally:
        signal.signal(signal.SIGINT, before)


def packing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "edgelm-packing"]


def test_a_closed_model_packs_no_more_and_goes_on_when_it_is_used(
    model: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edgelm.load(model) as loaded:
        expected = loaded.logits(TOKENS)
    find, endings, known = gguf.GGUF.find, list[threading.Event](), threading.Event()

    def wait(self: gguf.GGUF, rows: np.ndarray) -> Any:
        assert known.wait(HANGS) and endings[0].wait(HANGS), "until it is to end"
        return find(self, rows)

    monkeypatch.setattr(gguf.GGUF, "find", wait)
    with edgelm.load(model, threads=3) as loaded:
        under_way = loaded.runner._resources.packing
        endings.append(under_way._ending)
        known.set()
    assert not under_way.finished and not packing_threads()
    for _ in range(2):
        np.testing.assert_array_equal(loaded.logits(TOKENS), expected)
    loaded.close()


def test_a_model_that_cannot_be_loaded_packs_no_more(
    model: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, stop, stopped = gguf.GGUF.find, packing.Packing.stop, threading.Event()

    def spy(self: packing.Packing) -> None:
        stopped.set()
        stop(self)

    monkeypatch.setattr(gguf.GGUF, "find", lambda self, rows: stopped.wait(HANGS) and find(self, rows))
    monkeypatch.setattr(packing.Packing, "stop", spy)
    with pytest.raises(TemplateError):
        edgelm.load(model, chat_template="{% nonsense %}", threads=2)
    assert stopped.is_set() and not packing_threads()


@pytest.mark.parametrize(
    ("settings", "expected"), [({"threads": 3}, 3), ({"threads": 3, "threads_batch": 1}, 1), ({"threads_batch": 2}, 2)]
)
def test_packing_takes_as_many_threads_as_prompts(model: Path, settings: dict[str, int], expected: int) -> None:
    with edgelm.load(model, **settings) as loaded:
        assert loaded.runner._resources.packing.n_threads == loaded.runner.n_threads_batch == expected


def test_kernels_that_pack_are_compiled_with_all_others(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a first start: so no core has nothing to compile."""
    compile_all, told = compiler.compile_all, list[list[Any]]()

    def watched(kernels: Iterable[Any], *rest: Any) -> None:
        told.append(list(kernels))
        compile_all(told[-1], *rest)

    def refuse() -> None:
        raise OSError

    monkeypatch.setattr(compiler, "compile_all", watched)
    monkeypatch.setattr(compiler, "is_compiled", lambda kernel: False)
    monkeypatch.setattr(compiler, "_start_helper", refuse)
    with edgelm.load(model) as loaded:
        modules = {str(kernel).partition(":")[0] for kernel in told[0]}
        assert {"packing_kernels", "walk"} <= modules
        assert len(loaded.logits(TOKENS)) == len(TOKENS)


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
    subprocess.run([sys.executable, "-c", script, str(model)], check=True, timeout=600)


def test_a_process_may_end_while_weights_are_packed(model: Path) -> None:
    script = """
import sys, edgelm
from edgelm.kernels import packing
pack_piece = packing._pack_piece
packing._pack_piece = lambda *args: (__import__("time").sleep(0.2), pack_piece(*args))[1]
model = edgelm.load(sys.argv[1])
print(int(model.logits([1]).shape[0]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(model)], check=True, timeout=600, capture_output=True)
    assert (done.stdout, done.stderr) == (b"1\n", b"")
