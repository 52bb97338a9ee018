"""Attention with keys and values of 8 and 4 bits, laid out as `kv_types.BlockArray` says: products of whole numbers.

Queries, and weights times the scales of values, become whole numbers of 15 bits, so that nothing is lost that could be
seen; each is two signed bytes, 128 * high + low, and takes two products of bytes. Sums of 32 dimensions, or of the
positions of a page, are exact: so neither the order nor the machine changes a bit.

Knows nothing of softmax or of how the work is divided.
"""

from __future__ import annotations

from llvmlite import ir

from edgelm.kernels.attention_tiles import addresses_ahead
from edgelm.kernels.emit import (
    F32,
    I8,
    I16,
    I32,
    I64,
    I8x16,
    I8x64,
    I16x16,
    I16x64,
    I32x16,
    I32x32,
    I64x16,
    load_at,
    repeat,
    shuffle,
    spread,
    store_at,
    target,
)
from edgelm.kernels.isa import Form, joined, parts
from edgelm.kernels.isas import select as select_isa
from edgelm.kernels.words import Emitter, Value, function
from edgelm.kv_types import BLOCK, PAGE, SCALES, block_bytes

LARGEST = 127 * 128 + 63  # of whole numbers of 15 bits
TINY = 2.0**-126  # the smallest normal float32
MOST_AHEAD = 3  # of `places_ahead`: there is more work on each byte than with floats
NOTHING = 2.0**-60  # a weight that counts for nothing beside the largest, which is 1; products of smaller are slow
MAGIC = 1.5 * 2.0**23  # adding it rounds to a whole number, to nearest even, in the low bits
MAGNITUDE, INFINITY = 0x7FFFFFFF, 0x7F800000

# A block of a query: bytes of 32 dimensions, and minus `zero` times their sum. It takes the place of 32 float32.
QUERY_LOW, QUERY_OFFSET, QUERY = BLOCK, 2 * BLOCK, 4 * BLOCK
# Weights of a page: bytes of 64 positions, minus `zero` times their sum, and their scale.
WEIGHTS_LOW, WEIGHTS_OFFSET, WEIGHTS_SCALE, WEIGHTS = PAGE, 2 * PAGE, 2 * PAGE + 4, 160


def _form(e: Emitter, bits: int) -> Form:
    """How the machine wants the bytes of keys and values: TOP or LOW are as they are stored."""
    return Form.LOW if bits == 4 else select_isa(e.context).form(bits, zero=True)


def _zero(e: Emitter, bits: int) -> int:
    """What has to be taken from each of them."""
    return 0 if _form(e, bits) is Form.SIGNED and not _as_words(e, bits) else 1 << (bits - 1)


def _zero_of(e, bits):
    return e.select(bits.is_(8), e.word(_zero(e, 8)), _zero(e, 4))


def _as_words(e: Emitter, bits: int) -> bool:
    """Whether whole numbers of 15 bits are multiplied as they are, not as two bytes: where bytes are widened anyway."""
    return select_isa(e.context).widens(_form(e, bits))


def _row_tiles(e: Emitter) -> tuple[int, ...]:
    """Rows whose sums, of two bytes and 32 columns each, fit into the registers."""
    _, features = target(e.context)
    return (4, 3, 2, 1) if "avx512f" in features else (1,)


# --- float32 to whole numbers


def _as(e: Emitter, x: Value, type_: ir.Type) -> Value:
    return Value(e, e.b.bitcast(x.llvm, type_))


def _magnitude(e, x):
    """The bits of |x|, which are ordered as |x| is, with infinity and NaN above all."""
    return Value(e, e.b.and_(_as(e, x, I32x16).llvm, repeat(I32x16, MAGNITUDE)))


def _larger(e, x, y):
    return Value(e, e.b.select(e.b.icmp_signed(">", x.llvm, y.llvm), x.llvm, y.llvm))


def _smaller(e, x, y):
    return Value(e, e.b.select(e.b.icmp_signed("<", x.llvm, y.llvm), x.llvm, y.llvm))


def _largest(e, magnitudes):
    """The largest of the lanes, a float32."""
    return _as(e, e.across(magnitudes, lambda x, y: _larger(e, x, y)), F32)


