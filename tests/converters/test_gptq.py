"""GPTQ: errors of outputs against rounding and against the best that trying finds; codes; a whole tiny model."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny

from converters import block_codes
from converters.block_codes import FORMATS_WITH_CODES
from converters.calibrated import quantize_model
from converters.chunks import Opened, chunked
from converters.gptq import gptq
from converters.quantizers import SEARCHED, quantize
from converters.targets import Moments, fitted
from edgelm.errors import UnsupportedError, UsageError
from edgelm.formats import by_name


def layer(n_cols: int = 512, n_rows: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the hessian of inputs that hang together."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(0, 1, (n_cols, n_cols // 4)) @ rng.normal(0, 0.1, (n_cols // 4, n_cols)) + np.eye(n_cols)
    x = rng.normal(0, 1, (2000, n_cols)) @ mixed
    return rng.normal(0, 0.02, (n_rows, n_cols)).astype(np.float32), (x.T @ x / 2000).astype(np.float32)


def loss(name: str, w: np.ndarray, data: np.ndarray, hessian: np.ndarray) -> float:
    error = (block_codes.decode(by_name(name), data) - w).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", error, hessian.astype(np.float64), error, optimize=True))


@pytest.mark.parametrize("name", FORMATS_WITH_CODES)
def test_outputs_are_nearer_than_by_rounding(name: str) -> None:
    w, hessian = layer()
    compensated = loss(name, w, gptq(name, w, hessian), hessian)
    weighted = loss(name, w, quantize(name, w, np.diagonal(hessian)), hessian)
    assert compensated < 0.4 * weighted


@pytest.mark.parametrize("name", FORMATS_WITH_CODES)
def test_each_sweep_makes_the_error_smaller(name: str) -> None:
    w, hessian = layer()
    losses = [loss(name, w, gptq(name, w, hessian, damping=1e-4, sweeps=n), hessian) for n in range(3)]
    assert losses[0] > losses[1] > losses[2]


def test_inputs_that_do_not_hang_together_leave_nothing_to_make_up_for() -> None:
    w, _ = layer()
    importance = np.random.default_rng(1).lognormal(0, 1, 512).astype(np.float32)
    hessian = np.diag(importance)
    data = gptq("Q4_0", w, hessian, damping=1e-9, act_order=False, sweeps=0)
    plain = loss("Q4_0", w, quantize("Q4_0", w, importance), hessian)
    assert loss("Q4_0", w, data, hessian) == pytest.approx(plain, rel=1e-3)


def test_inputs_that_never_come(name: str = "Q4_K") -> None:
    w, hessian = layer()
    hessian[:, 7] = hessian[7] = 0
    assert np.isfinite(block_codes.decode(by_name(name), gptq(name, w, hessian))).all()
    assert np.isfinite(block_codes.decode(by_name(name), gptq(name, w, np.zeros_like(hessian)))).all()
    few = np.ones((1, 512), np.float32)
    assert np.isfinite(block_codes.decode(by_name(name), gptq(name, w, few.T @ few))).all()


@pytest.mark.parametrize("bad", [np.zeros((3, 3)), np.full((512, 512), np.nan)])
def test_hessians_that_cannot_be(bad: np.ndarray) -> None:
    with pytest.raises(UsageError, match="hessian"):
        gptq("Q4_0", layer()[0], bad)


def test_room_is_that_of_a_few_hessians() -> None:
    """Of a wide layer these are nearly all that a calibration holds: 256 MB each for 8192 inputs."""
    n = 1024
    hessian, w = np.eye(n, dtype=np.float32), np.ones((8, n), np.float32)
    moments = Moments()
    for half in (0, 1):
        moments.add_gap(half, hessian, w.T)
    peaks = []
    for work in (lambda: gptq("Q4_0", w, hessian), lambda: fitted(w, moments)):
        tracemalloc.start()
        work()
        peaks.append(tracemalloc.get_traced_memory()[1] / hessian.nbytes)
        tracemalloc.stop()
    assert max(peaks) < 1.7, peaks


@pytest.mark.parametrize("name", FORMATS_WITH_CODES)
def test_codes_mean_what_they_say(name: str) -> None:
    format, rng = by_name(name), np.random.default_rng(2)
    data = quantize(name, rng.normal(0, 0.1, (6, 512)).astype(np.float32), search=True)
    start, step = block_codes.lines(format, data)
    levels = block_codes.levels(format)
    codes = rng.integers(0, len(levels), (6, 512), dtype=np.uint8)
    decoded = block_codes.decode(format, block_codes.with_codes(format, data, codes))
    np.testing.assert_allclose(decoded, start + step * levels[codes], atol=1e-5)
    values = rng.normal(0, len(levels), 100).astype(np.float32)
    distances = np.abs(values[:, None] - levels)
    np.testing.assert_array_equal(block_codes.nearest(levels, values), distances.argmin(axis=1))


def test_formats_without_codes_of_one_weight() -> None:
    with pytest.raises(UnsupportedError, match="MXFP4"):
        gptq("MXFP4", *layer())


def test_every_format_that_is_searched_for_can_be_rounded_so() -> None:
    assert set(SEARCHED) == set(FORMATS_WITH_CODES)


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-fused", "gemma3", "gpt2"])
def test_a_model_is_quantized_in_one_run(variant: str, tmp_path: Path) -> None:
    model = Opened.read(tiny(variant, folder=tmp_path))
    tokens = chunked(model, np.random.default_rng(0).integers(3, 60, 128).tolist(), 32, None)
    layers = {n: t for n, t in model.weights.by_name.items() if n.startswith("blk.") and len(t.shape) == 2}
    types = {n: "Q4_0" if i % 2 else "IQ4_NL" for i, n in enumerate(layers)}
    given: dict[str, np.ndarray] = {}
    quantize_model(model, tokens, types, lambda name, data, importance: given.__setitem__(name, data))
    assert set(given) == set(types)
    for name, data in given.items():
        w = layers[name].dequantize()
        assert np.abs(block_codes.decode(by_name(types[name]), data) - w).max() < 0.5 * np.abs(w).max()
