"""The formats, packed: one class each, registered by being defined. Most hold the file's own bits.

Legacy blocks, K-quants, few bits with one scale, formats with a table of levels. Points of a codebook, and digits of
base three, are too much work for each token: they are `transcode`d, to numbers of their levels. The meaning of the bits
is defined in `edgelm.formats`; here they are only moved. Products of a super-block's scale and a block's are exact in
float32.

Knows nothing of how machines multiply.
"""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir

from edgelm.formats.codebooks import LEVELED
from edgelm.kernels.blocks import BLOCKS, Blocks, Scales, Value, at, f16_lanes, f32_lanes, i8_lanes, u8_lanes
from edgelm.kernels.emit import I8, I16, F32x16, I8x64, I32x16, load_at, repeat, stack, store_at, widen_f16
from edgelm.kernels.lanes import Int, Place, Rows
from edgelm.kernels.units import ROWS, UNITS


def nibbles(source: Rows) -> list[Int]:
    """Sixteen bytes: low nibbles are inputs 0-15, high nibbles 16-31."""
    words = source.words(4)
    return [word & 0x0F0F0F0F for word in words] + [(word >> 4) & 0x0F0F0F0F for word in words]


def spread(word: Int, shift: int) -> Int:
    """Bits shift … shift + 3 of `word` to the bottom bits of four bytes."""
    return (((word >> shift) & 15) * 0x00204081) & 0x01010101


# --- blocks of 32 with one scale, and perhaps a minimum


class _Scaled(Blocks):
    """float16 scale at the start of the block; two blocks to a unit, so that vectors lie on cache lines."""

    def scales(self, context: Any, b: ir.IRBuilder, head: Value, block: Value) -> Scales:
        return [f16_lanes(context, b, at(b, head, 0, block, 32))], []

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        (unit + block * 32).store(source.load(16), 16)


class _ScaledMinimum(Blocks):
    """float16 scale and minimum."""

    def scales(self, context: Any, b: ir.IRBuilder, head: Value, block: Value) -> Scales:
        return [f16_lanes(context, b, head)], [f16_lanes(context, b, at(b, head, 32))]

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        both = source.load()
        unit.store(both, 16)
        (unit + 32).store(both >> 16, 16)


class Q8_0(_Scaled):
    def words(self, source: Rows, part: Int) -> list[Int]:
        return (source + 2).words(8)


class Q8_1(_Scaled):
    def words(self, source: Rows, part: Int) -> list[Int]:
        return (source + 4).words(8)


class Q4_0(_Scaled):
    def words(self, source: Rows, part: Int) -> list[Int]:
        return nibbles(source + 2)


class Q4_1(_ScaledMinimum):
    def words(self, source: Rows, part: Int) -> list[Int]:
        return nibbles(source + 4)


def _five_bits(source: Rows) -> list[Int]:
    """Four bytes of fifth bits, then nibbles."""
    high = source.load()
    return [word | spread(high, 4 * i) << 4 for i, word in enumerate(nibbles(source + 4))]


class Q5_0(_Scaled):
    def words(self, source: Rows, part: Int) -> list[Int]:
        return _five_bits(source + 2)


class Q5_1(_ScaledMinimum):
    def words(self, source: Rows, part: Int) -> list[Int]:
        return _five_bits(source + 4)


# --- K-quants: super-blocks of 256. Small scales have a byte each, if nothing else is said; `part` is the block of 32


def _times(b: ir.IRBuilder, factor: Value, integers: Value) -> Value:
    return b.fmul(factor, b.sitofp(integers, F32x16))


