"""Types of cached keys and values: how those of one KV head lie in a page, and what their bytes mean.

`f32` and `f16` are arrays. `bf16` are pairs, as processors that add two products at a time want them: nothing has to be
converted when they are read. `q8_0` and `q4_0` are whole numbers of 8 and 4 bits with a float16 scale for each 32 of
them, like the weights of that name: 8.5 and 4.5 bits a value. Outliers, of which keys have many, would cost their whole
block its precision; so each block is first turned by an orthonormal Hadamard transform, which spreads them, but not to
other blocks (docs/LOG.md: two to three times less divergence than without, or over whole heads). Queries are turned
alike, which leaves q·k as it was, and the weighted sum of values is turned back (Ashkboos et al. 2024: QuaRot).

Everything that is stored for a position, but padding, depends on that position alone. Knows nothing of pages and
sequences.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .formats import simple

PAGE = 64  # positions of a page; kernels are written for it
BLOCK = 32  # quantized values that share a scale
SCALES = 2 * PAGE  # bytes of a block's scales, before its numbers
Floats = NDArray[np.float32]


def block_bytes(bits: int) -> int:
    """Bytes of a quantized block of a page."""
    return SCALES + PAGE * BLOCK // 8 * bits


class KVArray:
    """The keys, or the values, of `n_heads` heads of `dim` in a page of one layer, as bytes (uint8).

    Attributes:
        n_bytes: of all heads.
        stride: dim as it is stored: what lies beyond `dim` is padding.
    """

    def __init__(self, keys: bool, n_heads: int, dim: int) -> None:
        self.keys, self.n_heads, self.dim = keys, n_heads, dim

    n_bytes: int
    stride: int

    def write(self, page: NDArray[np.uint8], first: int, x: Floats) -> None:
        """Stores x (n, n_heads, dim) at positions first … first + n - 1 of the page."""
        raise NotImplementedError

    def read(self, page: NDArray[np.uint8]) -> Floats:
        """What is stored: (PAGE, n_heads, dim)."""
        raise NotImplementedError

    def keep(self, page: NDArray[np.uint8], n: int) -> None:
        """Zeroes everything but the first n positions, and all padding."""
        raise NotImplementedError


class FloatArray(KVArray):
    """Keys as (n_heads, dim, PAGE), values as (n_heads, PAGE, stride): a vector of a kernel holds positions in q·k,
    dimensions in p·v, so that nothing is ever summed across its lanes."""

    dtype: ClassVar[np.dtype[np.generic]]

    def __init__(self, keys: bool, n_heads: int, dim: int) -> None:
        super().__init__(keys, n_heads, dim)
        self.stride = dim if keys else -(-dim // 16) * 16
        self.n_bytes = n_heads * self.stride * PAGE * self.dtype.itemsize

    def view(self, page: NDArray[np.uint8]) -> NDArray[Any]:
        """(n_heads, PAGE, dim), writable."""
        x = page.view(self.dtype)
        if self.keys:
            return x.reshape(self.n_heads, self.dim, PAGE).transpose(0, 2, 1)
        return x.reshape(self.n_heads, PAGE, self.stride)[:, :, : self.dim]

    def write(self, page: NDArray[np.uint8], first: int, x: Floats) -> None:
        self.view(page)[:, first : first + len(x)] = x.transpose(1, 0, 2)

    def read(self, page: NDArray[np.uint8]) -> Floats:
        return self.view(page).transpose(1, 0, 2).astype(np.float32)

    def keep(self, page: NDArray[np.uint8], n: int) -> None:
        kept = self.view(page)[:, :n].copy()
        page[:] = 0
        self.view(page)[:, :n] = kept


class F16(FloatArray):
    dtype = np.dtype(np.float16)


class F32(FloatArray):
    dtype = np.dtype(np.float32)


class BF16(KVArray):
    """The upper halves of float32, subnormal numbers as zero. What is added up two at a time lies side by side: keys
    [stride / 2][PAGE][2 dimensions], an odd last one beside zero; values 64 dimensions after the other, and what is
    left of them, [PAGE / 2][64][2 positions]. So a kernel reads a head from its beginning to its end."""

    columns: ClassVar[int] = 64

    def __init__(self, keys: bool, n_heads: int, dim: int) -> None:
        super().__init__(keys, n_heads, dim)
        size = 2 if keys else 16
        self.stride = -(-dim // size) * size
        self.n_bytes = 2 * n_heads * self.stride * PAGE

    def _parts(self, page: NDArray[np.uint8]) -> list[tuple[slice, NDArray[np.uint16]]]:
        """Some dimensions and where they are, as (n_heads, PAGE / 2, 2, dimensions), writable."""
        heads = page.view(np.uint16).reshape(self.n_heads, -1)
        if self.keys:
            pairs = heads.reshape(self.n_heads, self.stride // 2, PAGE // 2, 2, 2).transpose(0, 2, 3, 1, 4)
            return [(slice(i, self.stride, 2), pairs[..., i]) for i in range(2)]
        parts = []
        for c in range(0, self.stride, self.columns):
            which = slice(c, min(c + self.columns, self.stride))
            part = heads[:, PAGE * which.start : PAGE * which.stop].reshape(self.n_heads, PAGE // 2, -1, 2)
            parts.append((which, part.transpose(0, 1, 3, 2)))
        return parts

    def write(self, page: NDArray[np.uint8], first: int, x: Floats) -> None:
        bits = np.zeros((self.n_heads, len(x), self.stride), np.uint16)
        bits[:, :, : self.dim] = bfloat16(x).transpose(1, 0, 2)
        pairs, which = np.divmod(np.arange(first, first + len(x)), 2)
        for dims, part in self._parts(page):
            part[:, pairs, which] = bits[:, :, dims]

    def read(self, page: NDArray[np.uint8]) -> Floats:
        bits = np.zeros((PAGE, self.n_heads, self.stride), np.uint32)
        for dims, part in self._parts(page):
            bits[:, :, dims] = part.reshape(self.n_heads, PAGE, -1).transpose(1, 0, 2)
        return (bits << 16).view(np.float32)[:, :, : self.dim]

    def keep(self, page: NDArray[np.uint8], n: int) -> None:
        kept = self.read(page)[:n]
        page[:] = 0
        self.write(page, 0, kept)


def bfloat16(x: Floats) -> NDArray[np.uint16]:
    """The bits of float32 as bfloat16: to nearest even, subnormal numbers as zero, NaN as a quiet one."""
    bits = simple.BF16.quantize(x.reshape(-1, 1))["x"].reshape(x.shape)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, bits & 0x8000, bits)


class BlockArray(KVArray):
    """Each head is a row of blocks of 32 dimensions, the last one padded with zeros. A block is PAGE float16, the
    scales of its positions, and whole numbers plus `zero`. Four of these that are multiplied and summed together lie
    side by side: keys [dim / 4][PAGE][4 dimensions], values [PAGE / 4][dim][4 positions]."""

    bits: ClassVar[int]

    def __init__(self, keys: bool, n_heads: int, dim: int) -> None:
        super().__init__(keys, n_heads, dim)
        self.stride = -(-dim // BLOCK) * BLOCK
        self.n_bytes = n_heads * (self.stride // BLOCK) * block_bytes(self.bits)
        self.zero = 1 << (self.bits - 1)

    def _parts(self, page: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """Scales (n_heads, blocks, PAGE) and bytes in fours, as the class says; views of the page."""
        blocks = page.reshape(self.n_heads, self.stride // BLOCK, block_bytes(self.bits))
        n = BLOCK * self.bits // 8
        fours = (n // 4, PAGE, 4) if self.keys else (PAGE // 4, n, 4)
        return blocks[:, :, :SCALES].view(np.float16), blocks[:, :, SCALES:].reshape(*blocks.shape[:2], *fours)

    def write(self, page: NDArray[np.uint8], first: int, x: Floats) -> None:
        padded = np.zeros((len(x), self.n_heads, self.stride), np.float32)
        padded[:, :, : self.dim] = x
        new_scales, numbers = self.quantize(hadamard(padded.reshape(len(x), self.n_heads, -1, BLOCK)))
        scales, fours = self._parts(page)
        positions, packed = np.arange(first, first + len(x)), self.pack(numbers)  # (n, heads, blocks, bytes)
        scales[:, :, positions] = new_scales.transpose(1, 2, 0)
        if self.keys:
            fours[:, :, :, positions] = packed.reshape(*packed.shape[:3], -1, 4).transpose(1, 2, 3, 0, 4)
        else:
            fours[:, :, positions // 4, :, positions % 4] = packed

    def read(self, page: NDArray[np.uint8]) -> Floats:
        scales, fours = self._parts(page)
        packed = fours.transpose(3, 0, 1, 2, 4) if self.keys else fours.transpose(2, 4, 0, 1, 3)
        numbers = self.unpack(packed.reshape(PAGE, *scales.shape[:2], -1)).astype(np.float32) - self.zero
        with np.errstate(all="ignore"):  # pages hold anything beyond the end
            blocks = hadamard(numbers * scales.transpose(2, 0, 1)[..., None].astype(np.float32))
            return blocks.reshape(PAGE, self.n_heads, -1)[:, :, : self.dim]

    def keep(self, page: NDArray[np.uint8], n: int) -> None:
        scales, fours = self._parts(page)
        scales[:, :, n:] = 0
        if self.keys:
            fours[:, :, :, n:] = 0
        else:
            positions = np.arange(n, PAGE)
            fours[:, :, positions // 4, :, positions % 4] = 0

    def quantize(self, x: Floats) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """Blocks x (…, 32) as scales (…) and whole numbers plus `zero`. What is not finite becomes NaN."""
        largest = np.abs(x).max(axis=-1)
        with np.errstate(all="ignore"):
            scale = self.scale(x, largest).astype(np.float16)
            wide = scale.astype(np.float32)
            inverse = np.where(wide != 0, np.float32(1) / wide, np.float32(0))
            numbers = np.rint(x * inverse[..., None]) + np.float32(self.zero)
        scale[~np.isfinite(largest)] = np.nan
        return scale, np.clip(np.nan_to_num(numbers), 0, 2 * self.zero - 1).astype(np.uint8)

    def scale(self, x: Floats, largest: Floats) -> Floats:
        raise NotImplementedError

    def pack(self, numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The bytes of blocks (…, 32)."""
        return numbers

    def unpack(self, packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return packed


class Q8(BlockArray):
    """Numbers from -127 to 127; also -128, where the scale is subnormal and was rounded down."""

    bits = 8

    def scale(self, x: Floats, largest: Floats) -> Floats:
        return largest * np.float32(1 / 127)


class Q4(BlockArray):
    """Numbers from -8 to 7; what is largest becomes -8, so a scale may be negative. A byte holds dimensions i and
    i + 16 of a block, the first in its low half."""

    bits = 4

    def scale(self, x: Floats, largest: Floats) -> Floats:
        return np.where(x.max(axis=-1) == largest, largest, -largest) * np.float32(-1 / 8)

    def pack(self, numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.asarray(numbers[..., :16] | numbers[..., 16:] << 4, np.uint8)

    def unpack(self, packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.concatenate([packed & 15, packed >> 4], axis=-1)


KV_TYPES: dict[str, type[KVArray]] = {"f16": F16, "bf16": BF16, "f32": F32, "q8_0": Q8, "q4_0": Q4}


def both(kv_type: str) -> tuple[str, str]:
    """The types of keys and of values that a name means: "q8_0" is both, "q8_0/f16" keys and values.

    Raises UsageError for a name that is unknown.
    """
    keys, slash, values = str(kv_type).partition("/")
    if not slash:
        values = keys
    for name in (keys, values):
        if name not in KV_TYPES:
            raise UsageError(
                f"unknown KV cache type {name!r}; choose one of {', '.join(KV_TYPES)}, or two as keys/values"
            )
    return keys, values


def named(keys: str, values: str) -> str:
    """The inverse of `both`: one name for types of keys and values."""
    return keys if keys == values else f"{keys}/{values}"


def hadamard(x: Floats) -> Floats:
    """x (…, n), n a power of two, times an orthonormal Hadamard matrix, which is its own inverse.

    Sums are taken in the order of Sylvester's construction, neighbours first, as the kernels do it.
    """
    n, step = x.shape[-1], 1
    while step < n:
        a, b = np.moveaxis(x.reshape(*x.shape[:-1], n // (2 * step), 2, step), -2, 0)
        x = np.stack([a + b, a - b], axis=-2).reshape(x.shape)
        step *= 2
    turned: Floats = x * (np.float32(1) / np.sqrt(np.float32(n)))
    return turned
