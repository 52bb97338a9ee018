"""What a model would miss least: how much each of its layers changes the stream, how much each channel carries.

Layers: 1 - cos between the stream before and behind a layer ("block influence", Men et al., ShortGPT, 2403.03853), or
the angle between the stream before and behind n layers in a row (Gromov et al., "The Unreasonable Ineffectiveness of
the Deeper Layers", 2403.17887). Or one after the other, each time the one without which predictions move least
(Song et al., SLEB, 2402.09025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.cache import Batch
from edgelm.disk import Progress, nothing
from edgelm.reference import Operations, Reference
from edgelm.weights import Layer

from .chunks import Source
from .probe import Probe
from .prune_fit import Streams, layer_of, run

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
N_SEQUENCES = 4  # that the loss of layers is measured on
_FEWEST_TRIED = 4  # layers in each round


class _Watching(Streams):
    """Keeps every stream; sums, for every matrix that reads one, how much of its output each channel makes."""

    def __init__(self, runner: Reference, batch: Batch, streams: list[Floats], carried: dict[str, Doubles]) -> None:
        super().__init__(runner, batch)
        self._streams, self._carried = streams, carried

    def entering(self, layer: int, x: Floats) -> None:
        self._streams.append(x / np.sqrt(np.sum(x * x, axis=1, keepdims=True) + 1e-30))

    def linear(self, x: Floats, layer: Layer) -> Floats:
        name = layer.weight.name
        if self._specs[name].shape[1] == "dim" and layer_of(name) is not None:
            w = self._dense(layer.weight)
            share = np.square(x).mean(axis=0, dtype=np.float64) * np.square(w).sum(axis=0, dtype=np.float64)
            self._carried[name] = self._carried.get(name, np.zeros_like(share)) + share / (share.sum() or 1.0)
        return super().linear(x, layer)


def watched(
    source: Source, tokens: NDArray[np.int32], progress: Progress = nothing
) -> tuple[Doubles, Doubles, Doubles]:
    """What a text says about a model: (cosines, angles, carried).

    cosines, angles: (layers + 1, layers + 1), between the streams that enter two layers, mean over tokens; angles as
    shares of a half turn. carried: (dim,), mean share of each channel in what the matrices make that read it.
    """
    c = source.config
    cosines: Doubles = np.zeros((c.n_layers + 1, c.n_layers + 1))
    angles: Doubles = np.zeros_like(cosines)
    carried: dict[str, Doubles] = {}
    for i, chunk in enumerate(tokens):
        progress("score", i, len(tokens))
        streams: list[Floats] = []
        last = run(source, chunk[None], partial(_Watching, streams=streams, carried=carried))
        if len(streams) == c.n_layers:  # an encoder gives its last stream itself
            streams.append(last / np.sqrt(np.sum(last * last, axis=1, keepdims=True) + 1e-30))
        for a, b in zip(*np.triu_indices(c.n_layers + 1, 1), strict=True):
            cosine = np.einsum("ij,ij->i", streams[a], streams[b]).clip(-1, 1)
            cosines[a, b] += float(cosine.mean()) / len(tokens)
            angles[a, b] += float(np.arccos(cosine).mean()) / np.pi / len(tokens)
    progress("score", len(tokens), len(tokens))
    return cosines, angles, np.mean(list(carried.values()), axis=0)


def least_influence(cosines: Doubles, n: int) -> tuple[int, ...]:
    """The n layers that turn the stream least, each on its own."""
    influence = 1 - np.diagonal(cosines, 1)
    return tuple(sorted(np.argsort(influence, kind="stable")[:n].tolist()))


def smallest_angle(angles: Doubles, n: int) -> tuple[int, ...]:
    """The n layers in a row that turn the stream least together."""
    start = int(np.argmin(np.diagonal(angles, n))) if n else 0
    return tuple(range(start, start + n))


class _Without(Operations):
    """Operations in which the layers `gone` add nothing to the stream."""

    def __init__(self, runner: Reference, batch: Batch, gone: set[int]) -> None:
        super().__init__(runner, batch)
        self._gone = gone

    def linear(self, x: Floats, layer: Layer) -> Floats:
        if layer_of(layer.weight.name) in self._gone:
            return np.zeros((len(x), layer.weight.shape[0]), np.float32)
        y: Floats = super().linear(x, layer)
        return y


def least_loss(
    source: Source, tokens: NDArray[np.int32], n: int, rival: tuple[int, ...], progress: Progress = nothing
) -> tuple[int, ...]:
    """The n layers of a decoder that go when each time the one goes without which predictions move least.

    After the first round only the better half, by the round before, is tried again. What is least on a few tokens need
    not be least on others: chunks that were not looked at decide between this choice and a rival, another n layers.
    """
    without = set[int]()

    def probe(chunks: NDArray[np.int32]) -> Callable[[Iterable[int]], float]:
        made = Probe(source, chunks, N_SEQUENCES, partial(_Without, gone=without))

        def loss(gone: Iterable[int]) -> float:
            without.clear()
            without.update(gone)
            return made.kl()

        return loss

    loss, gone, losses = probe(tokens[::2]), list[int](), dict.fromkeys(range(source.config.n_layers), 0.0)
    for i in range(n):
        progress("choose layers", i, n)
        pool = sorted(losses.keys() - gone, key=lambda layer: (losses[layer], layer))
        tried = pool[: max(_FEWEST_TRIED, len(pool) // 2)] if gone else pool
        losses |= {layer: loss([*gone, layer]) for layer in tried}
        gone.append(min(tried, key=lambda layer: (losses[layer], layer)))
    without.clear()
    judge = probe(tokens[1::2] if len(tokens) > 1 else tokens)
    progress("choose layers", n, n)
    return min(tuple(sorted(gone)), rival, key=judge)


LAYER_CHOICES: dict[str, Any] = {"influence": least_influence, "angular": smallest_angle}
