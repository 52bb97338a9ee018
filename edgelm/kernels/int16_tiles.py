"""Generators of the innermost code for float16 and bfloat16 as `int16`: pack, look up, multiply, quantize activations.

    direct   32 rows x few tokens, straight from packed weights
    unpack   packed weights to a slab: 32 vectors of int16 and 16 scales for each block
    tile     32 rows x several tokens, from two slabs

For every row and token, blocks of 64 inputs are added in order, whatever the number of tokens:

    acc = fma(float(sum of x * w) * scale of x, scale of w, acc)

where the sum is an exact integer: the order within a block is free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgelm.kernels.abi import float_bits
from edgelm.kernels.amx import TILE, has_tiles
from edgelm.kernels.blocks import ROWS, at
from edgelm.kernels.emit import (
    F32,
    I8,
    I16,
    I32,
    I64,
    F32x16,
    I8x64,
    I16x16,
    I16x32,
    I32x16,
    across,
    assembler,
    bfloat16_pairs,
    call,
    emit_fma,
    fence,
    here,
    larger,
    load_at,
    opaque,
    prefetch_at,
    repeat,
    shuffle,
    spread,
    stack,
    store_at,
    target,
)
from edgelm.kernels.float_tiles import NUMBERS, Number
from edgelm.kernels.functions import Code, address_of, code_address, function_address, tile_fields
from edgelm.kernels.int16 import BLOCK, PIECE, RECORD, SCALES, UNIT, VALUES, W_MAX, X_MAX
from edgelm.kernels.isa import apart
from edgelm.kernels.lanes import Int, Place, Rows
from edgelm.kernels.records import MAGIC
from edgelm.kernels.slab_tiles import PAIR, ROW
from edgelm.kernels.tiles import AHEAD, FAR, behind, in_order, in_turn

Value = ir.Value
Pairs = Callable[[int], Value]  # the weights of pair i of a block's columns: I16x32
PAIRS = BLOCK // 2
SLAB_SCALES = 64 * PAIRS  # where in a block of a slab the scales lie
SLAB_UNIT = SLAB_SCALES + 64
SLAB_BLOCKS = 4  # that a tile goes over at a time: 17 KiB of weights stay in the first-level cache
SLAB_BYTES = SLAB_BLOCKS * SLAB_UNIT
CHAINS = 8  # sums that must be under way at once to hide how long a product takes


@dataclass(frozen=True)
class Machine:
    """A way to add products of int16 pairs. groups, tokens: shape of tiles; direct: tokens of `direct`.

    product: an LLVM intrinsic; or an instruction in assembler that adds to the sum by itself, because LLVM would take
    it apart again, into two.
    """

    needs: frozenset[str]
    n_parts: int  # registers that hold 64 bytes
    groups: int
    tokens: tuple[int, ...]
    direct: tuple[int, ...]
    product: str

    def step(self, b: ir.IRBuilder, total: Value, w: Value, x: Value) -> Value:
        """total + w * x: I32x16 of both products of a pair; w as I16x32, x as I32x16."""
        def add(own: Value, *pair: Value) -> Value:
            if self.product.startswith("llvm."):
                return here(b, b.add(own, call(b, self.product, own.type, *pair)))
            places = "=v,0,v,v" if self.n_parts == 1 else "=x,0,x,x"
            return assembler(b, own.type, self.product, places, [own, *pair])

        return apart(b, self.n_parts, add, total, w, b.bitcast(x, I16x32))


# Source: Intel intrinsics guide (vpdpwssd, pmaddwd).
MACHINES = (
    Machine(frozenset({"avx512vnni", "avx512bw"}), 1, 2, (8, 4, 2, 1), (4, 2, 1), "vpdpwssd $3, $2, $0"),
    Machine(frozenset({"avxvnni"}), 2, 1, (6, 4, 2, 1), (2, 1), "{vex} vpdpwssd $3, $2, $0"),
    Machine(frozenset({"avx512bw"}), 1, 2, (8, 4, 2, 1), (4, 2, 1), "llvm.x86.avx512.pmaddw.d.512"),
    Machine(frozenset({"avx2"}), 2, 1, (6, 4, 2, 1), (2, 1), "llvm.x86.avx2.pmadd.wd"),
    Machine(frozenset(), 4, 1, (2, 1), (1,), "llvm.x86.sse2.pmadd.wd"),
)


def machine(context: Any) -> Machine:
    """The first of `MACHINES` that Numba compiles for."""
    features = target(context)[1]
    return next(m for m in MACHINES if m.needs <= features)


# --- multiplying


def _int16_direct(context: Any, b: ir.IRBuilder, fmt: Any, args: list[Value], n_tokens: int) -> None:
    """(first, second, n_units, x, x_stride, out, _, next_first, next_second): products of two packed groups.

    x: records; out: (token, 2, 16) float32. The last two: groups that this thread will read next.
    """
    first, second, n_units, x, x_stride, out, _, next_first, next_second = args
    isa, one_stream = machine(context), in_order(context, n_tokens)
    n_groups = 1 if one_stream else isa.groups
    with cgutils.for_range(b, I64(2 // n_groups), intp=I64) as outer:
        weights, after = in_turn(b, outer.index, n_groups, [first, second, next_first, next_second])
        places = [(g, t) for t in range(n_tokens) for g in range(n_groups)]
        acc = {place: cgutils.alloca_once_value(b, ir.Constant(F32x16, None)) for place in places}
        with cgutils.for_range(b, n_units, intp=I64) as loop:
            units = [at(b, group, 0, loop.index, UNIT) for group in weights]
            for group, unit, follows in zip(weights, units, after, strict=True):
                for distance in FAR[isa.n_parts] if one_stream else (AHEAD,):
                    _prefetch(b, behind(b, unit, distance, at(b, group, 0, n_units, UNIT), follows))
            records = _spaced(b, at(b, x, 0, loop.index, RECORD), x_stride, n_tokens)
            pairs = [_unpacked(b, unit) for unit in units]
            scales = [load_at(b, at(b, unit, SCALES), F32x16, 64) for unit in units]
            _add_block(context, b, isa, pairs, scales, records, acc)
        out_here = b.add(out, b.mul(outer.index, I64(ROW)))
        for g, t in places:
            store_at(b, b.load(acc[g, t]), at(b, out_here, PAIR * t + ROW * g), 64)


def _int16_tile(context: Any, b: ir.IRBuilder, fmt: Any, args: list[Value], n_tokens: int) -> None:
    """(slab, second, n_blocks, x, x_stride, out, …): adds products of two groups to `out`.

    slab, second: blocks from `unpack` of either group; x: records; out: (token, 2, 16) float32.
    """
    first, second, n_blocks, x, x_stride, out = args[:6]
    isa = machine(context)
    with cgutils.for_range(b, I64(2 // isa.groups), intp=I64) as outer:
        slabs = [b.add(first, b.mul(b.sub(second, first), outer.index)), second][: isa.groups]
        out = b.add(out, b.mul(outer.index, I64(ROW)))
        sums = {(g, t): at(b, out, PAIR * t + ROW * g) for t in range(n_tokens) for g in range(isa.groups)}
        acc = {place: b.inttoptr(address, F32x16.as_pointer()) for place, address in sums.items()}
        with cgutils.for_range(b, n_blocks, intp=I64) as loop:
            blocks = [at(b, slab, 0, loop.index, SLAB_UNIT) for slab in slabs]
            records = _spaced(b, at(b, x, 0, loop.index, RECORD), x_stride, n_tokens)
            scales = [load_at(b, at(b, block, SLAB_SCALES), F32x16, 64) for block in blocks]
            _add_block(context, b, isa, [_loads(b, block) for block in blocks], scales, records, acc)


def _int16_unpack(context: Any, b: ir.IRBuilder, fmt: Any, args: list[Value]) -> None:
    """(weights, n_blocks, slab, end, after): blocks of a packed group, which goes to `end` and is followed by that at
    `after`, on to a slab."""
    weights, n_blocks, slab, end, after = args
    with cgutils.for_range(b, n_blocks, intp=I64) as loop:
        unit, block = at(b, weights, 0, loop.index, UNIT), at(b, slab, 0, loop.index, SLAB_UNIT)
        _prefetch(b, behind(b, unit, SLAB_BLOCKS * UNIT, end, after))  # while the tiles run
        pairs = _unpacked(b, unit)
        for i in range(PAIRS):
            store_at(b, pairs(i), at(b, block, 64 * i), 64)
        store_at(b, load_at(b, at(b, unit, SCALES), F32x16, 64), at(b, block, SLAB_SCALES), 64)


def _int16_pairs(context: Any, b: ir.IRBuilder, fmt: Any, args: list[Value]) -> None:
    """(weights, n_blocks, tiles): blocks of a packed group to two tiles each, for the matrix unit."""
    weights, n_blocks, tiles = args
    with cgutils.for_range(b, n_blocks, intp=I64) as loop:
        unit, tile = at(b, weights, 0, loop.index, UNIT), at(b, tiles, 0, loop.index, 2 * TILE)
        scale, pairs = load_at(b, at(b, unit, SCALES), F32x16, 64), _unpacked(b, unit)
        for i in range(PAIRS):
            pair = b.bitcast(pairs(i), I32x16)
            halves = b.ashr(b.shl(pair, repeat(I32x16, 16)), repeat(I32x16, 16)), b.ashr(pair, repeat(I32x16, 16))
            line = bfloat16_pairs(b, *(b.fmul(b.sitofp(half, F32x16), scale) for half in halves))
            store_at(b, line, at(b, tile, 64 * i), 64)


def _prefetch(b: ir.IRBuilder, unit: Value) -> None:
    for line in range(0, UNIT, 64):
        prefetch_at(b, at(b, unit, line))


def _loads(b: ir.IRBuilder, block: Value) -> Pairs:
    return lambda i: load_at(b, at(b, block, 64 * i), I16x32, 64)


def _unpacked(b: ir.IRBuilder, unit: Value) -> Pairs:
    """Pairs of columns of a packed unit; asked for in order."""
    found: list[Value] = []

    def pair(i: int) -> Value:
        if i == len(found):
            found.extend(_piece(b, at(b, unit, PIECE * (i // 4))))
        return found[i]

    return pair


def _piece(b: ir.IRBuilder, piece: Value) -> list[Value]:
    """Four pairs of columns, as `int16` lays them down."""
    *upper, lower = (load_at(b, at(b, piece, 64 * i), I8x64, 64) for i in range(3))
    low_bits = b.shl(lower, repeat(I8x64, 4)), b.and_(lower, repeat(I8x64, 0xF0))
    words = [b.shuffle_vector(low, high, lanes) for low, high in zip(low_bits, upper, strict=True) for lanes in _LANES]
    return [b.ashr(b.bitcast(word, I16x32), repeat(I16x32, 4)) for word in words]


def _interleaved(half: int) -> ir.Constant:
    """The bytes of one half of each 16 bytes, of two vectors in turns."""
    starts = [16 * lane + 8 * half + i for lane in range(4) for i in range(8)]
    return ir.Constant(ir.VectorType(I32, 64), [byte for start in starts for byte in (start, 64 + start)])


_LANES = [_interleaved(half) for half in range(2)]


def _add_block(context, b, isa: Machine, pairs: list[Pairs], scales: list[Value], records: list[Value], acc) -> None:
    """Adds the products of one block to acc[group, token]: pointers to F32x16."""
    sums = _block_sums(b, isa, pairs, records)
    for t, record in enumerate(records):
        factor = spread(b, load_at(b, record, F32, 4), F32x16)
        for g, scale in enumerate(scales):
            scaled = b.fmul(b.sitofp(sums[g, t], F32x16), factor)
            b.store(emit_fma(context, b, scaled, scale, b.load(acc[g, t], align=64)), acc[g, t], align=64)


def _block_sums(b: ir.IRBuilder, isa: Machine, pairs: list[Pairs], records: list[Value]) -> dict:
    """The exact sums, I32x16, of one block by group and token. With few tokens several chains make up a sum."""
    keys = [(g, t) for t in range(len(records)) for g in range(len(pairs))]
    chains = max(1, CHAINS // (len(keys) * isa.n_parts))
    acc = {(*key, k): repeat(I32x16, 0) for key in keys for k in range(chains)}
    for i in range(PAIRS):
        w = [group(i) for group in pairs]
        if i % 4 == 0:
            fence(b)
        for t, record in enumerate(records):
            x = spread(b, load_at(b, at(b, record, VALUES + 4 * i), I32, 4), I32x16)
            for g in range(len(pairs)):
                acc[g, t, i % chains] = isa.step(b, acc[g, t, i % chains], w[g], x)
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
    """Address of the `Code` of int16."""

    def codegen(context, b, sig, args):
        def function(emit, n_args, *numbers):
            return function_address(context, b.module, NUMBERS["F16"], emit, n_args, *numbers)

        isa = machine(context)
        fields = {
            **tile_fields(isa.direct, lambda tokens: function(_int16_direct, 9, tokens), Code.DIRECT),
            **tile_fields(isa.tokens, lambda tokens: function(_int16_tile, 8, tokens)),
            Code.DIRECT_MOST: isa.direct[0],
            Code.UNPACK: function(_int16_unpack, 5),
            Code.BLOCKS: 1,
            Code.UNIT_BYTES: UNIT,
            Code.RECORD_BYTES: RECORD,
            Code.SLAB_BLOCKS: SLAB_BLOCKS,
            Code.SLAB_BYTES: SLAB_BYTES,
            Code.FACTOR: float_bits(1.0),
            Code.PAIRS: function(_int16_pairs, 3) if has_tiles(context) else 0,
            Code.PAIR_TILES: 2,
        }
        return code_address(b, "INT12", fields)

    return types.int64(), codegen


# --- packing and looking up


def _rounded(b: ir.IRBuilder, value: Value, factor: Value) -> Value:
    """float32 times a factor to nearest even: I32x16, of which the lower halves are the integers as int16."""
    return b.bitcast(b.fadd(b.fmul(value, spread(b, factor, F32x16)), repeat(F32x16, MAGIC)), I32x16)


def _copy(b: ir.IRBuilder, source: Value, left: Value, memory: Value, size: int) -> None:
    """A block of `size` bytes to `memory`; see `_whole`."""
    source = _whole(b, source, left, memory, size)
    for i in range(0, size, 64):
        store_at(b, load_at(b, at(b, source, i), I16x32), at(b, memory, i), 64)


def _whole(b: ir.IRBuilder, source: Value, left: Value, memory: Value, size: int) -> Value:
    """Address of a block of `size` bytes: `source`, or, if only `left` are there, an even number, `memory`, which gets
    them and then zeros."""
    address = cgutils.alloca_once_value(b, source)
    with b.if_then(b.icmp_signed("<", left, I64(size)), likely=False):
        for i in range(0, size, 64):
            store_at(b, ir.Constant(I16x32, None), at(b, memory, i), 64)
        with cgutils.for_range(b, b.lshr(left, I64(1)), intp=I64) as loop:
            step = b.shl(loop.index, I64(1))
            store_at(b, load_at(b, b.add(source, step), I16), b.add(memory, step), 2)
        b.store(memory, address)
    return b.load(address)


def _scales(b: ir.IRBuilder, largest: Value, most: int) -> tuple[Value, Value]:
    """(factors, scales) that make the largest magnitudes `most`: 0 if one is hardly a number, NaN if it is none."""
    type_ = largest.type
    k = partial(repeat, type_) if isinstance(type_, ir.VectorType) else partial(ir.Constant, type_)
    scales = b.fmul(largest, k(1 / most))
    usable = b.fcmp_unordered(">=", scales, k(2.0**-126))  # a NaN stays
    return b.select(usable, b.fdiv(k(1.0), scales), k(0.0)), b.select(usable, scales, k(0.0))


def _magnitudes(b: ir.IRBuilder, rows: list[Value]) -> Value:
    """The largest magnitude of 64 numbers of 16 bits at each of 16 places, of a NaN if there is one: bits, I16x16."""
    def combine(one: Value, other: Value) -> Value:
        return b.bitcast(larger(b, b.bitcast(one, I16x32), b.bitcast(other, I16x32)), I32x16)

    def signless(address: Value) -> Value:
        return b.and_(load_at(b, address, I16x32, 64), repeat(I16x32, 0x7FFF))

    found = across(b, [combine(signless(row), signless(at(b, row, 64))) for row in rows], combine)
    return b.trunc(combine(found, b.lshr(found, repeat(I32x16, 16))), I16x16)


def _int16_pack(context: Any, b: ir.IRBuilder, number: Number, args: list[Value]) -> None:
    """(source, row_bytes, n_rows, n_cols, target): rows of a file, at most 16, to a packed group.

    Rows are copied first: where they begin a multiple of 4096 bytes apart, the nearest cache does not keep all of them.
    """
    source, row_bytes, n_rows, n_cols, target = args
    size = number.n_bytes * BLOCK
    n_blocks = b.udiv(b.add(n_cols, I64(BLOCK - 1)), I64(BLOCK))
    copies, factors = stack(b, size * ROWS), stack(b, 4 * ROWS)
    rows = [at(b, copies, size * row) for row in range(ROWS)]
    for i in range(0, size * ROWS, 64):  # where there is no row
        store_at(b, ir.Constant(I16x32, None), at(b, copies, i), 64)
    with cgutils.for_range(b, n_blocks, intp=I64) as loop:
        unit, start = b.add(target, b.mul(loop.index, I64(UNIT))), b.mul(loop.index, I64(size))
        left = b.sub(b.mul(n_cols, I64(number.n_bytes)), start)
        with cgutils.for_range(b, n_rows, intp=I64) as each:
            own = b.add(b.add(source, start), b.mul(each.index, row_bytes))
            _copy(b, own, left, at(b, copies, 0, each.index, size), size)
        factor, scale = _scales(b, number.widen(context, b, _magnitudes(b, rows)), W_MAX)
        store_at(b, factor, factors, 64)
        Place(b, at(b, unit, SCALES), n_rows).store(Int(b, b.bitcast(scale, I32x16)))
        with cgutils.for_range(b, n_rows, intp=I64) as each:
            own, factor = at(b, copies, 0, each.index, size), load_at(b, at(b, factors, 0, each.index, 4), F32, 4)
            for i in range(0, size, 64):  # integers in the place of the numbers
                halves = [_rounded(b, number.rows(context, b, at(b, own, i + j)), factor) for j in (0, 32)]
                words = [b.bitcast(half, I16x32) for half in halves]
                store_at(b, shuffle(b, *words, list(range(0, 64, 2))), at(b, own, i), 64)
        pairs = Rows(b, rows, Int(b, I64(0))).words(PAIRS)
        for i in range(0, PAIRS, 4):
            _store_piece(b, [b.bitcast(pair.value, I16x32) for pair in pairs[i : i + 4]], at(b, unit, PIECE * (i // 4)))


def _store_piece(b: ir.IRBuilder, pairs: list[Value], place: Value) -> None:
    """Four pairs of columns of 16 rows, each I16x32, the inverse of `_piece`."""
    upper = [b.and_(b.lshr(pair, repeat(I16x32, 4)), repeat(I16x32, 0xFF)) for pair in pairs]
    low = [b.and_(pair, repeat(I16x32, 0xF)) for pair in pairs]
    lower = [b.or_(low[i], b.shl(low[i + 2], repeat(I16x32, 4))) for i in range(2)]
    for i, two in enumerate((upper[:2], upper[2:], lower)):
        store_at(b, shuffle(b, *(b.bitcast(x, I8x64) for x in two), _BYTES_IN_TURN), at(b, place, 64 * i), 64)


# The lower bytes of words: those of four rows of one pair, then of the other.
_BYTES_IN_TURN = [side + 4 * first + i for first in range(0, ROWS, 4) for side in (0, 64) for i in range(0, 16, 2)]


def _lane(b: ir.IRBuilder, row: Value) -> Value:
    """Where in the vectors of a piece the first byte of a row lies."""
    return b.add(b.shl(b.lshr(row, I64(2)), I64(4)), b.shl(b.and_(row, I64(3)), I64(1)))


def _int16_embed(context: Any, b: ir.IRBuilder, number: Number, args: list[Value]) -> None:
    """(weights, n_cols, lane, out, scale): row `lane` of a packed group as float32; scale: bits of a float32."""
    weights, n_cols, lane, out, scale = args
    scale = b.bitcast(b.trunc(scale, I32), F32)
    with cgutils.for_range(b, n_cols, intp=I64) as loop:
        unit = at(b, weights, 0, b.udiv(loop.index, I64(BLOCK)), UNIT)
        column = b.urem(loop.index, I64(BLOCK))
        bit = [b.and_(b.lshr(column, I64(i)), I64(1)) for i in range(3)]  # column of a pair, pair of two, two of four
        piece = b.add(at(b, unit, 0, b.lshr(column, I64(3)), PIECE), _lane(b, lane))
        piece = b.add(piece, b.add(bit[0], b.shl(bit[1], I64(3))))
        upper = b.sext(load_at(b, b.add(piece, b.shl(bit[2], I64(6))), I8), I32)
        lower = b.lshr(b.zext(load_at(b, at(b, piece, 128), I8), I32), b.trunc(b.shl(bit[2], I64(2)), I32))
        integer = b.or_(b.shl(upper, I32(4)), b.and_(lower, I32(15)))
        value = b.fmul(b.sitofp(integer, F32), load_at(b, at(b, unit, SCALES, lane, 4), F32, 4))
        store_at(b, b.fmul(value, scale), b.add(out, b.mul(loop.index, I64(4))))


def _largest(b: ir.IRBuilder, values: list[Value]) -> Value:
    """The largest magnitude in float32 vectors; of a NaN, if there is one."""
    bits = [b.and_(b.bitcast(value, I32x16), repeat(I32x16, 0x7FFFFFFF)) for value in values]
    return b.bitcast(call(b, "llvm.vector.reduce.umax.v16i32", I32, reduce(partial(larger, b), bits)), F32)


def _int16_record(context: Any, b: ir.IRBuilder, number: Number, args: list[Value]) -> None:
    """(x, n_cols, record): the records of the float32 of one token."""
    x, n_cols, record = args
    block = stack(b, 4 * BLOCK)
    with cgutils.for_range(b, b.udiv(b.add(n_cols, I64(BLOCK - 1)), I64(BLOCK)), intp=I64) as loop:
        start, place = b.mul(loop.index, I64(4 * BLOCK)), b.add(record, b.mul(loop.index, I64(RECORD)))
        left = b.sub(b.mul(n_cols, I64(4)), start)
        own = _whole(b, b.add(x, start), left, block, 4 * BLOCK)
        values = [load_at(b, at(b, own, 4 * i), F32x16, 4) for i in range(0, BLOCK, ROWS)]
        factor, scale = _scales(b, _largest(b, values), X_MAX)
        store_at(b, scale, place, 4)
        for i, value in enumerate(values):
            store_at(b, b.trunc(_rounded(b, value, factor), I16x16), at(b, place, VALUES + 32 * i), 4)


int16_pack_code = address_of(NUMBERS, _int16_pack, 5)
int16_embed_code = address_of(NUMBERS, _int16_embed, 5)
int16_record_code = address_of(NUMBERS, _int16_record, 3)
