"""Any checkpoint as a model that runs: what calibration watches, and what the loss of a conversion is measured against.

    source = opened(checkpoints.read(path))       # config, weights, tokenizer
    imatrix.collect(source, text)

A checkpoint that was transformed (adapters merged, pruned, scales folded) opens as one that was just read: weights are
read from it when an operation of the reference interpreter needs them, and forgotten after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm import gguf
from edgelm.cache import KVCache
from edgelm.errors import UsageError
from edgelm.formats import F32, QTensor
from edgelm.models import model_of
from edgelm.reference import Operations, Reference
from edgelm.tokenizer import Tokenizer
from edgelm.weights import Layer, Weights

from . import vocab, vocab_prune
from .arrays import Array, Floats
from .checkpoint import Checkpoint
from .chunks import Opened, Source
from .gguf_writer import Typed
from .special_tokens import Folder

KEPT_BYTES = 256 << 20  # of float32 weights that an evaluated model does not dequantize again
STRIP_BYTES = 64 << 20  # of a weight that is multiplied at a time


@dataclass(frozen=True, eq=False)
class Unread(QTensor):
    """A weight that is read from its checkpoint, as float32, at each use; nothing of it stays in memory."""

    array: Array
    forget: Callable[[], None]

    @property
    def n_bytes(self) -> int:
        """That it would take as float32."""
        return 4 * self.n_weights

    def dequantize(self) -> Floats:
        values = self.array.read().reshape(self.shape)
        self.forget()
        return values

    def rows(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Floats:
        unique, places = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        if len(unique) and not 0 <= unique[0] <= unique[-1] < self.shape[0]:
            raise IndexError(f"{self.name} has {self.shape[0]} rows")
        found, at = np.empty((len(unique), self.shape[-1]), np.float32), 0
        for run in np.split(unique, np.flatnonzero(np.diff(unique) != 1) + 1) if len(unique) else ():
            found[at : at + len(run)] = self.array.rows(int(run[0]), int(run[-1]) + 1)
            at += len(run)
        self.forget()
        return found[places]


def opened(checkpoint: Checkpoint) -> Source:
    """A checkpoint as something that the reference interpreter can run.

    All its weights are `Unread`: those that lie in a mapped file, too, whose pages would stay in memory.

    Raises FormatError for tensors or a tokenizer that are no model's, SourceError if there is no tokenizer,
    UnsupportedError for what no runtime of ours can run.
    """
    nothing, forget = np.empty((0, 0), np.uint8), checkpoint.forget
    weights = {n: Unread(n, F32, a.shape or (1,), nothing, a, forget) for n, a in checkpoint.tensors.items()}
    config = checkpoint.config
    return Opened(config, Weights.from_gguf(config, weights), Tokenizer.from_gguf(vocabulary(checkpoint)))


def vocabulary(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The keys `tokenizer.*` of a checkpoint, as Python values; values that a transformation put there are taken."""
    if not checkpoint.is_gguf:
        words = vocab.read(Folder.read(checkpoint.path, checkpoint.hf), checkpoint.n_tokens_before)
        return words if checkpoint.kept_tokens is None else vocab_prune.cut_keys(words, checkpoint.kept_tokens)
    changed = {key: value for key, value in checkpoint.metadata.items() if not isinstance(value, Typed)}
    return {**gguf.read(checkpoint.path).metadata, **changed}


class Strips(Operations):
    """Operations that read a large weight a strip of rows at a time: a table of tokens may be a gigabyte as float32."""

    def linear(self, x: NDArray[Any], layer: Layer) -> NDArray[Any]:
        n_rows, n_columns = layer.weight.shape
        at_once = max(1, STRIP_BYTES // (4 * n_columns))
        if n_rows <= at_once:
            return super().linear(x, layer)
        y = np.empty((len(x), n_rows), x.dtype)
        for start in range(0, n_rows, at_once):
            rows = np.arange(start, min(start + at_once, n_rows))
            y[:, rows] = x @ self._dense.rows(layer.weight, rows).T
        if layer.bias is not None:
            y += self._dense(layer.bias)
        return y


@dataclass(frozen=True)
class Interpreted:
    """A source as `edgelm.evaluate` takes one: its logits by the reference interpreter, in float32."""

    source: Source
    runner: Reference

    @classmethod
    def of(cls, source: Source, n_ctx: int, kept_bytes: int = KEPT_BYTES) -> Interpreted:
        """For sequences of up to n_ctx tokens; kept_bytes: of weights that are not dequantized again at each use."""
        c = source.config
        runner = Reference(model_of(c), c, source.weights, n_ctx=n_ctx, max_weight_bytes=kept_bytes, operations=Strips)
        return cls(source, runner)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.source.config.vocab_size

    def require_logits(self) -> None:
        """Raises UsageError for an encoder."""
        if self.source.config.spec.family == "encoder":
            raise UsageError(f"a {self.source.config.arch} model is an encoder, which predicts no tokens")

    def new_cache(self) -> KVCache:
        return self.runner.new_cache()
