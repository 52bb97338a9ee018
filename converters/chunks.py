"""Chunks of text go through the reference interpreter, each of them a sequence of its own, and nothing is kept of them.

A `Source` is the model that they go through, `Chunks` are its operations without a cache. `Turns` lets several parts of
a text go through the model at once, in threads of which one runs at a time, and meet at each layer: a layer sees all
inputs that a text gives it, while what takes room inside an operation takes it for one part only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm import gguf
from edgelm.arch import Config
from edgelm.cache import Batch
from edgelm.errors import FormatError, UsageError
from edgelm.models import model_of
from edgelm.reference import Operations, Reference, visible
from edgelm.tokenizer import Tokenizer
from edgelm.weights import Weights

PART_BYTES = 64 << 20  # of the widest activation of a part
_QUERIES = 256  # that attention works on at a time: bounds the memory of scores


class Source(Protocol):
    """A model whose activations are measured: `edgelm.Model` is one."""

    @property
    def config(self) -> Config: ...
    @property
    def weights(self) -> Weights: ...
    @property
    def tokenizer(self) -> Tokenizer: ...


@dataclass(frozen=True)
class Opened:
    """A model file as a `Source`, without anything that runs it fast."""

    config: Config
    weights: Weights
    tokenizer: Tokenizer

    @classmethod
    def read(cls, path: str | Path) -> Opened:
        """Raises FormatError for a broken file, UnsupportedError for one that no runtime of ours can run."""
        file = gguf.read(path)
        config = Config.from_gguf(file.metadata)
        return cls(config, Weights.from_gguf(config, file.tensors), Tokenizer.from_gguf(file.metadata))


def chunked(source: Source, text: str | Sequence[int], n_ctx: int, chunks: int | None) -> NDArray[np.int32]:
    """int32 (chunks, n_ctx): a text as llama.cpp cuts it, each chunk begun by the token that begins texts, if any."""
    tokenizer = source.tokenizer
    if isinstance(text, str):
        text = tokenizer.encode(text.removesuffix("\n"), add_special=True, parse_special=False)
    n = len(text) // n_ctx if chunks is None else min(chunks, len(text) // n_ctx)
    if n < 1:
        raise UsageError(f"the text has {len(text)} tokens; calibration needs at least one chunk of {n_ctx}")
    tokens = np.array(text[: n * n_ctx], np.int32).reshape(n, n_ctx)
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        tokens[:, 0] = tokenizer.bos_id
    return tokens


class Chunks(Operations):
    """Operations on a batch of whole chunks, n_ctx rows each."""

    def __init__(self, runner: Reference, batch: Batch, n_ctx: int) -> None:
        super().__init__(runner, batch)
        self._n_ctx = n_ctx

    def attention(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], layer: int, scale: float, softcap: float = 0.0,
        causal: bool = True,
    ) -> NDArray[Any]:  # fmt: skip
        """As the interpreter has it, on keys and values of this very call."""
        c, n = self._runner.config, self._n_ctx
        out = np.empty((len(q), c.n_heads, c.v_head_dim), q.dtype)
        for start in range(0, len(q), n):
            chunk = slice(start, start + n)
            keys = k[chunk].reshape(n, c.n_kv_heads, c.head_dim).transpose(1, 2, 0)[:, None]  # (KvH, 1, d, S)
            values = v[chunk].reshape(n, c.n_kv_heads, c.v_head_dim).transpose(1, 0, 2)[:, None]  # (KvH, 1, S, dv)
            for first in range(0, n, _QUERIES):
                positions = np.arange(first, min(first + _QUERIES, n), dtype=np.int32)
                rows, n_keys = start + positions, int(positions[-1]) + 1 if causal else n
                queries = q[rows].reshape(len(rows), c.n_kv_heads, -1, c.head_dim).transpose(1, 2, 0, 3)
                scores = queries @ keys[..., :n_keys] * np.float32(scale)  # (KvH, heads of a group, t, S)
                if softcap:
                    scores = self.softcap(scores, softcap)
                scores = np.where(visible(positions, n_keys, c.window(layer), causal), scores, -np.inf)
                scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
                scores /= scores.sum(axis=-1, keepdims=True)
                heads = (scores @ values[..., :n_keys, :]).transpose(2, 0, 1, 3)
                out[rows] = heads.reshape(len(rows), c.n_heads, c.v_head_dim)
        return out.reshape(len(q), -1)


def forward(
    source: Source, tokens: NDArray[np.int32], operations: Callable[[Reference, Batch, int], Chunks] = Chunks
) -> NDArray[Any]:
    """Last hidden states (all tokens, D) of chunks, int32 (chunks, n_ctx)."""
    n, n_ctx = tokens.shape
    c, flat, rows = source.config, tokens.reshape(-1), np.repeat(np.arange(n, dtype=np.int32), n_ctx)
    runner = Reference(model_of(c), c, source.weights, head="hidden", n_ctx=n_ctx, max_weight_bytes=0)
    positions = np.tile(np.arange(n_ctx, dtype=np.int32), n)
    batch = Batch(flat, positions, rows, (), np.arange(len(flat), dtype=np.int32))
    with np.errstate(all="ignore"):
        hidden: NDArray[Any] = runner.model(operations(runner, batch, n_ctx), c, source.weights)
    return hidden


def parts(source: Source, tokens: NDArray[np.int32], copies: int = 1) -> list[NDArray[np.int32]]:
    """Chunks, cut so that the widest activation of a part takes PART_BYTES at most; copies: rows for each token."""
    width = max(t.shape[0] for t in source.weights if len(t.shape) == 2 and t.name.startswith("blk."))
    at_once = max(1, PART_BYTES // (4 * copies * tokens.shape[1] * width))
    return [tokens[start : start + at_once] for start in range(0, len(tokens), at_once)]


def need_numbers(name: str, sums: NDArray[Any]) -> None:
    """FormatError unless what was summed of the inputs of the layer `name` is finite."""
    if not np.isfinite(sums).all():
        raise FormatError(f"the inputs of {name} are no numbers: the model is broken, or needs more than float32")


class Stopped(Exception):
    """Raised in a thread because another one failed."""


class Turns:
    """Threads 0 … n - 1, of which one runs at a time, until it has to wait for the others. Always in that order."""

    def __init__(self, n: int) -> None:
        self._n, self._turn = n, 0
        self._baton = threading.Condition()
        self._result: Any = None
        self._error: BaseException | None = None

    def meet(self, number: int, finish: Callable[[], Any]) -> Any:
        """Waits until all threads have called this; the last of them calls `finish`, and all get its result."""
        if number == self._n - 1:
            self._result = finish()
        self._pass_on(number)
        self._wait(number)
        return self._result

    def run(self, works: Sequence[Callable[[], Any]]) -> None:
        """Runs all works, as many as there are threads; raises the first error."""

        def one(number: int) -> None:
            with self._baton:
                try:
                    self._wait(number)
                    works[number]()
                except BaseException as error:
                    self._error = self._error or error
                finally:
                    self._pass_on(number)

        threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(1, self._n)]
        for thread in threads:
            thread.start()
        one(0)
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _pass_on(self, number: int) -> None:
        self._turn = (number + 1) % self._n
        self._baton.notify_all()

    def _wait(self, number: int) -> None:
        while self._turn != number and self._error is None:
            self._baton.wait()
        if self._error is not None:
            raise Stopped
