"""Least squares for pruning: which inputs a matrix can do without, and what the others must become then.

A layer y = W x is wanted to give targets t(x) on the inputs x of a text. With H = Σ x xᵀ and G = Σ (t - W x) xᵀ the
best weights are W + G H⁻¹. The loss is a parabola with curvature H around them, so taking the columns of a set S away
costs at least tr(V_S (H⁻¹_SS)⁻¹ V_Sᵀ), V the best weights, if those that stay make up for it by -V_S (H⁻¹_SS)⁻¹ H⁻¹_S·.
That is the surgeon of Hassibi and Stork (1993) for whole columns, as in ZipLM (2302.04089) and SlimGPT (2412.18110).

What a few thousand tokens say of a thousand inputs is partly noise. So the fit is a ridge regression of what is missing
(it pulls towards W, not towards zero), as strong as does best on tokens that the fit has not seen.

Knows no model: matrices, and groups of columns that go or stay together.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgelm.errors import FormatError

from .symmetric import damp, factorize, solve

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Indices = NDArray[np.intp]

CHOICE_RIDGE = 0.01  # of the mean of H's diagonal, added to it, when columns are chosen
RIDGES = (10.0, 1.0, 0.1, 0.01, 0.001)  # of the same, among which the fit chooses
_SAMPLE = 128  # outputs of a layer by which it chooses
_ROUNDS = 16  # in which columns are taken away; the costs of those left are known exactly at the start of each


@dataclass(frozen=True)
class Sums:
    """What a text says about a layer, all that a fit needs: H (in, in), and G (out, in) of what is missing."""

    h: Floats
    g: Floats

    @classmethod
    def of(cls, x: Floats, missing: Floats) -> Sums:
        """x (T, in): inputs; missing (T, out): targets less what the layer gives. Rows may be weighed, both alike.

        Raises FormatError when they are no numbers.
        """
        with np.errstate(all="ignore"):
            sums = cls(x.T @ x, missing.T @ x)
        if not (np.isfinite(sums.h).all() and np.isfinite(sums.g).all()):
            raise FormatError("an activation is not a number: the model is broken, or needs more than float32")
        return sums

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.h + other.h, self.g + other.g)

    def without(self, w: Floats, kept: Indices) -> Sums:
        """The sums of the layer that has only some of the columns of w (out, in)."""
        gone = np.setdiff1d(np.arange(len(self.h)), kept)
        return Sums(self.h[np.ix_(kept, kept)], self.g[:, kept] + w[:, gone] @ self.h[np.ix_(gone, kept)])

    def gain(self, change: NDArray[np.floating]) -> float:
        """By how much the squared error falls when `change` is added to the weights."""
        return float(np.sum(change * (2 * self.g - change @ self.h), dtype=np.float64))


def choose(w: Floats, sums: Sums, groups: Indices, n_gone: int) -> Indices:
    """Columns that stay, ascending, when a layer w (out, in) loses `n_gone` groups of each family of groups.

    groups: (families, groups of each, columns of a group), every column once. The group that costs least goes first,
    with all others as good as they can be without it.
    """
    inverse = np.asarray(np.linalg.inv(_with_ridge(sums.h, CHOICE_RIDGE)), np.float64)
    best = w + sums.g.astype(np.float64) @ inverse
    stay = groups
    while n_gone:
        batch = min(n_gone, max(1, (stay.shape[1] - 1) // _ROUNDS))
        costs = _costs(best, inverse, stay.reshape(-1, stay.shape[2])).reshape(stay.shape[:2])
        order = np.argsort(costs, axis=1, kind="stable")[:, :, None]
        gone = np.take_along_axis(stay, order[:, :batch], axis=1).reshape(-1)
        # (H⁻¹_SS)⁻¹ H⁻¹_S·: what each column that stays takes over of those that go
        takes_over = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[gone])
        best -= best[:, gone] @ takes_over
        inverse -= inverse[:, gone] @ takes_over
        stay = np.take_along_axis(stay, order[:, batch:], axis=1)
        n_gone -= batch
    return np.sort(stay.reshape(-1))


def fit(seen: Sums, unseen: Sums) -> Floats:
    """What to add to the weights of a layer: float32 (out, in), zeros if nothing helps.

    The ridge is the one of RIDGES that does best on `unseen` when fitted to `seen`; the fit is to both.
    """
    n_out = len(seen.g)
    some = np.linspace(0, n_out - 1, min(n_out, _SAMPLE)).astype(int)
    judge, best, chosen = Sums(unseen.h, unseen.g[some]), 0.0, np.inf
    for ridge in RIDGES:
        gain = judge.gain(_change(seen, ridge, np.float32, some))
        if gain <= best and chosen < np.inf:
            break  # weaker ones only follow the noise further
        if gain > best:
            best, chosen = gain, ridge
    return np.zeros_like(seen.g) if chosen == np.inf else _change(seen + unseen, chosen, np.float64)


def _change(sums: Sums, ridge: float, dtype: DTypeLike, rows: Any = slice(None)) -> Floats:
    """G (H + ridge)⁻¹, of some outputs."""
    for kind in (dtype, np.float64):
        h = sums.h.astype(kind)
        damp(h, ridge)
        with contextlib.suppress(np.linalg.LinAlgError):
            factorize(h)
            return np.asarray(solve(h, sums.g[rows]), np.float32)
    return np.zeros_like(sums.g[rows])  # inputs that are not worth a fit


def _with_ridge(h: Floats, ridge: float) -> Doubles:
    h64: Doubles = h.astype(np.float64)
    mean = float(np.diagonal(h64).mean())
    h64[np.diag_indices_from(h64)] += ridge * mean if mean > 0 else 1.0
    return h64


def _costs(best: Doubles, inverse: Doubles, groups: Indices) -> Doubles:
    """What the loss grows by when a group goes, for each: tr(V_S (H⁻¹_SS)⁻¹ V_Sᵀ)."""
    if groups.shape[1] == 1:
        columns = groups[:, 0]
        costs: Doubles = np.einsum("ij,ij->j", best[:, columns], best[:, columns]) / np.diagonal(inverse)[columns]
        return costs
    return np.array([np.sum(np.linalg.solve(inverse[np.ix_(g, g)], best[:, g].T) * best[:, g].T) for g in groups])
