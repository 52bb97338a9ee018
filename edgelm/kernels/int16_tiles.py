"""Generators of the innermost code for float16 and bfloat16 as `int16`: pack, look up, multiply, quantize activations.

For every row and token, blocks of 64 inputs are added in order, whatever the number of tokens:

    acc = fma(float(sum of x * w) * scale of x, scale of w, acc)

where the sum is an exact integer: the order within a block is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgelm.kernels.blocks import ROWS, at
from edgelm.kernels.emit import (
    F32,
    I16,
    I32,
    I64,
    F32x16,
    I16x16,
    I32x16,
    assembler,
    call,
    emit_fma,
    load_at,
    opaque,
    prefetch_at,
    repeat,
    spread,
    store_at,
    target,
)
from edgelm.kernels.float_tiles import NUMBERS, Number
from edgelm.kernels.functions import Code, address_of, code_address, function_address, stack, tile_fields
from edgelm.kernels.int16 import BLOCK, RECORD, SCALES, UNIT, VALUES, WEIGHT_BITS, X_MAX
from edgelm.kernels.isa import joined, parts
from edgelm.kernels.isas import is_amd

Value = ir.Value
I16x32 = ir.VectorType(I16, 32)
MAGIC = 1.5 * 2.0**23  # adding it rounds to an integer, to nearest even, in the low bits
PAIRS = BLOCK // 2
SLAB_BLOCKS = 8  # that a tile goes over at a time: 33 KiB of weights stay in the first-level cache
DIRECT = (2, 1)  # tokens that are multiplied with one stream of weights, where that is faster
CHAINS = 8  # sums that must be under way at once to hide how long a product takes


@dataclass(frozen=True)
class Machine:
    """A way to add products of int16 pairs. groups, tokens: shape of tiles.

    product: an LLVM intrinsic; or an instruction in assembler that adds to the sum by itself, because LLVM would take
    it apart again, into two.
    """

    needs: frozenset[str]
    n_parts: int  # registers that hold 64 bytes
    groups: int
    tokens: tuple[int, ...]
    product: str

    def step(self, b: ir.IRBuilder, total: Value, w: Value, x: Value) -> Value:
        """total + w * x: I32x16 of both products of a pair; w as I16x32, x as I32x16."""
        done = []
        for acc, *pair in zip(*(parts(b, v, self.n_parts) for v in (total, w, b.bitcast(x, I16x32))), strict=True):
            if self.product.startswith("llvm."):
                done.append(b.add(acc, call(b, self.product, acc.type, *pair)))
            else:
                places = "=v,0,v,v" if self.n_parts == 1 else "=x,0,x,x"
                done.append(assembler(b, acc.type, self.product, places, [acc, *pair]))
        return joined(b, done)


# Source: Intel intrinsics guide (vpdpwssd, pmaddwd).
MACHINES = (
    Machine(frozenset({"avx512vnni", "avx512bw"}), 1, 2, (8, 4, 2, 1), "vpdpwssd $3, $2, $0"),
    Machine(frozenset({"avxvnni"}), 2, 1, (6, 4, 2, 1), "{vex} vpdpwssd $3, $2, $0"),
    Machine(frozenset({"avx512bw"}), 1, 2, (8, 4, 2, 1), "llvm.x86.avx512.pmaddw.d.512"),
    Machine(frozenset({"avx2"}), 2, 1, (4, 2, 1), "llvm.x86.avx2.pmadd.wd"),
    Machine(frozenset(), 4, 1, (2, 1), "llvm.x86.sse2.pmadd.wd"),
)


def machine(context: Any) -> Machine:
    """The first of `MACHINES` that Numba compiles for."""
    features = target(context)[1]
    return next(m for m in MACHINES if m.needs <= features)


# --- multiplying


def _int16_tile(context: Any, b: ir.IRBuilder, fmt: Any, args: list[Value], n_tokens: int) -> None:
    """(first, second, n_blocks, x, x_stride, out, next_first, next_second): adds products of two groups to `out`.

    x: records; out: (token, 2, 16) float32. The last two: units that come next, to be fetched ahead.
    """
    first, second, n_blocks, x, x_stride, out, next_first, next_second = args
    isa = machine(context)
    with cgutils.for_range(b, I64(2 // isa.groups), intp=I64) as outer:
        weights = [b.add(first, b.mul(b.sub(second, first), outer.index)), second][: isa.groups]
        after = [b.add(next_first, b.mul(b.sub(next_second, next_first), outer.index)), next_second][: isa.groups]
        out = b.add(out, b.mul(outer.index, I64(64)))
        with cgutils.for_range(b, n_blocks, intp=I64) as loop:
            step = b.mul(loop.index, I64(UNIT))
            units, ahead = ([b.add(address, step) for address in some] for some in (weights, after))
            here = b.add(x, b.mul(loop.index, I64(RECORD)))
            records = _spaced(b, here, x_stride, n_tokens)
            sums = _block_sums(b, isa, units, ahead, records)
            for g, unit in enumerate(units):
                scale = load_at(b, at(b, unit, SCALES), F32x16, 64)
                for t, record in enumerate(records):
                    place = at(b, out, 64 * (2 * t + g))
                    acc = load_at(b, place, F32x16, 64)
                    store_at(b, _plus(context, b, acc, sums[g, t], record, scale), place, 64)


def _int16_direct(context: Any, b: ir.IRBuilder, fmt: Any, args: list[Value], n_tokens: int) -> None:
    """As `_int16_tile`, over whole groups, one after the other, and `out` is written: see `tiles._in_order`."""
    first, second, n_blocks, x, x_stride, out, _, _ = args
    with cgutils.for_range(b, I64(2), intp=I64) as outer:
        group = b.add(first, b.mul(b.sub(second, first), outer.index))
        acc = [cgutils.alloca_once_value(b, repeat(F32x16, 0)) for _ in range(n_tokens)]
        with cgutils.for_range(b, n_blocks, intp=I64) as loop:
            unit = b.add(group, b.mul(loop.index, I64(UNIT)))
            here = b.add(x, b.mul(loop.index, I64(RECORD)))
            records = [b.add(here, b.mul(x_stride, I64(t))) for t in range(n_tokens)]
            sums = _block_sums(b, machine(context), [unit], [], records)
            scale = load_at(b, at(b, unit, SCALES), F32x16, 64)
            for t, record in enumerate(records):
                b.store(_plus(context, b, b.load(acc[t]), sums[0, t], record, scale), acc[t])
        for t in range(n_tokens):
            store_at(b, b.load(acc[t]), at(b, out, 128 * t, outer.index, 64), 64)


def _plus(context: Any, b: ir.IRBuilder, acc: Value, total: Value, record: Value, scale: Value) -> Value:
    """A sum and the products of one more block; total: of its integers."""
    scaled = b.fmul(b.sitofp(total, F32x16), spread(b, load_at(b, record, F32, 4), F32x16))
    return emit_fma(context, b, scaled, scale, acc)


def _block_sums(b: ir.IRBuilder, isa: Machine, units: list[Value], ahead: list[Value], records: list[Value]) -> dict:
    """The exact sums, I32x16, of one block by group and token. With few tokens several chains make up a sum."""
    keys = [(g, t) for t in range(len(records)) for g in range(len(units))]
    chains = max(1, CHAINS // (len(keys) * isa.n_parts))
    acc = {(*key, k): repeat(I32x16, 0) for key in keys for k in range(chains)}
    for i in range(PAIRS):
        w = [load_at(b, at(b, unit, 64 * i), I16x32, 64) for unit in units]
        for unit in ahead:
            prefetch_at(b, at(b, unit, 64 * i))
        for t, record in enumerate(records):
            pair = spread(b, load_at(b, at(b, record, VALUES + 4 * i), I32, 4), I32x16)
            for g in range(len(units)):
                acc[g, t, i % chains] = isa.step(b, acc[g, t, i % chains], w[g], pair)
    return {key: reduce(b.add, (acc[*key, k] for k in range(chains))) for key in keys}


def _spaced(b: ir.IRBuilder, first: Value, stride: Value, n: int) -> list[Value]:
    """n addresses from `first` on: every third in a register, which LLVM must not see through, the others from it."""
    found = []
    for i in range(n):
        if i % 3 == 0 and i > 0:
            first = opaque(b, b.add(first, b.mul(stride, I64(3))))
        found.append(b.add(first, b.mul(stride, I64(i % 3))))
    return found


@intrinsic
def int16_linear_code(typingctx):
    """Address of the `functions.Code` of int16."""

    def codegen(context, b, sig, args):
        def function(emit):
            return lambda tokens: function_address(context, b.module, NUMBERS["F16"], emit, 8, tokens)

        direct = DIRECT if is_amd(context) else ()
        fields = {
            Code.BLOCKS: 1,
            Code.UNIT_BYTES: UNIT,
            Code.RECORD_BYTES: RECORD,
            Code.SLAB_BLOCKS: SLAB_BLOCKS,
            Code.FACTOR: 0x3F800000,  # 1.0
            **tile_fields(direct, function(_int16_direct), Code.DIRECT),
            Code.DIRECT_MOST: max(direct, default=0),
            **tile_fields(machine(context).tokens, function(_int16_tile)),
        }
        return code_address(b, "INT16", fields)

    return types.int64(), codegen


# --- packing and looking up


def _largest(b: ir.IRBuilder, values: list[Value]) -> Value:
    """The largest magnitude in float32 vectors, as the bits of a float32; of a NaN, if there is one."""
    total = None
    for value in values:
        bits = b.and_(b.bitcast(value, I32x16), repeat(I32x16, 0x7FFFFFFF))
        total = bits if total is None else b.select(b.icmp_unsigned(">", bits, total), bits, total)
    return call(b, "llvm.vector.reduce.umax.v16i32", I32, total)


def _rounded(b: ir.IRBuilder, value: Value, factor: Value) -> Value:
    """float32 times a factor to int16, to nearest even."""
    scaled = b.fmul(value, spread(b, factor, F32x16))
    bits = b.bitcast(b.fadd(scaled, repeat(F32x16, MAGIC)), I32x16)
    return b.trunc(b.sub(bits, b.bitcast(repeat(F32x16, MAGIC), I32x16)), I16x16)


def _copied(b: ir.IRBuilder, source: Value, n_bytes: Value, size: int) -> Value:
    """Address of `size` bytes on the stack: the first `n_bytes` at `source`, an even number, then zeros."""
    memory = stack(b, size)
    for i in range(0, size, 32):
        store_at(b, ir.Constant(I16x16, None), at(b, memory, i), 32)
    with cgutils.for_range(b, b.lshr(n_bytes, I64(1)), intp=I64) as loop:
        step = b.shl(loop.index, I64(1))
        store_at(b, load_at(b, b.add(source, step), I16), b.add(memory, step), 2)
    return memory


def _whole(b: ir.IRBuilder, source: Value, left: Value, size: int) -> Value:
    """Address of a block of `size` bytes of which `left` are there; what is missing is zero."""
    address = cgutils.alloca_once_value(b, source)
    with b.if_then(b.icmp_signed("<", left, I64(size)), likely=False):
        b.store(_copied(b, source, left, size), address)
    return b.load(address)


def _int16_pack(context: Any, b: ir.IRBuilder, number: Number, args: list[Value]) -> None:
    """(source, row_bytes, n_rows, n_cols, target): rows of a file, at most 16, to a packed group."""
    source, row_bytes, n_rows, n_cols, target = args
    size, integers = number.n_bytes * BLOCK, stack(b, 2 * BLOCK)
    n_blocks = b.udiv(b.add(n_cols, I64(BLOCK - 1)), I64(BLOCK))
    with cgutils.for_range(b, n_blocks, intp=I64) as loop:
        unit, start = b.add(target, b.mul(loop.index, I64(UNIT))), b.mul(loop.index, I64(size))
        left = b.sub(b.mul(n_cols, I64(number.n_bytes)), start)
        with cgutils.for_range(b, n_rows, intp=I64) as rows:
            own = b.add(b.add(source, start), b.mul(rows.index, row_bytes))
            own, lane = _whole(b, own, left, size), b.add(unit, b.mul(rows.index, I64(4)))
            values = [number.rows(context, b, at(b, own, number.n_bytes * i)) for i in range(0, BLOCK, ROWS)]
            factor, scale = _power(b, _largest(b, values))
            store_at(b, scale, at(b, lane, SCALES), 4)
            for i, value in enumerate(values):
                store_at(b, _rounded(b, value, factor), at(b, integers, 32 * i), 32)
            with cgutils.for_range(b, I64(PAIRS), intp=I64) as pairs:
                pair = load_at(b, b.add(integers, b.mul(pairs.index, I64(4))), I32, 4)
                store_at(b, pair, b.add(lane, b.mul(pairs.index, I64(64))), 4)


def _power(b: ir.IRBuilder, largest: Value) -> tuple[Value, Value]:
    """(factor, scale): powers of two, inverse to each other, that make `largest` an integer of WEIGHT_BITS bits.

    The scale is NaN if there is a weight that is no number.
    """
    field, least = b.lshr(largest, I32(23)), I32(WEIGHT_BITS)  # bfloat16 below 2 ** -114 lose bits
    exponent = b.select(b.icmp_unsigned("<", field, least), least, field)
    factor = b.shl(b.sub(I32(2 * 127 + WEIGHT_BITS - 1), exponent), I32(23))
    scale = b.shl(b.sub(exponent, I32(WEIGHT_BITS - 1)), I32(23))
    scale = b.select(b.icmp_unsigned("==", field, I32(0xFF)), I32(0x7FC00000), scale)
    return b.bitcast(factor, F32), b.bitcast(scale, F32)


def _int16_embed(context: Any, b: ir.IRBuilder, number: Number, args: list[Value]) -> None:
    """(weights, n_cols, lane, out, scale): row `lane` of a packed group as float32; scale: bits of a float32."""
    weights, n_cols, lane, out, scale = args
    own, scale = b.add(weights, b.mul(lane, I64(4))), b.bitcast(b.trunc(scale, I32), F32)
    with cgutils.for_range(b, n_cols, intp=I64) as loop:
        unit = b.add(own, b.mul(b.udiv(loop.index, I64(BLOCK)), I64(UNIT)))
        column = b.urem(loop.index, I64(BLOCK))
        place = b.add(b.mul(b.lshr(column, I64(1)), I64(64)), b.mul(b.and_(column, I64(1)), I64(2)))
        integer = b.sitofp(load_at(b, b.add(unit, place), I16, 2), F32)
        value = b.fmul(integer, load_at(b, at(b, unit, SCALES), F32, 4))
        store_at(b, b.fmul(value, scale), b.add(out, b.mul(loop.index, I64(4))))


def _int16_record(context: Any, b: ir.IRBuilder, number: Number, args: list[Value]) -> None:
    """(x, n_cols, record): the records of the float32 of one token."""
    x, n_cols, record = args
    with cgutils.for_range(b, b.udiv(b.add(n_cols, I64(BLOCK - 1)), I64(BLOCK)), intp=I64) as loop:
        start, place = b.mul(loop.index, I64(4 * BLOCK)), b.add(record, b.mul(loop.index, I64(RECORD)))
        own = _whole(b, b.add(x, start), b.sub(b.mul(n_cols, I64(4)), start), 4 * BLOCK)
        values = [load_at(b, at(b, own, 4 * i), F32x16, 4) for i in range(0, BLOCK, ROWS)]
        scale = b.fmul(b.bitcast(_largest(b, values), F32), ir.Constant(F32, 1 / X_MAX))
        usable = b.fcmp_unordered(">=", scale, ir.Constant(F32, 2.0**-126))  # a NaN stays
        zero = ir.Constant(F32, 0.0)
        factor = b.select(usable, b.fdiv(ir.Constant(F32, 1.0), scale), zero)
        store_at(b, b.select(usable, scale, zero), place, 4)
        for i, value in enumerate(values):
            store_at(b, _rounded(b, value, factor), at(b, place, VALUES + 32 * i), 4)


int16_pack_code = address_of(NUMBERS, _int16_pack, 5)
int16_embed_code = address_of(NUMBERS, _int16_embed, 5)
int16_record_code = address_of(NUMBERS, _int16_record, 3)