class _ScalesAndMinima(Blocks):
    """Q4_K and Q5_K: d, dmin, then eight scales and eight minima of 6 bits.

    In the header lie the lower four bits of a block's scales and minima in 16 bytes, then, two for each, their upper
    ones: of the scales of blocks 0-3 and 4-7, then of the minima. Opened, each has a byte. So a header is read at once:
    memory sees a stream in order (docs/LOG.md), and the bytes are as many as in the file.
    """

    def opened(self, b: ir.IRBuilder, unit: Value) -> Value:
        place = stack(b, 64 + 2 * 128)
        store_at(b, load_at(b, unit, I8x64, 64), place, 64)
        lower = [load_at(b, at(b, unit, 64 + 64 * half), I8x64, 64) for half in range(2)]
        upper = load_at(b, at(b, unit, 192), I8x64, 64)
        for which, half in itertools.product(range(2), range(2)):
            low = b.lshr(lower[half], repeat(I8x64, 4)) if which else b.and_(lower[half], repeat(I8x64, 15))
            shift = 4 - 2 * (2 * which + half)
            high = b.shl(upper, repeat(I8x64, shift)) if shift >= 0 else b.lshr(upper, repeat(I8x64, -shift))
            value = b.or_(low, b.and_(high, repeat(I8x64, 0x30)))
            store_at(b, value, at(b, place, 64 + 128 * which + 64 * half), 64)
        return place

    def scales(self, context: Any, b: ir.IRBuilder, head: Value, block: Value) -> Scales:
        d, less = f16_lanes(context, b, head), b.fneg(f16_lanes(context, b, at(b, head, 32)))
        scale, minimum = (u8_lanes(b, at(b, head, start, block, 16)) for start in (64, 192))
        return [_times(b, d, scale)], [_times(b, less, minimum)]

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        d, *packed = source.words(4)
        unit.store(d, 16)
        (unit + 32).store(d >> 16, 16)
        four, first = part & 3, part.below(4)
        low, mid, high = ((word >> (four * 8).i32()) & 255 for word in packed)  # high: lower bits of blocks 4-7
        (unit + block * 16 + 64).store(((low & 15) | (mid & 15) << 4).where(high, first), 8)
        (unit + four * 16 + 192).store((low >> 4) | (mid & 0xF0), 8)


class Q4_K(_ScalesAndMinima):
    def words(self, source: Rows, part: Int) -> list[Int]:
        start, shift = source + 16 + (part >> 1) * 32, ((part & 1) * 4).i32()
        return [(word >> shift) & 0x0F0F0F0F for word in start.words(8)]


class Q5_K(_ScalesAndMinima):
    def words(self, source: Rows, part: Int) -> list[Int]:
        start, shift, bit = source + 48 + (part >> 1) * 32, ((part & 1) * 4).i32(), part.i32()
        low = [(word >> shift) & 0x0F0F0F0F for word in start.words(8)]
        return [w | ((h >> bit) & 0x01010101) << 4 for w, h in zip(low, (source + 16).words(8), strict=True)]


class _ScalesOfHalves(Blocks):
    """d, then sixteen signed scales."""

    def scales(self, context: Any, b: ir.IRBuilder, head: Value, block: Value) -> Scales:
        d = f16_lanes(context, b, head)
        return [_times(b, d, i8_lanes(b, at(b, head, 64 + 16 * half, block, 32))) for half in range(2)], []

    def _store(self, unit: Place, block: Int, d: Int, scales: list[Int]) -> None:
        unit.store(d, 16)
        for half, scale in enumerate(scales):
            (unit + block * 32 + 64 + 16 * half).store(scale, 8)


class Q6_K(_ScalesOfHalves):
    def words(self, source: Rows, part: Int) -> list[Int]:
        half, quarter = part >> 2, part & 3
        low, shift_low = source + half * 64 + (quarter & 1) * 32, ((quarter >> 1) * 4).i32()
        high, shift_high = source + 128 + half * 32, (quarter * 2).i32()
        words = [(word >> shift_low) & 0x0F0F0F0F for word in low.words(8)]
        return [w | ((h >> shift_high) & 0x03030303) << 4 for w, h in zip(words, high.words(8), strict=True)]

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        scales = (source + 192 + part * 2).load(16)
        self._store(unit, block, (source + 208).load(16), [scales, scales >> 8])


