"""Which layers of a decoder go: those without which its predictions move least once the rest is fitted.

Layers go one after the other, each time the one that is missed least (Song et al., SLEB, 2402.09025), but with a fit in
place: the last matrix before a gap gives what least squares can of the stream behind it. Its n weights a row are
fitted to fewer tokens T, so all that is needed is a matrix of T x T: (x xᵀ + ridge)⁻¹, of the inputs x (T, n). Then
this choice and others are fitted as pruning will do it, on a part of the text, and another part decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
from .prune_fit import Goal, last_before, tried
from .streams import Streams, adds_to_stream, before_norm, importance, layer_of, run
from .symmetric import factorize, solve

Floats = NDArray[np.float32]

N_SEQUENCES, N_TOKENS, N_SCORED = 4, 96, 64  # that layers are tried on; the end of each is scored
RIDGE = 0.3  # of the mean of a layer's squared inputs, when it is tried
_FIT_BYTES = 256 << 20  # of the inputs that the last matrices of all layers are fitted to
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


@dataclass
class Bridges:
    """What a text says of the last matrix of each layer: enough to fit it to the stream behind any layer after it.

    streams: that enter each layer, (T, D), and the last one. inputs: of each matrix, each token as it weighs, (T, n).
    outputs: what it gives, where a norm stands behind it, and the weights of that.
    """

    eps: float
    streams: list[Floats] = field(default_factory=list)
    inputs: dict[int, Floats] = field(default_factory=dict)
    outputs: dict[int, tuple[Floats, Floats]] = field(default_factory=dict)
    _roots: dict[int, Floats] = field(default_factory=dict)
    _solved: dict[tuple[int, int], Floats] = field(default_factory=dict)

    def given(self, layer: int, end: int, x: Floats) -> Floats:
        """What the matrix of `layer` gives more for inputs x, (rows, n), when the layers up to `end` are gone."""
        if (layer, end) not in self._solved:
            self._solved[layer, end] = self._solve(layer, end)
        return np.asarray(x @ self.inputs[layer].T @ self._solved[layer, end], np.float32)

    def _solve(self, layer: int, end: int) -> Floats:
        x, stream = self.inputs[layer], self.streams[layer + 1]
        missing: Floats = self.streams[end + 1] - stream
        weights = importance(stream)
        if layer in self.outputs:
            y, w = self.outputs[layer]
            missing, size = before_norm(missing, y, w, self.eps)
            weights = weights / size
        if layer not in self._roots:
            x *= weights
            squares = x @ x.T
            np.einsum("ii->i", squares)[:] += RIDGE * np.trace(squares) / x.shape[1] + 1e-12
            factorize(squares)
            self._roots[layer] = squares
        solved: Floats = solve(self._roots[layer], np.ascontiguousarray((missing * weights).T)).T
        return solved


class _Seeing(Streams):
    """Operations that keep the streams that enter layers, and the rest of `Bridges` if there are some."""

    def __init__(self, runner: Reference, batch: Batch, streams: list[Floats], seen: Bridges | None) -> None:
        super().__init__(runner, batch)
        self._streams, self._seen = streams, seen

    def entering(self, layer: int, x: Floats) -> None:
        self._streams.append(x)

    def linear(self, x: Floats, layer: Layer) -> Floats:
        y, name = super().linear(x, layer), layer.weight.name
        i = layer_of(name)
        if self._seen is not None and i is not None and ends_layer(self._specs[name]):
            self._seen.inputs[i] = x.copy()
            if (norm := self.post_norm(name)) is not None:
                self._seen.outputs[i] = y, norm
        return y


def ends_layer(spec: TensorSpec) -> bool:
    """Whether this is the last matrix of a layer that adds to the stream."""
    return adds_to_stream(spec) and spec.shape[1] == "ffn_dim"


class _Without(Streams):
    """Operations in which the layers `gone` add nothing to the stream, and the matrices before them make up for it.

    streams: that enter the layers of the whole model. Up to the first layer in which anything changes nothing is
    computed; its stream is known.
    """

    def __init__(
        self, runner: Reference, batch: Batch, gone: frozenset[int], bridges: Bridges | None, streams: list[Floats]
    ) -> None:
        super().__init__(runner, batch)
        self._gone, self._bridges, self._streams = gone, bridges, streams
        self._ends: Mapping[int, int] = {} if bridges is None else last_before(gone)
        self._first = min(gone) - (bridges is not None)

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
        ends = i is not None and ends_layer(self._specs[name])
        if self._is_known and ends and i == self._first - 1:
            return self._streams[self._first] - self._stream
        if self._is_known or i in self._gone:
            return np.zeros((len(x), layer.weight.shape[0]), np.float32)
        y = super().linear(x, layer)
        if self._bridges is not None and ends and i is not None and i in self._ends:
            y = y + self._bridges.given(i, self._ends[i], x)
        return y


class Trial:
    """How far a decoder's predictions move without some layers. fit: tokens that the rest is fitted to, if any."""

    def __init__(self, source: Source, tokens: NDArray[np.int32], fit: NDArray[np.int32] | None) -> None:
        c, self._source = source.config, source
        some = np.linspace(0, len(tokens) - 1, min(N_SEQUENCES, len(tokens))).astype(int)
        self._tokens = tokens[some, :N_TOKENS]
        self._bridges = None
        if fit is not None:
            self._bridges = Bridges(c.norm_eps)
            n = max(1, min(fit.shape[1], _FIT_BYTES // (4 * len(fit) * c.n_layers * c.ffn_dim)))
            run(source, fit[:, :n], partial(_Seeing, streams=self._bridges.streams, seen=self._bridges))
        self._streams = list[Floats]()
        hidden = run(source, self._tokens, partial(_Seeing, streams=self._streams, seen=None))
        self._whole = Predictions(source, self._scored(hidden))

    def loss(self, gone: Iterable[int]) -> float:
        """Mean KL divergence without these layers, at least one."""
        operations = partial(_Without, gone=frozenset(gone), bridges=self._bridges, streams=self._streams)
        return self._whole.kl(self._scored(run(self._source, self._tokens, operations)))

    def _scored(self, hidden: Floats) -> Floats:
        n = self._tokens.shape[1]
        hidden = hidden.reshape(*self._tokens.shape, -1)[:, max(n // 2, n - N_SCORED) :]
        return np.ascontiguousarray(hidden.reshape(-1, hidden.shape[-1]))


def least_missed(source: Source, n: int, trial: Trial, progress: Progress = nothing) -> tuple[int, ...]:
    """The n layers that go when each time the one goes that is missed least.

    After the first round only the better third, by the round before, is tried again.
    """
    gone, losses = list[int](), dict.fromkeys(range(source.config.n_layers), 0.0)
    for i in range(n):
        progress("choose layers", i, n)
        pool = sorted(losses.keys() - gone, key=lambda layer: (losses[layer], layer))
        tried = pool[: max(_FEWEST_TRIED, len(pool) // 3)] if gone else pool
        losses |= {layer: trial.loss([*gone, layer]) for layer in tried}
        gone.append(min(tried, key=lambda layer: (losses[layer], layer)))
    progress("choose layers", n, n)
    return tuple(sorted(gone))


def judged(
    source: Source, fit: NDArray[np.int32], unseen: NDArray[np.int32], choices: Iterable[tuple[int, ...]], refit: bool
) -> tuple[int, ...]:
    """The choice of layers that is missed least on some chunks when it was fitted to others; the first of equals."""
    losses, whole = dict.fromkeys(choices, 0.0), None
    for gone in losses if len(losses) > 1 else ():
        before, after = tried(source, fit, unseen, Goal(frozenset(gone), refit=refit))
        whole = whole or Predictions(source, before)
        losses[gone] = whole.kl(after)
    return min(losses, key=lambda gone: losses[gone])


def chosen(
    source: Source, tokens: NDArray[np.int32], n: int, others: Iterable[tuple[int, ...]], refit: bool = True,
    progress: Progress = nothing,
) -> tuple[int, ...]:  # fmt: skip
    """The n layers of a decoder that go; others: choices of n layers to compare with.

    tokens: int32 (chunks, n_ctx). Of every second chunk the first half is what is fitted to, the second half of some of
    them judges; layers are tried on the chunks between.
    """
    half = tokens.shape[1] // 2
    rest = tokens[1::2] if len(tokens) > 1 else tokens
    fit, judge = rest[:, :half], rest[::2, half : 2 * half]
    mine = least_missed(source, n, Trial(source, tokens[::2], fit if refit else None), progress)
    return judged(source, fit, judge, (mine, *others), refit)
