"""Attention as the kernels do it, over a real KV cache, and as a few lines of float64 NumPy do it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
from llvmlite.binding import get_host_cpu_features
from op_rows import Workspace

from edgelm.cache import Batch, KVCache, Sequence
from edgelm.kernels.abi import Env
from edgelm.kernels.attention import row_attention, row_store_kv, scratch_bytes
from edgelm.kernels.executor import Executor
from edgelm.kv_types import bfloat16, both
from edgelm.pages import KV_TYPES, PAGE

N_CTX = 2048
PAIRS = "+avx512bf16" in os.environ.get("NUMBA_CPU_FEATURES", get_host_cpu_features().flatten())


@dataclass(frozen=True)
class Group:
    layers: tuple[int, ...]
    n_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int


@dataclass
class Case:
    """One attention layer, with as many other layers and groups around it as it takes to see wrong offsets."""

    n_heads: int = 6
    n_kv_heads: int = 2
    head_dim: int = 64
    v_head_dim: int = 0
    window: int = 0
    kv_type: str = "bf16"
    softcap: float = 0.0
    causal: bool = True
    rope_dim: int = 0
    halves: bool = True
    n_scratch: int | None = None  # None: what is asked for
    portions: int | None = 3
    seed: int = 0
    tiles: int = 0  # tokens from which they go through the matrix unit; 0: none do
    executor: Executor | None = None  # real threads, instead of portions in random order
    cache: KVCache = field(init=False)

    def __post_init__(self) -> None:
        self.v_head_dim = self.v_head_dim or self.head_dim
        other = Group((0, 3), 1, 16, 16, 0)
        group = Group((1, 2), self.n_kv_heads, self.head_dim, self.v_head_dim, self.window)
        self.cache = KVCache((other, group), self.kv_type, undo=0)
        rng = np.random.default_rng(self.seed)
        angles = rng.uniform(0, 7, (N_CTX, max(1, self.rope_dim // 2)))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.scale = self.head_dim**-0.5

    def inputs(self, n: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v of n tokens."""
        rng = np.random.default_rng(seed)
        widths = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, self.n_kv_heads * self.v_head_dim)
        return tuple(rng.standard_normal((n, width)).astype(np.float32) for width in widths)

    def poisoned(self) -> None:
        """Fills the pages that are in no use with NaN, as if they had held something."""
        for pool in self.cache._pools:
            for address in pool.free:
                pool.pages[address][:] = 0xFF

    def forward(
        self, parts: list[tuple[Sequence, tuple[np.ndarray, ...]]], layer: int = 2, outputs: np.ndarray | None = None
    ) -> np.ndarray:
        """Attention of the next tokens of some sequences: parts of q, k and v; the result of all of them, or of those
        tokens alone that want an output."""
        for sequence, (q, _, _) in parts:
            sequence.reserve(len(q))
        batch = Batch.of((sequence, [0] * len(q), "none") for sequence, (q, _, _) in parts)
        n = len(batch.tokens)
        layout = self.cache.layouts[1]
        n_scratch = scratch_bytes(layout, self.n_heads, N_CTX) if self.n_scratch is None else self.n_scratch
        columns = (self.n_heads + self.n_kv_heads) * (self.head_dim + self.v_head_dim) + 4 * 16
        ws = Workspace(4 * n * columns + n_scratch + (1 << 14), self.seed + n)
        q = np.concatenate([x[0] for _, x in parts])
        q_off, q_stride = ws.put(q if outputs is None else q[outputs])
        k_off, k_stride = ws.put(np.concatenate([x[1] for _, x in parts]))
        v_off, v_stride = ws.put(np.concatenate([x[2] for _, x in parts]))
        y_off, y_stride, y = ws.buffer(n if outputs is None else len(outputs), self.n_heads * self.v_head_dim)
        beside = ws.take(4096)  # nothing may be written after the result
        scratch = ws.take(n_scratch)
        after = ws.take(4096)
        tables = np.array([[s.table(g).ctypes.data for g in range(2)] for s in batch.sequences])
        ws.set(Env.N_TOKENS, n)
        ws.set(Env.POSITIONS, batch.positions)
        ws.set(Env.ROWS, batch.rows)
        ws.set(Env.TABLES, tables)
        ws.set(Env.N_GROUPS, 2)
        ws.set(Env.TILES, self.tiles)
        ws.set(Env.LENGTHS, np.array([s.length + len(x[0]) for s, x in parts], np.int32))
        ws.set(Env.COS, np.array([0, self.cos.ctypes.data]))
        ws.set(Env.SIN, np.array([0, self.sin.ctypes.data]))
        if outputs is not None:
            ws.set_outputs(outputs, batch.positions, batch.rows)
        rope = {"rope": 1, "rope_dim": self.rope_dim, "halves": self.halves} if self.rope_dim else {}
        index = layer - 1
        rows = (
            row_store_kv(layout, 1, index, k_off, k_stride, v_off, v_stride, scratch_off=scratch, **rope),
            row_attention(layout, 1, index, self.n_heads, q_off, q_stride, y_off, y_stride, scale=self.scale,
                          scratch_off=scratch, n_scratch=n_scratch, softcap=self.softcap, causal=self.causal, **rope,
                          count=Env.N_TOKENS if outputs is None else Env.N_OUTPUTS),
        )
        if self.executor is None:
            ws.run(*rows, portions=self.portions)
        else:
            self.executor.run(np.array(rows), 2, ws.env.ctypes.data)
        for sequence, (q, _, _) in parts:
            sequence.advance(len(q))
        assert (ws.bytes_at(beside, 4096) == 0x7F).all()
        assert (ws.bytes_at(after, 4096) == 0x7F).all()
        return y.copy()

    def turned(self, x: np.ndarray, heads: int) -> np.ndarray:
        x = x.astype(np.float64).reshape(len(x), heads, -1)
        if not self.rope_dim:
            return x
        y, pairs = x.copy(), self.rope_dim // 2
        first = np.arange(pairs) if self.halves else 2 * np.arange(pairs)
        second = first + (pairs if self.halves else 1)
        c, s = self.cos[: len(x), None].astype(np.float64), self.sin[: len(x), None].astype(np.float64)
        y[..., first], y[..., second] = x[..., first] * c - x[..., second] * s, x[..., first] * s + x[..., second] * c
        return y

    def rounded(self, x: np.ndarray, keys: bool) -> np.ndarray:
        """What a cache of this type gives back for x (n, heads, dim)."""
        array = KV_TYPES[both(self.kv_type)[0 if keys else 1]](keys, *x.shape[1:])
        pages = []
        for at in range(0, len(x), PAGE):
            page = np.zeros(array.n_bytes, np.uint8)
            array.write(page, 0, x[at : at + PAGE])
            pages.append(array.read(page))
        return np.concatenate(pages)[: len(x)].astype(np.float64)

    @property
    def tolerance(self) -> float:
        """Of results: weights of quantized values are whole numbers of 15 bits, those of pairs of bfloat16 have 8; and
        a query may be rounded to another neighbour than here."""
        keys, values = both(self.kv_type)
        if PAIRS and values == "bf16":
            return 5e-3
        return 5e-4 if "q" in self.kv_type or (PAIRS and keys == "bf16") else 1e-5

    def multiplied(self, x: np.ndarray, keys: bool) -> np.ndarray:
        """x as it is when it is multiplied with keys, or values: bfloat16, if that is what the processor does."""
        kind = both(self.kv_type)[0 if keys else 1]
        if not (PAIRS and kind == "bf16"):
            return x
        return (bfloat16(x.astype(np.float32)).astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def exact(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """All tokens of one sequence at once. Keys and values as the cache rounds them."""
        n = len(q)
        wide_q = self.turned(q, self.n_heads)
        wide_k = self.rounded(self.turned(k, self.n_kv_heads).astype(np.float32), keys=True)
        wide_v = self.rounded(v.reshape(n, self.n_kv_heads, -1), keys=False)
        group = self.n_heads // self.n_kv_heads
        factor = self.scale * (1 if self.softcap else np.log2(np.e))
        wide_q, wide_k = self.multiplied(wide_q * factor, keys=True) / factor, self.multiplied(wide_k, keys=True)
        wide_v = self.multiplied(wide_v, keys=False)
        scores = np.einsum("qhgd,khd->hgqk", wide_q.reshape(n, self.n_kv_heads, group, -1), wide_k) * self.scale
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        distance = np.arange(n)[:, None] - np.arange(n)
        seen = (distance >= 0) if self.causal else np.ones((n, n), bool)
        if self.window:
            seen &= distance < self.window
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hgqk,khd->qhgd", weights, wide_v).reshape(n, -1)