class Q3_K(_ScalesOfHalves):
    def words(self, source: Rows, part: Int) -> list[Int]:
        low, shift, bit = source + 32 + (part >> 2) * 32, ((part & 3) * 2).i32(), part.i32()
        words = [(word >> shift) & 0x03030303 for word in low.words(8)]
        return [w | ((h >> bit) & 0x01010101) << 2 for w, h in zip(words, source.words(8), strict=True)]

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        scales = []
        for half in range(2):
            i = part * 2 + half
            low = ((source + 96 + (i & 7)).load(8) >> ((i >> 3) * 4).i32()) & 15
            high = ((source + 104 + (i & 3)).load(8) >> ((i >> 2) * 2).i32()) & 3
            scales.append((low | high << 4) - 32)
        self._store(unit, block, (source + 108).load(16), scales)


class Q2_K(Blocks):
    """d, dmin, then sixteen bytes: scale in the low nibble, minimum in the high one."""

    def scales(self, context: Any, b: ir.IRBuilder, head: Value, block: Value) -> Scales:
        d, dmin = f16_lanes(context, b, head), f16_lanes(context, b, at(b, head, 32))
        both = [u8_lanes(b, at(b, head, 64 + 16 * half, block, 32)) for half in range(2)]
        scales = [_times(b, d, b.and_(pair, repeat(I32x16, 15))) for pair in both]
        minima = [_times(b, dmin, b.lshr(pair, repeat(I32x16, 4))) for pair in both]
        return scales, [b.fneg(minimum) for minimum in minima]

    def words(self, source: Rows, part: Int) -> list[Int]:
        low, shift = source + 16 + (part >> 2) * 32, ((part & 3) * 2).i32()
        return [(word >> shift) & 0x03030303 for word in low.words(8)]

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        d, both = (source + 80).load(), (source + part * 2).load(16)
        unit.store(d, 16)
        (unit + 32).store(d >> 16, 16)
        for half in range(2):
            (unit + block * 32 + 64 + 16 * half).store(both >> 8 * half, 8)


class Q8_K(Blocks):
    """d is a float32."""

    def scales(self, context: Any, b: ir.IRBuilder, head: Value, block: Value) -> Scales:
        return [f32_lanes(b, head)], []

    def words(self, source: Rows, part: Int) -> list[Int]:
        return (source + 4 + part * 32).words(8)

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        unit.store(source.load())


# --- one or two bits, and a scale for all blocks of a unit


class _OneScale(Blocks):
    def scales(self, context: Any, b: ir.IRBuilder, head: Value, block: Value) -> Scales:
        return [f16_lanes(context, b, head)], []

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        unit.store(source.load(16), 16)


class Q1_0(_OneScale):
    def words(self, source: Rows, part: Int) -> list[Int]:
        signs = (source + 2 + part * 4).load()
        return [spread(signs, 4 * i) for i in range(8)]


class Q2_0(_OneScale):
    """(q - 1) * d, held as (q' - 2) * -d where q' is 3 - q: so 2 stands for zero, as the kernels want it."""

    def words(self, source: Rows, part: Int) -> list[Int]:
        start = source + 2 + part * 8
        quads = [(word >> 8 * i) & 255 for word in (start.load(), (start + 4).load()) for i in range(4)]
        return [~(quad | quad << 6 | quad << 12 | quad << 18) & 0x03030303 for quad in quads]

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        unit.store(source.load(16) ^ 0x8000, 16)


class TQ2_0(Q2_0):
    def words(self, source: Rows, part: Int) -> list[Int]:
        low, shift = source + (part >> 2) * 32, ((part & 3) * 2).i32()
        return [~(word >> shift) & 0x03030303 for word in low.words(8)]

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        super().pack_scales(source + 64, part, unit, block)


class TQ1_0(TQ2_0):
    """Transcoded to blocks of TQ2_0: a third of a bit more, and no digits to work out again for each token."""


