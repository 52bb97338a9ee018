"""Which layers of a decoder go: those without which its predictions move least.

Layers go one after the other, each time the one that is missed least (Song et al., SLEB, 2402.09025), before anything
is fitted; parts of the text that were not looked at decide between that choice and another. To choose with the fit in
place was tried as well, and is no better: docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.arch import Rope, TensorSpec
from edgelm.cache import Batch
from edgelm.disk import Progress, nothing
from edgelm.evaluate import score
from edgelm.formats import QTensor
from edgelm.reference import Reference
from edgelm.weights import Layer

from .chunks import Source
from .probe import beginnings
from .streams import Keeping, Streams, adds_to_stream, layer_of, run

Floats = NDArray[np.float32]

N_SEQUENCES = 4  # that layers are tried on
_FEWEST_TRIED = 4  # layers in each round
_LIKELY = 32  # tokens that the model finds most probable, at each place
_STRIP = 1 << 14  # rows of the output matrix at a time


class Predictions:
    """What a decoder predicts at some places, among the tokens that it finds likely at any of them.

    hidden: (R, D), its last hidden states there.
    """

    def __init__(self, source: Source, hidden: Floats) -> None:
        layer = source.weights.output or source.weights.token_embd
        self._softcap = source.config.final_softcap
        best: Floats = np.full((len(hidden), _LIKELY), -np.inf, np.float32)
        tokens = np.zeros(best.shape, np.intp)
        for start in range(0, layer.weight.shape[0], _STRIP):
            rows = np.arange(start, min(start + _STRIP, layer.weight.shape[0]))
            logits = np.concatenate([best, _logits(hidden, layer, rows)], axis=1)
            names = np.concatenate([tokens, np.broadcast_to(rows, (len(hidden), len(rows)))], axis=1)
            top = np.argpartition(-logits, min(_LIKELY, logits.shape[1]) - 1, axis=1)[:, :_LIKELY]
            best, tokens = np.take_along_axis(logits, top, 1), np.take_along_axis(names, top, 1)
        likely = np.unique(tokens)
        self._w, self._b = layer.weight.rows(likely), None if layer.bias is None else layer.bias.dequantize()[likely]
        self._base = self._of(hidden)

    def kl(self, hidden: Floats) -> float:
        """Mean KL divergence, in nats, of what other hidden states predict there."""
        return float(score(self._of(hidden), np.zeros(len(hidden), np.int64), self._base).kl.mean())

    def _of(self, hidden: Floats) -> Floats:
        logits: Floats = hidden @ self._w.T
        if self._b is not None:
            logits += self._b
        if self._softcap:
            logits = self._softcap * np.tanh(logits / np.float32(self._softcap))
        return logits


def _logits(hidden: Floats, layer: Layer, rows: NDArray[np.intp]) -> Floats:
    logits: Floats = hidden @ layer.weight.rows(rows).T
    if layer.bias is not None:
        logits += layer.bias.dequantize()[rows]
    return logits


def ends_layer(spec: TensorSpec) -> bool:
    """Whether this is the last matrix of a layer that adds to the stream."""
    return adds_to_stream(spec) and spec.shape[1] == "ffn_dim"


class _Without(Streams):
    """Operations in which the layers `gone` add nothing to the stream.

    streams: that enter the layers of the whole model. Up to the first layer that goes nothing is computed: the stream
    there is known.
    """

    def __init__(self, runner: Reference, batch: Batch, gone: frozenset[int], streams: Mapping[int, Floats]) -> None:
        super().__init__(runner, batch)
        self._gone, self._streams, self._first = gone, streams, min(gone)

    @property
    def _is_known(self) -> bool:
        return self._layer is not None and self._layer < self._first

    def norm(self, x: Floats, weight: QTensor, bias: QTensor | None, compute: Any) -> Floats:
        return x if self._is_known else super().norm(x, weight, bias, compute)

    def rms_norm(self, x: Floats, weight: QTensor | None, eps: float, heads: int = 0) -> Floats:
        return x if heads and self._is_known else super().rms_norm(x, weight, eps, heads)

    def rope(self, x: Floats, rope: Rope, heads: int) -> Floats:
        return x if self._is_known else super().rope(x, rope, heads)

    def attention(
        self, q: Floats, k: Floats, v: Floats, layer: int, scale: float, softcap: float = 0.0, causal: bool = True
    ) -> Floats:
        if self._is_known:
            return np.zeros((len(q), self._c.n_heads * self._c.v_head_dim), np.float32)
        return super().attention(q, k, v, layer, scale, softcap, causal)

    def linear(self, x: Floats, layer: Layer) -> Floats:
        name = layer.weight.name
        i = layer_of(name)
        if self._is_known and i == self._first - 1 and ends_layer(self._specs[name]):
            return self._streams[self._first] - self._stream
        if self._is_known or i in self._gone:
            return np.zeros((len(x), layer.weight.shape[0]), np.float32)
        return super().linear(x, layer)


class Trial:
    """How far a decoder's predictions move without some layers, on chunks of tokens (chunks, n_ctx)."""

    def __init__(self, source: Source, tokens: NDArray[np.int32]) -> None:
        self._source, (self._tokens, self._first) = source, beginnings(tokens, N_SEQUENCES)
        self._streams, layers = dict[int, Floats](), frozenset(range(source.config.n_layers))
        hidden = run(source, self._tokens, partial(Keeping, wanted=layers, kept=self._streams))
        self._whole = Predictions(source, self._scored(hidden))

    def loss(self, gone: Iterable[int]) -> float:
        """Mean KL divergence without these layers, at least one."""
        operations = partial(_Without, gone=frozenset(gone), streams=self._streams)
        return self._whole.kl(self._scored(run(self._source, self._tokens, operations)))

    def _scored(self, hidden: Floats) -> Floats:
        hidden = hidden.reshape(*self._tokens.shape, -1)[:, self._first :]
        return np.ascontiguousarray(hidden.reshape(-1, hidden.shape[-1]))


def least_missed(source: Source, n: int, trial: Trial, progress: Progress = nothing) -> tuple[int, ...]:
    """The n layers that go when each time the one goes that is missed least.

    After the first round only the better half, by the round before, is tried again.
    """
    gone, losses = list[int](), dict.fromkeys(range(source.config.n_layers), 0.0)
    for i in range(n):
        progress("choose layers", i, n)
        pool = sorted(losses.keys() - gone, key=lambda layer: (losses[layer], layer))
        tried = pool[: max(_FEWEST_TRIED, len(pool) // 2)] if gone else pool
        losses |= {layer: trial.loss([*gone, layer]) for layer in tried}
        gone.append(min(tried, key=lambda layer: (losses[layer], layer)))
    progress("choose layers", n, n)
    return tuple(sorted(gone))


def chosen(
    source: Source, tokens: NDArray[np.int32], n: int, other: tuple[int, ...], progress: Progress = nothing
) -> tuple[int, ...]:
    """The n layers of a decoder that go; other: a choice of n layers to compare with.

    tokens: int32 (chunks, n_ctx). What is least on a few tokens need not be least on others: every second chunk finds
    layers, the chunks between decide.
    """
    mine = least_missed(source, n, Trial(source, tokens[::2]), progress)
    if mine == other:
        return mine
    judge = Trial(source, tokens[1::2] if len(tokens) > 1 else tokens)
    return min(mine, other, key=judge.loss)
