"""Writes the records of `records`: activations as int8. Knows nothing of weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils

from edgelm.kernels import isas
from edgelm.kernels.abi import WORD, Env, Row
from edgelm.kernels.activation_tiles import in_tiles, write_tiles
from edgelm.kernels.emit import (
    F32,
    I8,
    I16,
    I32,
    I64,
    F32x16,
    I8x16,
    I8x64,
    I16x32,
    I32x16,
    I64x8,
    across,
    call,
    emit_fma,
    larger,
    load_at,
    repeat,
    shuffle,
    spread,
    store_at,
    undefined,
)
from edgelm.kernels.functions import call_function, statement
from edgelm.kernels.int16_tiles import int16_record_code
from edgelm.kernels.isa import Form, Isa
from edgelm.kernels.records import (
    BLOCK,
    FLAG,
    MAGIC,
    RECORD,
    SCALE_HIGH,
    SCALE_LOW,
    activation_bytes,
    chunk_at,
)
from edgelm.kernels.simd import add_f32, fma, load_f32, load_f32x16, load_i64, mul_f32, splat_f32, store, sum_f32

Value = ir.Value
TINY = 2.0**-126  # the smallest normal float32
AT_ONCE = 4  # blocks: what is one number for half a block fills lanes then
I32x4 = ir.VectorType(I32, 4)
_WORKSPACE = WORD * Env.WORKSPACE
_X, _X_STRIDE, _N_COLS, _Q, _Q_STRIDE, _LIMIT = (WORD * (Row.ARGS + i) for i in range(6))


def _pick(b: ir.IRBuilder, values: Value, lanes: list[int]) -> Value:
    return shuffle(b, values, undefined(values.type), lanes)


def _integers(floats: Value) -> ir.VectorType:
    return ir.VectorType(I32, floats.type.count)


def _scales(context: Any, b: ir.IRBuilder, peaks: Value, inverse_unit: Value) -> tuple[Value, Value]:
    """d of halves of blocks whose largest magnitudes are `peaks`, and what values are multiplied with."""
    isa = isas.select(context)
    return _whole_scales(b, isa, peaks, inverse_unit) if isa.whole_scales else _float_scales(b, peaks)


def _float_scales(b: ir.IRBuilder, peaks: Value) -> tuple[Value, Value]:
    floats, integers = peaks.type, _integers(peaks)
    scales = b.fmul(peaks, repeat(floats, 1 / 127))
    scales = b.bitcast(b.and_(b.bitcast(scales, integers), repeat(integers, -4)), floats)  # so that MAGIC * d is exact
    normal = b.fcmp_unordered(">=", scales, repeat(floats, TINY))  # a NaN stays
    inverses = b.select(normal, b.fdiv(repeat(floats, 1.0), scales), repeat(floats, 0.0))
    return b.select(normal, scales, repeat(floats, 0.0)), inverses


def _whole_scales(b: ir.IRBuilder, isa: Isa, peaks: Value, inverse_unit: Value) -> tuple[Value, Value]:
    floats, integers = peaks.type, _integers(peaks)
    units, most = spread(b, inverse_unit, floats), repeat(floats, (1 << isa.factor_bits) - 2)
    wanted = b.fmul(b.fmul(peaks, repeat(floats, 1 / 127)), units)
    wanted = b.select(b.fcmp_ordered("<", wanted, most), wanted, most)
    scales = b.sitofp(b.add(b.fptosi(wanted, integers), repeat(integers, 1)), floats)
    return scales, b.fdiv(units, scales)


def _peaks(b: ir.IRBuilder, halves: list[Value]) -> Value:
    """The largest magnitudes. Found as bits: so NaN is larger than infinity."""
    bits = [b.and_(b.bitcast(x, I32x16), repeat(I32x16, 0x7FFFFFFF)) for x in halves]
    peaks = across(b, bits, partial(larger, b))
    return b.bitcast(peaks, ir.VectorType(F32, peaks.type.count))


def _write_blocks(
    context: Any, b: ir.IRBuilder, halves: list[Value], scales: Value, inverses: list[Value], target: Value
) -> None:
    """Writes 64 bytes of a record for each two of `halves`, of 16 float32. inverses: one for each half."""
    isa = isas.select(context)
    products = [b.fmul(x, spread(b, inverse, F32x16)) for x, inverse in zip(halves, inverses, strict=True)]
    vectors = isa.n_parts == 1 and not isa.scales_sums  # AVX-512
    write = _write_floats if not isa.whole_scales else _write_vectors if vectors else _write_whole
    total, third, fourth, low, high = write(b, isa, products, scales, target)
    fields = [
        b.bitcast(scales, _integers(scales)), _in_turn(b, b.bitcast(total, low.type), third), _in_turn(b, fourth, low),
        _in_turn(b, high, repeat(high.type, 0)),
    ]  # two fields of each block, as they lie from SCALE_LOW on
    for i in range(0, len(halves), 2):
        lanes = [i, i + 1, len(halves) + i, len(halves) + i + 1]
        line = shuffle(b, shuffle(b, *fields[:2], lanes), shuffle(b, *fields[2:], lanes), list(range(8)))
        store_at(b, line, b.add(target, I64(RECORD * (i // 2) + SCALE_LOW)), 32)


Fields = tuple[Value, Value, Value, Value, Value]  # of each block, what is at 40, 44, 48, 52 and 56


def _write_floats(b: ir.IRBuilder, isa: Isa, products: list[Value], scales: Value, target: Value) -> Fields:
    """Writes the q of blocks, products rounded to nearest even, for scales that are any numbers."""
    sums = _write_quants(b, isa, products, target)
    total = b.fadd(*_low_and_high(b, b.fmul(scales, b.sitofp(sums, scales.type))))
    third, fourth = _low_and_high(b, b.bitcast(b.fmul(scales, repeat(scales.type, -MAGIC)), sums.type))
    return total, third, fourth, *_offsets(b, isa, sums)


def _offsets(b: ir.IRBuilder, isa: Isa, sums: Value) -> list[Value]:
    return _low_and_high(b, b.sub(repeat(sums.type, isa.first), b.mul(sums, repeat(sums.type, 128))))


def _write_quants(b: ir.IRBuilder, isa: Isa, products: list[Value], target: Value) -> Value:
    """Rounds `products` to nearest even, writes them, and returns sums of halves."""
    magic, quants = repeat(F32x16, MAGIC), []
    for x in products:
        quants.append(b.sub(b.bitcast(b.fadd(x, magic), I32x16), b.bitcast(magic, I32x16)))
    for i in range(0, len(quants), 2):
        bytes_ = [b.trunc(half, I8x16) for half in quants[i : i + 2]]
        store_at(b, shuffle(b, *bytes_, _order(isa.in_turn)), b.add(target, I64(RECORD * (i // 2))), 32)
    return across(b, quants, b.add)


def _write_whole(b: ir.IRBuilder, isa: Isa, products: list[Value], scales: Value, target: Value) -> Fields:
    """The same for whole scales."""
    factors = b.fptosi(scales, _integers(scales))
    sums = _write_quants(b, isa, products, target)
    both = _low_and_high(b, b.mul(sums, factors))
    total, (low, high) = b.add(*both), _low_and_high(b, factors)
    pairs = b.or_(low, b.shl(high, repeat(high.type, 16)))
    zero = b.mul(total, repeat(total.type, -8))
    offsets = [b.mul(own, repeat(own.type, -32)) for own in both] if isa.scales_sums else _offsets(b, isa, sums)
    return b.sitofp(total, _halved(scales.type)), pairs, zero, *offsets


def _write_vectors(b: ir.IRBuilder, isa: Isa, products: list[Value], scales: Value, target: Value) -> Fields:
    """The same with what AVX-512 has for it.

    Packing two blocks puts four q of each half of either side by side, so a product with ones adds up one half's.
    """
    n, fours, shorts = len(products), [], ir.VectorType(I16, len(products))
    to_nearest_even = ir.Constant(I32x16, None), ir.Constant(I16, -1), I32(4)  # of all lanes, as the processor is set
    wholes = [call(b, "llvm.x86.avx512.mask.cvtps2dq.512", I32x16, x, *to_nearest_even) for x in products]
    words = [call(b, "llvm.x86.avx512.packssdw.512", I16x32, *wholes[i : i + 2]) for i in range(0, n, 2)]
    for i in range(0, len(words), 2):
        quants = call(b, "llvm.x86.avx512.packsswb.512", I8x64, words[i], words[min(i + 1, len(words) - 1)])
        fours.append(isa.step(b, repeat(I32x16, 0), repeat(I8x64, 1), quants, Form.LOW, 1))
        for block in range(i, min(i + 2, len(words))):
            own = _pick(b, b.bitcast(quants, I64x8), list(range(block % 2, 8, 2)))
            store_at(b, own, b.add(target, I64(RECORD * block)), 32)
    sums = fours[0] if len(fours) == 1 else shuffle(b, *fours, list(range(32)))  # in lanes of four: of two blocks
    while sums.type.count > max(n, 4):
        even, odd = ([i for i in range(sums.type.count) if i // 4 % 2 == part] for part in range(2))
        sums = b.add(_pick(b, sums, even), _pick(b, sums, odd))
    sums = _pick(b, sums, list(range(n)))
    factors, short_sums = b.fptosi(scales, shorts), b.trunc(sums, shorts)
    both = (_pick(b, x, [i % n for i in range(8)]) for x in (factors, short_sums))
    total = _pick(b, call(b, "llvm.x86.sse2.pmadd.wd", I32x4, *both), list(range(n // 2)))
    zero = b.mul(total, repeat(total.type, -8))
    return b.sitofp(total, _halved(scales.type)), b.bitcast(factors, total.type), zero, *_offsets(b, isa, sums)


def _order(in_turn: bool) -> list[int]:
    """Which input of a block each byte of its record is."""
    places = {chunk_at(chunk, in_turn) + i: 4 * chunk + i for chunk in range(BLOCK // 4) for i in range(4)}
    return [places[place] for place in range(BLOCK)]


def _halved(type_: ir.VectorType) -> ir.VectorType:
    return ir.VectorType(type_.element, type_.count // 2)


def _low_and_high(b: ir.IRBuilder, values: Value) -> list[Value]:
    """Those of the first half of each block, and those of the second."""
    return [_pick(b, values, list(range(first, values.type.count, 2))) for first in range(2)]


def _in_turn(b: ir.IRBuilder, low: Value, high: Value) -> Value:
    n = low.type.count
    return shuffle(b, low, high, [i + n * part for i in range(n) for part in range(2)])


def _halves(b: ir.IRBuilder, source: Value, n_blocks: int) -> list[Value]:
    return [load_at(b, b.add(source, I64(64 * i)), F32x16) for i in range(2 * n_blocks)]


def _write_peaks(n_blocks: int) -> Any:
    def write(context: Any, b: ir.IRBuilder, x: Value, block: Value, peaks: Value) -> None:
        source = b.add(x, b.mul(block, I64(4 * BLOCK)))
        store_at(b, _peaks(b, _halves(b, source, n_blocks)), b.add(peaks, b.mul(block, I64(8))), 4)

    return write


def _write_unit(context: Any, b: ir.IRBuilder, peaks: Value, n_bytes: Value, place: Value) -> None:
    unit = inverse = ir.Constant(F32, 1.0)
    if isas.select(context).whole_scales:
        largest = cgutils.alloca_once_value(b, repeat(I32x16, 0))
        with cgutils.for_range(b, b.lshr(n_bytes, I64(6)), intp=I64) as loop:
            bits = load_at(b, b.add(peaks, b.shl(loop.index, I64(6))), I32x16)
            b.store(larger(b, bits, b.load(largest)), largest)
        bits = call(b, "llvm.vector.reduce.umax.v16i32", I32, b.load(largest))
        bits = b.bitcast(b.fmul(b.bitcast(bits, F32), ir.Constant(F32, 1 / 127)), I32)
        most = isas.select(context).factor_bits
        exponent = b.sub(b.lshr(bits, I32(23)), I32(most - 1))  # of the largest d, in units
        usable = b.icmp_signed(">", exponent, I32(0))
        finite = b.icmp_unsigned("<", bits, I32(0x7F800000))
        unit = b.bitcast(b.shl(exponent, I32(23)), F32)
        unit = b.select(usable, b.select(finite, unit, ir.Constant(F32, float("nan"))), ir.Constant(F32, 0.0))
        inverse = b.bitcast(b.shl(b.sub(I32(254), exponent), I32(23)), F32)
        inverse = b.select(b.and_(usable, finite), inverse, ir.Constant(F32, 0.0))
    store_at(b, unit, place, 4)
    store_at(b, inverse, b.add(place, I64(4)), 4)


def _write_scales(context: Any, b: ir.IRBuilder, peaks: Value, inverses: Value, unit: Value) -> None:
    inverse_unit = load_at(b, b.add(unit, I64(4)), F32, 4)
    scales, factors = _scales(context, b, load_at(b, peaks, F32x16), inverse_unit)
    store_at(b, scales, peaks)
    store_at(b, factors, inverses)


def _quantize_blocks(n_blocks: int) -> Any:
    def write(context: Any, b: ir.IRBuilder, source: Value, target: Value, scales: Value, inverses: Value) -> None:
        each = [load_at(b, b.add(inverses, I64(4 * i)), F32, 4) for i in range(2 * n_blocks)]
        own = load_at(b, scales, ir.VectorType(F32, 2 * n_blocks), 4)
        _write_blocks(context, b, _halves(b, source, n_blocks), own, each, target)

    return write


def _quantize_rest(context: Any, b: ir.IRBuilder, source: Value, target: Value, rest: Value, unit: Value) -> None:
    halves, inverse = [], load_at(b, b.add(unit, I64(4)), F32, 4)
    order, stored = _order(isas.select(context).in_turn), load_at(b, target, ir.VectorType(I8, BLOCK), 32)
    inputs = [order.index(i) for i in range(BLOCK)]  # where each is
    for i, x in enumerate(_halves(b, source, 1)):
        scale = b.fmul(load_at(b, b.add(target, I64(SCALE_LOW + 4 * i)), F32, 4), load_at(b, unit, F32, 4))
        q = b.sitofp(_pick(b, stored, inputs[16 * i : 16 * i + 16]), F32x16)
        halves.append(emit_fma(context, b, b.fneg(q), spread(b, scale, F32x16), x))
    scales, inverses = _scales(context, b, _peaks(b, halves), inverse)
    _write_blocks(context, b, halves, scales, [b.extract_element(inverses, I32(i)) for i in range(2)], rest)
    store_at(b, I32(1), b.add(target, I64(FLAG)), 4)


# (x, block, peaks): the largest magnitude of each half of this block of x, or of AT_ONCE from it on.
peaks_of_block, peaks_of_blocks = (statement(_write_peaks(n), 3) for n in (1, AT_ONCE))
# (peaks, n_bytes, place): the unit of a record with these peaks, 64 bytes of them at a time, and 1 / unit.
write_unit = statement(_write_unit, 3)
# (peaks, inverses, unit): 16 peaks become d; and what values are multiplied with.
write_scales = statement(_write_scales, 3)
# (source, target, scales, inverses): the 64 bytes of a record for each block.
quantize_block, quantize_blocks = (statement(_quantize_blocks(n), 4) for n in (1, AT_ONCE))
# (source, target, rest, unit): what the block at `target` is short of for its float32, to `rest`, and its flag.
quantize_rest = statement(_quantize_rest, 4)


record_bytes = njit(activation_bytes)


@njit
def inexactness(record):
    """Sum of d² of both halves of a block: the squares of what it is short of are in proportion to it."""
    low, high = load_f32(record + SCALE_LOW), load_f32(record + SCALE_HIGH)
    return low * low + high * high


@njit
def mean_square(x, n_blocks, inverse):
    """Of the inputs of a row, in units; inverse: 1 / unit."""
    low, high, factor = splat_f32(0.0), splat_f32(0.0), splat_f32(inverse)
    for place in range(x, x + 4 * BLOCK * n_blocks, 4 * BLOCK):
        first, second = mul_f32(load_f32x16(place), factor), mul_f32(load_f32x16(place + 64), factor)
        low, high = fma(first, first, low), fma(second, second, high)
    return sum_f32(add_f32(low, high)) / (BLOCK * n_blocks)


@njit
def clear(block):
    store(block, splat_f32(0.0))


@njit
def quantize_row(x, n_cols, out, limit):
    """Writes the record of the `n_cols` float32 at address `x` to address `out`; limit: see `records`.

    First all scales, then all blocks: a processor can begin many blocks while none waits for a scale of its own.
    """
    n_blocks = n_cols // BLOCK
    stride = record_bytes(n_cols)
    rest, unit = out + stride // 2, out + stride - RECORD
    whole, n_bytes = n_blocks // AT_ONCE * AT_ONCE, (8 * n_blocks + 63) // 64 * 64
    peaks, inverses = rest, rest + n_bytes  # until there are remainders
    clear(inverses - 64)
    for i in range(0, whole, AT_ONCE):
        peaks_of_blocks(x, i, peaks)
    for i in range(whole, n_blocks):
        peaks_of_block(x, i, peaks)
    write_unit(peaks, n_bytes, unit)
    for i in range(0, n_bytes, 64):
        write_scales(peaks + i, inverses + i, unit)
    for i in range(0, whole, AT_ONCE):
        quantize_blocks(x + 4 * BLOCK * i, out + RECORD * i, peaks + 8 * i, inverses + 8 * i)
    for i in range(whole, n_blocks):
        quantize_block(x + 4 * BLOCK * i, out + RECORD * i, peaks + 8 * i, inverses + 8 * i)
    if n_blocks % 2 == 1:
        clear(out + RECORD * n_blocks)
        clear(rest + RECORD * n_blocks)
    most = limit * mean_square(x, n_blocks, load_f32(unit + 4))
    for i in range(n_blocks):
        if inexactness(out + RECORD * i) > most:
            quantize_rest(x + 4 * BLOCK * i, out + RECORD * i, rest + RECORD * i, unit)
        else:
            clear(rest + RECORD * i)


@njit
def write_record(x, n_cols, first, stride, token, limit, tiled):
    """Writes the record of a token to its place among those that begin at `first`; or what the matrix unit wants."""
    if tiled:
        write_tiles(x, n_cols, first, stride, token)
    else:
        quantize_row(x, n_cols, first + token * stride, limit)


def quantize(op, env, begin, end):
    """Unit: the record of one token."""
    workspace = load_i64(env + _WORKSPACE)
    x, q = workspace + load_i64(op + _X), workspace + load_i64(op + _Q)
    n_cols, x_stride, q_stride = load_i64(op + _N_COLS), load_i64(op + _X_STRIDE), load_i64(op + _Q_STRIDE)
    tiled = in_tiles(op, env)
    for token in range(begin, end):
        write_record(x + token * x_stride, n_cols, q, q_stride, token, load_f32(op + _LIMIT), tiled)


def quantize_int16(op, env, begin, end):
    """Unit: the `int16` record of one token."""
    workspace, n_cols = load_i64(env + _WORKSPACE), load_i64(op + _N_COLS)
    x, q = workspace + load_i64(op + _X), workspace + load_i64(op + _Q)
    x_stride, q_stride = load_i64(op + _X_STRIDE), load_i64(op + _Q_STRIDE)
    tiled = in_tiles(op, env)
    for token in range(begin, end):
        if tiled:
            write_tiles(x + token * x_stride, n_cols, q, q_stride, token)
            continue
        call_function(int16_record_code("F32"), x + token * x_stride, n_cols, q + token * q_stride)
