"""Generators of the innermost code: for each format and machine a few functions in LLVM's language.

    direct   32 rows x few tokens, straight from packed weights
    unpack   packed weights to a slab: eight int8 vectors, scales and minima of each block, ready to multiply
    tile     32 rows x several tokens, from two slabs
    rest     the remainders of the same, for the tokens that have one
    embed    one row of packed weights as float32
    pack     16 rows of a file to packed weights

Sums of products are those of `block_tile`, the same to the bit for any number of tokens. `tile` and `rest` come from
`slab_tiles`.

Knows formats as `blocks.Blocks`, machines as `isa.Isa`, activations as the record of `quantize`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgelm.kernels import (
    block_formats,  # noqa: F401  (defines them)
    isas,
)
from edgelm.kernels.abi import float_bits
from edgelm.kernels.amx import has_tiles
from edgelm.kernels.amx_tiles import unpack_blocks
from edgelm.kernels.block_tile import ROW, Tile
from edgelm.kernels.blocks import BLOCKS, CHUNKS, Blocks, Scales, at
from edgelm.kernels.emit import (
    F32,
    I8,
    I32,
    I64,
    F32x16,
    I8x64,
    I32x16,
    fence,
    load_at,
    prefetch_at,
    spread,
    stack,
    store_at,
)
from edgelm.kernels.functions import Code, address_of, code_address, function_address, tile_fields
from edgelm.kernels.isa import Form, parts
from edgelm.kernels.lanes import Int, Place, Rows
from edgelm.kernels.pair_tiles import doubled, paired
from edgelm.kernels.records import FLAG, RECORD
from edgelm.kernels.slab_tiles import SLAB, _rest, _tile, side_by_side, slab_block_bytes

Value = ir.Value
Unpacked = tuple[list[Any], Any, Any]  # weights, scales and minima of a block of each group
AHEAD = 4096  # how many bytes before they are needed weights are asked for: the processor's own prefetching comes late
# The same in one stream, by registers that hold 64 bytes. AMD's processors drop what they have no room for, so a line
# is asked for more than once, where there is time for the instructions.
FAR = {1: (4096, 8192, 12288), 2: (8192, 16384), 4: (8192,)}
MAX_SLAB_BYTES = SLAB * 64 * (2 * CHUNKS + 8)


def _to_rest(b: ir.IRBuilder, record_stride: Value) -> Value:
    """Bytes from a record to its remainder."""
    return b.lshr(record_stride, I64(1))


def _has_rest(b: ir.IRBuilder, records: list[Value]) -> Value:
    """Whether any of the records has a remainder."""
    flags = functools.reduce(b.or_, [load_at(b, at(b, record, FLAG), I32, 4) for record in records])
    return b.icmp_signed("!=", flags, I32(0))


# --- the functions


def _direct(context: Any, b: ir.IRBuilder, blocks: Blocks, args: list[Value], n_tokens: int, n_groups: int) -> None:
    """(first, second, n_units, record, record_stride, out, listed, next_first, next_second): of two packed groups.

    record + record_stride * token; out: (token, 2, 16) float32; listed: `linear_kernels.list_blocks`, where `Code` says
    so. The last two: groups that this thread will read next.
    """
    first, second, n_units, record, record_stride, out, listed, next_first, next_second = args
    n_groups = 1 if in_order(context, n_tokens) else n_groups
    form = blocks.direct_form(isas.select(context))
    last = at(b, record, -RECORD, n_units, RECORD * blocks.blocks)
    every = b.and_(_has_rest(b, [record]), _has_rest(b, [last]))  # as in the inputs of the output matrix
    rest = _to_rest(b, record_stride)
    with cgutils.for_range(b, I64(2 // n_groups), intp=I64) as outer:
        groups = in_turn(b, outer.index, n_groups, [first, second, next_first, next_second])
        records = [b.add(record, b.mul(record_stride, I64(t))) for t in range(n_tokens)]
        tile, rests = (Tile(context, b, blocks, form, n_groups, n_tokens) for _ in range(2))
        _products(tile, rests, _Read(*groups, n_units, records, every, listed), rest)
        place = b.add(out, b.mul(outer.index, I64(ROW)))
        for g, t in itertools.product(range(n_groups), range(n_tokens)):
            total = b.fadd(b.load(tile.acc[g][t]), b.load(rests.acc[g][t]))
            store_at(b, total, at(b, place, ROW * (2 * t + g)), 64)


class _Read(NamedTuple):
    """What `_direct` reads: packed groups, and what comes after each; the records of a few tokens."""

    groups: list[Value]
    after: list[Value]
    n_units: Value  # of a group
    records: list[Value]
    all_rest: Value  # whether every block of them has a remainder, most likely
    listed: Value  # the blocks of any of them that have one


def _products(tile: Tile, rests: Tile, read: _Read, rest: Value) -> None:
    """Products with records, to `tile`, and with their remainders, to `rests`. rest: bytes from a record to those."""
    b, n_parts, n_tokens = tile.b, tile.isa.n_parts, len(read.records)
    far = FAR[n_parts]
    always = far if _takes_long(tile.fmt) else ()

    def with_its_rest(unpacked: Unpacked, inputs: list[Value]) -> None:
        tile.add_block(*unpacked, inputs)
        with b.if_then(_has_rest(b, inputs)):
            rests.add_block(*unpacked, [b.add(record, rest) for record in inputs])

    def apart() -> None:
        _each_block(tile, read, lambda unpacked, inputs: tile.add_block(*unpacked, inputs), always)
        _add_rests(rests, read, rest)

    if n_parts == 1 and (always or not in_order(tile.context, n_tokens)):
        _each_block(tile, read, with_its_rest, always)  # unpacked weights stay in registers, beside both sums
    elif n_parts == 1:
        reaches = b.icmp_unsigned(">=", b.mul(read.n_units, I64(tile.fmt.unit_bytes)), I64(far[-1]))  # less is no gain
        with b.if_else(b.and_(read.all_rest, reaches)) as (all_of_them, few):
            with all_of_them:
                _each_block(tile, read, with_its_rest, far)
            with few:
                _each_block(tile, read, with_its_rest)
    elif n_parts == 2 and n_tokens == 1:  # they do if both go over them chunk by chunk, as two tokens do
        with b.if_else(read.all_rest) as (together, few):
            with together:
                both = Tile(tile.context, b, tile.fmt, tile.form, len(read.groups), 2)

                def as_two_tokens(unpacked: Unpacked, one: list[Value]) -> None:
                    both.add_block(*unpacked, [*one, b.add(one[0], rest)])

                _each_block(tile, read, as_two_tokens, far[:1])
                for (own, other), total, remainder in zip(both.acc, tile.acc, rests.acc, strict=True):
                    b.store(b.load(own), total[0])
                    b.store(b.load(other), remainder[0])
            with few:
                apart()
    else:
        apart()


def _each_block(
    tile: Tile, read: _Read, add: Callable[[Unpacked, list[Value]], object], far: tuple[int, ...] = ()
) -> None:
    """Has `add` multiply each block of packed groups: with its weights, and its records.

    far: how many bytes before they are needed lines of one stream are asked for.
    """
    b, blocks = tile.b, tile.fmt
    one_stream = in_order(tile.context, len(read.records))
    ends = [b.add(group, b.mul(read.n_units, I64(blocks.unit_bytes))) for group in read.groups]
    with cgutils.for_range(b, read.n_units, intp=I64) as loop:
        step = b.mul(loop.index, I64(blocks.unit_bytes))
        units = [b.add(group, step) for group in read.groups]
        heads = [_in_lines(b, blocks, unit) if one_stream else blocks.opened(b, unit) for unit in units]
        places = [] if one_stream else zip(units, ends, read.after, strict=True)
        ahead = [_ahead(b, blocks, *place) for place in places]
        offset = b.mul(loop.index, I64(RECORD * blocks.blocks))
        here = [b.add(record, offset) for record in read.records]
        with cgutils.for_range(b, I64(blocks.blocks), intp=I64) as inner:
            inputs = [at(b, record, 0, inner.index, RECORD) for record in here]
            share = b.mul(inner.index, I64(_share(blocks)))
            for distance in far if one_stream else ():
                _prefetch(b, blocks, behind(b, b.add(units[0], share), distance, ends[0], read.after[0]))
            add(_unpacked(tile, units, heads, inner.index), inputs)
            for unit in ahead:
                _prefetch(b, blocks, b.add(unit, share))


def _in_lines(b: ir.IRBuilder, blocks: Blocks, unit: Value) -> Value:
    """`Blocks.opened`, with all lines of the header read before those behind it."""
    head = blocks.opened(b, unit)
    if head is not unit or blocks.header <= 64:
        return head
    place = stack(b, blocks.header)
    for line in range(0, blocks.header, 64):
        store_at(b, load_at(b, at(b, unit, line), I8x64), at(b, place, line), 64)
    return place


def _add_rests(tile: Tile, read: _Read, rest: Value) -> None:
    """Multiplies packed groups once more, with what is `rest` bytes behind the records: the blocks that are listed."""
    b, blocks = tile.b, tile.fmt
    with cgutils.for_range(b, load_at(b, read.listed, I64, 8), intp=I64) as loop:
        listed = b.sext(load_at(b, at(b, read.listed, 8, loop.index, 4), I32, 4), I64)
        units, within = zip(*(_locate(b, blocks, group, listed) for group in read.groups), strict=True)
        heads = [blocks.opened(b, unit) for unit in units]
        inputs = [b.add(at(b, record, 0, listed, RECORD), rest) for record in read.records]
        tile.add_block(*_unpacked(tile, list(units), heads, within[0]), inputs)


def _unpacked(tile: Tile, units: list[Value], heads: list[Value], block: Value) -> Unpacked:
    """Weights, scales and minima of a block of each unit, as `Tile.add_block` takes them; heads: `Blocks.opened`.

    Where registers do not hold a block, each half of it is read when it is multiplied: else LLVM reads it whole, and
    puts what it has no room for on the stack.
    """
    own = [_of_block(tile, unit, head, block) for unit, head in zip(units, heads, strict=True)]
    weights, scales, minima = ([reads[i] for reads in own] for i in range(3))
    return weights, scales, minima


def _of_block(tile: Tile, unit: Value, head: Value, block: Value) -> tuple[Any, Any, Any]:
    """The same of one unit: functions of a chunk, and of a half."""
    b, isa, fmt = tile.b, tile.isa, tile.fmt

    def quants() -> list[Value]:
        return fmt.quants(b, isa, unit, block, tile.form)

    def floats() -> Scales:
        return fmt.scales_for(isa, tile.context, b, head, block)

    both = 0 if fmt.stored == 8 else fmt.stored  # vectors that both halves are made of
    if isa.n_parts * both <= isa.kept:
        weights, (scales, minima) = quants(), floats()
        return weights.__getitem__, scales.__getitem__, minima.__getitem__

    @functools.cache
    def of_half(half: int) -> list[Value]:
        if half > 0:
            fence(b)
        return quants()

    @functools.cache
    def factor(which: int, half: int) -> Value:
        return floats()[which][half]

    return (
        lambda chunk: of_half(chunk // (CHUNKS // 2))[chunk],
        functools.partial(factor, 0), functools.partial(factor, 1),
    )  # fmt: skip


def in_turn(b: ir.IRBuilder, turn: Value, n: int, groups: list[Value]) -> tuple[list[Value], list[Value]]:
    """Of two groups those, `n`, of a turn, and what is read after each; groups: the two, and the two that come next."""
    first, second, next_first, next_second = groups
    mine = [b.add(first, b.mul(b.sub(second, first), turn)), second][:n]
    if n == 2:
        return mine, [next_first, next_second]
    return mine, [b.select(b.icmp_signed("==", turn, I64(0)), second, next_first)]


def in_order(context: Any, n_tokens: int) -> bool:
    """Whether this processor's own prefetching gets all that the memory gives, if it sees one stream of lines in order.

    So does AMD's: two groups at a time are slower by a quarter. Headers of several lines are read before the quants
    behind them. It works as long as the window of instructions under way reaches some blocks ahead: not with many
    tokens. Where work on a block is long, as it `_takes_long` or all have remainders, lines are asked for `FAR` ahead.
    """
    return n_tokens <= 2 and isas.is_amd(context)


def _takes_long(blocks: Blocks) -> bool:
    """Whether a block takes so many instructions that the window of those under way does not reach far."""
    return 8 % blocks.stored != 0 or blocks.header > 64


def _ahead(b: ir.IRBuilder, blocks: Blocks, unit: Value, end: Value, after: Value) -> Value:
    """The unit to ask for while working on `unit` of a group that goes to `end` and is followed by that at `after`."""
    return behind(b, unit, -(-AHEAD // blocks.unit_bytes) * blocks.unit_bytes, end, after)


def behind(b: ir.IRBuilder, place: Value, n_bytes: int, end: Value, after: Value) -> Value:
    """What is read `n_bytes` after `place`, in a group that goes to `end` and is followed by that at `after`."""
    ahead = at(b, place, n_bytes)
    return b.select(b.icmp_unsigned("<", ahead, end), ahead, b.add(after, b.sub(ahead, end)))


def _share(blocks: Blocks) -> int:
    """Bytes of a block in a unit."""
    return blocks.unit_bytes // blocks.blocks


def _prefetch(b: ir.IRBuilder, blocks: Blocks, start: Value) -> None:
    """Asks for as many bytes as a block has."""
    for line in range(0, _share(blocks), 64):
        prefetch_at(b, at(b, start, line))


def _unpack(context: Any, b: ir.IRBuilder, blocks: Blocks, args: list[Value]) -> None:
    """(weights, n_blocks, slab, end, after): blocks (whole units) of a packed group on to a slab; as for `_ahead`."""
    weights, n_blocks, slab, end, after = args
    isa = isas.select(context)
    size = slab_block_bytes(blocks, isa)
    with cgutils.for_range(b, b.udiv(n_blocks, I64(blocks.blocks)), intp=I64) as outer:
        unit = at(b, weights, 0, outer.index, blocks.unit_bytes)
        head, ahead = blocks.opened(b, unit), _ahead(b, blocks, unit, end, after)
        slab_unit = at(b, slab, 0, outer.index, blocks.blocks * size)
        with cgutils.for_range(b, I64(blocks.blocks), intp=I64) as inner:
            _prefetch(b, blocks, at(b, ahead, 0, inner.index, _share(blocks)))
            target = at(b, slab_unit, 0, inner.index, size)
            _unpack_block(context, b, isa, blocks, unit, head, inner.index, target, blocks.form(isa), for_tiles=True)


def _locate(b: ir.IRBuilder, blocks: Blocks, weights: Value, index: Value) -> tuple[Value, Value]:
    """Address of the unit of block `index` of a group, and the number of the block in it."""
    unit = b.udiv(index, I64(blocks.blocks))
    return b.add(weights, b.mul(unit, I64(blocks.unit_bytes))), b.sub(index, b.mul(unit, I64(blocks.blocks)))


def _unpack_block(context, b, isa, blocks: Blocks, unit, head, block, target, form, for_tiles=False) -> None:
    own = blocks.scales_for(isa, context, b, head, block) if for_tiles else blocks.scales(context, b, head, block)
    scales, minima = own
    quants = blocks.quants(b, isa, unit, block, form)
    if for_tiles and isa.side_by_side and blocks.joins(isa):
        quants = side_by_side(b, quants)
    elif for_tiles and blocks.widens(isa):
        quants = [pair for chunk in quants for pair in parts(b, isa.words(b, chunk), 2)]
    elif for_tiles and isa.two_by_two:
        quants, scales, minima = paired(b, quants), doubled(b, scales), doubled(b, minima)
    for k, vector in enumerate([*quants, *scales, *minima]):
        store_at(b, vector, at(b, target, 64 * k), 64)


def _embed(context: Any, b: ir.IRBuilder, blocks: Blocks, args: list[Value]) -> None:
    """(weights, n_cols, lane, out, scale): row `lane` of a packed group as float32; scale: bits of a float32."""
    weights, n_cols, lane, out, scale = args
    isa, form = isas.select(context), Form.SIGNED if blocks.zero else Form.LOW
    slab = stack(b, slab_block_bytes(blocks))
    own = b.add(slab, b.mul(lane, I64(4)))
    factor = spread(b, b.bitcast(b.trunc(scale, I32), F32), F32x16)
    with cgutils.for_range(b, b.udiv(n_cols, I64(32)), intp=I64) as loop:
        unit, block = _locate(b, blocks, weights, loop.index)
        _unpack_block(context, b, isa, blocks, unit, blocks.opened(b, unit), block, slab, form)
        target = b.add(out, b.mul(loop.index, I64(128)))
        for half in range(2):
            words = ir.Constant(ir.VectorType(I32, 4), ir.Undefined)
            for i in range(4):
                words = b.insert_element(words, load_at(b, at(b, own, 64 * (4 * half + i)), I32, 4), I32(i))
            integers = b.bitcast(words, ir.VectorType(I8, 16))
            integers = (b.sext if form is Form.SIGNED else b.zext)(integers, I32x16)
            which = half if blocks.halves == 2 else 0
            value = b.fmul(b.sitofp(integers, F32x16), _lane(b, own, CHUNKS + which))
            if blocks.minimum:
                value = b.fadd(value, _lane(b, own, CHUNKS + blocks.halves + which))
            store_at(b, b.fmul(value, factor), at(b, target, 64 * half))


def _lane(b: ir.IRBuilder, own: Value, k: int) -> Value:
    return spread(b, load_at(b, at(b, own, 64 * k), F32, 4), F32x16)


def _pack(context: Any, b: ir.IRBuilder, blocks: Blocks, args: list[Value]) -> None:
    """(source, row_bytes, n_rows, n_blocks, target): rows of a file, at most 16, to a packed group."""
    source, row_bytes, n_rows, n_blocks, target = args
    rows = Rows.of(b, source, row_bytes, n_rows)
    with cgutils.for_range(b, n_blocks, intp=I64) as loop:
        unit, block = _locate(b, blocks, target, loop.index)
        place = b.udiv(loop.index, I64(blocks.file_blocks))
        part = b.sub(loop.index, b.mul(place, I64(blocks.file_blocks)))
        place = b.mul(place, I64(blocks.file_bytes))
        blocks.pack(rows + Int(b, place), Int(b, part), Place(b, unit, n_rows), Int(b, block))


# --- the way to them from Numba

embed_code = address_of(BLOCKS, _embed, 5)
pack_code = address_of(BLOCKS, _pack, 5)


@intrinsic(prefer_literal=True)
def linear_code(typingctx, fmt):
    """Address of the `Code` of a format."""
    if not isinstance(fmt, types.StringLiteral):
        return None
    blocks = BLOCKS[fmt.literal_value]

    def codegen(context, b, sig, args):
        return code_address(b, blocks.name, code_fields(context, b, blocks))

    return types.int64(fmt), codegen


def code_fields(context: Any, b: ir.IRBuilder, blocks: Blocks) -> dict[int, Any]:
    """What a `Code` says of a format."""
    isa = isas.select(context)

    def function(emit, n_args, *numbers):
        return function_address(context, b.module, blocks, emit, n_args, *numbers)

    return {
        **tile_fields(
            isa.direct_sizes(blocks.joins(isa)),
            lambda tokens: function(_direct, 9, tokens, isa.direct_groups),
            Code.DIRECT,
        ),
        **tile_fields(isa.tokens, lambda tokens: function(_tile, 8, tokens)),
        Code.DIRECT_MOST: isa.direct_most,
        Code.DIRECT_LISTS: int(isa.n_parts > 1),
        Code.UNPACK: function(_unpack, 5),
        Code.REST: function(_rest, 7),
        Code.PAIRS: function(unpack_blocks, 3) if has_tiles(context) else 0,
        Code.PAIR_TILES: 1,
        Code.BLOCKS: blocks.blocks,
        Code.UNIT_BYTES: blocks.unit_bytes,
        Code.RECORD_BYTES: RECORD,
        Code.SLAB_BLOCKS: SLAB,
        Code.SLAB_BYTES: SLAB * slab_block_bytes(blocks, isa),
        Code.FACTOR: float_bits(blocks.factor(blocks.form(isa))),
    }
