"""Chunks of tokens through the reference interpreter as a user would run them: each a sequence of a cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelm.cache import Batch
from edgelm.reference import Reference


def hidden_states(runner: Reference, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Hidden states (all tokens, D) of chunks that a runner reads side by side."""
    cache = runner.new_cache()
    sequences = [cache.new_sequence() for _ in tokens]
    try:
        return runner.forward(Batch.of([(s, chunk, "all") for s, chunk in zip(sequences, tokens, strict=True)]))
    finally:
        for sequence in sequences:
            sequence.release()
