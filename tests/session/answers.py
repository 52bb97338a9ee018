"""What is asked of sessions, an answer read to its end, and a model that answers what it is told to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from edgelm.cache import Batch, KVCache
from edgelm.model import Model
from edgelm.session import Response, Session

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
PROMPT = "what is the capital of france ? "


def read(responses: Iterator[Response]) -> tuple[str, list[int], Response]:
    """Text, tokens and last response of an answer."""
    all_of_them = list(responses)
    return "".join(r.text for r in all_of_them), [r.token for r in all_of_them], all_of_them[-1]


class Scripted:
    """A runner that wants to say certain tokens, whatever it is given."""

    max_tokens = 16

    def __init__(self, model: Model, tokens: Sequence[int]) -> None:
        self.config, self.script = model.config, list(tokens)
        self.error_at: int | None = None

    def new_cache(self, kv_type: str = "f16") -> KVCache:
        return KVCache(self.config.cache_groups(), kv_type)

    def forward(self, batch: Batch) -> Any:
        [sequence] = batch.sequences
        if self.error_at is not None and sequence.length >= self.error_at:
            raise KeyboardInterrupt
        sequence.reserve(len(batch.tokens))
        sequence.advance(len(batch.tokens))
        logits = np.zeros((len(batch.outputs), self.config.vocab_size), np.float32)
        if len(logits):
            logits[0, self.script.pop(0)] = 50.0
        return logits


def says(model: Model, monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int]) -> Session:
    """A session of a model that will say these tokens."""
    monkeypatch.setattr(model, "runner", Scripted(model, tokens))
    return model.session(temperature=0)
