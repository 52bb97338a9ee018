"""Generators of the innermost code for matrices of float32, float16 and bfloat16, which multiply float32 activations.

The counterpart of `tiles`: packed, 16 rows stand side by side, column after column. For every row and token one sum
runs over the columns in order, by fused multiply-add, whatever the number of tokens.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgelm.kernels import isas
from edgelm.kernels.abi import float_bits
from edgelm.kernels.blocks import ROWS, at
from edgelm.kernels.emit import (
    F32,
    I16,
    I32,
    I64,
    F32x16,
    I16x16,
    I32x16,
    emit_fma,
    load_at,
    prefetch_at,
    spread,
    store_at,
    widen_f16,
)
from edgelm.kernels.functions import Code, address_of, code_address, function_address, tile_fields
from edgelm.kernels.slab_tiles import PAIR, ROW
from edgelm.kernels.weight_layout import FLOATS

Value = ir.Value
COLUMNS = 512  # that a tile goes over at a time


class Number:
    """A type of number: how a scalar or 16 of them become float32."""

    def __init__(self, name: str) -> None:
        self.name, self.n_bytes = name, FLOATS[name]

    def widen(self, context: Any, b: ir.IRBuilder, bits: Value) -> Value:
        vector = isinstance(bits.type, ir.VectorType)
        if self.name == "F16":
            return widen_f16(context, b, bits)
        if self.name == "BF16":
            wide = I32x16 if vector else I32
            bits = b.shl(b.zext(bits, wide), ir.Constant(wide, [16] * ROWS if vector else 16))
        return b.bitcast(bits, F32x16 if vector else F32)

    def rows(self, context: Any, b: ir.IRBuilder, address: Value) -> Value:
        """One column of a group."""
        return self.widen(context, b, load_at(b, address, I32x16 if self.n_bytes == 4 else I16x16))

    def single(self, context: Any, b: ir.IRBuilder, address: Value) -> Value:
        return self.widen(context, b, load_at(b, address, I32 if self.n_bytes == 4 else I16))


NUMBERS = {name: Number(name) for name in FLOATS}


def _float_tile(context: Any, b: ir.IRBuilder, number: Number, args: list[Value], n_tokens: int) -> None:
    """(first, second, n_cols, x, x_stride, out, next_first, next_second): adds products of two groups to `out`.

    out: (token, 2, 16). The last two: columns that come next, to be fetched ahead.
    """
    first, second, n_cols, x, x_stride, out, next_first, next_second = args
    n_groups = isas.select(context).float_groups
    with cgutils.for_range(b, I64(2 // n_groups), intp=I64) as outer:
        first = b.add(first, b.mul(b.sub(second, first), outer.index))
        weights = [first, second][:n_groups]
        after = [b.add(next_first, b.mul(b.sub(next_second, next_first), outer.index)), next_second][:n_groups]
        out = b.add(out, b.mul(outer.index, I64(ROW)))
        places = {(g, t): at(b, out, PAIR * t + ROW * g) for g in range(n_groups) for t in range(n_tokens)}
        acc = {key: cgutils.alloca_once(b, F32x16) for key in places}
        for key, place in places.items():
            b.store(load_at(b, place, F32x16, 64), acc[key])
        with cgutils.for_range(b, n_cols, intp=I64) as loop:
            step = b.mul(loop.index, I64(ROWS * number.n_bytes))
            if n_tokens == 1:
                for address in after:
                    prefetch_at(b, b.add(address, step))
            w = [number.rows(context, b, b.add(address, step)) for address in weights]
            here = b.add(x, b.mul(loop.index, I64(4)))
            for t in range(n_tokens):
                value = spread(b, load_at(b, b.add(here, b.mul(x_stride, I64(t))), F32, 4), F32x16)
                for g in range(n_groups):
                    b.store(emit_fma(context, b, w[g], value, b.load(acc[g, t])), acc[g, t])
        for key, place in places.items():
            store_at(b, b.load(acc[key]), place, 64)


def _float_embed(context: Any, b: ir.IRBuilder, number: Number, args: list[Value]) -> None:
    """(weights, n_cols, lane, out, scale): row `lane` of a packed group as float32; scale: bits of a float32."""
    weights, n_cols, lane, out, scale = args
    own, scale = b.add(weights, b.mul(lane, I64(number.n_bytes))), b.bitcast(b.trunc(scale, I32), F32)
    with cgutils.for_range(b, n_cols, intp=I64) as loop:
        value = number.single(context, b, b.add(own, b.mul(loop.index, I64(ROWS * number.n_bytes))))
        store_at(b, b.fmul(value, scale), b.add(out, b.mul(loop.index, I64(4))))


float_embed_code = address_of(NUMBERS, _float_embed, 5)


@intrinsic(prefer_literal=True)
def float_linear_code(typingctx, fmt):
    """Address of the `Code` of a type of number."""
    if not isinstance(fmt, types.StringLiteral):
        return None
    number = NUMBERS[fmt.literal_value]

    def codegen(context, b, sig, args):
        def tile(tokens):
            return function_address(context, b.module, number, _float_tile, 8, tokens)

        fields = {
            Code.BLOCKS: 1,
            Code.UNIT_BYTES: ROWS * number.n_bytes,
            Code.RECORD_BYTES: 4,
            Code.SLAB_BLOCKS: COLUMNS,
            Code.FACTOR: float_bits(1.0),
            **tile_fields(isas.select(context).float_tokens, tile),
        }
        return code_address(b, number.name, fields)

    return types.int64(fmt), codegen
