"""A whole model quantized in one run of it: each layer is quantized when its inputs first come by.

The reference interpreter runs all calibration chunks side by side. When it comes to a linear layer, all inputs that the
text gives this layer are there, as the layers before it, already quantized, produce them ("true sequential"): their
products make the hessian, the layer is quantized for them, and the run goes on with the quantized weights. So one run
is enough, and what it holds is the activations of one layer and one hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.cache import Batch
from edgelm.disk import Progress
from edgelm.formats import by_name
from edgelm.models import model_of
from edgelm.reference import Operations, Reference
from edgelm.weights import Layer

from . import block_codes
from .gptq import DAMPING, can, gptq
from .imatrix import Source, run

Bytes = NDArray[np.uint8]


class Quantizing(Operations):
    """Operations that quantize each linear layer for the inputs they see, and go on with what came out."""

    def __init__(self, runner: Reference, batch: Batch, job: _Job) -> None:
        super().__init__(runner, batch)
        self._job = job

    def linear(self, x: NDArray[Any], layer: Layer) -> NDArray[Any]:
        name = layer.weight.name
        if name not in self._job.types:
            return super().linear(x, layer)
        data = self._job.quantize(name, x, self._dense(layer.weight))
        y: NDArray[Any] = x @ block_codes.decode(by_name(self._job.types[name]), data).T
        if layer.bias is not None:
            y = y + self._dense(layer.bias)
        return y


class _Job:
    """What is to be quantized, and the hessian of the inputs that were seen last: several layers may share them."""

    def __init__(
        self, types: Mapping[str, str], give: Callable[[str, Bytes], None], progress: Progress | None, damping: float
    ) -> None:
        self.types, self.give, self.progress, self.damping = types, give, progress, damping
        self.done = 0
        self._inputs: NDArray[Any] | None = None
        self._hessian: NDArray[Any] = np.empty((0, 0))

    def quantize(self, name: str, x: NDArray[Any], w: NDArray[Any]) -> Bytes:
        if self._inputs is not x:
            self._inputs, self._hessian = x, x.T @ x / np.float32(len(x))
        data = gptq(self.types[name], w, self._hessian, self.damping)
        self.give(name, data)
        self.done += 1
        if self.progress:
            self.progress("gptq", self.done, len(self.types))
        return data


def quantize_model(
    source: Source,
    tokens: NDArray[np.int32],
    types: Mapping[str, str],
    give: Callable[[str, Bytes], None],
    progress: Progress | None = None,
    damping: float = DAMPING,
) -> None:
    """Quantizes linear layers by GPTQ; `give(name, rows of blocks)` is called for each as soon as it is finished.

    tokens: int32 (chunks, n_ctx), see `imatrix.chunked`; types: the format of each weight that is wanted; weights of
    formats without evenly spaced codes are left out, run as they are, and are never given.
    """
    c = source.config
    wanted = {name: type_ for name, type_ in types.items() if can(type_)}
    job = _Job(wanted, give, progress, damping)
    runner = Reference(
        model_of(c), c, source.weights, head="hidden", n_ctx=tokens.shape[1], max_weight_bytes=0,
        operations=lambda runner, batch: Quantizing(runner, batch, job),
    )  # fmt: skip
    run(runner, tokens)
