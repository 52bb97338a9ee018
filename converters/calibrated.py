"""A whole model quantized in one run of it: each layer is quantized when its inputs first come by.

The calibration text goes through the reference interpreter twice at once: through the layers that are already
quantized, and through the original ones. When it comes to a linear layer, all inputs that the text gives this layer are
there. So one run is enough, and what it holds is the activations of one layer and their moments.

With x the inputs in the quantized model, x* those in the original, and H = mean of xᵀ x: a layer should not give what
its own weights make of x, but what the original makes of x* (asymmetric calibration: GPTAQ, Li et al., 2504.02692).
The weights that come nearest to that are W + W (mean of (x* - x)ᵀ x) H⁻¹. Where a layer's outputs are added to the
residual stream they should also make up for what the stream lost before: + (mean of (s* - s)ᵀ x) H⁻¹. These weights are
what is then rounded: by `gptq`, or by a search where a format has no even codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.cache import Batch
from edgelm.disk import Progress, nothing
from edgelm.formats import by_name
from edgelm.reference import Reference
from edgelm.weights import Layer

from . import block_codes, structure
from .chunks import Chunks, Turns, forward, parts
from .gptq import DAMPING, can, gptq
from .imatrix import Source
from .quantizers import quantize

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

RIDGE = 1.0  # of the mean of the diagonal of H, added to it where targets are fitted: few tokens fit too well


@dataclass(frozen=True)
class Choices:
    """damping: of `gptq`; ridge: of the targets, None to keep the weights as targets; sweeps: of `gptq`."""

    damping: float = DAMPING
    ridge: float | None = RIDGE
    sweeps: int = 0


@dataclass
class Moments:
    """Of inputs x of a layer, and x* of the original: sums over n rows of xᵀ x and (x* - x)ᵀ x; of the stream alike."""

    n: int = 0
    hessian: Any = 0.0
    lost: Any = 0.0

    def add(self, x: NDArray[Any]) -> None:
        mine, original = np.split(x, 2)
        self.n += len(mine)
        self.hessian = self.hessian + mine.T @ mine
        self.lost = self.lost + (original - mine).T @ mine


@dataclass
class _Job:
    """What is to be quantized, and what the parts of the text have brought together for the layer that they are at."""

    types: Mapping[str, str]
    adding: frozenset[str]
    give: Callable[[str, Bytes, Floats], None]
    known: Callable[[str], Bytes | None]
    progress: Progress
    choices: Choices
    turns: Turns
    moments: Moments = field(default_factory=Moments)
    stream_lost: Any = 0.0  # sum of (s* - s)ᵀ x
    done: int = 0

    def finish(self, name: str, w: Floats) -> Bytes:
        """The layer's weights, quantized, from what all parts have brought."""
        data = self.known(name)
        if data is None:
            n = np.float32(self.moments.n)
            hessian, target = self.moments.hessian / n, w
            if self.choices.ridge is not None:
                missing = w @ (self.moments.lost / n) + self.stream_lost / n
                target = w + solved(hessian, missing, self.choices.ridge)
            data = _rounded(self.types[name], target, hessian, self.choices)
            self.give(name, data, np.diagonal(hessian))
        self.stream_lost = 0.0
        self.done += 1
        self.progress("calibrate", self.done, len(self.types))
        return data


class Paired(Chunks):
    """Operations on rows of which the first half goes through quantized layers, the second through the originals."""

    def __init__(self, runner: Reference, batch: Batch, n_ctx: int, job: _Job, number: int) -> None:
        super().__init__(runner, batch, n_ctx)
        self._job, self._number = job, number
        self._stream: NDArray[Any] | None = None
        self._seen: NDArray[Any] | None = None  # inputs that are in the moments already: several layers may share them

    def rms_norm(self, x: NDArray[Any], weight: Any, eps: float, heads: int = 0) -> NDArray[Any]:
        if not heads:
            self._stream = x
        return super().rms_norm(x, weight, eps, heads)

    def layer_norm(self, x: NDArray[Any], weight: Any, bias: Any, eps: float) -> NDArray[Any]:
        self._stream = x
        return super().layer_norm(x, weight, bias, eps)

    def linear(self, x: NDArray[Any], layer: Layer) -> NDArray[Any]:
        name, job = layer.weight.name, self._job
        if name not in job.types:
            return super().linear(x, layer)
        if job.known(name) is None:
            self._bring(name, x)
        w = self._dense(layer.weight)
        data = job.turns.meet(self._number, lambda: job.finish(name, w))
        half = len(x) // 2
        y = np.empty((len(x), len(w)), x.dtype)
        np.matmul(x[:half], block_codes.decode(by_name(job.types[name]), data).T, out=y[:half])
        np.matmul(x[half:], w.T, out=y[half:])
        if layer.bias is not None:
            y += self._dense(layer.bias)
        return y

    def _bring(self, name: str, x: NDArray[Any]) -> None:
        job = self._job
        if self._seen is not x:
            if self._number == 0:
                job.moments = Moments()
            job.moments.add(x)
            self._seen = x
        if name in job.adding and self._stream is not None:
            mine, original = np.split(self._stream, 2)
            job.stream_lost = job.stream_lost + (original - mine).T @ x[: len(mine)]


def solved(hessian: Floats, missing: Floats, ridge: float) -> Floats:
    """missing @ (hessian + ridge * mean of its diagonal)⁻¹."""
    h = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", h)  # a view
    diagonal += ridge * (diagonal.mean() or 1.0)
    found: Floats = np.linalg.solve(h, missing.T.astype(np.float64)).T.astype(np.float32)
    return found


def _rounded(format_name: str, w: Floats, hessian: Floats, choices: Choices) -> Bytes:
    if can(format_name):
        return gptq(format_name, w, hessian, choices.damping, sweeps=choices.sweeps)
    return quantize(format_name, w, np.diagonal(hessian))


def quantize_model(
    source: Source,
    tokens: NDArray[np.int32],
    types: Mapping[str, str],
    give: Callable[[str, Bytes, Floats], None],
    progress: Progress = nothing,
    choices: Choices | None = None,
    known: Callable[[str], Bytes | None] = lambda name: None,
) -> None:
    """Quantizes linear layers; `give(name, rows of blocks, importance)` is called for each as soon as it is finished.

    tokens: int32 (chunks, n_ctx), see `imatrix.chunked`; types: the format of each weight that is wanted; importance:
    mean squares of its inputs, (columns,); known: what an earlier run gave, which is taken instead of computed: the
    rest comes out as it would have then.
    """
    pieces = parts(source, tokens, copies=2)
    turns = Turns(len(pieces))
    nodes = structure.recorded(source.config, source.weights)
    job = _Job(types, structure.adding(nodes), give, known, progress, choices or Choices(), turns)
    turns.run([
        partial(forward, source, np.concatenate([piece, piece]), partial(Paired, job=job, number=number))
        for number, piece in enumerate(pieces)
    ])  # fmt: skip
