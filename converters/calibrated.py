"""A whole model quantized in one run of it: each layer is quantized when its inputs first come by.

The calibration text goes through the reference interpreter twice at once: through the layers that are already
quantized, and through the original ones. When it comes to a linear layer, all inputs that the text gives this layer are
there. So one run is enough, and what it holds is the activations of one layer and their moments.

A layer should not give what its own weights make of the inputs that it now gets, but what it gave in the original:
`targets` finds the weights for that, and `gptq` rounds them.
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
from .chunks import Chunks, Source, Turns, forward, need_numbers, parts
from .feedback import DAMPING
from .gptq import gptq
from .targets import Moments, fitted

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Choices:
    """damping, sweeps: of `gptq`; mend: whether weights may change to make up for layers before (`targets`)."""

    damping: float = DAMPING
    sweeps: int = 0
    mend: bool = True


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
    done: int = 0

    def finish(self, name: str, w: Floats) -> Bytes:
        """The layer's weights, quantized, from what all parts have brought."""
        data = self.known(name)
        if data is None:
            importance = self.moments.importance()
            need_numbers(name, importance)
            target = fitted(w, self.moments) if self.choices.mend else w
            hessian = self.moments.hessian()
            if name in self.adding:
                self.moments = Moments()  # no other layer has these inputs: the room is needed
            data = gptq(self.types[name], target, hessian, self.choices.damping, sweeps=self.choices.sweeps)
            self.give(name, data, importance)
        self.done += 1
        self.progress("calibrate", self.done, len(self.types))
        return data


class Paired(Chunks):
    """Operations on rows of which the first half goes through quantized layers, the second through the originals."""

    def __init__(self, runner: Reference, batch: Batch, n_ctx: int, job: _Job, number: int, first: int) -> None:
        super().__init__(runner, batch, n_ctx)
        self._job, self._number, self._first = job, number, first
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
        w, half = self._dense(layer.weight), len(x) // 2
        y = np.empty((len(x), len(w)), x.dtype)
        np.matmul(x[half:], w.T, out=y[half:])
        if job.known(name) is None:
            self._bring(name, x, w, y[half:])
        data = job.turns.meet(self._number, lambda: job.finish(name, w))
        np.matmul(x[:half], block_codes.decode(by_name(job.types[name]), data).T, out=y[:half])
        if layer.bias is not None:
            y += self._dense(layer.bias)
        return y

    def _bring(self, name: str, x: NDArray[Any], w: Floats, original: NDArray[Any]) -> None:
        """Adds inputs x to the moments: chunks with even numbers to the one half, those with odd ones to the other.

        original: the outputs of the original layer.
        """
        if self._seen is x:
            return
        if self._number == 0:
            self._job.moments = Moments()
        self._seen, moments = x, self._job.moments
        chunks, adds = np.arange(len(x) // self._n_ctx // 2) + self._first, name in self._job.adding
        mine, others = np.split(x, 2)
        if adds and self._stream is not None:  # what the outputs lack, of themselves and of what they are added to
            stream, stream_original = np.split(self._stream, 2)
            others = original - mine @ w.T + (stream_original - stream)
        for half in (0, 1):
            rows = np.repeat(chunks % 2 == half, self._n_ctx)
            if rows.any():
                (moments.add_gap if adds else moments.add)(half, mine[rows], others[rows])


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

    tokens: int32 (chunks, n_ctx), see `chunks.chunked`; types: the format of each weight that is wanted; importance:
    mean squares of its inputs, (columns,); known: what an earlier run gave, which is taken instead of computed: the
    rest comes out as it would have then.

    Raises FormatError when the model computes something that is not a number.
    """
    pieces = parts(source, tokens, copies=2)
    turns = Turns(len(pieces))
    nodes = structure.recorded(source.config, source.weights)
    job = _Job(types, structure.adding(nodes), give, known, progress, choices or Choices(), turns)
    works, first = [], 0
    for number, piece in enumerate(pieces):
        operations = partial(Paired, job=job, number=number, first=first)
        works.append(partial(forward, source, np.concatenate([piece, piece]), operations))
        first += len(piece)
    turns.run(works)
