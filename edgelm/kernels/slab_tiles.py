"""Tiles that multiply unpacked weights, a slab of two groups of 16 rows, with many tokens.

    tile     several tokens, one after the other in memory
    rest     the remainders of a slab's blocks, of those tokens that have one

A slab has for each block eight int8 vectors, scales and minima, ready to multiply; sums lie as (token, 2, 16) float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from edgelm.kernels import isas
from edgelm.kernels.block_tile import ROW, Tile
from edgelm.kernels.blocks import CHUNKS, Blocks, at
from edgelm.kernels.emit import I8, I64, F32x16, I8x64, I16x32, I16x64, I32x16, load_at, prefetch_at, stack, store_at
from edgelm.kernels.isa import Isa
from edgelm.kernels.pair_tiles import ZIP, PairTile, both
from edgelm.kernels.records import BLOCK, ENTRY, RECORD

Value = ir.Value
PAIR = 2 * ROW  # bytes of a token's sums
SLAB = 8  # blocks that are unpacked at a time: they stay in the first-level cache
WORDS = 2 * BLOCK  # bytes of a block's activations as int16


def slab_block_bytes(fmt: Blocks, isa: Isa | None = None) -> int:
    """Bytes of a block in a slab: quants, scales, minima; for `pair_tiles` the latter twice. Without `isa`: once."""
    floats = fmt.halves * (2 if fmt.minimum else 1) * (2 if isa and isa.two_by_two else 1)
    return (CHUNKS * chunk_bytes(fmt, isa) if isa else 64 * CHUNKS) + 64 * floats


def chunk_bytes(fmt: Blocks, isa: Isa) -> int:
    """Bytes of a chunk in a slab: of int8, or of int16."""
    return 128 if fmt.widens(isa) else 64


def side_by_side(b: ir.IRBuilder, chunks: list[Value]) -> list[Value]:
    """The chunks of a block for `Isa.join_neighbours`: both halves of a row in neighbouring lanes, in turn.

    First the chunks of the rows 4 i and 4 i + 1, then those of the others: what is joined is in order again.
    """
    halves = [b.bitcast(chunk, I32x16) for i in range(CHUNKS // 2) for chunk in (chunks[i], chunks[i + CHUNKS // 2])]
    vectors = [b.bitcast(vector, I8x64) for vector in both(b, halves, ZIP)]
    return vectors[::2] + vectors[1::2]


class _SlabTile:
    """Sums of some tokens with one or two groups of a slab. slabs: addresses of one block of each."""

    def __init__(self, context: Any, b: ir.IRBuilder, fmt: Blocks, slabs: list[Value], n_tokens: int) -> None:
        self.b, self.fmt, self.isa, self.slabs = b, fmt, isas.select(context), slabs
        self.copies = 2 if self.isa.two_by_two and n_tokens == 1 else 1  # a token goes with itself
        self.tile: Any = Tile(context, b, fmt, fmt.form(self.isa), len(slabs), n_tokens * self.copies)
        self.tile.neighbours = self.tile.whole and self.isa.side_by_side
        if self.isa.two_by_two:
            self.tile = PairTile(self.tile)

    def load(self, outs: list[Value]) -> None:
        """Goes on from the sums of each token."""
        self.tile.load(self._places(outs))

    def store(self, outs: list[Value]) -> None:
        self.tile.store(self._places(outs))

    def _places(self, outs: list[Value]) -> list[list[Value]]:
        return [[at(self.b, out, ROW * g) for out in outs * self.copies] for g in range(len(self.slabs))]

    def add_block(self, slabs: list[Value], records: list[Value], words: list[Value]) -> None:
        """Adds the products of a block with its tokens; words: what `_widen` stored of these, if it did."""
        b, n_bytes = self.b, chunk_bytes(self.fmt, self.isa)
        floats, n = CHUNKS * n_bytes, self.fmt.halves * (2 if self.isa.two_by_two else 1)
        self.tile.add_block(
            [_loads(b, slab, n_bytes) for slab in slabs],
            [self._floats(slab, floats, n) for slab in slabs],
            [self._floats(slab, floats + 64 * n, n * self.fmt.minimum) for slab in slabs],
            records * self.copies,
            *([words] if words else []),
        )

    def _floats(self, slab: Value, start: int, n: int) -> Any:
        load = functools.cache(lambda i: load_at(self.b, at(self.b, slab, start + 64 * i), F32x16, 64))
        for i in [] if self.isa.ordered else range(n):  # before the weights, unless they would stay in registers
            load(i)
        return load


def _loads(b: ir.IRBuilder, slab: Value, n_bytes: int) -> Any:
    return lambda chunk: load_at(b, at(b, slab, n_bytes * chunk), I8x64 if n_bytes == 64 else I16x64, 64)


def _widen(b: ir.IRBuilder, record: Value, words: Value) -> None:
    """Stores the activations of a record as int16."""
    q = load_at(b, record, ir.VectorType(I8, BLOCK), 64)
    store_at(b, b.sext(q, I16x32), words, 64)


@contextlib.contextmanager
def _groups(b: ir.IRBuilder, n: int, slab: Value, second: Value, out: Value) -> Iterator[Any]:
    """Both groups, `n` at a time: addresses of their slabs, and of the sums of the first."""
    with cgutils.for_range(b, I64(2 // n), intp=I64) as loop:
        slab = b.add(slab, b.mul(b.sub(second, slab), loop.index))
        yield [slab, second][:n], b.add(out, b.mul(loop.index, I64(ROW)))


def _at_block(b: ir.IRBuilder, context: Any, fmt: Blocks, slabs: list[Value], block: Value) -> list[Value]:
    size = slab_block_bytes(fmt, isas.select(context))
    return [at(b, slab, 0, block, size) for slab in slabs]


def _tile(context: Any, b: ir.IRBuilder, fmt: Blocks, args: list[Value], n_tokens: int) -> None:
    """(slab, second, n_blocks, record, record_stride, out, …): adds products of two groups of rows to `out`.

    slab, second: blocks from `unpack` of either group; record + record_stride * token; out: (token, 2, 16) float32.
    """
    slab, second, n_blocks, record, stride, out = args[:6]
    words: list[Value] = []
    if fmt.widens(isas.select(context)):
        words = [stack(b, SLAB * WORDS) for _ in range(n_tokens)]
        with cgutils.for_range(b, n_blocks, intp=I64) as loop:
            for t, place in enumerate(words):
                own = b.add(b.add(record, b.mul(stride, I64(t))), b.mul(loop.index, I64(RECORD)))
                _widen(b, own, at(b, place, 0, loop.index, WORDS))
    with _groups(b, isas.select(context).groups, slab, second, out) as (slabs, sums):
        outs = [at(b, sums, PAIR * t) for t in range(n_tokens)]
        tile = _SlabTile(context, b, fmt, slabs, n_tokens)
        tile.load(outs)
        with cgutils.for_range(b, n_blocks, intp=I64) as loop:
            here = b.add(record, b.mul(loop.index, I64(RECORD)))
            for t in range(n_tokens, 2 * n_tokens) if isas.select(context).asks_for_records else []:
                prefetch_at(b, b.add(here, b.mul(stride, I64(t))), near=True)
            own = [b.add(here, b.mul(stride, I64(t))) for t in range(n_tokens)]
            own_words = [at(b, place, 0, loop.index, WORDS) for place in words]
            tile.add_block(_at_block(b, context, fmt, slabs, loop.index), own, own_words)
        tile.store(outs)


def _rest(context: Any, b: ir.IRBuilder, fmt: Blocks, args: list[Value]) -> None:
    """(slab, second, entry, end, record, record_stride, out): adds products with remainders to `out`.

    entry, end: of which blocks and tokens, see `records.ENTRY`; record: of the first token's remainders. Entries of all
    blocks follow each other, so that nothing is to be guessed but where they end. Where a token stands twice, the same
    is stored for it twice.
    """
    slab, second, entry, end, record, stride, out = args
    isa, n_entries = isas.select(context), b.udiv(b.sub(end, entry), I64(ENTRY))
    n = 2 if isa.n_parts == 1 else 1
    with _groups(b, n, slab, second, out) as (slabs, sums), cgutils.for_range(b, n_entries, intp=I64) as loop:
        own = b.add(entry, b.mul(loop.index, I64(ENTRY)))
        block, *tokens = (b.zext(load_at(b, at(b, own, i), I8), I64) for i in range(ENTRY))
        outs, tile = [at(b, sums, 0, token, PAIR) for token in tokens], _SlabTile(context, b, fmt, slabs, len(tokens))
        here = at(b, record, 0, block, RECORD)
        records = [b.add(here, b.mul(t, stride)) for t in tokens]
        words = [stack(b, WORDS) for _ in tokens] if fmt.widens(isa) else []
        for own, place in zip(records, words, strict=False):
            _widen(b, own, place)
        tile.load(outs)
        tile.add_block(_at_block(b, context, fmt, slabs, block), records, words)
        tile.store(outs)
