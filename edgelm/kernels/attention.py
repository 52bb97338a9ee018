"""Rows of the op table for attention: storing keys and values in the pages of the KV cache, and attending to them.

Imports no Numba; the kernels are in `attention_kernels`, which also says how the work is divided.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgelm.errors import UnsupportedError
from edgelm.kernels import compiler
from edgelm.kernels.abi import Env, row_of
from edgelm.kv_types import both

if TYPE_CHECKING:
    from edgelm.pages import GroupLayout

BLOCK = 128  # positions over which a softmax is taken before it is merged with those before: two pages
TILE = 64  # tokens that a group of units works on, and the number of parts that positions are divided into
SPLIT_TOKENS = 8  # most tokens of a call for which positions are divided among threads
LARGEST_HEAD = 1024
GRAIN = 4  # units that a thread takes at a time
AHEAD = 4  # tokens: queries of so much later are fetched, and the lines of their results
COUNTER = 64  # bytes of a counter of finished blocks, one for each of SPLIT_TOKENS tokens and each KV head
PARTIAL = 64  # bytes of a maximum and a sum, before the values that belong to them
LOG2_E = math.log2(math.e)  # scores are taken in units of ln 2
CAUSAL, HALVES, OF_OUTPUTS = 1, 2, 4  # flags, and the types of keys and values beside them:
KINDS = {"f32": 0, "f16": 1, "bf16": 2, "q4_0": 4, "q8_0": 8}  # the latter two are the bits of a number
KEY_KIND, VALUE_KIND = 1 << 8, 1 << 16


def usual_kv_type() -> str:
    """What keys and values are stored as if nothing else is asked for: in 16 bits, as they are multiplied fastest."""
    return "bf16" if compiler.compiled_for().adds_pairs else "f16"


def scratch_bytes(layout: GroupLayout, n_heads: int, n_ctx: int) -> int:
    """Bytes of the scratch buffer that `row_store_kv` and `row_attention` of a layer share.

    Room for one token at the end of the context window to be worked on by all threads at once, and for some tokens
    nearer to the beginning. Larger calls do not need it.
    """
    counters = SPLIT_TOKENS * layout.group.n_kv_heads * COUNTER
    positions = n_ctx
    if layout.group.window:
        positions = min(n_ctx, layout.group.window + BLOCK)
    n_blocks = max(-(-positions // BLOCK) + 1, 2 * SPLIT_TOKENS)
    return counters + n_blocks * n_heads * (PARTIAL + 4 * layout.values.stride)


def _bits(low: float, high: float) -> int:
    """Two float32 in one field."""
    return int(np.array([low, high], np.float32).view(np.int64)[0])


def _flags(layout: GroupLayout, causal: bool, halves: bool, of_outputs: bool = False) -> int:
    keys, values = both(layout.kv_type)
    kinds = KEY_KIND * KINDS[keys] | VALUE_KIND * KINDS[values]
    return CAUSAL * causal | HALVES * halves | OF_OUTPUTS * of_outputs | kinds


def _check(layout: GroupLayout) -> None:
    if (size := max(layout.group.head_dim, layout.group.v_head_dim)) > LARGEST_HEAD:
        raise UnsupportedError(f"attention heads of {size} values; at most {LARGEST_HEAD} are possible")


def row_store_kv(
    layout: GroupLayout, group: int, layer_in_group: int, k_off: int, k_stride: int, v_off: int, v_stride: int, *,
    scratch_off: int, rope: int = -1, rope_dim: int = 0, halves: bool = False,
) -> list[int]:
    """Writes keys (T, n_kv_heads * head_dim) and values (T, n_kv_heads * v_head_dim) to their pages.

    Args:
        group: index of the cache group, as in Env.TABLES.
        scratch_off: offset of `scratch_bytes`, the same as for the row_attention of this layer, which comes next and
            must see this row finished.
        rope: index into Env.COS and Env.SIN if keys have still to be rotated, with rope_dim and halves as for
            `elementwise.row_rope`.
    """
    g = layout.group
    _check(layout)
    return row_of(compiler.address("attention_store:store_kv"), g.n_kv_heads, 1, Env.N_TOKENS, GRAIN, [
        k_off, k_stride, v_off, v_stride, g.n_kv_heads, g.head_dim, g.v_head_dim, layout.k_offset(layer_in_group),
        layout.v_offset(layer_in_group), group, scratch_off, rope, rope_dim // 2, _flags(layout, True, halves), 0,
        0,
    ])


def row_attention(
    layout: GroupLayout, group: int, layer_in_group: int, n_heads: int, q_off: int, q_stride: int, y_off: int,
    y_stride: int, *, scale: float, scratch_off: int, n_scratch: int, softcap: float = 0.0, causal: bool = True,
    rope: int = -1, rope_dim: int = 0, halves: bool = False, count: int = Env.N_TOKENS,
) -> list[int]:
    """y (T, n_heads * v_head_dim) = softmax(q·k * scale) v over the cached positions of each token's sequence.

    Token at position p sees positions up to p, and of these the last `window` of the group; with causal=False all
    positions of its sequence. q is (T, n_heads * head_dim). softcap > 0: cap * tanh(score / cap) before the softmax.

    Args:
        scratch_off, n_scratch: the buffer of `scratch_bytes`.
        rope, rope_dim, halves: if queries have still to be rotated, as for `row_store_kv`.
        count: Env.N_OUTPUTS if q and y have rows for the tokens that want an output alone.

    Raises:
        UnsupportedError: heads larger than LARGEST_HEAD, or a window without causality.
    """
    g = layout.group
    _check(layout)
    if g.window and not causal:
        raise UnsupportedError("a sliding window in both directions")
    quantized = max(KINDS[name] for name in both(layout.kv_type)) >= KINDS["q4_0"]
    kernel = "attention" if quantized else "attention_of_floats"
    return row_of(compiler.address(f"attention_kernels:{kernel}"), g.n_kv_heads * TILE, TILE, count, GRAIN, [
        q_off, q_stride, y_off, y_stride, g.n_kv_heads | n_heads // g.n_kv_heads << 32,
        g.head_dim | g.v_head_dim << 32, layout.k_offset(layer_in_group), layout.v_offset(layer_in_group),
        _bits(scale if softcap else scale * LOG2_E, softcap), group, g.window,
        _flags(layout, causal, halves, count == Env.N_OUTPUTS), rope, rope_dim // 2, scratch_off, n_scratch,
    ])
