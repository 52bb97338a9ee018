"""The inner loops of attention: small matrix products whose sums stay in registers.

The same product serves q·k, with positions in lanes, and p·v, with dimensions in lanes. Each sum runs over its index in
ascending order with one fused multiply-add at a time, or one pair of bfloat16 at a time, whatever the number of rows of
a tile: so how queries are put together into tiles, and how wide the registers are, changes no bit of a result.

Where the processor adds two products of bfloat16 at a time (`has_pairs`), keys and values of that type are multiplied
in pairs, and queries and weights are rounded to it: twice as many multiply-adds, and what it costs is a twentieth of
what activations of int8 cost (docs/LOG.md).

Knows nothing of pages or softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from edgelm.kernels.abi import WORD
from edgelm.kernels.emit import (
    I32,
    F32x16,
    I16x16,
    I16x32,
    I32x16,
    assembler,
    indices,
    load_at,
    repeat,
    spread,
    target,
    to_bfloat16,
)
from edgelm.kernels.isas import is_amd
from edgelm.kernels.words import Emitter, Value, function

WIDTH = 64  # columns of a product; 32 or 16 for what remains
ROWS = (6, 4, 3, 2, 1)  # of tiles; the largest that fits is taken
NARROW_ROWS = (6, 1)
LINE = 64  # bytes of a cache line
PAIRS_LINE = 4 * WIDTH  # bytes of a line of keys or values of bfloat16: a pair for each column


def has_pairs(e: Emitter) -> bool:
    """Whether there is an instruction that adds two products of bfloat16 to each lane."""
    return "avx512bf16" in target(e.context)[1]


def _register_vectors(e: Emitter) -> int:
    """How many vectors of 16 lanes a tile of six rows is wide, so that all of it fits into the registers."""
    _, features = target(e.context)
    return 4 if "avx512f" in features else 1


# --- what is multiplied with what


def rounded(e: Emitter, low: Value, high: Value) -> Value:
    """32 float32, two vectors, as bfloat16 in the same order: I32x16. The same bits as `kv_types.bfloat16`."""
    if has_pairs(e):
        return Value(e, e.b.bitcast(to_bfloat16(e.b, low.llvm, high.llvm), I32x16))
    halves = [e.b.trunc(_upper(e, x).llvm, I16x16) for x in (low, high)]
    return Value(e, e.b.bitcast(e.b.shuffle_vector(*halves, indices(0, 32)), I32x16))


def _upper(e: Emitter, x: Value) -> Value:
    """float32 as bfloat16, each in the lower half of a lane, by whole numbers."""
    b, bits = e.b, Value(e, e.b.bitcast(x.llvm, I32x16))

    def lower(value):
        return Value(e, b.lshr(value.llvm, repeat(I32x16, 16)))

    def where(condition, value, other):
        return Value(e, b.select(condition, value.llvm, other.llvm))

    magnitude, upper = bits & 0x7FFFFFFF, lower(bits)
    nearest = lower(bits + ((upper & 1) + 0x7FFF))
    nearest = where(b.icmp_signed("<", magnitude.llvm, repeat(I32x16, 0x00800000)), upper & 0x8000, nearest)
    return where(b.icmp_signed(">", magnitude.llvm, repeat(I32x16, 0x7F800000)), upper | 0x40, nearest)


def add_products(e: Emitter, x: Value, y: Value, total: Value) -> Value:
    """The total of each lane, to which the products of its two pairs of bfloat16 are added."""
    return Value(e, assembler(e.b, F32x16, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [total.llvm, x.llvm, y.llvm]))


def _add_pairs(e: Emitter, x: Value, columns: Value, total: Value) -> Value:
    """Adds the products of pairs of bfloat16, which lie side by side; x: address of two bfloat16, or float32."""
    if has_pairs(e):
        return add_products(e, Value(e, spread(e.b, load_at(e.b, x.llvm, I32), I32x16)), columns, total)
    first = Value(e, e.b.bitcast(e.b.shl(columns.llvm, repeat(I32x16, 16)), F32x16))
    second = Value(e, e.b.bitcast((columns & UPPER).llvm, F32x16))
    return _add_one(e, x + 4, second, _add_one(e, x, first, total))


def _add_one(e: Emitter, x: Value, column: Value, total: Value) -> Value:
    return e.fma(e.vector(e.load_f32(x)), column, total)


@dataclass(frozen=True)
class Form:
    """How the matrix of a product lies in memory, and what it is multiplied with.

    load(e, line): 16 columns of a step along the sum; size: bytes of a column in a line; numbers: how many of a sum
    make a step.
    """

    name: str
    load: Callable[..., Value]
    size: int
    numbers: int = 1

    @property
    def add(self) -> Callable[..., Value]:
        return _add_pairs if self.numbers == 2 else _add_one

    def factor(self, e: Emitter) -> int:
        """Bytes of a step of the other factor: of a float32, of two, or of two bfloat16."""
        return 8 if self.numbers == 2 and not has_pairs(e) else 4


def load_pairs(e: Emitter, line: Value) -> Value:
    """16 pairs of bfloat16."""
    return Value(e, load_at(e.b, line.llvm, I32x16))


LOWER, UPPER = 0xFFFF, -0x10000  # of a lane with a pair
F32_FLOATS = Form("f32", lambda e, line: e.load(line), 4)
F16_FLOATS = Form("f16", lambda e, line: e.load_f16(line), 2)
PAIRS = Form("pairs", load_pairs, 4, 2)
FIRST_OF_PAIR = Form("first_of_pair", lambda e, line: load_pairs(e, line) & LOWER, 4, 2)
SECOND_OF_PAIR = Form("second_of_pair", lambda e, line: load_pairs(e, line) & UPPER, 4, 2)


# --- products


def places_ahead(e: Emitter) -> tuple[int, ...]:
    """Which of the pieces that are read next are asked for while one is read.

    AMD's drop what they have no room for. With narrow registers there is less time for asking (docs/LOG.md).
    """
    if not is_amd(e.context):
        return (2,)
    return (1, 2, 3, 4) if _register_vectors(e) > 1 else (1, 2)


def addresses_ahead(e: Emitter, ahead: Value, behind: Value) -> list[Value]:
    """What to ask for next. ahead: address of a word for each of `places_ahead`."""
    return [e.load_word(ahead + WORD * i) + behind for i in range(len(places_ahead(e)))]


def _tile(e, n_rows, n_vectors, form, n, x, x_stride, m, m_stride, sums, sums_stride, fresh, next_ones):
    """`multiply` for a number of rows and vectors of columns that is known while it is written."""
    slots = []
    for r in range(n_rows):
        row = []
        for c in range(n_vectors):
            slot = e.variable(e.vector(0.0))
            with e.when(fresh.is_(0)):
                slot.set(e.load(sums + sums_stride * r + 64 * c))
            row.append(slot)
        slots.append(row)
    n_bytes = 16 * n_vectors * form.size
    with e.loop(0, n) as i:
        line, factor = m + m_stride * i, x + form.factor(e) * i
        for address in next_ones:
            for at in range(0, n_bytes, LINE):
                e.prefetch(address + n_bytes * i + at)
        vectors = [form.load(e, line + 16 * form.size * c) for c in range(n_vectors)]
        for r, row in enumerate(slots):
            for vector, slot in zip(vectors, row, strict=True):
                slot.set(form.add(e, factor + x_stride * r, vector, slot.get()))
    for r, row in enumerate(slots):
        for c, slot in enumerate(row):
            e.store(sums + sums_stride * r + 64 * c, slot.get())


def _multiply(width: int, form: Form, tiles: tuple[int, ...]):
    def write(e, n_rows, n, x, x_stride, m, m_stride, sums, sums_stride, fresh, ahead, behind):
        vectors = min(width // 16, _register_vectors(e))
        done = e.variable(0)
        for rows in tiles:
            with e.repeat(lambda rows=rows: done.get() + rows <= n_rows):
                r = done.get()
                for c in range(0, width // 16, vectors):
                    asks = width == WIDTH and rows < ROWS[0]
                    next_ones = addresses_ahead(e, ahead, behind + 16 * form.size * c * n) if asks else []
                    _tile(e, rows, vectors, form, n, x + x_stride * r, x_stride, m + 16 * form.size * c, m_stride,
                          sums + sums_stride * r + 64 * c, sums_stride, fresh, next_ones)
                done.set(r + rows)

    write.__qualname__ = f"multiply_{width}_{form.name}"
    return function(write)


_PRODUCTS = {
    form: {width: _multiply(width, form, rows if width == WIDTH else narrow_rows) for width in (WIDTH, 32, 16)}
    for forms, rows, narrow_rows in (
        ((F32_FLOATS, F16_FLOATS, PAIRS), ROWS, NARROW_ROWS),
        ((FIRST_OF_PAIR, SECOND_OF_PAIR), (1,), (1,)),
    )
    for form in forms
}


def multiply(e: Emitter, width: Value, form: Form, *arguments) -> None:
    """sums (n_rows, width) += x (n_rows, n) @ m (n, width), width 64, 32 or 16, in steps of the form.

    Arguments: n_rows, n (steps), x, x_stride, m, m_stride, sums, sums_stride, fresh, ahead, behind. Strides in bytes;
    if not fresh, sums are added to. With few rows memory is what there is to wait for, so as many bytes as are used are
    asked for, `behind` bytes behind each of the addresses at `ahead`: see `addresses_ahead`.
    """
    for columns, product in _PRODUCTS[form].items():
        with e.when(width.is_(columns)):
            product(e, *arguments)


@function
def convert(e, source, source_stride, to, n_rows, width):
    """n_rows rows of `width` float16 to rows of 64 float32."""
    with e.loop(0, n_rows) as r, e.loop(0, width, 16) as c:
        e.store(to + 4 * (WIDTH * r + c), e.load_f16(source + source_stride * r + 2 * c))


def _all_finite(form: Form):
    type_, magnitude, last = (I16x32, 0x7FFF, 0x80) if form.numbers == 2 else (I32x16, 0x7FFFFFFF, 0x800000)

    def write(e, m, stride, n_lines, width):
        """1 if lines have neither infinity nor NaN, whose exponents are all ones: one more is carried."""
        carried = e.variable(Value(e, ir.Constant(type_, None)))
        with e.loop(0, n_lines) as i, e.loop(0, width, 16) as c:
            bits = Value(e, load_at(e.b, (m + stride * i + 4 * c).llvm, type_))
            carried.set(carried.get() | ((bits & magnitude) + last))
        return e.select(e.across(carried.get(), lambda x, y: x | y) < 0, e.word(0), 1)

    write.__qualname__ = f"all_finite_{form.name}"
    return function(write)


all_finite = {form: _all_finite(form) for form in (F32_FLOATS, PAIRS)}


@function
def round_row(e, row, n):
    """n float32 at `row` to bfloat16 in their place. Up to 32 more may be written behind them."""
    with e.loop(0, n, 32) as i:
        e.store(row + 2 * i, rounded(e, e.load(row + 4 * i), e.load(row + 4 * i + 64)))
