"""Writes the records of `records`: activations as int8. Knows nothing of weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from edgelm.kernels import isas
from edgelm.kernels.abi import WORD, Env, Row
from edgelm.kernels.emit import (
    F32,
    I8,
    I16,
    I32,
    I64,
    F32x16,
    I32x16,
    call,
    emit_fma,
    load_at,
    repeat,
    spread,
    store_at,
    undefined,
)
from edgelm.kernels.functions import call_function
from edgelm.kernels.int16_tiles import int16_record_code
from edgelm.kernels.records import (
    BLOCK,
    FACTORS,
    FLAG,
    MAGIC,
    MAGIC_LOW,
    MAX_FACTOR,
    OFFSET_LOW,
    RECORD,
    SCALE_HIGH,
    SCALE_LOW,
    SCALED_SUM,
    ZERO,
    activation_bytes,
)
from edgelm.kernels.simd import load_f32, load_i64, splat_i32, store, to_i8

__all__ = ["activation_bytes", "quantize", "quantize_row"]

Value = ir.Value
TINY = 2.0**-126  # the smallest normal float32
I8x16, F32x4, I32x4 = ir.VectorType(I8, 16), ir.VectorType(F32, 4), ir.VectorType(I32, 4)
_WORKSPACE = WORD * Env.WORKSPACE
_X, _X_STRIDE, _N_COLS, _Q, _Q_STRIDE, _LIMIT = (WORD * (Row.ARGS + i) for i in range(6))


def _shuffle(b: ir.IRBuilder, low: Value, high: Value, lanes: list[int]) -> Value:
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _reduce(b: ir.IRBuilder, low: Value, high: Value, combine: Any) -> Value:
    """The 16 lanes of each of two vectors combined: four lanes, low, high, low, high."""
    first, second = list(range(8)), list(range(8, 16))
    v = combine(
        _shuffle(b, low, high, first + [16 + i for i in first]),
        _shuffle(b, low, high, second + [16 + i for i in second]),
    )
    for distance in (4, 2, 1):
        v = combine(v, _shuffle(b, v, undefined(v.type), [i ^ distance for i in range(16)]))
    return _shuffle(b, v, undefined(v.type), [0, 8, 0, 8])


def _pair(b: ir.IRBuilder, values: Value, address: Value) -> None:
    """Stores the first two of four lanes."""
    store_at(b, _shuffle(b, values, undefined(values.type), [0, 1]), address, 4)


def _maximum(b: ir.IRBuilder, x: Value, y: Value) -> Value:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _float_scales(b: ir.IRBuilder, peaks: Value) -> tuple[Value, Value]:
    """d of blocks whose largest magnitudes are `peaks`, and what values are multiplied with. F32x4"""
    scales = b.fmul(peaks, repeat(F32x4, 1 / 127))
    scales = b.bitcast(b.and_(b.bitcast(scales, I32x4), repeat(I32x4, -4)), F32x4)  # so that MAGIC * d is exact
    normal = b.fcmp_ordered(">=", scales, repeat(F32x4, TINY))
    inverses = b.select(normal, b.fdiv(repeat(F32x4, 1.0), scales), repeat(F32x4, 0.0))
    return b.select(normal, scales, repeat(F32x4, 0.0)), inverses


def _whole_scales(b: ir.IRBuilder, peaks: Value, inverse_unit: Value) -> tuple[Value, Value]:
    """The same in whole units."""
    units, most = spread(b, inverse_unit, F32x4), repeat(F32x4, MAX_FACTOR - 1)
    wanted = b.fmul(b.fmul(peaks, repeat(F32x4, 1 / 127)), units)
    wanted = b.select(b.fcmp_ordered("<", wanted, most), wanted, most)
    scales = b.sitofp(b.add(b.fptosi(wanted, I32x4), repeat(I32x4, 1)), F32x4)
    return scales, b.fdiv(units, scales)


def _write_block(context: Any, b: ir.IRBuilder, halves: list[Value], target: Value, inverse_unit: Value) -> None:
    """Writes the 64 bytes of a record for 32 float32, two vectors."""
    isa = isas.select(context)

    def at(offset):
        return b.add(target, I64(offset))

    def both(values, i):
        return _shuffle(b, values, undefined(values.type), [i] * 16)

    peaks = _reduce(b, *(call(b, "llvm.fabs.v16f32", F32x16, x) for x in halves), partial(_maximum, b))
    whole = isa.whole_scales
    scales, inverses = _whole_scales(b, peaks, inverse_unit) if whole else _float_scales(b, peaks)
    quants = []
    for i, x in enumerate(halves):
        rounded = b.fadd(b.fmul(x, both(inverses, i)), repeat(F32x16, MAGIC))  # to nearest even
        quants.append(b.sub(b.bitcast(rounded, I32x16), b.bitcast(repeat(F32x16, MAGIC), I32x16)))
        store_at(b, b.trunc(quants[i], I8x16), at(16 * i), 16)
    sums = _reduce(b, *quants, b.add)
    scaled = b.fmul(scales, b.sitofp(sums, F32x4))
    _pair(b, scales, at(SCALE_LOW))
    total = b.fadd(*(b.extract_element(scaled, I32(i)) for i in range(2)))
    store_at(b, total, at(SCALED_SUM), 4)
    if whole:
        factors = b.fptosi(scales, I32x4)
        _pair(b, b.trunc(factors, ir.VectorType(I16, 4)), at(FACTORS))
        zeros = b.mul(b.mul(factors, sums), repeat(I32x4, -8))
        store_at(b, b.add(*(b.extract_element(zeros, I32(i)) for i in range(2))), at(ZERO), 4)
    else:
        _pair(b, b.fmul(scales, repeat(F32x4, -MAGIC)), at(MAGIC_LOW))
    first = repeat(I32x4, isa.first)
    _pair(b, b.sub(first, b.mul(sums, repeat(I32x4, 128))), at(OFFSET_LOW))
    store_at(b, I32(0), at(FLAG), 4)


@intrinsic
def write_unit(typingctx, x, n_cols, place):
    """Stores the unit of the record of `n_cols` float32 at `x`, and 1 / unit, to `place`."""

    def codegen(context, b, sig, args):
        x, n_cols, place = args
        unit = inverse = ir.Constant(F32, 1.0)
        if isas.select(context).whole_scales:
            largest = cgutils.alloca_once_value(b, repeat(I32x16, 0))  # as bits: NaN is larger than infinity
            with cgutils.for_range(b, b.lshr(n_cols, I64(4)), intp=I64) as loop:
                bits = load_at(b, b.add(x, b.shl(loop.index, I64(6))), I32x16)
                bits, old = b.and_(bits, repeat(I32x16, 0x7FFFFFFF)), b.load(largest)
                b.store(b.select(b.icmp_unsigned(">", bits, old), bits, old), largest)
            bits = call(b, "llvm.vector.reduce.umax.v16i32", I32, b.load(largest))
            bits = b.bitcast(b.fmul(b.bitcast(bits, F32), ir.Constant(F32, 1 / 127)), I32)
            exponent = b.sub(b.lshr(bits, I32(23)), I32(14))  # of the largest d, less the bits of MAX_FACTOR but one
            usable = b.icmp_signed(">", exponent, I32(0))
            finite = b.icmp_unsigned("<", bits, I32(0x7F800000))
            unit = b.bitcast(b.shl(exponent, I32(23)), F32)
            unit = b.select(usable, b.select(finite, unit, ir.Constant(F32, float("nan"))), ir.Constant(F32, 0.0))
            inverse = b.bitcast(b.shl(b.sub(I32(254), exponent), I32(23)), F32)
            inverse = b.select(b.and_(usable, finite), inverse, ir.Constant(F32, 0.0))
        store_at(b, unit, place, 4)
        store_at(b, inverse, b.add(place, I64(4)), 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def quantize_block(typingctx, source, target, unit):
    """Writes the 64 bytes of a record for 32 float32. unit: address of that, from `write_unit`."""

    def codegen(context, b, sig, args):
        source, target, unit = args
        inverse = load_at(b, b.add(unit, I64(4)), F32, 4)
        _write_block(context, b, [load_at(b, b.add(source, I64(i)), F32x16) for i in (0, 64)], target, inverse)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def quantize_rest(typingctx, source, target, rest, unit):
    """What the record at `target` is short of for 32 float32: its remainder, to `rest`, and its flag."""

    def codegen(context, b, sig, args):
        source, target, rest, unit = args
        halves, inverse = [], load_at(b, b.add(unit, I64(4)), F32, 4)
        for i in range(2):
            scale = b.fmul(load_at(b, b.add(target, I64(SCALE_LOW + 4 * i)), F32, 4), load_at(b, unit, F32, 4))
            scale = spread(b, scale, F32x16)
            q = b.sitofp(load_at(b, b.add(target, I64(16 * i)), I8x16), F32x16)
            x = load_at(b, b.add(source, I64(64 * i)), F32x16)
            halves.append(emit_fma(context, b, b.fneg(q), scale, x))
        _write_block(context, b, halves, rest, inverse)
        store_at(b, I32(1), b.add(target, I64(FLAG)), 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


record_bytes = njit(activation_bytes)


@njit
def inexactness(record):
    """Sum of d² of both halves of a block: the squares of what it is short of are in proportion to it."""
    low, high = load_f32(record + SCALE_LOW), load_f32(record + SCALE_HIGH)
    return low * low + high * high


@njit
def clear(block):
    for i in range(0, RECORD, 16):
        store(block + i, to_i8(splat_i32(0)))


@njit
def quantize_row(x, n_cols, out, limit):
    """Writes the record of the `n_cols` float32 at address `x` to address `out`; limit: see `records`."""
    n_blocks = n_cols // BLOCK
    total = 0.0
    stride = record_bytes(n_cols)
    rest, unit = out + stride // 2, out + stride - RECORD
    write_unit(x, n_cols, unit)
    for i in range(n_blocks):
        quantize_block(x + 4 * BLOCK * i, out + RECORD * i, unit)
        total += inexactness(out + RECORD * i)
    for i in range(n_blocks):
        if inexactness(out + RECORD * i) * n_blocks > limit * total:
            quantize_rest(x + 4 * BLOCK * i, out + RECORD * i, rest + RECORD * i, unit)
        else:
            clear(rest + RECORD * i)
    if n_blocks % 2 == 1:
        clear(out + RECORD * n_blocks)
        clear(rest + RECORD * n_blocks)


def quantize(op, env, begin, end):
    """Unit: the record of one token."""
    workspace = load_i64(env + _WORKSPACE)
    x, q = workspace + load_i64(op + _X), workspace + load_i64(op + _Q)
    n_cols, x_stride, q_stride = load_i64(op + _N_COLS), load_i64(op + _X_STRIDE), load_i64(op + _Q_STRIDE)
    for token in range(begin, end):
        quantize_row(x + token * x_stride, n_cols, q + token * q_stride, load_f32(op + _LIMIT))


def quantize_int16(op, env, begin, end):
    """Unit: the `int16` record of one token."""
    workspace, n_cols = load_i64(env + _WORKSPACE), load_i64(op + _N_COLS)
    x, q = workspace + load_i64(op + _X), workspace + load_i64(op + _Q)
    x_stride, q_stride = load_i64(op + _X_STRIDE), load_i64(op + _Q_STRIDE)
    for token in range(begin, end):
        call_function(int16_record_code("F32"), x + token * x_stride, n_cols, q + token * q_stride)