def _rounded(e, x):
    """The nearest whole numbers of x, below 2**22, in lanes of int32."""
    magic = e.vector(MAGIC)
    return _as(e, x + magic, I32x16) - _as(e, magic, I32x16)


def _scale(e, largest):
    """(scale, its inverse in all lanes) that make `largest` LARGEST; both 0 where there is next to nothing."""
    scale = largest * (1 / LARGEST)
    empty, zero = scale < TINY, Value(e, F32(0.0))
    inverse = Value(e, F32(float(LARGEST))) / largest
    return e.select(empty, zero, scale), e.vector(e.select(empty, zero, inverse))


def _store_numbers(e, x, inverse, bits, to, i, low):
    """x times inverse as whole numbers, which are returned. They are numbers i, i + 1 … of those at `to`.

    As their upper bytes, and `low` bytes behind them the lower ones; or as int16, where that is how they are multiplied
    with numbers of so many bits.
    """
    b, numbers = e.b, _rounded(e, x * inverse)

    def two_bytes():
        upper = b.ashr(b.add(numbers.llvm, repeat(I32x16, 64)), repeat(I32x16, 7))
        lower = b.sub(numbers.llvm, b.shl(upper, repeat(I32x16, 7)))
        e.store(to + i, Value(e, b.trunc(upper, I8x16)))
        e.store(to + low + i, Value(e, b.trunc(lower, I8x16)))

    if _as_words(e, 8):
        with e.choose(bits.is_(8)) as (eight, four):
            with eight:
                e.store(to + 2 * i, Value(e, b.trunc(numbers.llvm, I16x16)))
            with four:
                two_bytes()
    else:
        two_bytes()
    return numbers


def _store_offset(e, address, numbers, zero):
    total = e.across(numbers, lambda x, y: x + y)
    zero = Value(e, e.b.trunc(zero.llvm, I32))
    e.store(address, Value(e, I32(0)) - total * zero)


@function
def quantize_query(e, x, n, bits, scale_to):
    """n float32 at x, whole blocks, to as many blocks of a query in the same place; their scale to `scale_to`."""
    most = e.variable(Value(e, ir.Constant(I32x16, None)))
    with e.loop(0, n, 16) as i:
        most.set(_larger(e, most.get(), _magnitude(e, e.load(x + 4 * i))))
    scale, inverse = _scale(e, _largest(e, most.get()))
    e.store(scale_to, scale)
    zero = _zero_of(e, bits)
    with e.loop(0, 4 * n, QUERY) as at:
        halves = [e.load(x + at + 64 * i) for i in range(2)]
        numbers = [_store_numbers(e, half, inverse, bits, x + at, 16 * i, QUERY_LOW) for i, half in enumerate(halves)]
        _store_offset(e, x + at + QUERY_OFFSET, numbers[0] + numbers[1], zero)


@function
def quantize_weights(e, n_rows, weights, weights_stride, scales, bits, to):
    """Weights of a page's positions, 64 float32 a row, times the scales of a block of values."""
    zero, wide = _zero_of(e, bits), [e.load_f16(scales + 32 * i) for i in range(4)]
    with e.loop(0, n_rows) as r:
        record, products = to + WEIGHTS * r, []
        for i, scale in enumerate(wide):
            weight = e.load(weights + weights_stride * r + 64 * i)
            products.append(e.select(weight < NOTHING, e.vector(0.0), weight * scale))  # unseen: the scale is anything
        sizes = [_magnitude(e, product) for product in products]
        most = _larger(e, _larger(e, *sizes[:2]), _larger(e, *sizes[2:]))
        scale, inverse = _scale(e, _largest(e, most))
        numbers = [_store_numbers(e, product, inverse, bits, record, 16 * i, WEIGHTS_LOW)
                   for i, product in enumerate(products)]
        _store_offset(e, record + WEIGHTS_OFFSET, (numbers[0] + numbers[1]) + (numbers[2] + numbers[3]), zero)
        e.store(record + WEIGHTS_SCALE, scale)


# --- products


def _bytes(e, bits, address):
    """64 bytes of keys or values as the machine wants them: of 4 bits two vectors, the low halves and the high."""
    b, raw = e.b, load_at(e.b, address.llvm, I8x64)
    if bits == 4:
        return [b.and_(raw, repeat(I8x64, 15)), b.lshr(raw, repeat(I8x64, 4))]
    return [raw if _zero(e, bits) else b.xor(raw, repeat(I8x64, 0x80))]


