"""Words for quantizers: sixteen blocks side by side, one in each lane of a vector, so that no lanes are ever added up.

What one would write for a block is written once, over vectors of 16 float32, and done to 16 blocks at a time. Sums
run over the weights of a block in order, and products are rounded before they are added: every machine, whatever its
vectors, comes to the same bytes.

    gather      16 blocks in a row of memory become a tile: line i holds weight i of each block
    Grid        the integers, or the uneven levels, that weights are rounded to
    Image       the bytes of 16 blocks, byte i of each side by side
    scatter     an image becomes 16 blocks in a row of memory

Knows nothing of how scales are found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgelm.kernels.emit import I8, I8x16, I32x16, load_at, narrow_f16, store_at, widen_f16
from edgelm.kernels.words import Emitter, Value, function

LINE = 64  # bytes of 16 float32
TINY = 1e-30  # a smaller scale is none
HUGE = 3e38
MAGIC = 1.5 * 2.0**23  # adding it rounds to an integer, to nearest even


# --- arithmetic of lanes


def absolute(e: Emitter, x: Value) -> Value:
    return e.intrinsic("llvm.fabs.v16f32", x)


def integer_of(e: Emitter, x: Value) -> Value:
    """Lanes rounded to zero, as int32."""
    return e.apply(lambda context, b, v: b.fptosi(v, I32x16), x)


def nearest_integer(x: Value) -> Value:
    """Lanes rounded to nearest even, as float32; below 2**22."""
    return x + MAGIC - MAGIC


def as_f16(e: Emitter, x: Value) -> Value:
    """Lanes rounded to what a float16 holds, at most its largest number."""
    x = e.max(e.min(x, 65504.0), -65504.0)
    return e.apply(lambda context, b, v: widen_f16(context, b, narrow_f16(context, b, v)), x)


def inverse(e: Emitter, x: Value) -> Value:
    """1 / x, and 0 where x is (nearly) nothing."""
    return e.select(absolute(e, x) > TINY, 1.0 / x, 0.0)


def clamp(e: Emitter, x: Value, low: float, high: float) -> Value:
    return e.min(e.max(x, low), high)


def number(e: Emitter, index: Value) -> Value:
    """The word `index` as a number in each lane."""
    return e.vector(e.to_f32(index))


# --- what weights are rounded to


class Grid:
    """The integers low … high."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = float(low), float(high)
        self.name = f"integers_{-low}_{high}"

    def level(self, e: Emitter, t: Value) -> Value:
        """The nearest level, as a number."""
        return nearest_integer(clamp(e, t, self.low, self.high))

    def code(self, e: Emitter, t: Value) -> Value:
        """What stands for the nearest level in a file: int32."""
        return integer_of(e, self.level(e, t) - self.low)


class Levels(Grid):
    """A table of levels, ascending; `codes` where a level is not called by its place in the table."""

    def __init__(self, name: str, levels: tuple[int, ...], codes: tuple[int, ...] | None = None) -> None:
        self.name, self.levels = name, levels
        self.codes = codes or tuple(range(len(levels)))
        self.low, self.high = float(levels[0]), float(levels[-1])

    def _climb(self, e: Emitter, t: Value, heights: tuple[int, ...]) -> Value:
        found = e.vector(float(heights[0]))
        for i in range(1, len(heights)):
            above = t > (self.levels[i - 1] + self.levels[i]) / 2
            found = found + e.select(above, e.vector(float(heights[i] - heights[i - 1])), 0.0)
        return found

    def level(self, e: Emitter, t: Value) -> Value:
        return self._climb(e, t, self.levels)

    def code(self, e: Emitter, t: Value) -> Value:
        return integer_of(e, self._climb(e, t, self.codes))


# --- between rows of memory and lanes


def _transpose(e: Emitter, rows: list[Value]) -> list[Value]:
    """16 vectors become their transpose: four perfect shuffles."""
    low = [lane // 2 + 16 * (lane % 2) for lane in range(16)]
    high = [lane + 8 for lane in low]
    for _ in range(4):
        rows = [e.shuffle(rows[i], rows[i + 8], order) for i in range(8) for order in (low, high)]
    return rows


@function
def gather(e: Emitter, source: Value, n_weights: Value, first: Value, period: Value, tile: Value) -> None:
    """16 blocks of n_weights float32 become a tile: those at first, first + 1, … modulo period, counted from source."""
    with e.loop(0, n_weights, 16) as i:
        rows = [e.load(source + ((first + lane) % period * n_weights + i) * 4) for lane in range(16)]
        for k, column in enumerate(_transpose(e, rows)):
            e.store(tile + (i + k) * LINE, column)


class Image:
    """The bytes of 16 blocks, byte i of each of them side by side at `address` + 16 i."""

    def __init__(self, e: Emitter, address: Value) -> None:
        self.e, self.address = e, address

    def put(self, index: Any, byte: Value) -> None:
        """The low byte of int32 lanes, to place `index` of each block."""
        low = self.e.apply(lambda context, b, v: b.trunc(v, I8x16), byte)
        self.e.store(self.address + index * 16, low)

    def put_f16(self, index: int, x: Value) -> None:
        bits = self.e.apply(lambda context, b, v: b.zext(narrow_f16(context, b, v), I32x16), x)
        self.put(index, bits)
        self.put(index + 1, bits // 256)

    def pack(self, first: int, n_bytes: int, byte: Callable[[Value], list[tuple[Value, int]]]) -> None:
        """Bytes first … first + n_bytes - 1: for place l the sum of fields times their powers of two."""
        with self.e.loop(0, n_bytes) as l:
            fields = [field * (1 << shift) if shift else field for field, shift in byte(l)]
            total = fields[0]
            for field in fields[1:]:
                total = total | field
            self.put(l + first, total)


@function
def scatter(e: Emitter, image: Value, n_bytes: Value, n_blocks: Value, target: Value) -> None:
    """The first n_blocks blocks of an image, one after the other, to target."""
    b = e.b
    with e.loop(0, n_blocks) as lane, e.loop(0, n_bytes) as i:
        byte = load_at(b, (image + i * 16 + lane).llvm, I8)
        store_at(b, byte, (target + lane * n_bytes + i).llvm)
