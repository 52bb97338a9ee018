"""Importance matrices: what is measured, by hand; both forms of file, with `gguf` as second opinion; damaged files."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny

from converters import chunks, imatrix
from converters.chunks import Opened
from converters.imatrix import Entry, Imatrix, collect
from edgelm.errors import FormatError, UsageError

TOKENS = np.random.default_rng(0).integers(3, 60, 100).tolist()


def example() -> Imatrix:
    sums = np.random.default_rng(1).random((4, 8)).astype(np.float32)
    return Imatrix(
        {
            "blk.0.ffn_down.weight": Entry(sums[:1] * 100, np.array([128], np.float32)),
            "blk.0.ffn_up_exps.weight": Entry(sums[1:], np.array([64, 0, 64], np.float32)),
        },
        ("a text.txt",),
        n_chunks=2,
        chunk_size=64,
    )


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_the_first_layer_by_hand(name: str, tmp_path: Path) -> None:
    model = Opened.read(tiny(name, folder=tmp_path))
    measured = collect(model, TOKENS, n_ctx=32)
    tokens = np.array(TOKENS[:96])
    if model.tokenizer.add_bos:
        tokens[::32] = model.tokenizer.bos_id
    w = model.weights.by_name
    x = w["token_embd.weight"].dequantize()[tokens].astype(np.float64)
    if model.config.spec.scaled_embedding:
        x *= np.sqrt(model.config.dim)
    h = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + model.config.norm_eps)
    expected = ((h * w["blk.0.attn_norm.weight"].dequantize()) ** 2).mean(axis=0)
    importance = measured.importance("blk.0.attn_q.weight")
    assert importance is not None
    np.testing.assert_allclose(importance, expected, rtol=1e-4)
    assert (measured.n_chunks, measured.chunk_size) == (3, 32)


def test_every_linear_layer_is_measured_over_every_token(tmp_path: Path) -> None:
    model = Opened.read(tiny("llama-gqa", folder=tmp_path))
    measured = collect(model, TOKENS, n_ctx=32, chunks=2, process_output=True)
    layers = {n for n, t in model.weights.by_name.items() if n.startswith("blk.") and len(t.shape) == 2}
    assert set(measured.entries) == layers | {"output.weight"}
    assert {float(entry.counts[0]) for entry in measured.entries.values()} == {64.0}


def test_how_many_chunks_run_at_once_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Opened.read(tiny("llama-gqa", folder=tmp_path))
    whole = collect(model, TOKENS, n_ctx=32)
    monkeypatch.setattr(chunks, "PART_BYTES", 1)
    seen = []
    single = collect(model, TOKENS, n_ctx=32, progress=lambda stage, done, total: seen.append((stage, done, total)))
    assert seen == [("imatrix", i, 3) for i in range(4)]
    for name in whole.entries:
        np.testing.assert_allclose(single.entries[name].sums, whole.entries[name].sums, rtol=1e-4)


def test_a_text_shorter_than_a_chunk(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one chunk of 128"):
        collect(Opened.read(tiny("llama-gqa", folder=tmp_path)), TOKENS, n_ctx=128)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_files_come_back(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"imatrix.{form}"
    imatrix.save(path, example())
    back = imatrix.read(path)
    assert back.datasets == ("a text.txt",) and back.n_chunks == 2
    for name, entry in example().entries.items():
        found = back.importance(name)
        assert found is not None
        np.testing.assert_allclose(found.reshape(-1), entry.means().reshape(-1), rtol=1e-6)
    assert back.importance("blk.9.ffn_down.weight") is None
    if form == "gguf":
        experts = back.importance("blk.0.ffn_up_exps.weight")
        assert experts is not None and experts.shape == (3, 8) and (experts[1] == 1).all()


def test_gguf_reads_what_is_written(tmp_path: Path) -> None:
    imatrix.save(tmp_path / "i.gguf", example())
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    tensors = {t.name: t for t in reader.tensors}
    assert sorted(tensors) == sorted(n + s for n in example().entries for s in (".in_sum2", ".counts"))
    assert list(tensors["blk.0.ffn_up_exps.weight.in_sum2"].shape) == [8, 3]
    assert list(tensors["blk.0.ffn_up_exps.weight.counts"].shape) == [1, 3]
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a text.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 2


def test_the_bytes_of_the_old_form(tmp_path: Path) -> None:
    name = b"blk.0.attn_q.weight"
    data = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii3f", 4, 3, 4.0, 8.0, 2.0)
    path = tmp_path / "old"
    path.write_bytes(data)
    read = imatrix.read(path)
    found = read.importance(name.decode())
    assert found is not None and found.tolist() == [1.0, 2.0, 0.5]
    assert read.datasets == () and read.n_chunks == 0


@given(cut=st.integers(0, 400), byte=st.integers(0, 255), at=st.integers(0, 400))
def test_damaged_old_files_are_errors_or_readable(
    tmp_path_factory: pytest.TempPathFactory, cut: int, byte: int, at: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "i.dat"
    imatrix.save(path, example())
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data[: len(data) - cut % len(data)])
    try:
        imatrix.read(path)
    except FormatError as error:
        assert str(path) in str(error)


def test_other_files_are_no_imatrix(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no imatrix"):
        imatrix.read(tiny("llama-gqa", folder=tmp_path))
    (tmp_path / "x").write_bytes(b"hello")
    with pytest.raises(FormatError, match="no imatrix"):
        imatrix.read(tmp_path / "x")