class _Words:
    """Sums of products of `rows` rows of int16 with two vectors of columns of bytes, in registers: as `_Dots`.

    Four numbers of each column lie side by side; so there are two sums for each, which are added up in the end.
    """

    def __init__(self, e: Emitter, rows: int) -> None:
        self.e, self.isa = e, select_isa(e.context)
        self.sums = [[e.variable(Value(e, ir.Constant(I32x32, None))) for _ in range(2)] for _ in range(rows)]

    def begin(self, offsets: list[Value]) -> None:
        self.offsets = offsets
        for row in self.sums:
            for slot in row:
                slot.set(Value(self.e, ir.Constant(I32x32, None)))

    def add(self, x: list[Value], low: int, first: int, steps: list[tuple[int, list[ir.Value]]]) -> None:
        b, n = self.e.b, 2 * self.isa.n_parts
        sums = [[parts(b, slot.get().llvm, n) for slot in row] for row in self.sums]
        for chunk, vectors in steps:
            words = [parts(b, b.zext(vector, I16x64), n) for vector in vectors]
            for row, record in zip(sums, x, strict=True):
                address = (record + 2 * (first + 4 * chunk)).llvm
                four = parts(b, b.bitcast(spread(b, load_at(b, address, I64), I64x16), I16x64), n)[0]
                for column, own in enumerate(words):
                    row[column] = [self.isa.add_pairs(b, *both, four) for both in zip(row[column], own, strict=True)]
        for row, slots in zip(sums, self.sums, strict=True):
            for done, slot in zip(row, slots, strict=True):
                slot.set(Value(self.e, joined(b, done)))

    def end(self) -> list[list[Value]]:
        """[row][column vector] float32."""
        e, b, results = self.e, self.e.b, []
        for row, offset in zip(self.sums, self.offsets, strict=True):
            first, whole = spread(b, load_at(b, offset.llvm, I32), I32x16), []
            for sums in (slot.get().llvm for slot in row):
                even, odd = (shuffle(b, sums, sums, [*range(i, 32, 2)]) for i in range(2))
                whole.append(b.add(b.add(even, odd), first))
            results.append([Value(e, b.sitofp(w, e.vector(0.0).llvm.type)) for w in whole])
        return results


class _Dots:
    """Sums of products of `rows` rows of two bytes with two vectors of columns, in registers."""

    def __init__(self, e: Emitter, bits: int, rows: int) -> None:
        self.e, self.bits, self.isa, self.form = e, bits, select_isa(e.context), _form(e, bits)
        self.sums = [[[e.variable(Value(e, ir.Constant(I32x16, None))) for _ in range(2)] for _ in range(2)]
                     for _ in range(rows)]  # [row][column vector][high, low]

    def begin(self, offsets: list[Value]) -> None:
        """offsets: addresses, one for each row."""
        e = self.e
        for row, offset in zip(self.sums, offsets, strict=True):
            first = Value(e, spread(e.b, load_at(e.b, offset.llvm, I32), I32x16))
            for high, low in row:
                high.set(Value(e, ir.Constant(I32x16, None)))
                low.set(first)

    def add(self, x: list[Value], low: int, first: int, steps: list[tuple[int, list[ir.Value]]]) -> None:
        """Adds products of each row's numbers, from `first` on of those at `x`, with the vectors of `steps`, (four of
        them, columns). `low` as for `_store_numbers`."""
        b, isa = self.e.b, self.isa
        sums = [[[isa.empty(b, sums.get().llvm) for sums in column] for column in row] for row in self.sums]
        for chunk, vectors in steps:
            for row, record in zip(sums, x, strict=True):
                for which, address in enumerate((record + first, record + low + first)):
                    four = isa.input(b, address.llvm, chunk)
                    for column, vector in zip(row, vectors, strict=True):
                        column[which] = isa.step(b, column[which], vector, four, self.form, self.bits)
        for row, slots in zip(sums, self.sums, strict=True):
            for column, pair in zip(row, slots, strict=True):
                for done, slot in zip(column, pair, strict=True):
                    slot.set(Value(self.e, isa.end(b, done)))

    def end(self) -> list[list[Value]]:
        """[row][column vector] float32."""
        e, b, results = self.e, self.e.b, []
        for row in self.sums:
            whole = [b.add(b.shl(high.get().llvm, repeat(I32x16, 7)), low.get().llvm) for high, low in row]
            results.append([Value(e, b.sitofp(w, e.vector(0.0).llvm.type)) for w in whole])
        return results


