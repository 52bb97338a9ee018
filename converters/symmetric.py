"""Symmetric matrices of which the lower triangle alone is kept: sums of squares, their roots, what solves with them.

Of a layer with 8192 inputs each such matrix takes 256 MB. So all of this happens in place, a strip of rows or columns
at a time, and two of them share the room of one. What lies above the diagonal is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_STRIP = 256  # rows or columns at a time


def _strips(n: int) -> Iterator[tuple[slice, slice]]:
    """Strips in order: what lies before each, and the strip itself."""
    return ((slice(0, start), slice(start, min(start + _STRIP, n))) for start in range(0, n, _STRIP))


class Two:
    """Two symmetric matrices (n, n), at first zero: one below a diagonal, the other above the next one."""

    def __init__(self, n: int) -> None:
        self._room = np.zeros((n, n + 1), np.float32)

    def lower(self, which: int) -> Floats:
        """A view (n, n) of matrix 0 or 1: its lower triangle. What lies above belongs to the other."""
        return self._room[:, 1:].T if which else self._room[:, :-1]

    def add(self, which: int, x: NDArray[Any]) -> None:
        """Adds xᵀ x, x (rows, n), to a matrix."""
        lower = self.lower(which)
        for before, here in _strips(len(lower)):
            lower[here, before] += x[:, here].T @ x[:, before]
            lower[here, here] += np.tril(x[:, here].T @ x[:, here])

    def sum(self) -> Floats:
        """The lower triangle of both together, a copy."""
        total = self.lower(0).copy()
        for _, here in _strips(len(total)):
            total[here, : here.stop] += self.lower(1)[here, : here.stop]
        return total


class Few:
    """A sum of squares xᵀ x of far fewer rows x, (T, n), than inputs: what solves with it is of T x T (Woodbury).

    In float64: it takes the difference of what is nearly the same.
    """

    def __init__(self, x: NDArray[Any]) -> None:
        self._x = x.astype(np.float64)
        self._products = self._x @ self._x.T

    def solve(self, rows: NDArray[Any], damping: float) -> Floats:
        """rows (m, n) times the inverse of xᵀ x, damped as `damp` does it; rows: combinations of those of x."""
        more = damping * (np.trace(self._products) / self._x.shape[1] or 1.0)
        products = self._products + more * np.eye(len(self._products))
        wide = rows.astype(np.float64)
        wide -= np.linalg.solve(products, self._x @ wide.T).T @ self._x
        wide /= more
        return wide.astype(np.float32)


def mirror(h: NDArray[Any]) -> None:
    """Makes the whole matrix of its lower triangle, in place."""
    for before, here in _strips(len(h)):
        h[before, here] = h[here, before].T
        h[here, here] = _whole(h[here, here])


def squared(h: NDArray[Any], rows: NDArray[Any]) -> float:
    """Sum of r H rᵀ over rows r, (m, n)."""
    total = 0.0
    for before, here in _strips(len(h)):
        mine = rows[:, here]
        product = 2 * (mine @ h[here, before])
        total += float(np.einsum("ij,ij->", product, rows[:, before], dtype=np.float64))
        total += float(np.einsum("ij,ij->", mine @ _whole(h[here, here]), mine, dtype=np.float64))
    return total


def _whole(block: NDArray[Any]) -> NDArray[Any]:
    whole: NDArray[Any] = np.tril(block) + np.tril(block, -1).T
    return whole


def damp(h: NDArray[Any], damping: float) -> None:
    """Adds that share of the mean of its diagonal to the diagonal of H, in place."""
    diagonal = np.einsum("ii->i", h)  # a view
    mean = diagonal.mean(dtype=np.float64) or 1.0
    diagonal[diagonal <= 0] = mean  # inputs that the text never drives
    diagonal += np.asarray(damping * mean, h.dtype)


def factorize(h: NDArray[Any]) -> None:
    """Turns H = L Lᵀ into L, in place. Raises LinAlgError where H has no root."""
    for before, here in _strips(len(h)):
        behind = slice(here.stop, None)
        h[here.start :, here] -= h[here.start :, before] @ h[here, before].T
        h[here, here] = np.linalg.cholesky(h[here, here])
        h[behind, here] = h[behind, here] @ inverse(h[here, here]).T


def root(taken: Callable[[], NDArray[Any]], damping: float) -> Floats:
    """L of the matrix of which `taken` gives a copy, damped. Raises LinAlgError where it has none."""
    for dtype in (np.float32, np.float64):  # float64 when a few inputs are far larger than all others
        h = taken().astype(dtype, copy=False)
        damp(h, damping)
        try:
            factorize(h)
        except np.linalg.LinAlgError:
            continue
        return h.astype(np.float32, copy=False)
    raise np.linalg.LinAlgError("no sum of squares")


def solve(root: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """rows (m, n) times the inverse of L Lᵀ."""
    x = rows.astype(root.dtype)
    strips = list(_strips(len(root)))
    for before, here in strips:
        x[:, here] = (x[:, here] - x[:, before] @ root[here, before].T) @ inverse(root[here, here]).T
    for _, here in reversed(strips):
        behind = slice(here.stop, None)
        x[:, here] = (x[:, here] - x[:, behind] @ root[behind, here]) @ inverse(root[here, here])
    return x


def inverse(block: NDArray[Any]) -> NDArray[Any]:
    """Of a lower triangle: what lies above its diagonal is not read."""
    found: NDArray[Any] = np.tril(np.linalg.inv(np.tril(block)))
    return found
