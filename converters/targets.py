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

Floats = NDArray[np.float32]
RIDGES = (0.03, 0.3, 3.0)  # of the mean of the diagonal of H


@dataclass
class Sums:
    """Over n rows x of a part of a text: xᵀ x and (x* - x)ᵀ x, (in, in); gapᵀ x, (out, in)."""

    n: int = 0
    squares: Any = 0.0
    lost: Any = 0.0
    gap: Any = 0.0


@dataclass
class Moments:
    """Of the inputs of a layer, for each half of a text."""

    halves: tuple[Sums, Sums] = field(default_factory=lambda: (Sums(), Sums()))

    def add(self, half: int, x: NDArray[Any], original: NDArray[Any]) -> None:
        """x, x*: (n, in). For inputs that several layers share."""
        sums = self.halves[half]
        sums.n += len(x)
        sums.squares = sums.squares + x.T @ x
        sums.lost = sums.lost + (original - x).T @ x

    def add_gap(self, half: int, x: NDArray[Any], gap: NDArray[Any]) -> None:
        """x: (n, in); gap: (n, out), what the outputs of the layer lack. For inputs that one layer has for itself."""
        sums = self.halves[half]
        sums.n += len(x)
        sums.squares = sums.squares + x.T @ x
        sums.gap = sums.gap + gap.T @ x

    def hessian(self) -> Floats:
        """Mean of xᵀ x over the whole text."""
        one, two = self.halves
        mean: Floats = (one.squares + two.squares) / np.float32(one.n + two.n)
        return mean


def fitted(w: Floats, moments: Moments) -> Floats:
    """Weights (out, in) that give most nearly what w gives in the original model."""
    problems = [(np.asarray(s.squares), _missing(w, s)) for s in moments.halves if s.n]
    if len(problems) < 2:  # a single chunk of text: nothing tells what is true
        return w
    total = problems[0][0] + problems[1][0], problems[0][1] + problems[1][1]
    best, ridge, factor = 0.0, 0.0, 0.0
    for candidate in RIDGES:
        asked = [solved(*problem, candidate) for problem in problems]
        others = problems[::-1]
        linear = sum(_dot(change, missing) for change, (_, missing) in zip(asked, others, strict=True))
        square = sum(_dot(change @ h, change) for change, (h, _) in zip(asked, others, strict=True))
        if linear > 0 and square > 0 and linear * min(1.0, linear / square) > best:
            best, ridge, factor = linear * min(1.0, linear / square), candidate, min(1.0, linear / square)
    return w + np.float32(factor) * solved(*total, ridge) if factor else w


def _missing(w: Floats, sums: Sums) -> Floats:
    """What outputs lack, times x, summed: (out, in)."""
    missing: Floats = w @ sums.lost + sums.gap if np.ndim(sums.lost) else sums.gap
    return missing


def _dot(a: Floats, b: Floats) -> float:
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))


def solved(h: Floats, missing: Floats, ridge: float) -> Floats:
    """missing @ (h + ridge * mean of its diagonal)⁻¹, in float32: the ridge sees to it that that is enough."""
    damped = h.copy()
    diagonal = np.einsum("ii->i", damped)  # a view
    diagonal += np.float32(ridge) * (diagonal.mean() or np.float32(1))
    found: Floats = np.linalg.solve(damped, missing.T).T
    return found
