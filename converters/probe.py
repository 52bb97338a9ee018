"""How far a model's predictions move when something in it is changed: mean KL divergence on a few tokens of a text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelm.cache import Batch
from edgelm.evaluate import score
from edgelm.models import model_of
from edgelm.reference import Reference

from .chunks import Source

N_TOKENS, N_SCORED = 96, 64  # of each sequence; its end is scored
_KEPT_BYTES = 1 << 30  # of weights as float32


def beginnings(tokens: NDArray[np.int32], n_sequences: int) -> tuple[NDArray[np.int32], int]:
    """How some chunks of a text begin, taken from all over it; and the first place in each that is scored."""
    some = np.linspace(0, len(tokens) - 1, min(n_sequences, len(tokens))).astype(int)
    found = tokens[some, :N_TOKENS]
    n = found.shape[1]
    return found, max(n // 2, n - N_SCORED)


class Probe:
    """A model that runs again and again; whoever has it changes `runner` in between.

    tokens: int32 (chunks, n_ctx) of a text; the beginnings of `n_sequences` chunks are read. Not for encoders, which
    predict nothing.
    """

    def __init__(self, source: Source, tokens: NDArray[np.int32], n_sequences: int) -> None:
        c, (self._tokens, self._first) = source.config, beginnings(tokens, n_sequences)
        n_ctx = self._tokens.shape[1]
        self.runner = Reference(model_of(c), c, source.weights, n_ctx=n_ctx, max_weight_bytes=_KEPT_BYTES)
        self._base = self._logits()
        self._targets = np.zeros(len(self._base), np.int64)

    def kl(self) -> float:
        """Mean KL divergence, in nats, of what the model predicts now from what it predicted at first."""
        return float(score(self._logits(), self._targets, self._base).kl.mean())

    def _logits(self) -> NDArray[np.float32]:
        cache = self.runner.new_cache()
        sequences = [cache.new_sequence() for _ in self._tokens]
        try:
            pairs = list(zip(sequences, self._tokens, strict=True))
            self.runner.forward(Batch.of([(s, t[: self._first], "none") for s, t in pairs]))
            return self.runner.forward(Batch.of([(s, t[self._first :], "all") for s, t in pairs]))
        finally:
            for sequence in sequences:
                sequence.release()
