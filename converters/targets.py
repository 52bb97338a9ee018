"""What the weights of a layer should be before they are rounded, when the layers before it are rounded already.

With x the inputs of a layer in the quantized model, x* those in the original, H = xᵀ x summed over a text: the weights
that give most nearly what W gives for x* are W + W ((x* - x)ᵀ x) H⁻¹ (asymmetric calibration: GPTAQ, Li et al.,
2504.02692). Where a layer's outputs are added to a stream, which is s instead of s*, they can also make up for what
the stream has lost: + ((s* - s)ᵀ x) H⁻¹. Both together are the gap of its outputs, times x.

A text of a few thousand tokens fits these weights too well: what they mend there is worth less on another text. So each
half of the text tells how much of what the other half asks for is true: a ridge, added to H, and a factor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .symmetric import Few, Two, mirror, root, solve, squared

Floats = NDArray[np.float32]
RIDGES = (0.03, 0.3, 3.0)  # of the mean of the diagonal of H
_SAMPLE = 128  # outputs of a layer by which ridge and factor are chosen
_FEW = 8  # rows are few when there are so many times as many inputs


@dataclass
class Sums:
    """Over n rows x of a part of a text: (x* - x)ᵀ x, (in, in), or gapᵀ x, (out, in); rows: x, if they are few."""

    n: int = 0
    rows: list[NDArray[Any]] = field(default_factory=list)
    lost: Any = 0.0
    gap: Any = 0.0


@dataclass
class Moments:
    """Of the inputs of a layer, for each half of a text; squares: xᵀ x of both."""

    halves: tuple[Sums, Sums] = field(default_factory=lambda: (Sums(), Sums()))
    squares: Two = field(default_factory=lambda: Two(0))
    _roots: dict[tuple[int, float], Floats] = field(default_factory=dict)
    _few: dict[int, Few] = field(default_factory=dict)

    def add(self, half: int, x: NDArray[Any], original: NDArray[Any]) -> None:
        """x, x*: (n, in). For inputs that several layers share."""
        sums = self._seen(half, x)
        sums.lost = sums.lost + (original - x).T @ x

    def add_gap(self, half: int, x: NDArray[Any], gap: NDArray[Any]) -> None:
        """x: (n, in); gap: (n, out), what the outputs of the layer lack. For inputs that one layer has for itself."""
        sums = self._seen(half, x)
        sums.gap = sums.gap + gap.T @ x

    def _seen(self, half: int, x: NDArray[Any]) -> Sums:
        if not any(sums.n for sums in self.halves):
            self.squares = Two(x.shape[1])
        self.squares.add(half, x)
        sums = self.halves[half]
        sums.n += len(x)
        sums.rows = [*sums.rows, x] if _FEW * sums.n <= x.shape[1] else []
        return sums

    def importance(self) -> Floats:
        """Mean squares of the inputs over the whole text: (in,)."""
        both = np.diagonal(self.squares.lower(0)) + np.diagonal(self.squares.lower(1))
        mean: Floats = both / np.float32(sum(sums.n for sums in self.halves))
        return mean

    def hessian(self) -> Floats:
        """Mean of xᵀ x over the whole text."""
        mean = self.squares.sum()
        mean /= np.float32(sum(sums.n for sums in self.halves))
        mirror(mean)
        return mean

    def solved(self, which: int, missing: Floats, ridge: float) -> Floats:
        """missing @ (xᵀ x + ridge * mean of its diagonal)⁻¹, of a half (0, 1) or of the whole text (2)."""
        if (few := self._rows(which)) is not None:
            return few.solve(missing, ridge)
        found = self._roots.get((which, ridge))
        if found is None:
            found = root(self.squares.sum if which == 2 else self.squares.lower(which).copy, ridge)
            if np.ndim(self.halves[0].lost):  # other layers have these inputs, too
                self._roots[which, ridge] = found
        return solve(found, missing)

    def _rows(self, which: int) -> Few | None:
        """The rows of a part of the text, if they are few."""
        parts = self.halves if which == 2 else (self.halves[which],)
        n_rows, n_inputs = sum(sums.n for sums in parts), len(self.squares.lower(0))
        if which not in self._few and _FEW * n_rows <= n_inputs:
            self._few[which] = Few(np.concatenate([x for sums in parts for x in sums.rows]))
        return self._few.get(which)


def fitted(w: Floats, moments: Moments) -> Floats:
    """Weights (out, in) that give most nearly what w gives in the original model."""
    one, two = moments.halves
    if not (one.n and two.n):  # a single chunk of text: nothing tells what is true
        return w
    some = np.linspace(0, len(w) - 1, min(len(w), _SAMPLE)).astype(int)
    missing = _missing(w, one, some), _missing(w, two, some)
    best, ridge, factor = 0.0, 0.0, 0.0
    for candidate in RIDGES:
        linear = square = 0.0
        for half in (0, 1):
            asked = moments.solved(half, missing[half], candidate)
            linear += _dot(asked, missing[1 - half])
            square += squared(moments.squares.lower(1 - half), asked)
        share = min(1.0, linear / square) if linear > 0 and square > 0 else 0.0
        if linear * share > best:
            best, ridge, factor = linear * share, candidate, share
    if not factor:
        return w
    whole = _missing(w, one, slice(None)) + _missing(w, two, slice(None))
    return w + np.float32(factor) * moments.solved(2, whole, ridge)


def _missing(w: Floats, sums: Sums, rows: Any) -> Floats:
    """What some outputs lack, times x, summed: (rows, in)."""
    missing: Floats = w[rows] @ sums.lost if np.ndim(sums.lost) else sums.gap[rows]
    return missing


def _dot(a: Floats, b: Floats) -> float:
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))
