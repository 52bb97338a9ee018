"""Sums of products of one block after the other, in registers: what `tiles` and `slab_tiles` are made of.

For every row and token the operations and their order are always the same, so that the number of tokens in a call
changes no bit of the result:

    acc = fma(float(sum) * d, scale, acc), for the first half of each block and then for the second
    acc = fma(minimum, sum of d * x, acc), after both, if there are minima

where sum is an exact integer, of 16 inputs, and d the scale of these activations. Where `Isa.joins_halves` and there is
one scale, both halves go to acc at once, as fma(float(sum of the second), d, float(sum of the first) * d); where the
weights are so small that `Isa.joins`, or where `Isa.scales_sums`, as float(sum of the first * d + sum of the second
* d), of integers. Remainders are summed up by themselves, in the same way, and that is added at the end.

Knows formats as `blocks.Blocks`, machines as `isa.Isa`, activations as the record of `quantize`.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from edgelm.kernels import isas
from edgelm.kernels.blocks import CHUNKS, Blocks, at
from edgelm.kernels.emit import F32, I32, F32x16, I32x16, emit_fma, here, load_at, opaque, repeat, spread, store_at
from edgelm.kernels.isa import Form, Isa, apart, joined, parts
from edgelm.kernels.records import (
    FACTORS,
    MAGIC,
    MAGIC_HIGH,
    MAGIC_LOW,
    OFFSET_HIGH,
    OFFSET_LOW,
    SCALE_HIGH,
    SCALE_LOW,
    SCALED_SUM,
    ZERO,
    chunk_at,
)

Value = ir.Value
HALVES = ((OFFSET_LOW, SCALE_LOW, MAGIC_LOW), (OFFSET_HIGH, SCALE_HIGH, MAGIC_HIGH))  # of a record
ROW = 64  # bytes of 16 float32
Sums = dict[tuple[int, int, int], Any]


class Tile:
    """Accumulators of `groups` x `tokens` vectors of 16 rows, in registers."""

    def __init__(self, context: Any, b: ir.IRBuilder, fmt: Blocks, form: Form, groups: int, tokens: int) -> None:
        self.context, self.b, self.fmt, self.form = context, b, fmt, form
        self.isa: Isa = isas.select(context)
        self.scaled, self.whole, self.less_zero = (
            has(self.isa) for has in (fmt.scales_sums, fmt.joins, fmt.joins_less_zero)
        )
        self.neighbours = False  # whether weights are `slab_tiles.side_by_side`
        zero = ir.Constant(F32x16, None)
        self.acc = [[cgutils.alloca_once_value(b, zero) for _ in range(tokens)] for _ in range(groups)]

    def add_block(
        self, weights: list[Any], scales: list[Any], minima: list[Any], records: list[Value], words: Any = None
    ) -> None:
        """Adds the products of one block. weights[group](chunk), scales[group](half), minima[group](half).

        words: the activations of `records` once more, as `Isa.input_words` takes them, if weights are from `Isa.words`.
        """
        isa, fmt = self.isa, self.fmt
        places = [(g, t) for t in range(len(records)) for g in range(len(weights))]
        if self.scaled:
            self._add_times_d(weights, scales, records)
        for halves in () if self.scaled else ((0, 1),) if self.whole or isa.joins_halves else ((0,), (1,)):
            sums = self._sums(weights, records, words, halves)
            for g, t in places:
                if self.whole or (isa.joins_halves and fmt.halves == 1):
                    join = self._whole if self.whole else self._joined
                    self.add(g, t, join(sums[0, g, t], sums[1, g, t], records[t]), scales[g](0))
                    continue
                for half in halves:
                    scaled = self._scaled(sums[half, g, t], records[t], half)
                    self.add(g, t, scaled, scales[g](half % fmt.halves))
        for g, t in places:
            for half, factor in enumerate(self.minimum_factors(records[t])):
                self.add(g, t, minima[g](half), factor)

    def _sums(self, weights: list[Any], records: list[Value], words: Any, halves: tuple[int, ...]) -> Sums:
        """Exact sums of products by (half, group, token)."""
        b, isa, sums = self.b, self.isa, Sums()
        own = halves[:1] if self.neighbours else halves  # neighbours start alike
        starts = {(half, t): self._start(record, half) for t, record in enumerate(records) for half in own}
        for half, t, g in itertools.product(halves, range(len(records)), range(len(weights))):
            sums[half, g, t] = starts[half if half in own else own[0], t]
        for i, half in itertools.product(range(CHUNKS // 2), halves):
            self._add_chunk(sums, half, half * CHUNKS // 2 + i, weights, records, words)
            if isa.ordered and self.neighbours and half == halves[-1]:  # both have used the same activations
                sums = {key: apart(b, isa.n_parts, partial(here, b), total) for key, total in sums.items()}
        return {place: isa.end(b, total) for place, total in sums.items()}

    def _add_chunk(
        self, sums: Sums, half: int, chunk: int, weights: list[Any], records: list[Value], words: Any = None
    ) -> None:
        """Adds the products of a chunk to sums[half, group, token]."""
        b, isa, place = self.b, self.isa, chunk_at(chunk, self.isa.in_turn) // 4
        w = [group(chunk) for group in weights]
        for t, record in enumerate(records):
            if words is not None:
                x = isa.input_words(b, words[t], place)
            elif self.neighbours:
                x = isa.inputs_of_halves(b, record, chunk % (CHUNKS // 2))
            else:
                x = isa.input(b, record, place)
            for g in range(len(weights)):
                sums[half, g, t] = isa.step(b, sums[half, g, t], w[g], x, self.form, self.fmt.bits)

    def _add_times_d(self, weights: list[Any], scales: list[Any], records: list[Value]) -> None:
        """Adds exact sums of products times d: of both halves at once if they share a scale."""
        b, isa, fmt, sums = self.b, self.isa, self.fmt, Sums()
        for halves in ((0, 1),) if fmt.halves == 1 else ((0,), (1,)):
            for g, t in itertools.product(range(len(weights)), range(len(records))):
                sums[0, g, t] = isa.empty(b, repeat(I32x16, 0))
            for chunk in range(halves[0] * CHUNKS // 2, (halves[-1] + 1) * CHUNKS // 2):
                for (_, g, t), so_far in sums.items() if chunk % (CHUNKS // 2) == 0 else ():
                    sums[0, g, t] = isa.times(b, so_far, records[t], 2 * chunk // CHUNKS)
                self._add_chunk(sums, 0, chunk, weights, records)
            for (_, g, t), so_far in sums.items():
                total = isa.end(b, so_far)
                if fmt.has_zero(isa) and self.form is Form.LOW:
                    field, bits = (ZERO, 4) if fmt.halves == 1 else (HALVES[halves[0]][0], 6)
                    total = b.add(total, self._zero(records[t], field, bits))
                self.add(g, t, b.sitofp(total, F32x16), scales[g](halves[0]))

    def _start(self, record: Value, half: int) -> Any:
        """A sum without products, less the zero point of those to come unless that is made good at the end."""
        b, isa, bits, first = self.b, self.isa, self.fmt.bits, 0 if self.whole else self.isa.first
        if self.neighbours and self.less_zero:  # the same in each part
            offset = parts(b, isa.inputs_of_halves(b, at(b, record, OFFSET_LOW), 0), isa.n_parts)[0]
            offset = opaque(b, offset)  # else LLVM shifts before it spreads: one more
            return joined(b, [isa.offset(b, offset, 8 - bits, first)] * isa.n_parts)
        zero = self.less_zero or (self.fmt.zero and not self.whole)
        return isa.start(b, record, HALVES[half][0], self.form, bits, zero, first)

    def load(self, addresses: list[list[Value]]) -> None:
        """Goes on from the sums at addresses[group][token]."""
        for acc, address in zip(itertools.chain(*self.acc), itertools.chain(*addresses), strict=True):
            self.b.store(load_at(self.b, address, F32x16, 64), acc)

    def store(self, addresses: list[list[Value]]) -> None:
        for acc, address in zip(itertools.chain(*self.acc), itertools.chain(*addresses), strict=True):
            store_at(self.b, self.b.load(acc), address, 64)

    def add(self, g: int, t: int, x: Value, y: Value) -> None:
        self.b.store(emit_fma(self.context, self.b, x, y, self.b.load(self.acc[g][t])), self.acc[g][t])

    def _scaled(self, total: Value, record: Value, half: int) -> Value:
        """An exact sum of products, as float32, times d."""
        b, factor = self.b, self.factor(record, half)
        if self.isa.magic and not self.isa.whole_scales:  # (MAGIC + total) * d - MAGIC * d, rounded once
            return emit_fma(self.context, b, b.bitcast(total, F32x16), factor, self._float(record, HALVES[half][2]))
        return b.fmul(self._exactly(total), factor)

    def _exactly(self, total: Value) -> Value:
        """An exact sum of products as float32."""
        if self.isa.magic:  # on Intel's, conversions go to the units that multiply
            return self.b.fsub(self.b.bitcast(total, F32x16), repeat(F32x16, MAGIC))
        return self.b.sitofp(total, F32x16)

    def _joined(self, low: Value, high: Value, record: Value) -> Value:
        """Exact sums of both halves, each times its d."""
        high = self._exactly(high)
        return emit_fma(self.context, self.b, high, self.factor(record, 1), self._scaled(low, record, 0))

    def _whole(self, low: Value, high: Value, record: Value) -> Value:
        """The same by integers."""
        join = self.isa.join_neighbours if self.neighbours else self.isa.join
        total = join(self.b, low, high, self.factors(record))
        if self.fmt.zero and not self.less_zero and self.form is Form.LOW:
            total = self.b.add(total, self._zero(record, ZERO, 4))
        return self.b.sitofp(total, F32x16)

    def _zero(self, record: Value, field: int, bits: int) -> Value:
        """What the zero point takes off sums; the field is that of weights of `bits` bits."""
        value, more = self._integer(record, field), self.fmt.bits - bits
        if more == 0:
            return value
        return (self.b.shl if more > 0 else self.b.ashr)(value, repeat(I32x16, abs(more)))

    def factor(self, record: Value, half: int) -> Value:
        """d of half a block, in all lanes."""
        return self._float(record, HALVES[half][1])

    def factors(self, record: Value) -> Value:
        """The whole d of both halves, two int16 in each lane."""
        return self._integer(record, FACTORS)

    def minimum_factors(self, record: Value) -> list[Value]:
        """What minima are multiplied with, in all lanes."""
        if not self.fmt.minimum:
            return []
        if self.fmt.halves == 1:
            return [self._float(record, SCALED_SUM)]
        return [self._scaled_sum(record, offset, d) for offset, d, _ in HALVES]

    def _scaled_sum(self, record: Value, offset: int, d: int) -> Value:
        """d times the sum of half a block."""
        b = self.b
        total = b.sub(I32(self.isa.first), load_at(b, at(b, record, offset), I32, 4))
        scaled = b.sitofp(total, F32)
        if self.isa.scales_sums:
            return spread(b, b.fmul(scaled, ir.Constant(F32, 1 / 32)), F32x16)
        scaled = b.fmul(scaled, load_at(b, at(b, record, d), F32, 4))
        return spread(b, b.fmul(scaled, ir.Constant(F32, 1 / 128)), F32x16)

    def _integer(self, record: Value, field: int) -> Value:
        return spread(self.b, load_at(self.b, at(self.b, record, field), I32, 4), I32x16)

    def _float(self, record: Value, field: int) -> Value:
        return spread(self.b, load_at(self.b, at(self.b, record, field), F32, 4), F32x16)
