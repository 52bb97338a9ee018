"""Texts to vectors: ragged batches through a model that gives hidden states, pooled and normalised.

Pooling and normalisation are those of Sentence-BERT (Reimers and Gurevych 2019), as sentence-transformers has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .cache import Batch
from .errors import ContextFull, UsageError

if TYPE_CHECKING:
    from .disk import Progress
    from .model import Model

Floats = NDArray[np.float32]
POOLINGS = ("none", "mean", "cls", "last")


def embed(
    model: Model,
    texts: Sequence[str | Sequence[int]],
    pooling: str | None,
    normalize: bool,
    truncate: bool,
    progress: Progress | None,
) -> Floats:
    """See `Model.embed`."""
    if model.pooling == "graph" and pooling is not None:
        raise UsageError(f"pooling is {pooling!r}, but the graph of {model.name} gives the vector of a whole text")
    if pooling is None:
        pooling = model.pooling if model.pooling != "none" else "mean"
    if pooling not in (*POOLINGS, "graph"):
        raise UsageError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}")
    if pooling == "none" and len(texts) != 1:
        raise UsageError("pooling none gives a vector for each token; embed one text at a time")
    parts = [_tokens(model, text, truncate) for text in texts]
    if not parts:
        return np.empty((0, model.dim), np.float32)
    rows: list[Floats] = [np.empty(0, np.float32)] * len(parts)
    done = 0
    for batch in _batches(parts, model.hidden_runner.max_tokens):
        for i, states in zip(batch, _states(model, [parts[i] for i in batch]), strict=True):
            rows[i] = _pool(states, pooling)
        done += len(batch)
        if progress is not None:
            progress("embed", done, len(parts))
    vectors = rows[0] if pooling == "none" else np.stack(rows)
    return _normalized(vectors) if normalize else vectors


def _tokens(model: Model, text: str | Sequence[int], truncate: bool) -> list[int]:
    tokens = model.tokens_of(text)
    if not tokens:
        raise UsageError("a text has no tokens; there is nothing to embed")
    if len(tokens) > model.n_ctx:
        if not truncate:
            raise ContextFull(len(tokens), model.n_ctx, "cut the text into pieces, or let it be cut: --truncate")
        end = tokens[-1:] if model.tokenizer.is_special(tokens[-1]) else []  # [SEP] stays where the model expects it
        tokens = tokens[: model.n_ctx - len(end)] + end
    return tokens


def _batches(parts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """Indices of texts that fit into a batch together; texts of like length come together."""
    batch: list[int] = []
    n_tokens = 0
    for i in sorted(range(len(parts)), key=lambda i: len(parts[i])):
        if batch and n_tokens + len(parts[i]) > max_tokens:
            yield batch
            batch, n_tokens = [], 0
        batch.append(i)
        n_tokens += len(parts[i])
    yield batch


def _states(model: Model, parts: Sequence[Sequence[int]]) -> list[Floats]:
    """Hidden states of each text: (T, D). A text that is longer than a batch goes in pieces, which only decoders do."""
    runner, cache = model.hidden_runner, model.new_cache()
    sequences = [cache.new_sequence() for _ in parts]
    try:
        if model.pooling == "graph":
            out = runner.forward(Batch.of((s, tokens, "last") for s, tokens in zip(sequences, parts, strict=True)))
            return np.split(out, len(parts))
        if len(parts) == 1:
            [sequence], [tokens] = sequences, parts
            step = runner.max_tokens
            pieces = [runner.forward(Batch.of([(sequence, tokens[at : at + step], "all")]))
                      for at in range(0, len(tokens), step)]  # fmt: skip
            return [np.concatenate(pieces)]
        out = runner.forward(Batch.of((s, tokens, "all") for s, tokens in zip(sequences, parts, strict=True)))
        return np.split(out, np.cumsum([len(tokens) for tokens in parts])[:-1])
    finally:
        for sequence in sequences:
            sequence.release()


def _pool(states: Floats, pooling: str) -> Floats:
    if pooling == "mean":
        mean: Floats = states.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean
    one: Floats = states[0 if pooling == "cls" else -1].copy()
    return states if pooling == "none" else one


def _normalized(vectors: Floats) -> Floats:
    """Each row of length one; a row of zeros stays as it is."""
    lengths = np.sqrt(np.sum(np.square(vectors, dtype=np.float64), axis=-1, keepdims=True))
    out: Floats = (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
    return out
