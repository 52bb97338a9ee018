"""Matrices with zeros: the patterns hold, and what costs more to choose costs less in the outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from test_prune import TOKENS, outputs, written

from converters import checkpoint as checkpoints
from converters.prune import PruneSpec, pruned
from converters.sparse import METHODS, Pattern, thinned
from edgelm.errors import UsageError


def layer(n_rows: int = 48, n_cols: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the inputs' sum of squares, some of which hang together and some of which are large."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, n_cols)) @ (np.eye(n_cols) + rng.normal(0, 0.05, (n_cols, n_cols)))
    x *= rng.lognormal(0, 1, n_cols)
    return rng.normal(size=(n_rows, n_cols)).astype(np.float32), (x.T @ x).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["50%", "12.5%", "2:4", "4:8", "1:2", "3:4"])
def test_as_many_zeros_as_asked_for(method: str, text: str) -> None:
    w, hessian = layer()
    pattern = Pattern.parse(f"{text}:{method}")
    found = thinned(w, hessian, pattern)
    if pattern.of:
        stay = (found != 0).reshape(len(w), -1, pattern.of).sum(axis=2)
        assert (stay == int(text.split(":")[0])).all()
    else:
        assert (found == 0).mean() == pytest.approx(pattern.share, abs=0.005)
    if method != "sparsegpt":
        np.testing.assert_array_equal(found[found != 0], w[found != 0])


@pytest.mark.parametrize("text", ["50%", "2:4", "4:8"])
def test_methods_in_their_order(text: str) -> None:
    w, hessian = layer()
    losses = []
    for method in ("sparsegpt", "wanda", "magnitude"):
        error = thinned(w, hessian, Pattern.parse(f"{text}:{method}")).astype(np.float64) - w
        losses.append(float(np.einsum("ij,jk,ik->", error, hessian.astype(np.float64), error, optimize=True)))
    assert losses[0] < 0.9 * losses[1] < losses[1] < 0.5 * losses[2]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_a_whole_model(name: str, method: str, tmp_path: Path) -> None:
    source = checkpoints.read(tiny.tiny(name, folder=tmp_path))
    text = () if method == "magnitude" else TOKENS
    smaller = pruned(source, PruneSpec.parse(f"sparse=2:4:{method}"), text, n_ctx=64)
    w = smaller.tensors["blk.1.ffn_down.weight"].read()
    assert ((w != 0).reshape(len(w), -1, 4).sum(axis=2) <= 2).all()
    assert smaller.tensors["token_embd.weight"] is source.tensors["token_embd.weight"]
    assert np.isfinite(outputs(written(smaller, tmp_path / "thin.gguf"))).all()
    assert smaller.facts["pruned"]["sparse"]["method"] == method


@pytest.mark.parametrize("text", ["", "0%", "100%", "2:2", "0:4", "4:2", "0:0", "2:4:best", "half", "50", "2:4:wanda:"])
def test_patterns_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="sparse"):
        Pattern.parse(text)
    with pytest.raises(UsageError, match="--prune"):
        PruneSpec.parse(f"sparse={text}")


def test_rows_that_groups_do_not_divide() -> None:
    w, hessian = layer()
    with pytest.raises(UsageError, match="groups of 7"):
        thinned(w, hessian, Pattern.parse("3:7"))
    with pytest.raises(UsageError, match="--calibrate"):
        thinned(w, None, Pattern.parse("2:4"))
