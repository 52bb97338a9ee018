"""A whole model quantized in one run of it: each layer is quantized when its inputs first come by.

The reference interpreter runs all calibration chunks side by side, each of them twice: through the layers that are
already quantized, and through the original ones. When it comes to a linear layer, all inputs that the text gives this
layer are there. So one run is enough, and what it holds is the activations of one layer and its moments.

With x the inputs of the quantized model, x* those of the original, and H = mean of xᵀ x, a layer should not give what
its own weights make of x, but what the original makes of x* (asymmetric calibration: GPTAQ, Li et al., 2504.02692):
the weights that come nearest to that are W + W (mean of (x* - x)ᵀ x) H⁻¹. Where a layer's outputs are added to a
stream, they should also make up for what the stream lost before. These weights are what `gptq` then rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.cache import Batch
from edgelm.disk import Progress, nothing
from edgelm.formats import by_name
from edgelm.models import model_of
from edgelm.reference import Operations, Reference
from edgelm.weights import Layer

from . import block_codes
from .gptq import DAMPING, can, gptq
from .imatrix import Source, run

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

RIDGE = 0.1  # of the mean of the diagonal of H, added to it where targets are fitted: few tokens fit too well


@dataclass(frozen=True)
class Choices:
    """How layers are quantized. damping: of `gptq`; ridge: of the targets, None to keep the weights as targets."""

    damping: float = DAMPING
    ridge: float | None = RIDGE
    stream: bool = True
    sweeps: int = 0


class Paired(Operations):
    """Operations on rows of which the first half goes through quantized layers, the second through the original ones."""

    def __init__(self, runner: Reference, batch: Batch, job: _Job) -> None:
        super().__init__(runner, batch)
        self._job = job
        self._stream: NDArray[Any] | None = None

    def rms_norm(self, x: NDArray[Any], weight: Any, eps: float, heads: int = 0) -> NDArray[Any]:
        if not heads:
            self._stream = x
        return super().rms_norm(x, weight, eps, heads)

    def layer_norm(self, x: NDArray[Any], weight: Any, bias: Any, eps: float) -> NDArray[Any]:
        self._stream = x
        return super().layer_norm(x, weight, bias, eps)

    def linear(self, x: NDArray[Any], layer: Layer) -> NDArray[Any]:
        name = layer.weight.name
        if name not in self._job.types:
            return super().linear(x, layer)
        w, half = self._dense(layer.weight), len(x) // 2
        stream = self._stream if name in self._job.adding else None
        data = self._job.quantize(name, x, w, stream)
        y = np.empty((len(x), len(w)), x.dtype)
        np.matmul(x[:half], block_codes.decode(by_name(self._job.types[name]), data).T, out=y[:half])
        np.matmul(x[half:], w.T, out=y[half:])
        if layer.bias is not None:
            y += self._dense(layer.bias)
        return y


class _Job:
    """What is to be quantized, and the moments of the inputs that were seen last: several layers may share them."""

    def __init__(
        self, types: Mapping[str, str], adding: frozenset[str], give: Callable[[str, Bytes], None],
        known: Callable[[str], Bytes | None], progress: Progress, choices: Choices,
    ) -> None:  # fmt: skip
        self.types, self.adding, self.give, self.known = types, adding, give, known
        self.progress, self.choices = progress, choices
        self.done = 0
        self._inputs: NDArray[Any] | None = None
        self._hessian: Floats = np.empty((0, 0), np.float32)
        self._lost: Floats = self._hessian

    def quantize(self, name: str, x: NDArray[Any], w: Floats, stream: NDArray[Any] | None) -> Bytes:
        data = self.known(name)
        if data is None:
            if self._inputs is not x:
                self._inputs, (self._hessian, self._lost) = x, moments(x)
            target = w
            if self.choices.ridge is not None:
                missing = w @ self._lost
                if stream is not None and self.choices.stream:
                    half = len(x) // 2
                    missing += (stream[half:] - stream[:half]).T @ x[:half] / np.float32(half)
                target = w + solved(self._hessian, missing, self.choices.ridge)
            data = gptq(self.types[name], target, self._hessian, self.choices.damping, sweeps=self.choices.sweeps)
            self.give(name, data)
        self.done += 1
        self.progress("gptq", self.done, len(self.types))
        return data


def moments(x: NDArray[Any]) -> tuple[Floats, Floats]:
    """(mean of xᵀ x, mean of (x* - x)ᵀ x) of rows x, and x* as many behind them."""
    half = len(x) // 2
    mine, original = x[:half], x[half:]
    return mine.T @ mine / np.float32(half), (original - mine).T @ mine / np.float32(half)


def solved(hessian: Floats, missing: Floats, ridge: float) -> Floats:
    """missing @ (hessian + ridge * mean of its diagonal)⁻¹."""
    h = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", h)  # a view
    diagonal += ridge * (diagonal.mean() or 1.0)
    found: Floats = np.linalg.solve(h, missing.T.astype(np.float64)).T.astype(np.float32)
    return found


def quantize_model(
    source: Source,
    tokens: NDArray[np.int32],
    types: Mapping[str, str],
    give: Callable[[str, Bytes], None],
    progress: Progress = nothing,
    choices: Choices = Choices(),
    known: Callable[[str], Bytes | None] = lambda name: None,
) -> None:
    """Quantizes linear layers by GPTQ; `give(name, rows of blocks)` is called for each as soon as it is finished.

    tokens: int32 (chunks, n_ctx), see `imatrix.chunked`; types: the format of each weight that is wanted; weights of
    formats without evenly spaced codes are left out, run as they are, and are never given; known: what an earlier run
    gave, which is taken instead of computed.
    """
    c = source.config
    wanted = {name: type_ for name, type_ in types.items() if can(type_)}
    adding = frozenset()
    job = _Job(wanted, adding_layers(source), give, known, progress, choices)
    runner = Reference(
        model_of(c), c, source.weights, head="hidden", n_ctx=tokens.shape[1], max_weight_bytes=0,
        operations=lambda runner, batch: Paired(runner, batch, job),
    )  # fmt: skip
    run(runner, np.concatenate([tokens, tokens]))


def adding_layers(source: Source) -> frozenset[str]:
    """Names of the weights whose outputs are added to the stream as they are."""
    from edgelm.graph import Recorder, in_order

    recorder = Recorder(source.config, "hidden")
    nodes = in_order([model_of(source.config)(recorder, source.config, source.weights)])
    names = set()
    for node in nodes:
        if node.kind == "add":
            for value in node.inputs:
                if value.kind == "linear":
                    names.add(value.args["matrix"].tensor.name)
    return frozenset(names)
