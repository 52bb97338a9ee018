"""Tiles for machines whose instruction multiplies two rows with two tokens (`Isa.two_by_two`).

Of each four rows, accumulator 2 i holds the first two with tokens 2 i and 2 i + 1: (row 0, token 0), (0, 1), (1, 0),
(1, 1); accumulator 2 i + 1 holds the other two. A slab has its vectors in that order too. For every row and token
the operations are those of `block_tile`, in the same order: results are the same to the bit.
"""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir

from edgelm.kernels.blocks import CHUNKS, at
from edgelm.kernels.emit import I64, F32x16, I8x16, I8x64, I32x16, load_at, shuffle

Value = ir.Value
I64x2 = ir.VectorType(I64, 2)
ZIP = [[4 * i + 2 * half + j + k for i in range(4) for j in (0, 1) for k in (0, 16)] for half in range(2)]
UNZIP = [[4 * i + token + j + k for i in range(4) for k in (0, 16) for j in (0, 2)] for token in range(2)]


def both(b: ir.IRBuilder, values: list[Value], orders: list[list[int]]) -> list[Value]:
    """Each two values as two others, whose lanes are picked from both."""
    pairs = zip(values[::2], values[1::2], strict=True)
    return [shuffle(b, *pair, lanes) for pair in pairs for lanes in orders]


def paired(b: ir.IRBuilder, chunks: list[Value]) -> list[Value]:
    """The chunks of a block as a slab holds them: of two, the first then has both for two of each four rows."""
    return [b.bitcast(v, I8x64) for v in both(b, [b.bitcast(chunk, I32x16) for chunk in chunks], ZIP)]


def doubled(b: ir.IRBuilder, vectors: list[Value]) -> list[Value]:
    """Scales or minima of 16 rows as a slab holds them: each as two, for either accumulator of a pair of tokens."""
    orders = [[4 * i + 2 * half + j for i in range(4) for j in (0, 0, 1, 1)] for half in range(2)]
    return [shuffle(b, vector, vector, lanes) for vector in vectors for lanes in orders]


class PairTile:
    """What a tile of `block_tile` does, with its accumulators; its tokens are even in number."""

    def __init__(self, tile: Any) -> None:
        self.tile, self.b = tile, tile.b

    def load(self, addresses: list[list[Value]]) -> None:
        self.tile.load(addresses)
        self._reorder(ZIP)

    def store(self, addresses: list[list[Value]]) -> None:
        self._reorder(UNZIP)
        self.tile.store(addresses)

    def _reorder(self, orders: list[list[int]]) -> None:
        for accs in self.tile.acc:
            for acc, value in zip(accs, both(self.b, [self.b.load(acc) for acc in accs], orders), strict=True):
                self.b.store(value, acc)

    def add_block(self, weights: list[Any], scales: list[Any], minima: list[Any], records: list[Value]) -> None:
        """As `Tile.add_block`, from `paired` weights and `doubled` scales and minima."""
        tile = self.tile
        for place in range(0, len(records), 2):
            pair = records[place : place + 2]
            add = self._add_joined if tile.whole else self._add_halves
            add(place, weights, scales, pair)
            factors = map(self._of_tokens, zip(*(tile.minimum_factors(record) for record in pair), strict=True))
            for i, factor in enumerate(factors):
                for g, odd in itertools.product(range(len(weights)), range(2)):
                    tile.add(g, place + odd, minima[g](2 * i + odd), factor)

    def _add_joined(self, place: int, weights: list[Any], scales: list[Any], pair: list[Value]) -> None:
        """Products of both halves, joined by integers."""
        inputs = [self._inputs(pair, half) for half in range(2)]
        factors = self._of_tokens([self.tile.factors(record) for record in pair])
        for g, odd in itertools.product(range(len(weights)), range(2)):
            totals = (self._total(weights[g], inputs[half], half, odd) for half in range(2))
            joined = self.tile.isa.join(self.b, *totals, factors)
            self.tile.add(g, place + odd, self.b.sitofp(joined, F32x16), scales[g](odd))

    def _add_halves(self, place: int, weights: list[Any], scales: list[Any], pair: list[Value]) -> None:
        for half in range(2):
            inputs, n_scales = self._inputs(pair, half), 2 * self.tile.fmt.halves
            factor = self._of_tokens([self.tile.factor(record, half) for record in pair])
            for g, odd in itertools.product(range(len(weights)), range(2)):
                total = self._total(weights[g], inputs, half, odd)
                scaled = self.b.fmul(self.b.sitofp(total, F32x16), factor)
                self.tile.add(g, place + odd, scaled, scales[g]((2 * half + odd) % n_scales))

    def _inputs(self, pair: list[Value], half: int) -> list[Value]:
        """Those of half a block, eight of either token at a time."""
        inputs = [load_at(self.b, at(self.b, record, 16 * half), I64x2, 16) for record in pair]
        return [self.b.bitcast(shuffle(self.b, *inputs, [i, 2 + i]), I8x16) for i in range(2)]

    def _total(self, group: Any, inputs: list[Value], half: int, odd: int) -> Value:
        """The sum of products of half a block with the first two of each four rows, or with the others."""
        total = ir.Constant(I32x16, None)
        for i, x in enumerate(inputs):
            total = self.tile.isa.step_pair(self.b, total, group(half * CHUNKS // 2 + 2 * i + odd), x)
        return total

    def _of_tokens(self, values: list[Value]) -> Value:
        """Two vectors that each have one value in all lanes, as the lanes of an accumulator."""
        return shuffle(self.b, *values, [0, 16] * 8)
