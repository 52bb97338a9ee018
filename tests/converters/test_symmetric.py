"""Lower triangles: against NumPy on whole matrices, with all that lies above the diagonal spoiled."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from converters.symmetric import Few, Two, damp, factorize, mirror, root, solve, squared

SIZES = [1, 7, 255, 256, 257, 600]


def squares(n: int, dtype: type = np.float64) -> np.ndarray:
    x = np.random.default_rng(n).normal(0, 1, (2 * n, n))
    return (x.T @ x / n).astype(dtype)


def spoiled(h: np.ndarray) -> np.ndarray:
    return np.where(np.tri(len(h), dtype=bool), h, np.nan)


@pytest.mark.parametrize("n", SIZES)
def test_a_root_in_place(n: int) -> None:
    h = squares(n)
    lower = spoiled(h)
    factorize(lower)
    np.testing.assert_allclose(np.tril(lower), np.linalg.cholesky(h), atol=1e-12)
    h[-1, -1] = -1
    with pytest.raises(np.linalg.LinAlgError):
        factorize(h)


@pytest.mark.parametrize("n_rows", [1, 3, 20])
def test_few_rows_need_no_large_matrix(n_rows: int) -> None:
    x = np.random.default_rng(n_rows).normal(0, 1, (n_rows, 200)).astype(np.float32)
    rows = np.random.default_rng(1).normal(0, 1, (5, n_rows)).astype(np.float32) @ x
    h = x.astype(np.float64).T @ x
    damp(h, 0.03)
    np.testing.assert_allclose(Few(x).solve(rows, 0.03), np.linalg.solve(h, rows.T).T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", SIZES)
def test_solutions(n: int) -> None:
    h, rows = squares(n), np.random.default_rng(1).normal(0, 1, (3, n))
    lower = spoiled(h)
    factorize(lower)
    np.testing.assert_allclose(solve(lower, rows) @ h, rows, atol=1e-9)


@pytest.mark.parametrize("n", SIZES)
def test_whole_again_and_quadratic_forms(n: int) -> None:
    h, rows = squares(n), np.random.default_rng(1).normal(0, 1, (3, n))
    assert squared(spoiled(h), rows) == pytest.approx(np.trace(rows @ h @ rows.T), rel=1e-12)
    lower = spoiled(h)
    mirror(lower)
    np.testing.assert_array_equal(lower, h)


@pytest.mark.parametrize("n", SIZES)
def test_two_share_a_room(n: int) -> None:
    rng, two, sums = np.random.default_rng(0), Two(n), [np.zeros((n, n)), np.zeros((n, n))]
    for which in (0, 1, 1, 0):
        x = rng.normal(0, 1, (9, n)).astype(np.float32)
        two.add(which, x)
        sums[which] += x.T.astype(float) @ x
    for which in (0, 1):
        np.testing.assert_allclose(np.tril(two.lower(which)), np.tril(sums[which]), atol=1e-4)
    np.testing.assert_allclose(np.tril(two.sum()), np.tril(sums[0] + sums[1]), atol=1e-4)


def test_inputs_of_very_different_sizes() -> None:
    """float32 has no root of this, so float64 is taken: the error is that of the hessian's own rounding."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (400, 300)) @ (1e-3 * np.eye(300)) + 1e3 * rng.normal(0, 1, (400, 1))
    h = x.T @ x
    found = root(h.copy, 1e-9)
    damp(h, 1e-9)
    found = np.tril(found).astype(np.float64)
    np.testing.assert_allclose(found @ found.T, h, rtol=1e-5)
    with pytest.raises(np.linalg.LinAlgError):
        root(lambda: -np.eye(3) + 2 * np.ones((3, 3)), 0.0)


def test_room_is_one_matrix() -> None:
    n = 1500
    tracemalloc.start()
    two, x = Two(n), np.ones((8, n), np.float32)
    for which in (0, 1):
        two.add(which, x)
    found = root(two.lower(1).copy, 0.1)
    solve(found, x)
    peak = tracemalloc.get_traced_memory()[1] / found.nbytes
    tracemalloc.stop()
    assert peak < 2.6, peak
