"""Calibration: checkpoints that run, whatever they come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hf_folder
import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from side_by_side import hidden_states
from tiny import ALL

from converters import calibrate, checkpoint
from converters.chunks import Opened, Source
from edgelm.cache import Batch
from edgelm.errors import UsageError
from edgelm.evaluate import perplexity
from edgelm.models import model_of
from edgelm.reference import Reference

TOKENS = np.array([[1, 17, 300, 17, 44, 250, 9, 8], [1, 2, 3, 4, 5, 6, 7, 8]], np.int32)


def hidden(source: Source) -> np.ndarray:
    c = source.config
    return hidden_states(Reference(model_of(c), c, source.weights, head="hidden", n_ctx=32), TOKENS)


def resident_kib(path: Path) -> int:
    """Of the mapping of a file."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    ours = (found for found in lines if found.endswith(str(path)))
    return sum(int(next(line for line in lines if line.startswith("Rss:")).split()[1]) for _ in ours)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is in memory")
def test_a_mapped_file_does_not_stay_in_memory(tmp_path: Path) -> None:
    path = tiny.tiny("llama-gqa", fmt="F32", folder=tmp_path)
    source = calibrate.opened(checkpoint.read(path))
    file = Opened.read(path)
    for name, weight in source.weights.by_name.items():
        assert np.array_equal(weight.dequantize(), file.weights.by_name[name].dequantize())
    del file
    source.weights.by_name["output_norm.weight"].dequantize()
    assert resident_kib(path) < path.stat().st_size / 1024 / 4


@pytest.mark.parametrize("variant", ALL)
def test_a_folder_runs_as_the_file_that_it_would_become(variant: str, tmp_path: Path) -> None:
    if tiny.VARIANTS[variant].fused:
        pytest.skip("only GGUF files are so")
    folder = calibrate.opened(checkpoint.read(hf_folder.write(tmp_path, variant)))
    file = Opened.read(tiny.tiny(variant, folder=tmp_path))
    np.testing.assert_allclose(hidden(folder), hidden(file), rtol=0, atol=1e-5)
    text = "the quick brown fox jumps over the lazy dog"
    assert folder.tokenizer.encode(text) == file.tokenizer.encode(text)


@pytest.mark.parametrize("format", ["F16", "Q4_0"])
def test_a_file_runs_as_it_is(format: str, tmp_path: Path) -> None:
    path = tiny.tiny("qwen3", fmt=format, folder=tmp_path)
    np.testing.assert_array_equal(hidden(calibrate.opened(checkpoint.read(path))), hidden(Opened.read(path)))


def test_what_a_transformation_changed_is_what_runs(tmp_path: Path) -> None:
    read = checkpoint.read(tiny.tiny("llama-gqa", folder=tmp_path))
    name = "blk.1.ffn_down.weight"
    old = read.tensors[name]
    zero = replace(old, rows=lambda start, stop: 0 * old.rows(start, stop), as_is=None)
    cut = calibrate.opened(replace(read, tensors={**read.tensors, name: zero}))
    assert not cut.weights.by_name[name].dequantize().any()
    assert np.abs(hidden(cut) - hidden(calibrate.opened(read))).max() > 0.01


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    source = calibrate.opened(checkpoint.read(hf_folder.write(tmp_path, "llama-gqa", dtype="BF16")))
    table = source.weights.by_name["token_embd.weight"]
    rows = [5, 2, 5, 511]
    np.testing.assert_array_equal(table.rows(rows), table.dequantize()[rows])
    with pytest.raises(IndexError, match="token_embd"):
        table.rows([512])


def test_a_source_is_evaluated(tmp_path: Path) -> None:
    source = calibrate.opened(checkpoint.read(hf_folder.write(tmp_path, "gemma3")))
    file = calibrate.opened(checkpoint.read(tiny.tiny("gemma3", fmt="Q8_0", folder=tmp_path)))
    tokens = np.random.default_rng(0).integers(3, 500, 64).tolist()
    model, against = (calibrate.Interpreted.of(s, 32, kept_bytes=0) for s in (file, source))
    report = perplexity(model, tokens, 32, against=against)
    assert report.mean_kl is not None and 0 < report.mean_kl < 0.01
    assert perplexity(against, tokens, 32, against=against).mean_kl == 0


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])  # without biases, with them
def test_large_weights_are_multiplied_in_strips(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = calibrate.opened(checkpoint.read(hf_folder.write(tmp_path, name)))
    tokens = np.random.default_rng(0).integers(3, 500, 32).astype(np.int32)

    def logits() -> NDArray[np.float32]:
        model = calibrate.Interpreted.of(source, 32, kept_bytes=0)
        return model.runner.forward(Batch.of([(model.new_cache().new_sequence(), tokens, "all")]))

    whole, wholly_read = logits(), list[str]()
    monkeypatch.setattr(calibrate, "STRIP_BYTES", 4 * 64 * 7)
    read = calibrate.Unread.dequantize
    monkeypatch.setattr(calibrate.Unread, "dequantize", lambda self: (wholly_read.append(self.name), read(self))[1])
    np.testing.assert_allclose(logits(), whole, rtol=1e-5, atol=1e-5)
    assert not any(len(source.weights.by_name[read].shape) == 2 for read in wholly_read)


def test_encoders_have_no_logits(tmp_path: Path) -> None:
    source = calibrate.opened(checkpoint.read(hf_folder.write(tmp_path, "bert-mean")))
    with pytest.raises(UsageError, match="encoder"):
        calibrate.Interpreted.of(source, 32).require_logits()