def _dots(e, bits, rows):
    return _Words(e, rows) if _as_words(e, bits) else _Dots(e, bits, rows)


def _fetch(e, next_ones, at, n):
    for address in next_ones:
        for line in range(0, n, 64):
            e.prefetch(address + at + line)


def _keys_tile(e, bits, rows, n_blocks, x, x_stride, scales, scales_stride, keys, column, sums, sums_stride, next_ones):
    """32 columns of `multiply_keys`."""
    totals, dots = [[e.variable(e.vector(0.0)) for _ in range(2)] for _ in range(rows)], _dots(e, bits, rows)
    with e.loop(0, n_blocks) as block:
        queries = [x + x_stride * r + QUERY * block for r in range(rows)]
        at = block_bytes(bits) * block
        dots.begin([query + QUERY_OFFSET for query in queries])
        _fetch(e, next_ones, at + 2 * column, 64)
        with e.loop(0, bits // 4) as i:
            steps, fours = [], at + SCALES + 4 * column + 1024 * i
            for chunk in range(4):
                _fetch(e, next_ones, fours + 256 * chunk, 128)
                pair = [_bytes(e, bits, keys + fours + 256 * chunk + 64 * c) for c in range(2)]
                steps += [(4 * half + chunk, list(columns)) for half, columns in enumerate(zip(*pair, strict=True))]
            dots.add(queries, QUERY_LOW, 16 * i, steps)
        scale = [e.load_f16(keys + at + 2 * column + 32 * c) for c in range(2)]
        for row, dot in zip(totals, dots.end(), strict=True):
            for c in range(2):
                row[c].set(e.fma(dot[c], scale[c], row[c].get()))
    for r, row in enumerate(totals):
        scale = e.vector(e.load_f32(scales + scales_stride * r))
        for c in range(2):
            e.store(sums + sums_stride * r + 4 * column + 64 * c, row[c].get() * scale)


def _values_tile(e, bits, rows, x, values, sums, sums_stride, next_ones):
    """`multiply_values` for a number of rows that is known while it is written."""
    dots, records = _dots(e, bits, rows), [x + WEIGHTS * r for r in range(rows)]
    dots.begin([record + WEIGHTS_OFFSET for record in records])
    _fetch(e, next_ones, 0, SCALES)
    line = BLOCK * bits // 2  # bytes of four positions
    with e.loop(0, PAGE // 16) as i:
        steps, fours = [], SCALES + 4 * line * i
        for chunk in range(4):
            _fetch(e, next_ones, fours + line * chunk, line)
            pair = [_bytes(e, bits, values + fours + line * chunk + at) for at in range(0, line, 64)]
            steps.append((chunk, [vector for vectors in pair for vector in vectors]))
        dots.add(records, WEIGHTS_LOW, 16 * i, steps)
    for r, dot in enumerate(dots.end()):
        scale = e.vector(e.load_f32(records[r] + WEIGHTS_SCALE))
        for c in range(2):
            at = sums + sums_stride * r + 64 * c
            e.store(at, e.fma(dot[c], scale, e.load(at)))


def _multiply_keys(bits: int):
    def write(e, n_rows, n_blocks, x, x_stride, scales, scales_stride, keys, n_columns, sums, sums_stride, ahead):
        done, next_ones = e.variable(0), addresses_ahead(e, ahead, e.word(0))[:MOST_AHEAD]
        for rows in _row_tiles(e):
            with e.repeat(lambda rows=rows: done.get() + rows <= n_rows):
                r = done.get()
                fetched = [e.select(r.is_(0), address, keys) for address in next_ones]  # once is enough
                with e.loop(0, n_columns, BLOCK) as column:
                    _keys_tile(e, bits, rows, n_blocks, x + x_stride * r, x_stride, scales + scales_stride * r,
                               scales_stride, keys, column, sums + sums_stride * r, sums_stride, fetched)
                done.set(r + rows)

    write.__qualname__ = f"multiply_keys_{bits}"
    return function(write)


def _multiply_values(bits: int):
    def write(e, n_rows, x, values, sums, sums_stride, ahead, behind):
        done, next_ones = e.variable(0), addresses_ahead(e, ahead, behind)[:MOST_AHEAD]
        for rows in _row_tiles(e):
            with e.repeat(lambda rows=rows: done.get() + rows <= n_rows):
                r = done.get()
                fetched = [e.select(r.is_(0), address, values) for address in next_ones]
                _values_tile(e, bits, rows, x + WEIGHTS * r, values, sums + sums_stride * r, sums_stride, fetched)
                done.set(r + rows)

    write.__qualname__ = f"multiply_values_{bits}"
    return function(write)


_KEYS, _VALUES = ({bits: write(bits) for bits in (8, 4)} for write in (_multiply_keys, _multiply_values))


def multiply_keys(e: Emitter, bits: Value, *arguments) -> None:
    """sums (n_rows, n_columns) = q·k of a page's first positions, 32 or 64 of them.

    Arguments: n_rows, n_blocks of a head, x and x_stride (blocks of queries), scales and scales_stride (of queries),
    keys, n_columns, sums, sums_stride, ahead (as for `attention_tiles.multiply`).
    """
    for n, product in _KEYS.items():
        with e.when(bits.is_(n)):
            product(e, *arguments)


def multiply_values(e: Emitter, bits: Value, *arguments) -> None:
    """sums (n_rows, 32) += p·v of a page, for a block of dimensions.

    Arguments: n_rows, x (what `quantize_weights` wrote), values, sums, sums_stride, ahead, behind.
    """
    for n, product in _VALUES.items():
        with e.when(bits.is_(n)):
            product(e, *arguments)


# --- storing


@function
def quantize_block(e, x, bits, to):
    """32 float32 at x to numbers plus zero, `to` 32 or 16 bytes; returns the bits of their scale, a float16."""
    b, halves = e.b, [e.load(x + 64 * i) for i in range(2)]
    most = _largest(e, _larger(e, *(_magnitude(e, half) for half in halves)))
    top = e.largest(e.max(*halves))
    signed = e.select(top.is_(most), most, Value(e, b.fneg(most.llvm))) * -0.125
    scale = e.select(bits.is_(8), most * (1 / 127), signed)
    half_scale = e.narrow(e.vector(scale))
    wide = e.widen(half_scale)
    inverse = e.select(wide.is_not(0.0), e.vector(1.0) / wide, e.vector(0.0))
    zero = e.select(bits.is_(8), e.word(128), 8)
    lanes = [_rounded(e, half * inverse) + e.spread_int(zero) for half in halves]
    lanes = [_smaller(e, _larger(e, x, e.spread_int(e.word(0))), e.spread_int(2 * zero - 1)) for x in lanes]
    with e.choose(bits.is_(8)) as (eight, four):
        with eight:
            for i, x in enumerate(lanes):
                e.store(to + 16 * i, Value(e, b.trunc(x.llvm, I8x16)))
        with four:
            both = b.or_(lanes[0].llvm, b.shl(lanes[1].llvm, repeat(I32x16, 4)))
            e.store(to, Value(e, b.trunc(both, I8x16)))
    finite = _as(e, most, I32) < INFINITY
    stored = b.select(finite.llvm, e.lane(half_scale).llvm, I16(0x7E00))
    return Value(e, b.zext(stored, I64))


@function
def store_block(e, x, bits, column, keys, to):
    """The 32 float32 at x to a block of a page, at position `column` of it."""
    numbers, b = e.stack(BLOCK), e.b
    scale = quantize_block(e, x, bits, numbers)
    e.store(to + 2 * column, Value(e, b.trunc(scale.llvm, I16)))
    to = to + SCALES
    with e.choose(keys.is_not(0)) as (fours, ones):
        with fours, e.loop(0, 4 * bits, 4) as i:
            e.store(to + PAGE * i + 4 * column, Value(e, load_at(b, (numbers + i).llvm, I32)))
        with ones, e.loop(0, 4 * bits) as i:
            at = to + 16 * bits * (column // 4) + 4 * i + column % 4
            store_at(b, load_at(b, (numbers + i).llvm, I8), at.llvm)
