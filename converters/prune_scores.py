"""What a model would miss least: how much each of its layers changes the stream, how much each channel carries.

Layers: 1 - cos between the stream before and behind a layer ("block influence", Men et al., ShortGPT, 2403.03853), or
the angle between the stream before and behind n layers in a row (Gromov et al., "The Unreasonable Ineffectiveness of
the Deeper Layers", 2403.17887). `prune_depth` asks what the predictions lose.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.cache import Batch
from edgelm.disk import Progress, nothing
from edgelm.reference import Reference
from edgelm.weights import Layer

from .chunks import Source
from .streams import Streams, layer_of, run

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


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


LAYER_CHOICES: dict[str, Any] = {"influence": least_influence, "angular": smallest_angle}