# --- levels from a table

class IQ4_NL(_Scaled):
    def words(self, source: Rows, part: Int) -> list[Int]:
        return nibbles(source + 2)


class IQ4_XS(Blocks):
    """d, upper two bits of the scales, lower four bits of the scales, nibbles."""

    def scales(self, context: Any, b: ir.IRBuilder, head: Value, block: Value) -> Scales:
        return [_times(b, f16_lanes(context, b, head), i8_lanes(b, at(b, head, 64, block, 16)))], []

    def words(self, source: Rows, part: Int) -> list[Int]:
        return nibbles(source + 8 + part * 16)

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        unit.store(source.load(16), 16)
        high = ((source + 2).load(16) >> (part * 2).i32()) & 3
        low = ((source + 4 + (part >> 1)).load(8) >> ((part & 1) * 4).i32()) & 15
        (unit + block * 16 + 64).store((low | high << 4) - 32, 8)


class MXFP4(Blocks):
    """One byte of exponent: half the scale is 2 ** (e - 128), as the table holds twice the values."""

    def scales(self, context: Any, b: ir.IRBuilder, head: Value, block: Value) -> Scales:
        e = u8_lanes(b, at(b, head, 0, block, 16))
        normal = b.shl(b.sub(e, repeat(I32x16, 1)), repeat(I32x16, 23))
        subnormal = b.shl(repeat(I32x16, 1 << 21), e)
        bits = b.select(b.icmp_unsigned("<", e, repeat(I32x16, 2)), subnormal, normal)
        return [b.bitcast(bits, F32x16)], []

    def words(self, source: Rows, part: Int) -> list[Int]:
        return nibbles(source + 1)

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        (unit + block * 16).store(source.load(8), 8)


class NVFP4(Blocks):
    """An E4M3 scale without sign for each 16 weights, halved as the table holds twice the values.

    Its bits are those of a float16 that is 2 ** 7 times too small. What counts as zero is stored as zero.
    """

    def scales(self, context: Any, b: ir.IRBuilder, head: Value, block: Value) -> Scales:
        scales = []
        for half in range(2):
            stored = load_at(b, at(b, head, 16 * half, block, 32), ir.VectorType(I8, ROWS))
            bits = ir.VectorType(I16, ROWS)
            small = widen_f16(context, b, b.shl(b.zext(stored, bits), repeat(bits, 7)))
            scales.append(b.fmul(small, repeat(F32x16, 128.0)))
        return scales, []

    def words(self, source: Rows, part: Int) -> list[Int]:
        words = nibbles(source + 4 + part * 16)  # of each eight bytes the low nibbles come first, then the high ones
        return words[0:2] + words[4:6] + words[2:4] + words[6:8]

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        both = (source + part * 2).load(16)
        for half in range(2):
            scale = (both >> 8 * half) & 255
            (unit + block * 32 + 16 * half).store((scale & 0).where(scale & 127, scale.equals(127)), 8)


class _Leveled(Blocks):
    """Transcoded: d as float32, whole scales, then a byte for each weight, the number of its level."""

    def scales(self, context: Any, b: ir.IRBuilder, head: Value, block: Value) -> Scales:
        d, n = f32_lanes(b, head), self.halves
        return [_times(b, d, i8_lanes(b, at(b, head, 64 + 16 * half, block, 16 * n))) for half in range(n)], []

    def words(self, source: Rows, part: Int) -> list[Int]:
        return (source + 4 + 8 * self.halves + part * 32).words(8)

    def pack_scales(self, source: Rows, part: Int, unit: Place, block: Int) -> None:
        unit.store(source.load())
        scales = (source + 4 + part * self.halves).load(8 * self.halves)
        for half in range(self.halves):
            (unit + block * (16 * self.halves) + 64 + 16 * half).store(scales >> 8 * half, 8)


BLOCKS.update((format.__name__, _Leveled(**vars(UNITS[format.__name__]))) for format in LEVELED)
