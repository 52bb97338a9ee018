"""The residual stream of a model, for whoever watches or changes it: operations that know when it enters which layer.

    run(source, tokens, operations)         # operations: a kind of Streams

Knows nothing of pruning: `prune_scores`, `prune_depth`, `prune_fit` and `sparse` look at models through it.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.arch import TensorSpec, tensors
from edgelm.architectures import POST_NORMS
from edgelm.cache import Batch, KVCache
from edgelm.formats import QTensor
from edgelm.models import model_of
from edgelm.reference import Operations, Reference
from edgelm.weights import Layer

from .chunks import Source

Floats = NDArray[np.float32]


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, by its GGUF name; None for tensors of the whole model."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else None


def adds_to_stream(spec: TensorSpec) -> bool:
    """Whether a matrix adds to the residual stream: it gives `dim` numbers and takes something else."""
    return len(spec.shape) == 2 and spec.shape[0] == "dim" and spec.shape[1] != "dim"


def _pattern(name: str) -> str:
    return re.sub(r"^blk\.\d+\.", "blk.{i}.", name)


class Streams(Operations):
    """Operations that know the residual stream: what enters each layer, and what is added to it.

    `entering(layer, x)` is called with the stream (T, D) before each layer, and with layer = n_layers at the end of a
    decoder.
    """

    def __init__(self, runner: Reference, batch: Batch) -> None:
        super().__init__(runner, batch)
        c = runner.config
        self._c, self._is_encoder = c, c.spec.family == "encoder"
        self._specs = {spec.gguf: spec for spec in tensors(c)}
        self._layer: int | None = -1
        self._stream: Floats = np.empty((0, 0), np.float32)
        groups = {c.window(i): i for i in reversed(range(c.n_layers))}
        self._first_of_group = [groups[c.window(i)] for i in range(c.n_layers)]

    def entering(self, layer: int, x: Floats) -> None:
        """Nothing, here."""

    def _at(self, name: str, x: Floats) -> None:
        """An operation with the weight `name` comes to x."""
        layer = layer_of(name)
        if layer is None and self._layer in (None, -1):
            return
        if layer != self._layer:
            self._layer = layer
            self.entering(self._c.n_layers if layer is None else layer, x)

    def is_post_norm(self, name: str) -> bool:
        """Whether a norm stands between a matrix and the sum that it goes into."""
        return _pattern(name) in POST_NORMS.values()

    def post_norm(self, name: str) -> Floats | None:
        """The weights of the norm between a matrix and the sum that it goes into, if there is one."""
        norm = self._runner.weights.by_name.get(POST_NORMS.get(_pattern(name), "").format(i=layer_of(name)))
        return None if norm is None else self._dense(norm)

    def rms_norm(self, x: Floats, weight: QTensor | None, eps: float, heads: int = 0) -> Floats:
        if heads or weight is None:
            return super().rms_norm(x, weight, eps, heads)
        self._at(weight.name, x)
        return self._normed(x, weight, None, lambda part, w, b: rms(part, w, eps))

    def layer_norm(self, x: Floats, weight: QTensor, bias: QTensor | None, eps: float) -> Floats:
        self._at(weight.name, x)
        return self._normed(x, weight, bias, lambda part, w, b: _layer(part, w, b, eps))

    def _normed(self, x: Floats, weight: QTensor, bias: QTensor | None, compute: Any) -> Floats:
        out: Floats = self.norm(x, weight, bias, compute)
        if not self.is_post_norm(weight.name):
            self._stream = out if self._is_encoder else x
        return out

    def norm(self, x: Floats, weight: QTensor, bias: QTensor | None, compute: Any) -> Floats:
        """compute(x, weight (D,), bias (D,) or None)."""
        out: Floats = compute(x, self._dense(weight), None if bias is None else self._dense(bias))
        return out

    def linear(self, x: Floats, layer: Layer) -> Floats:
        self._at(layer.weight.name, x)
        return super().linear(x, layer)

    def attention(
        self, q: Floats, k: Floats, v: Floats, layer: int, scale: float, softcap: float = 0.0, causal: bool = True
    ) -> Floats:
        # Nothing is read again: all layers of a cache group share the pages of its first one.
        return super().attention(q, k, v, self._first_of_group[layer], scale, softcap, causal)


def rms(x: Floats, w: Floats, eps: float) -> Floats:
    h: Floats = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * w
    return h


def _layer(x: Floats, w: Floats, b: Floats | None, eps: float) -> Floats:
    h: Floats = x - np.mean(x, axis=-1, keepdims=True)
    h = h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + eps) * w
    return h if b is None else h + b


def run(source: Source, tokens: NDArray[np.int32], operations: Any) -> Floats:
    """Hidden states of chunks of tokens, read side by side by `operations(runner, batch)`, a kind of Streams.

    The cache has one layer for each group of layers, as each uses it for itself.
    """
    c = source.config
    runner = Reference(model_of(c), c, source.weights, head="hidden", n_ctx=tokens.shape[1], max_weight_bytes=0)
    groups = tuple(type(g)(g.layers[:1], g.n_kv_heads, g.head_dim, g.v_head_dim, g.window) for g in c.cache_groups())
    cache = KVCache(groups, "f32")
    sequences = [cache.new_sequence() for _ in tokens]
    try:
        batch = Batch.of([(s, chunk, "all") for s, chunk in zip(sequences, tokens, strict=True)])
        for sequence in sequences:
            sequence.reserve(tokens.shape[1])
        with np.errstate(all="ignore"):
            return np.asarray(runner.model(operations(runner, batch), c, source.weights), np.float32)
    finally:
        for sequence in sequences:
            sequence.release()


class Keeping(Streams):
    """Keeps the stream that enters some layers."""

    def __init__(self, runner: Reference, batch: Batch, wanted: frozenset[int], kept: dict[int, Floats]) -> None:
        super().__init__(runner, batch)
        self._wanted, self._kept = wanted, kept

    def entering(self, layer: int, x: Floats) -> None:
        if layer in self._wanted:
            self._kept[layer] = x.copy()
