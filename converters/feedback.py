"""`Feedback`: columns of a matrix are changed block after block, and those still to come make up for their errors.

The error that matters is that of a layer's outputs on a text, trace of E H Eᵀ, where E is what its weights lack and
H = Xᵀ X of its inputs. With the columns in reverse and H = L Lᵀ, that is the size of E L, and a column of E L depends
on the errors of this column and of those changed before it: so each is best moved until what earlier errors have left
in its place is gone. This is the update of GPTQ (Frantar et al., 2210.17323) and SparseGPT without an inverse of H, as
Babai's nearest plane (Chen et al., 2507.18553), which a root in float32 is good enough for.
"""

from __future__ import annotations

import contextlib

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import UsageError

from .symmetric import inverse, root

Floats = NDArray[np.float32]
DAMPING = 0.01  # of the mean of the diagonal, added to it: GPTQ's


class Feedback:
    """w: float32 (out, in); hessian: (in, in), of any scale; order: of columns, in which they are changed.

    Raises UsageError when the hessian is no sum of squares.
    """

    def __init__(
        self, w: Floats, hessian: NDArray[np.floating], order: NDArray[np.intp], damping: float = DAMPING
    ) -> None:
        backwards = order[::-1]
        self._root = _root(hessian, backwards, damping)
        self._w = np.ascontiguousarray(w[:, backwards], np.float32)  # of columns that are settled: what they lack

    def block(self, start: int, end: int) -> tuple[Floats, Floats]:
        """Columns order[start:end] as they are best by now, (out, end - start), and the triangle U between them.

        U: upper triangular, a block on the diagonal of the one with H⁻¹ = Uᵀ U. When column j is changed by -e, those
        behind it are best moved by -e / U_jj times the rest of its row, and the error grows by (e / U_jj)².
        """
        here, done = self._places(start, end)
        triangle = inverse(self._root[here, here])
        left = self._w[:, done] @ self._root[done, here]
        best = self._w[:, here] + left @ triangle
        return np.ascontiguousarray(best[:, ::-1]), np.ascontiguousarray(triangle[::-1, ::-1])

    def settle(self, start: int, end: int, values: Floats) -> None:
        """Columns order[start:end] become `values`."""
        self._w[:, self._places(start, end)[0]] -= values[:, ::-1]

    def _places(self, start: int, end: int) -> tuple[slice, slice]:
        """Where a block lies in the reverse order, and where all that came before it."""
        n = len(self._root)
        return slice(n - end, n - start), slice(n - start, n)


def _root(hessian: NDArray[np.floating], columns: NDArray[np.intp], damping: float) -> Floats:
    places = np.ix_(columns, columns)
    for more in (1, 10, 100, 1000):
        with contextlib.suppress(np.linalg.LinAlgError):
            return root(lambda: hessian[places], damping * more)
    raise UsageError("the hessian is no sum of squares")
