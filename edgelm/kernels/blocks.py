"""Packed weights as vectors: the code for the bits that `units` describes.

`Blocks` turns a description into code: vectors for the kernels, integers of 16 rows for packing. The formats are in
`block_formats`. Knows nothing of activations or of how a machine multiplies, except the form it wants weights in
(`isa.Form`).
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir

from edgelm.kernels.emit import I8, I16, F32x16, I8x64, I32x16, emit_fma, load_at, repeat, widen_f16
from edgelm.kernels.isa import Form, Isa
from edgelm.kernels.lanes import Int, Place, Rows
from edgelm.kernels.records import BLOCK
from edgelm.kernels.units import ROWS, UNITS, Field, Unit

Value = ir.Value
Scales = tuple[list[Value], list[Value]]  # of a block, and minima: one or two F32x16, and as many or no minima
CHUNKS = 8  # of a block of 32 inputs
BLOCKS: dict[str, Blocks] = {}


class Blocks(Unit):
    """A unit with the code for it. One instance for each subclass that has the name of one, in `BLOCKS` by it."""

    def __init_subclass__(cls) -> None:
        if unit := UNITS.get(cls.__name__):
            BLOCKS[unit.name] = cls(**vars(unit))

    # --- what differs between formats

    def opened(self, b: ir.IRBuilder, unit: Value) -> Value:
        """Address of the scales of the unit at `unit`, as `scales` reads them: perhaps on the stack."""
        return unit

    def scales(self, context: Any, b: ir.IRBuilder, head: Value, block: Value) -> Scales:
        """Those of a block of a unit that is `opened`."""
        raise NotImplementedError

    def words(self, source: Rows, part: Int) -> list[Int]:
        """The eight chunks of each row as int32, a quant in each byte: block `part` of the file's block at `source`."""
        raise NotImplementedError

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        """Stores scales and minima of the same to block `block` of `unit`."""
        raise NotImplementedError

    # --- vectors

    def form(self, isa: Isa) -> Form:
        return isa.form(self.bits, self.has_zero(isa))

    def direct_form(self, isa: Isa) -> Form:
        return isa.direct_form(self.bits, self.has_zero(isa))

    def joins(self, isa: Isa) -> bool:
        """Whether sums of both halves of a block, which share a scale, are added up as integers: `Isa.joins`."""
        return self.halves == 1 and isa.joins(self.bits, self.has_zero(isa))

    def scales_sums(self, isa: Isa) -> bool:
        """Whether sums come multiplied with d: those of both halves at once, or of each."""
        each_fits = self.halves == 2 and isa.fits(BLOCK // 2, self.bits, self.zero)
        return isa.scales_sums and (self.joins(isa) or each_fits)

    def joins_less_zero(self, isa: Isa) -> bool:
        """Whether they fit only if they start with the zero point."""
        return self.joins(isa) and not isa.joins(self.bits, zero=False)

    def widens(self, isa: Isa) -> bool:
        """Whether tiles multiply its weights as int16: `Isa.widens`."""
        return isa.widens(self.form(isa))

    def has_zero(self, isa: Isa) -> bool:
        """Whether products are those of quants less a zero point: the format's own, or the middle of `centred`."""
        return self.zero or self.centred(isa)

    def centred(self, isa: Isa) -> bool:
        """Whether quants of a format with minima are taken less their middle, so that sums fit; minima make it good."""
        return self.minimum and self.halves == 1 and isa.joins(self.bits, True) and not isa.joins(self.bits, False)

    def scales_for(self, isa: Isa, context: Any, b: ir.IRBuilder, head: Value, block: Value) -> Scales:
        """`scales`, of quants as sums of products take them."""
        scales, minima = self.scales(context, b, head, block)
        if self.centred(isa):
            middle = repeat(F32x16, 2.0 ** (self.bits - 1))
            minima = [emit_fma(context, b, scale, middle, own) for scale, own in zip(scales, minima, strict=True)]
        return scales, minima

    def factor(self, form: Form) -> float:
        """What sums of products must be multiplied with at the end: exact, a power of two."""
        return 2.0 ** (self.bits - 8) if form is Form.TOP else 1.0

    def quants(self, b: ir.IRBuilder, isa: Isa, unit: Value, block: Value, form: Form) -> list[Value]:
        """The eight chunks of a block as I8x64 in `form`."""
        start = b.add(b.add(unit, unit.type(self.header)), b.mul(block, unit.type(self.quant_bytes)))
        vectors = [load_at(b, b.add(start, unit.type(64 * v)), I32x16) for v in range(self.stored)]
        return [self._chunk(b, isa, vectors, fields, form) for fields in self.fields]

    def _chunk(self, b: ir.IRBuilder, isa: Isa, vectors: list[Value], fields: list[Field], form: Form) -> Value:
        top = 8 - self.bits if form is Form.TOP and self.table is None else 0
        parts = [_field(b, vectors[f.vector], f.at, f.to + top, f.bits, isa.shifts_bytes) for f in fields]
        value = b.bitcast(functools.reduce(b.or_, parts), I8x64)
        if self.table is not None:
            shift = 128 if form is Form.TOP else 0
            return isa.lookup(b, [entry + shift for entry in self.table] * (16 // len(self.table)), value)
        if self.bits == 8:
            return b.xor(value, repeat(I8x64, 128)) if form is Form.TOP else value
        if self.has_zero(isa) and form is Form.SIGNED:
            return b.sub(value, repeat(I8x64, 1 << (self.bits - 1)))
        return value

    # --- packing

    def pack(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        """Code that packs one block of each row."""
        words = self.words(source, part)
        target = unit + (block * self.quant_bytes + self.header)
        vectors: list[Int | None] = [None] * self.stored
        for word, fields in zip(words, self.fields, strict=True):
            for vector, at, to, bits in fields:
                field = _shift(word, to, at)
                field = field if bits == 8 else field & _bytes(((1 << bits) - 1) << at)
                known = vectors[vector]
                vectors[vector] = field if known is None else known | field
        for v, value in enumerate(vectors):
            (target + 64 * v).store(value)
        self.pack_scales(source, part, unit, block)


def _bytes(value: int) -> int:
    """`value` in each of four bytes."""
    return value * 0x01010101


def _shift(word: Int, at: int, to: int) -> Int:
    return word if at == to else word << (to - at) if to > at else word >> (at - to)


def _field(b: ir.IRBuilder, vector: Value, at: int, to: int, bits: int, shifts_bytes: bool) -> Value:
    """In each byte of an I32x16, the `bits` bits from bit `at` on moved to bit `to`, and nothing else."""
    if bits == 8:
        return vector
    if shifts_bytes and at + bits == 8 and to == 0:  # then nothing else is left
        return b.bitcast(b.lshr(b.bitcast(vector, I8x64), repeat(I8x64, at)), I32x16)
    if at != to:
        vector = b.shl(vector, repeat(I32x16, to - at)) if to > at else b.lshr(vector, repeat(I32x16, at - to))
    return b.and_(vector, ir.Constant(I32x16, [_bytes(((1 << bits) - 1) << to)] * 16))


# --- scales, for the formats


def f16_lanes(context: Any, b: ir.IRBuilder, address: Value) -> Value:
    """Sixteen float16 as F32x16."""
    return widen_f16(context, b, load_at(b, address, ir.VectorType(I16, ROWS)))


def f32_lanes(b: ir.IRBuilder, address: Value) -> Value:
    return load_at(b, address, F32x16)


def u8_lanes(b: ir.IRBuilder, address: Value) -> Value:
    """Sixteen unsigned bytes as I32x16."""
    return b.zext(load_at(b, address, ir.VectorType(I8, ROWS)), I32x16)


def i8_lanes(b: ir.IRBuilder, address: Value) -> Value:
    return b.sext(load_at(b, address, ir.VectorType(I8, ROWS)), I32x16)


def at(b: ir.IRBuilder, unit: Value, offset: int, block: Value | None = None, stride: int = 0) -> Value:
    """unit + offset + block * stride"""
    address = b.add(unit, unit.type(offset))
    return address if block is None else b.add(address, b.mul(block, unit.type(stride)))
