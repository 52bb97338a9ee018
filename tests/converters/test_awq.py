"""AWQ: folding changes no output, whatever the architecture; scales are those that lose least."""

from __future__ import annotations

from pathlib import Path

import hf_folder
import numpy as np
import pytest
import tiny
from tiny import ALL

from converters import awq, block_codes, calibrate, checkpoint, chunks, structure
from converters.checkpoint import Checkpoint
from converters.chunks import Opened, Source
from converters.gguf_export import tensor_bytes
from converters.recipe import Recipe, make_plan
from converters.structure import Fold
from edgelm.formats import QTensor, by_name
from edgelm.weights import Weights

TOKENS = np.random.default_rng(0).integers(3, 60, (3, 32)).astype(np.int32)
# How many places of a layer can be scaled: norm -> q, k, v; values -> output; norm -> gate and up; up -> down.
N_FOLDS = {"gpt2": 3, "bert": 1, "nomic-bert": 2}


def folds_of(read: Checkpoint) -> tuple[Source, list[Fold]]:
    source = calibrate.opened(read)
    return source, structure.folds(source.config, structure.recorded(source.config, source.weights))


def random_scales(folds: list[Fold]) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(1)
    return {i: rng.lognormal(0, 0.7, fold.n_channels).astype(np.float32) for i, fold in enumerate(folds)}


def as_f16(read: Checkpoint) -> Opened:
    """The model as it is after it was written as F16."""
    plan = make_plan(read.config, read.tensors, Recipe("f16", allow_requantize=True))
    tensors = {}
    for step in plan.steps:
        data = np.concatenate([np.array(part) for part in tensor_bytes(step, read.tensors[step.name])])
        tensors[step.name] = QTensor(step.name, step.format, step.shape, data.reshape(-1, data.shape[-1]))
    weights = Weights.from_gguf(read.config, tensors)
    return Opened(read.config, weights, calibrate.opened(read).tokenizer)


@pytest.mark.parametrize("variant", ALL)
def test_a_folded_model_computes_the_same(variant: str, tmp_path: Path) -> None:
    if tiny.VARIANTS[variant].fused:
        read = checkpoint.read(tiny.tiny(variant, folder=tmp_path))
    else:
        read = checkpoint.read(hf_folder.write(tmp_path, variant))
    source, folds = folds_of(read)
    assert len(folds) == 2 * N_FOLDS.get(read.config.arch, 4)
    made = awq.folded(read, folds, random_scales(folds))
    was, now = chunks.forward(source, TOKENS), chunks.forward(calibrate.opened(made), TOKENS)
    np.testing.assert_allclose(now, was, rtol=0, atol=2e-5 * np.abs(was).max())
    halves = chunks.forward(as_f16(read), TOKENS), chunks.forward(as_f16(made), TOKENS)
    np.testing.assert_allclose(halves[1], halves[0], rtol=0, atol=1e-2 * np.abs(was).max())
    changed = {name for name in made.tensors if made.tensors[name] is not read.tensors[name]}
    assert changed == {n for f in folds for n in (*f.readers, *(name for name, _ in (*f.vectors, *f.rows)))}


def test_columns_that_matter_are_scaled_up() -> None:
    rng = np.random.default_rng(0)
    driven = np.where(np.arange(256) % 32 == 5, 30, 1.0)
    x = rng.normal(0, 1, (500, 256)) * driven
    hessian = (x.T @ x / 500).astype(np.float32)
    w = rng.normal(0, 0.02, (16, 256)).astype(np.float32)
    fold = Fold(("w",), (("norm", 0),), (), np.arange(256))
    s = awq.best(hessian, [(w, "Q4_0")], fold)
    assert s[5] > 1.5 * s[6]

    def lost(columns: np.ndarray) -> float:
        data = awq.quantize("Q4_0", w * columns, np.diagonal(hessian) / columns**2)
        e = block_codes.decode(by_name("Q4_0"), data) / columns - w
        return float(np.einsum("ij,ij->", e @ hessian, e))

    assert lost(s) < 0.9 * lost(np.ones(256, np.float32))


def test_nothing_is_scaled_for_nothing() -> None:
    w = np.zeros((4, 64), np.float32)
    fold = Fold(("w",), (("norm", 0),), (), np.arange(64))
    assert (awq.best(np.eye(64, dtype=np.float32), [(w, "Q4_0")], fold) == 1).all()


def test_heads_that_share_values_share_scales(tmp_path: Path) -> None:
    read = checkpoint.read(tiny.tiny("llama-gqa", folder=tmp_path))
    _, folds = folds_of(read)
    fold = next(f for f in folds if f.rows and f.rows[0][0] == "blk.0.attn_v.weight")
    assert fold.n_channels == read.config.v_dim == 32
    assert fold.channels[:48].tolist() == [*range(16), *range(16), *range(16, 32)]
