"""Single weights become zero: a share of each row, or all but N of every M that lie together. For people who retrain.

    pattern = Pattern.parse("2:4:wanda")
    w = thinned(w, hessian, pattern)

Which ones: the smallest (magnitude); those with the smallest |w| times the size of their input (Wanda, Sun et al.,
2306.11695); or those that cost least when the others in their row make up for them, which they then do (SparseGPT,
Frantar and Alistarh, 2301.00774). The last shares its algebra with GPTQ (`feedback`): to become zero is a kind of
rounding. No runtime of ours is faster for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.arch import Role
from edgelm.cache import Batch
from edgelm.disk import Progress
from edgelm.errors import UsageError
from edgelm.reference import Reference
from edgelm.weights import Layer

from .chunks import Source
from .feedback import Feedback
from .fits import Fit, Fits
from .streams import Streams, layer_of, run

Floats = NDArray[np.float32]
METHODS = ("sparsegpt", "wanda", "magnitude")
_BLOCK = 128  # columns among which SparseGPT chooses


@dataclass(frozen=True)
class Pattern:
    """share: of every `of` weights of a row that lie together become zero (of = 0: of a whole row)."""

    share: float
    of: int = 0
    method: str = METHODS[0]

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """SHARE% or N:M (N of M stay), and :METHOD. UsageError for what makes no sense."""
        match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)%|(\d{1,3}):(\d{1,3}))(?::(\w+))?", text)
        if not match or (match[4] and match[4] not in METHODS):
            raise UsageError(f"--prune sparse={text:.30}: a share such as 50%, or 2:4, and :{' or :'.join(METHODS)}")
        method = match[4] or METHODS[0]
        if match[1]:
            pattern = cls(float(match[1]) / 100, 0, method)
        else:
            stay, of = int(match[2]), int(match[3])
            pattern = cls(1 - stay / of if of else 1.0, of, method)
        if not 0 < pattern.share < 1:
            raise UsageError(f"--prune sparse={text:.30}: some weights must go, and some stay")
        return pattern

    def gone(self, costs: Floats) -> NDArray[np.bool_]:
        """The weights that go: bool of the shape (rows, columns) of their costs, the cheapest of each group."""
        n_rows, n_cols = costs.shape
        groups = costs.reshape(n_rows, -1, self.of or n_cols)
        n = round(self.share * groups.shape[2])
        order = np.argsort(groups, axis=2, kind="stable")
        gone = np.zeros(groups.shape, bool)
        np.put_along_axis(gone, order[:, :, :n], True, axis=2)
        return gone.reshape(n_rows, n_cols)


def thinned(w: Floats, hessian: NDArray[np.floating] | None, pattern: Pattern) -> Floats:
    """A matrix (out, in) with zeros in it. hessian: (in, in), the sum of x xᵀ over its inputs; not for "magnitude".

    Raises UsageError when rows are no whole number of groups, or the hessian is no sum of squares.
    """
    if pattern.of and w.shape[1] % pattern.of:
        raise UsageError(f"rows of {w.shape[1]} weights are no whole number of groups of {pattern.of}")
    if pattern.method == "magnitude":
        return np.where(pattern.gone(np.abs(w)), np.float32(0), w)
    if hessian is None:
        raise UsageError(f"--prune sparse …:{pattern.method} needs a text to run the model on: --calibrate FILE")
    if pattern.method == "wanda":
        size = np.sqrt(np.maximum(np.diagonal(hessian), 0)).astype(np.float32)
        return np.where(pattern.gone(np.abs(w) * size), np.float32(0), w)
    return _sparsegpt(w, hessian, pattern)


def _sparsegpt(w: Floats, hessian: NDArray[np.floating], pattern: Pattern) -> Floats:
    n_cols = w.shape[1]
    feedback, out = Feedback(w, hessian, np.arange(n_cols)), np.empty(w.shape, np.float32)
    for start in range(0, n_cols, _BLOCK):
        end = min(start + _BLOCK, n_cols)
        part, upper = feedback.block(start, end)
        gone, pivots = np.zeros(part.shape, bool), np.diagonal(upper)
        for j in range(end - start):
            if j == 0 or (pattern.of and (start + j) % pattern.of == 0):
                stop = min(j + pattern.of, end - start) if pattern.of and _BLOCK % pattern.of == 0 else end - start
                gone[:, j:stop] = pattern.gone((part[:, j:stop] / pivots[j:stop]) ** 2)
            errors = np.where(gone[:, j], part[:, j] / pivots[j], 0)
            part[:, j + 1 :] -= errors[:, None] * upper[j, j + 1 :]
            part[gone[:, j], j] = 0
        feedback.settle(start, end, part)
        out[:, start:end] = part
    return out


class _Thinning(Streams):
    """Operations that thin the matrices of each layer when their inputs come by, and go on with what is left."""

    def __init__(
        self, runner: Reference, batch: Batch, pattern: Pattern, found: dict[str, Fit], fits: Fits,
        progress: Progress,
    ) -> None:  # fmt: skip
        super().__init__(runner, batch)
        self._pattern, self._found, self._fits, self._progress = pattern, found, fits, progress
        self._inputs: Any = None
        self._hessian: Floats = np.empty((0, 0), np.float32)

    def entering(self, layer: int, x: Floats) -> None:
        self._progress("prune", layer, self._c.n_layers)

    def linear(self, x: Floats, layer: Layer) -> Floats:
        name = layer.weight.name
        self._at(name, x)
        if layer_of(name) is None or self._specs[name].role is not Role.MATMUL:
            return super().linear(x, layer)
        if name not in self._fits:
            self._fits.keep(name, self._thin(x, self._dense(layer.weight)))
        self._found[name] = self._fits[name]
        y: Floats = x @ self._found[name].w.T
        return y if layer.bias is None else y + self._dense(layer.bias)

    def _thin(self, x: Floats, w: Floats) -> Fit:
        if self._inputs is not x:  # several matrices read the same
            self._inputs, self._hessian = x, x.T @ x
        thin = thinned(w, self._hessian, self._pattern)
        wanted = x @ w.T
        error = float(np.sum((x @ thin.T - wanted) ** 2, dtype=np.float64) / (np.sum(wanted**2) or 1.0))
        return Fit(thin, np.arange(w.shape[1]), (0.0, error))


def thinned_model(
    source: Source, tokens: NDArray[np.int32], pattern: Pattern, fits: Fits, progress: Progress
) -> dict[str, Fit]:
    """All matrices of a model's layers, thinned for what a text gives them; errors are relative ones of their outputs.

    tokens: int32 (chunks, n_ctx). What is in `fits` is taken.
    """
    found: dict[str, Fit] = {}
    run(source, tokens, lambda runner, batch: _Thinning(runner, batch, pattern, found, fits, progress))
    return found
