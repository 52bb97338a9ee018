"""Targets of layers behind quantized ones: nearer to the original's outputs, on text that was not fitted, too."""

from __future__ import annotations

import numpy as np
import pytest

from converters import targets
from converters.symmetric import root, solve
from converters.targets import Moments, fitted


def text(n: int, seed: int, noise: float, n_in: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of an original model, and those of one that loses a part of them and adds noise."""
    mixing = np.random.default_rng(0).normal(0, 1, (n_in, n_in)) / n_in**0.5
    lossy = np.eye(n_in) + 0.3 * np.random.default_rng(1).normal(0, 1, (n_in, n_in)) / n_in**0.5
    rng = np.random.default_rng(seed)
    original = rng.normal(0, 1, (n, n_in)) @ mixing
    x = original @ lossy + noise * rng.normal(0, 1, (n, n_in))
    return x.astype(np.float32), original.astype(np.float32)


def gathered(n: int, noise: float, w: np.ndarray, stream: bool = False) -> Moments:
    moments = Moments()
    for half in (0, 1):
        x, original = text(n, 2 + half, noise)
        if stream:
            moments.add_gap(half, x, 1.1 * (original - x) @ w.T)
        else:
            moments.add(half, x, original)
    return moments


W = np.random.default_rng(9).normal(0, 0.1, (20, 48)).astype(np.float32)


def loss(w: np.ndarray, seed: int, noise: float) -> float:
    x, original = text(4000, seed, noise)
    return float(np.mean((x @ w.T - original @ W.T) ** 2))


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_other_text_gains(noise: float) -> None:
    assert loss(fitted(W, gathered(2000, noise, W)), 50, noise) < 0.8 * loss(W, 50, noise)


@pytest.mark.parametrize("n", [4, 12, 30])
def test_little_text_does_little_harm(n: int) -> None:
    assert loss(fitted(W, gathered(n, 0.5, W)), 50, 0.5) < 1.02 * loss(W, 50, 0.5)


def test_what_a_stream_lost_is_added() -> None:
    with_stream = fitted(W, gathered(3000, 0.0, W, stream=True))
    x, original = text(3000, 60, 0.0)

    def lost(w: np.ndarray) -> float:
        return float(np.mean((x @ w.T + 0.1 * x @ W.T - 1.1 * original @ W.T) ** 2))

    assert lost(with_stream) < 0.5 * lost(fitted(W, gathered(3000, 0.0, W)))


def test_nothing_lost_changes_nothing() -> None:
    x, _ = text(500, 2, 0.0)
    moments = Moments()
    moments.add(0, x, x)
    moments.add(1, x, x)
    np.testing.assert_array_equal(fitted(W, moments), W)


def test_one_chunk_says_nothing() -> None:
    moments = Moments()
    moments.add(0, *text(500, 2, 0.1))
    np.testing.assert_array_equal(fitted(W, moments), W)
    x, _ = text(500, 2, 0.1)
    np.testing.assert_allclose(moments.hessian(), x.T @ x / 500, rtol=1e-4)


def test_both_ways_to_say_what_is_lost() -> None:
    shared, alone = gathered(300, 0.1, W), Moments()
    for half in (0, 1):
        x, original = text(300, 2 + half, 0.1)
        alone.add_gap(half, x, (original - x) @ W.T)
    np.testing.assert_allclose(fitted(W, alone), fitted(W, shared), atol=1e-5)
    np.testing.assert_array_equal(alone.hessian(), shared.hessian())


def test_least_squares() -> None:
    x, original = text(400, 2, 0.3)
    found = W + solve(root(lambda: x.T @ x, 0.0), W @ ((original - x).T @ x))
    best = np.linalg.lstsq(x.astype(float), original @ W.T.astype(float), rcond=None)[0].T
    np.testing.assert_allclose(found, best, atol=1e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_few_rows_say_the_same_as_a_hessian(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(3).normal(0, 0.1, (20, 640)).astype(np.float32)

    def found() -> tuple[Moments, np.ndarray]:
        moments = Moments()
        for half, n in enumerate((40, 30)):
            for part in range(2):  # rows come in parts
                x, original = text(n // 2, 2 * part + half, 0.1, 640)
                x[:, 5] = original[:, 5] = 0  # an input that is never driven
                if stream:
                    moments.add_gap(half, x, (original - x) @ w.T)
                else:
                    moments.add(half, x, original)
        return moments, fitted(w, moments)

    few, quick = found()
    assert set(few._few) == {0, 1, 2} and not few._roots
    monkeypatch.setattr(targets, "_FEW", 1 << 20)
    many, slow = found()
    assert not many._few and not any(sums.rows for sums in many.halves)
    assert np.abs(slow - w).max() > 1e-3
    np.testing.assert_allclose(quick, slow, atol=2e-5)
