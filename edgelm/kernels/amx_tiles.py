"""Generators of the innermost code of matrix products by the matrix unit, for `linear_amx`.

    unpack   packed weights of a group of 16 rows to bfloat16: for each 32 inputs a tile, lines of pairs
    multiply both groups with tokens, 32 at a time, from tiles of either: see `activation_tiles`

Sums are float32, of pairs of products, in the order of the inputs: a token's results do not depend on the others that
are multiplied with it, but they are not those of int8.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgelm.kernels import amx, isas
from edgelm.kernels.amx import ROWS, TILE
from edgelm.kernels.blocks import CHUNKS, Blocks, at
from edgelm.kernels.emit import I64, F32x16, I8x64, I32x16, bfloat16_pairs, emit_fma, repeat, store_at
from edgelm.kernels.functions import function_address, statement
from edgelm.kernels.isa import Form
from edgelm.kernels.slab_tiles import PAIR, ROW

Value = ir.Value
_BYTES = [
    ir.Constant(ir.VectorType(ir.IntType(32), 64), [n for r in range(16) for n in (4 * r + byte, 64, 64, 64)])
    for byte in range(4)
]  # byte 0 to 3 of each lane, and zeros


# --- weights


def unpack_blocks(context: Any, b: ir.IRBuilder, blocks: Blocks, args: list[Value]) -> None:
    """(weights, n_blocks, tiles): blocks, whole units, of a packed group."""
    weights, n_blocks, tiles = args
    isa = isas.select(context)
    with cgutils.for_range(b, b.udiv(n_blocks, I64(blocks.blocks)), intp=I64) as outer:
        unit = at(b, weights, 0, outer.index, blocks.unit_bytes)
        head = blocks.opened(b, unit)
        own = at(b, tiles, 0, outer.index, blocks.blocks * TILE)
        with cgutils.for_range(b, I64(blocks.blocks), intp=I64) as inner:
            _unpack_block(context, b, isa, blocks, unit, head, inner.index, at(b, own, 0, inner.index, TILE))


def _unpack_block(context, b, isa, blocks: Blocks, unit: Value, head: Value, block: Value, tile: Value) -> None:
    """The weights of a block, scale * (q - zero) + minimum, of unsigned q."""
    whole = blocks.table is not None or blocks.bits == 8  # of the byte: signed numbers, made unsigned
    zero = 128.0 if whole else 2.0 ** (blocks.bits - 1) if blocks.zero else 0.0
    scales, minima = blocks.scales(context, b, head, block)
    less = [b.fmul(scale, repeat(F32x16, -zero)) for scale in scales] if zero else [None] * len(scales)
    offsets = [
        minimum if own is None else own if minimum is None else b.fadd(own, minimum)
        for own, minimum in zip(less, minima or [None] * len(scales), strict=True)
    ]
    chunks = blocks.quants(b, isa, unit, block, Form.TOP if whole else Form.LOW)
    for i, chunk in enumerate(chunks):
        half = i * len(scales) // CHUNKS
        weights = []
        for lanes in _BYTES:
            q = b.bitcast(b.shuffle_vector(chunk, ir.Constant(I8x64, None), lanes), I32x16)
            q, offset = b.sitofp(q, F32x16), offsets[half]
            weights.append(b.fmul(q, scales[half]) if offset is None else emit_fma(context, b, q, scales[half], offset))
        for k in range(2):
            store_at(b, bfloat16_pairs(b, *weights[2 * k : 2 * k + 2]), at(b, tile, 64 * (2 * i + k)), 64)


# --- products

AT_ONCE = 10  # tiles of a group that tokens go over one after the other: they stay in the nearest cache


def _multiply(context: Any, b: ir.IRBuilder, fmt: Any, args: list[Value]) -> None:
    """(first, second, n, x, x_step, out, n_tiles, fresh): products of both groups, `n` tiles of each, with tokens.

    x: the first tile of activations, x_step bytes before those of the next 16 tokens; n_tiles: of tokens; out:
    (token, 2, 16) float32, added to if not `fresh`.
    """
    first, second, n, x, x_step, out, n_tiles, fresh = args
    with cgutils.for_range(b, b.udiv(b.add(n, I64(AT_ONCE - 1)), I64(AT_ONCE)), intp=I64) as loop:
        begin = b.mul(loop.index, I64(AT_ONCE))
        left = b.sub(n, begin)
        depth = b.select(b.icmp_signed("<", left, I64(AT_ONCE)), left, I64(AT_ONCE))
        groups = [at(b, group, 0, begin, TILE) for group in (first, second)]
        new, own = b.icmp_signed(">", fresh, begin), at(b, x, 0, begin, TILE)
        with cgutils.for_range(b, b.lshr(n_tiles, I64(1)), intp=I64) as pairs:
            place = b.add(own, b.mul(b.shl(pairs.index, I64(1)), x_step))
            _multiply_tokens(b, 2, groups, depth, place, x_step, at(b, out, 0, pairs.index, 2 * ROWS * PAIR), new)
        with b.if_then(b.trunc(n_tiles, ir.IntType(1))):
            last = b.sub(n_tiles, I64(1))
            place = b.add(own, b.mul(last, x_step))
            _multiply_tokens(b, 1, groups, depth, place, x_step, at(b, out, 0, last, ROWS * PAIR), new)


def _multiply_tokens(b, count: int, groups, n: Value, x: Value, x_step: Value, out: Value, new: Value) -> None:
    """The same for one or two tiles of tokens; new: whether there is nothing to be added to."""
    sums = {(i, g): at(b, out, ROWS * PAIR * i + ROW * g) for i in range(count) for g in range(2)}
    with b.if_else(new) as (clear, go_on):
        with clear:
            for i, g in sums:
                amx.zero(b, 2 * i + g)
        with go_on:
            for (i, g), place in sums.items():
                amx.load(b, 2 * i + g, place, PAIR)
    with cgutils.for_range(b, n, intp=I64) as loop:
        step = b.mul(loop.index, I64(TILE))
        for i in range(count):
            amx.load(b, 4 + i, b.add(b.add(x, step), b.mul(x_step, I64(i))), 64)
        for g, group in enumerate(groups):
            amx.load(b, 6 + g, b.add(group, step), 64)
        for i, g in sums:
            amx.multiply(b, 2 * i + g, 4 + i, 6 + g)
    for (i, g), place in sums.items():
        amx.store(b, 2 * i + g, place, PAIR)


class _All:
    """What `function_address` names code by that is the same for all formats."""

    name = "any"


@intrinsic
def multiply_code(typingctx):
    """Address of `_multiply`; 0 where there is no matrix unit."""

    def codegen(context, b, sig, args):
        return function_address(context, b.module, _All, _multiply, 8) if amx.has_tiles(context) else I64(0)

    return types.int64(), codegen


# --- the unit itself


def _when_there(do: Any) -> Any:
    def emit(context: Any, b: ir.IRBuilder) -> None:
        if amx.has_tiles(context):
            do(b)

    return statement(emit, 0)


configure, release = _when_there(amx.configure), _when_there(amx.release)
