"""The operations in NumPy: what each of them means, one after the other, in plain floating point.

The slow, obvious twin of `edgelm.program`: the oracle of its tests, and the way to run where there is no Numba. Weights
are dequantized to float32 and kept while a budget of memory lasts; keys and values go through the same cache. Arrays
are (rows, columns), a row per token of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .arch import Config, Rope
from .cache import Batch, KVCache, paged
from .errors import ContextFull, UsageError
from .forks import lock_of
from .formats import QTensor
from .rope import RopeTable, rotate
from .weights import Layer, Weights

Array = NDArray[Any]
_erf = np.frompyfunc(math.erf, 1, 1)


class Reference:
    """A model on its operations' definitions; safe to call from several threads, one at a time runs.

    Args:
        model: a function of `edgelm.models`.
        head: "logits" or "hidden", what a decoder returns.
        n_ctx: longest sequence, in tokens; None = what the model was made for.
        dtype: of all arithmetic; float64 shows what is rounding and what is not.
        max_weight_bytes: dequantized weights to keep; the rest is dequantized again at each use.
        operations: the interpreter that the model function is handed; one that watches, or changes, what it computes.

    `dense` gives it the weights, and may be replaced between runs.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        config: Config,
        weights: Weights,
        *,
        head: str = "logits",
        n_ctx: int | None = None,
        dtype: DTypeLike = np.float32,
        max_weight_bytes: int = 4 << 30,
        operations: Callable[[Reference, Batch], Operations] | None = None,
    ) -> None:
        self.model, self.config, self.weights, self.head = model, config, weights, head
        self.operations = operations or Operations
        self.n_ctx = n_ctx or config.context_length
        self.max_tokens = self.n_ctx if config.spec.family == "encoder" else min(512, self.n_ctx)
        self.dense: Dense = DenseWeights(np.dtype(dtype), max_weight_bytes)
        ropes = {rope for i in range(config.n_layers) if (rope := config.rope(i)) is not None}
        factors = weights.factors()
        self._ropes = {rope: RopeTable(rope, factors, self.n_ctx) for rope in ropes}
        self._lock = lock_of(self)

    def new_cache(self, kv_type: str = "f32", max_bytes: int | None = None) -> KVCache:
        """A cache for sequences of this model; float32 unless asked otherwise, as befits an oracle."""
        return KVCache(self.config.cache_groups(), kv_type, max_bytes)

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Run a batch: logits (R, vocabulary) or hidden states (R, D) of `batch.outputs`; its sequences grow.

        Raises UsageError for tokens outside the vocabulary, ContextFull for a sequence that would
        outgrow the context window.
        """
        c, tokens = self.config, batch.tokens
        if tokens.min() < 0 or tokens.max() >= c.vocab_size:
            raise UsageError(f"a token is outside the vocabulary of {c.vocab_size}")
        longest = int(batch.positions.max()) + 1
        limit = min(self.n_ctx, c.max_position or self.n_ctx)
        if longest > limit:
            raise ContextFull(longest, limit)
        sequences = paged(batch.sequences)
        if any(sequence.cache.groups != c.cache_groups() for sequence in sequences):
            raise UsageError("the cache of a sequence was made for another model; use this model's new_cache()")
        with self._lock, np.errstate(all="ignore"):  # weights may be anything, and infinity is a value
            counts = np.bincount(batch.rows, minlength=len(sequences))
            for sequence, n in zip(sequences, counts, strict=True):
                sequence.reserve(int(n))
            out = self.model(self.operations(self, batch), c, self.weights)
            for sequence, n in zip(sequences, counts, strict=True):
                sequence.advance(int(n))
            return np.asarray(out, np.float32)


class Dense(Protocol):
    """How the operations of a `Reference` come by the values of weights; one that changes them can take its place."""

    def __call__(self, tensor: QTensor) -> Array:
        """All of a tensor, in its shape."""
        ...

    def rows(self, tensor: QTensor, indices: NDArray[np.integer[Any]]) -> Array:
        """Some rows of a table, without dequantizing the others."""
        ...


class DenseWeights:
    """Weights as arrays of one float type, kept while the budget lasts."""

    def __init__(self, dtype: np.dtype[Any], max_bytes: int) -> None:
        self.dtype, self._left = dtype, max_bytes
        self._kept: dict[str, Array] = {}

    def __call__(self, tensor: QTensor) -> Array:
        if tensor.name in self._kept:
            return self._kept[tensor.name]
        array = tensor.dequantize().astype(self.dtype, copy=False)
        if array.nbytes <= self._left:
            self._left -= array.nbytes
            self._kept[tensor.name] = array
        return array

    def rows(self, tensor: QTensor, indices: NDArray[np.integer[Any]]) -> Array:
        """Some rows of a table, without dequantizing the others."""
        return tensor.rows(indices).astype(self.dtype, copy=False)


class Operations:
    """The interpreter `op` that a model function is handed: computes each operation at once, for one batch."""

    def __init__(self, runner: Reference, batch: Batch) -> None:
        self._runner, self._batch, self._dense = runner, batch, runner.dense
        self.head = runner.head

    def embed(self, table: QTensor) -> Array:
        """Rows of `table` (vocabulary, D) for the tokens of the batch: (T, D)."""
        return self._dense.rows(table, self._batch.tokens)

    def embed_positions(self, table: QTensor, offset: int = 0) -> Array:
        """Rows of `table` (positions, D) for the positions of the tokens, plus offset: (T, D)."""
        return self._dense.rows(table, self._batch.positions + offset)

    def row(self, table: QTensor, index: int) -> Array:
        """One row (D,) of a table, the same for every token."""
        row: Array = self._dense.rows(table, np.array([index]))[0]
        return row

    def rms_norm(self, x: Array, weight: QTensor | None, eps: float, heads: int = 0) -> Array:
        """x / sqrt(mean(x²) + eps) * weight, over a row or, with heads > 0, over each head on its own (1910.07467)."""
        h: Array = x.reshape(len(x), heads, -1) if heads else x
        h = h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + eps)
        if weight is not None:
            h = h * self._dense(weight)
        return h.reshape(x.shape)

    def layer_norm(self, x: Array, weight: QTensor, bias: QTensor | None, eps: float) -> Array:
        """(x - mean) / sqrt(variance + eps) * weight + bias, over each row (1607.06450)."""
        h: Array = x - np.mean(x, axis=-1, keepdims=True)
        h = h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + eps) * self._dense(weight)
        if bias is not None:
            h = h + self._dense(bias)
        return h

    def linear(self, x: Array, layer: Layer) -> Array:
        """x (T, in) times weight (out, in) transposed, plus bias (out,)."""
        y: Array = x @ self._dense(layer.weight).T
        if layer.bias is not None:
            y = y + self._dense(layer.bias)
        return y

    def split(self, x: Array, sizes: tuple[int, ...]) -> tuple[Array, ...]:
        """Columns of x, cut into pieces of these widths."""
        return tuple(np.split(x, np.cumsum(sizes)[:-1], axis=1))

    def rope(self, x: Array, rope: Rope, heads: int) -> Array:
        """Rotates the heads of x (T, heads * head_dim) by the angles of their positions."""
        positions = self._batch.positions
        cos, sin = self._runner._ropes[rope].tables(int(positions.max()) + 1)
        return rotate(x.reshape(len(x), heads, -1), cos[positions], sin[positions], rope).reshape(x.shape)

    def attention(
        self, q: Array, k: Array, v: Array, layer: int, scale: float, softcap: float = 0.0, causal: bool = True
    ) -> Array:
        """softmax(scale q·k) v over the positions a query may see (1706.03762), after storing k and v in the cache.

        q (T, n_heads * head_dim) -> (T, n_heads * v_head_dim); consecutive query heads share a key/value head
        (2305.13245). A causal query sees itself and what is before it, in a layer with a window only the last `window`
        positions of that. Scores are capped before the softmax: softcap * tanh(score / softcap), if softcap > 0.
        """
        c, batch = self._runner.config, self._batch
        q, k, v = (a.reshape(len(a), -1, d) for a, d in ((q, c.head_dim), (k, c.head_dim), (v, c.v_head_dim)))
        out = np.empty((len(q), c.n_heads, c.v_head_dim), q.dtype)
        for i, sequence in enumerate(paged(batch.sequences)):
            mine = np.flatnonzero(batch.rows == i)
            positions = batch.positions[mine]
            sequence.write(layer, int(positions[0]), k[mine], v[mine])
            keys, values = sequence.read(layer, int(positions[-1]) + 1)  # (S, KvH, d), (S, KvH, dv)
            keys = keys.transpose(1, 2, 0)[:, None].astype(q.dtype, copy=False)  # (KvH, 1, d, S)
            values = values.transpose(1, 0, 2)[:, None].astype(q.dtype, copy=False)  # (KvH, 1, S, dv)
            for few in np.array_split(np.arange(len(mine)), -(-len(mine) // 256)):  # bounds the memory of scores
                queries = q[mine[few]].reshape(len(few), c.n_kv_heads, -1, c.head_dim).transpose(1, 2, 0, 3)
                scores = queries @ keys * scale  # (KvH, heads of a group, t, S)
                if softcap:
                    scores = self.softcap(scores, softcap)
                seen = visible(positions[few], len(values[0, 0]), c.window(layer), causal)
                scores = np.where(seen, scores, -np.inf)
                scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
                scores /= scores.sum(axis=-1, keepdims=True)
                out[mine[few]] = (scores @ values).transpose(2, 0, 1, 3).reshape(len(few), c.n_heads, c.v_head_dim)
        return out.reshape(len(q), -1)

    def scale(self, x: Array, s: float) -> Array:
        return x * s

    def softcap(self, x: Array, cap: float) -> Array:
        """cap * tanh(x / cap): as x where x is small, never beyond ±cap."""
        y: Array = cap * np.tanh(x / cap)
        return y

    def silu(self, x: Array) -> Array:
        """x * sigmoid(x)."""
        y: Array = x / (1 + np.exp(-x))
        return y

    def gelu(self, x: Array) -> Array:
        """GELU by tanh, as GPT-2 and Gemma have it (1606.08415)."""
        y: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
        return y

    def gelu_erf(self, x: Array) -> Array:
        """GELU itself: x times the probability that a normal variable is below x."""
        y: Array = 0.5 * x * (1 + np.asarray(_erf(x / math.sqrt(2))).astype(x.dtype))
        return y

    def relu(self, x: Array) -> Array:
        return np.maximum(x, 0)

    def outputs(self, x: Array) -> Array:
        """The rows (R, D) whose output is wanted."""
        return x[self._batch.outputs]


def visible(positions: NDArray[np.int32], n_keys: int, window: int, causal: bool) -> NDArray[np.bool_]:
    """Which of the keys 0 … n_keys - 1 queries at these positions see: bool (T, n_keys)."""
    back = positions[:, None] - np.arange(n_keys)  # how far a key lies behind a query
    seen = back >= 0 if causal else np.ones(back.shape, bool)
    return seen & (np.abs(back) < window) if window else seen
