"""AWQ: columns of weights that matter are scaled up before they are rounded, and what feeds them is scaled down.

After Lin et al., "AWQ: Activation-aware Weight Quantization" (2306.00978). A block of weights has one scale, so a
column that is larger loses less of itself. With s = (root mean square of the inputs of each channel) ** alpha, the
inputs divided by s and the columns multiplied by it, a layer computes the same; alpha is the one of 20 for which the
outputs of all layers that read these inputs lose least when they are rounded.

The scales are folded into what makes the channels, found by `structure`: the norm before a layer, or the layer before
it (values -> attention's output; up -> down). So the result is an ordinary model: a checkpoint like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.cache import Batch
from edgelm.disk import Progress, nothing
from edgelm.formats import by_name
from edgelm.reference import Reference
from edgelm.weights import Layer

from . import block_codes
from .arrays import Array
from .checkpoint import Checkpoint
from .chunks import Chunks, Source, Turns, forward, need_numbers, parts
from .quantizers import quantize
from .structure import Fold

Floats = NDArray[np.float32]
ALPHAS = np.arange(20) / 20
Scales = Mapping[int, Floats]  # of channels, (n_channels,), by number of the fold


def folded(checkpoint: Checkpoint, folds: list[Fold], scales: Scales) -> Checkpoint:
    """The same model with folds scaled: every tensor is still read only when it is asked for."""
    over: dict[str, Floats] = {}  # of rows, or of the numbers of a vector: divided
    by: dict[str, Floats] = {}  # of columns: multiplied
    for number, s in scales.items():
        fold = folds[number]
        for name, start in (*fold.vectors, *fold.rows):
            divisors = over.setdefault(name, np.ones(checkpoint.tensors[name].shape[0], np.float32))
            divisors[start : start + len(s)] *= s
        for name in fold.readers:
            by[name] = by.get(name, np.float32(1)) * s[fold.channels]
    changed = {name: _scaled(checkpoint.tensors[name], over.get(name), by.get(name)) for name in over.keys() | by}
    tensors = {name: changed.get(name, array) for name, array in checkpoint.tensors.items()}
    n_scaled = sum(bool((s != 1).any()) for s in scales.values())
    return replace(checkpoint, tensors=tensors, facts={**checkpoint.facts, "awq": {"folds": n_scaled}})


def _scaled(array: Array, over: Floats | None, by: Floats | None) -> Array:
    def rows(start: int, stop: int) -> Floats:
        values = array.rows(start, stop)
        if by is not None:
            values = values * by
        if over is not None:
            values = values / over[start:stop].reshape(-1, *[1] * (values.ndim - 1))
        return values

    return Array(array.name, array.shape, "F32", rows, source=array.source)


class _Watching(Chunks):
    """Operations that bring together what the readers of each fold are given, and then have it searched."""

    def __init__(
        self, runner: Reference, batch: Batch, n_ctx: int, number: int, turns: Turns, sums: dict[str, Any],
        search: Callable[[str], None],
    ) -> None:  # fmt: skip
        super().__init__(runner, batch, n_ctx)
        self._number, self._turns, self._sums, self._search = number, turns, sums, search

    def linear(self, x: NDArray[Any], layer: Layer) -> NDArray[Any]:
        name = layer.weight.name
        if name in self._sums:
            self._sums[name] = self._sums[name] + x.T @ x
            self._turns.meet(self._number, lambda: self._search(name))
        return super().linear(x, layer)


def searched(
    source: Source,
    tokens: NDArray[np.int32],
    folds: list[Fold],
    types: Mapping[str, str],
    give: Callable[[int, Floats], None],
    progress: Progress = nothing,
    known: Container[int] = (),
) -> None:
    """Looks for the best scales; `give(number of the fold, scales of its channels)` is called for each.

    tokens: int32 (chunks, n_ctx); types: the format that each weight is going to have; known: folds to leave out.
    """
    first = {
        fold.readers[0]: number
        for number, fold in enumerate(folds)
        if number not in known and any(name in types for name in fold.readers)
    }
    if not first:
        return
    pieces = parts(source, tokens)
    turns, sums = Turns(len(pieces)), dict.fromkeys(first, 0.0)
    weights = source.weights.by_name
    done = 0

    def search(name: str) -> None:
        nonlocal done
        fold = folds[first[name]]
        layers = [(weights[n].dequantize(), types[n]) for n in fold.readers if n in types]
        hessian: Floats = np.asarray(sums[name], np.float32) / np.float32(tokens.size)
        need_numbers(name, hessian)
        give(first[name], best(hessian, layers, fold))
        sums[name] = 0.0
        done += 1
        progress("awq", done, len(first))

    turns.run([
        partial(forward, source, piece, partial(_Watching, number=i, turns=turns, sums=sums, search=search))
        for i, piece in enumerate(pieces)
    ])  # fmt: skip


def best(hessian: Floats, layers: list[tuple[Floats, str]], fold: Fold) -> Floats:
    """The scales of a fold for which its readers lose least: float32 (n_channels,).

    hessian: mean of xᵀ x of their inputs; layers: their weights and formats.
    """
    squares = np.diagonal(hessian)
    driven = np.sqrt(np.bincount(fold.channels, squares) / np.bincount(fold.channels))
    driven = np.maximum(driven, 1e-4 * (driven.max() or 1.0))
    least, chosen = np.inf, np.ones(fold.n_channels, np.float32)
    for alpha in ALPHAS:
        s = driven**alpha
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
        columns = s[fold.channels]
        lost = 0.0
        for w, format_name in layers:
            data = quantize(format_name, w * columns, squares / columns**2)
            e = block_codes.decode(by_name(format_name), data) / columns - w
            lost += float(np.einsum("ij,ij->", e @ hessian, e, dtype=np.float64))
        if lost < least:
            least, chosen = lost, s
    return chosen
