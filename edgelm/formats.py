"""What the bytes of a weight mean: one class per ggml tensor type, and `QTensor`, a weight as it lies in a file.

Knows nothing of files, models, kernels or speed: `dequantize` is the meaning of a format in NumPy, and everything that
is faster is tested against it. Block layouts and arithmetic follow the format's definition in ggml; the results are
bit-equal to those of `gguf.quants`, except where a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, UnsupportedError

Blocks = NDArray[np.void]  # (n,) structured, one element per block
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_SLAB = 1 << 18  # weights dequantized at a time: temporaries stay in the processor's cache
FORMATS: dict[int, type[Format]] = {}


class Format:
    """A ggml tensor type. Defining a subclass registers it in `FORMATS`; its name is the name of the class.

    id: the number in the file; block: weights per block; n_bytes: bytes per block;
    layout: NumPy dtype of a block, written "type field, type field", where "16u1 qs" is sixteen bytes.
    """

    id: ClassVar[int]
    name: ClassVar[str]
    block: ClassVar[int]
    n_bytes: ClassVar[int]
    layout: ClassVar[np.dtype[np.void]]

    def __init_subclass__(cls, *, id: int, block: int, n_bytes: int, layout: str) -> None:
        cls.id, cls.name, cls.block, cls.n_bytes = id, cls.__name__, block, n_bytes
        cls.layout = np.dtype([(field.split()[1], field.split()[0]) for field in layout.split(",")])
        assert cls.layout.itemsize == n_bytes and id not in FORMATS, cls.name
        FORMATS[id] = cls

    @classmethod
    def row_bytes(cls, n_cols: int) -> int:
        """Bytes of a row of `n_cols` weights; FormatError when the row is no whole number of blocks."""
        if n_cols % cls.block:
            raise FormatError(f"a row of {n_cols} weights is no whole number of {cls.name} blocks of {cls.block}")
        return n_cols // cls.block * cls.n_bytes

    @classmethod
    def bits_per_weight(cls) -> float:
        """Bits that one weight takes in a file."""
        return 8 * cls.n_bytes / cls.block

    @staticmethod
    def quantize(x: Floats) -> Blocks:
        """(n, block) float32 -> (n,) blocks. UnsupportedError for formats that are only read."""
        raise UnsupportedError("this tensor type can be read but not written; choose another one, such as Q8_0")

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        """(n,) blocks -> (n, block) float32."""
        raise NotImplementedError


def by_name(name: str) -> type[Format]:
    """The format called `name`, such as "Q4_K" (any case). UnsupportedError when there is none."""
    for format in FORMATS.values():
        if format.name == name.upper():
            return format
    raise UnsupportedError(
        f"no tensor type is called {name!r}; there are: {', '.join(f.name for f in FORMATS.values())}"
    )


# ---------------------------------------------------------------------------------------------------- plain numbers


class F32(Format, id=0, block=1, n_bytes=4, layout="<f4 x"):
    @staticmethod
    def quantize(x: Floats) -> Blocks:
        return _pack(F32, x=x[:, 0])

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return _f32(blocks["x"])


class F16(Format, id=1, block=1, n_bytes=2, layout="<f2 x"):
    @staticmethod
    def quantize(x: Floats) -> Blocks:
        return _pack(F16, x=x[:, 0].astype(np.float16))

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return _f32(blocks["x"])


class BF16(Format, id=30, block=1, n_bytes=2, layout="<u2 x"):
    """The upper half of a float32, rounded to nearest even; NaN stays a quiet NaN."""

    @staticmethod
    def quantize(x: Floats) -> Blocks:
        bits = np.ascontiguousarray(x[:, 0]).view(np.uint32)
        quiet = (bits >> 16) | 64
        rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return _pack(BF16, x=np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).astype(np.uint16))

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return (blocks["x"].astype(np.uint32) << 16).view(np.float32)[:, None]


def _number(blocks: Blocks) -> Floats:
    """The nearest float32 of a plain number."""
    return _f32(blocks["x"])


class F64(Format, id=28, block=1, n_bytes=8, layout="<f8 x"):
    dequantize = staticmethod(_number)


class I8(Format, id=24, block=1, n_bytes=1, layout="i1 x"):
    dequantize = staticmethod(_number)


class I16(Format, id=25, block=1, n_bytes=2, layout="<i2 x"):
    dequantize = staticmethod(_number)


class I32(Format, id=26, block=1, n_bytes=4, layout="<i4 x"):
    dequantize = staticmethod(_number)


class I64(Format, id=27, block=1, n_bytes=8, layout="<i8 x"):
    dequantize = staticmethod(_number)


# ------------------------------------------------------------------------- blocks of 32: one scale, perhaps a minimum


class Q8_0(Format, id=8, block=32, n_bytes=34, layout="<f2 d, 32i1 qs"):
    @staticmethod
    def quantize(x: Floats) -> Blocks:
        d = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        return _pack(Q8_0, d=d[:, 0].astype(np.float16), qs=_round(x * _inverse(d)).astype(np.int8))

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return _f32(blocks["d"]) * _f32(blocks["qs"])


class Q4_0(Format, id=2, block=32, n_bytes=18, layout="<f2 d, 16u1 qs"):
    @staticmethod
    def quantize(x: Floats) -> Blocks:
        d = _extreme(x) / np.float32(-8)
        q = np.trunc(x * _inverse(d) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
        return _pack(Q4_0, d=d[:, 0].astype(np.float16), qs=q[:, :16] | q[:, 16:] << 4)

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return _f32(blocks["d"]) * (_f32(_planes(blocks["qs"], 16, 4)) - np.float32(8))


class Q4_1(Format, id=3, block=32, n_bytes=20, layout="<f2 d, <f2 m, 16u1 qs"):
    @staticmethod
    def quantize(x: Floats) -> Blocks:
        m = x.min(axis=-1, keepdims=True)
        d = (x.max(axis=-1, keepdims=True) - m) / np.float32(15)
        q = np.trunc((x - m) * _inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, 15)
        return _pack(Q4_1, d=d[:, 0].astype(np.float16), m=m[:, 0].astype(np.float16), qs=q[:, :16] | q[:, 16:] << 4)

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return _f32(blocks["d"]) * _f32(_planes(blocks["qs"], 16, 4)) + _f32(blocks["m"])


class Q5_0(Format, id=6, block=32, n_bytes=22, layout="<f2 d, 4u1 qh, 16u1 qs"):
    @staticmethod
    def quantize(x: Floats) -> Blocks:
        d = _extreme(x) / np.float32(-16)
        q = np.trunc(x * _inverse(d) + np.float32(16.5)).astype(np.uint8).clip(0, 31)
        qh = np.packbits(q >> 4, axis=-1, bitorder="little")
        return _pack(Q5_0, d=d[:, 0].astype(np.float16), qh=qh, qs=q[:, :16] & 15 | q[:, 16:] << 4)

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        q = _planes(blocks["qs"], 16, 4) | _planes(blocks["qh"], 1, 1) << 4
        return _f32(blocks["d"]) * (_f32(q) - np.float32(16))


class Q5_1(Format, id=7, block=32, n_bytes=24, layout="<f2 d, <f2 m, 4u1 qh, 16u1 qs"):
    @staticmethod
    def quantize(x: Floats) -> Blocks:
        m = x.min(axis=-1, keepdims=True)
        d = (x.max(axis=-1, keepdims=True) - m) / np.float32(31)
        q = np.trunc((x - m) * _inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, 31)
        qh, qs = np.packbits(q >> 4, axis=-1, bitorder="little"), q[:, :16] & 15 | q[:, 16:] << 4
        return _pack(Q5_1, d=d[:, 0].astype(np.float16), m=m[:, 0].astype(np.float16), qh=qh, qs=qs)

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        q = _planes(blocks["qs"], 16, 4) | _planes(blocks["qh"], 1, 1) << 4
        return _f32(blocks["d"]) * _f32(q) + _f32(blocks["m"])


# ------------------------------------------------------- K-quants: super-blocks of 256 with quantized scales and minima


class Q4_K(Format, id=12, block=256, n_bytes=144, layout="<f2 d, <f2 dmin, 12u1 scales, 128u1 qs"):
    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        scale, minimum = _scales_and_minima(blocks)
        q = _f32(_planes(blocks["qs"], 32, 4)).reshape(-1, 8, 32)
        return (scale * q - minimum).reshape(-1, 256)


class Q5_K(
    Format,
    id=13,
    block=256,
    n_bytes=176,
    layout="<f2 d, <f2 dmin, 12u1 scales, 32u1 qh, 128u1 qs",
):
    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        scale, minimum = _scales_and_minima(blocks)
        q = _planes(blocks["qs"], 32, 4) | _planes(blocks["qh"], 32, 1) << 4
        return (scale * _f32(q).reshape(-1, 8, 32) - minimum).reshape(-1, 256)


class Q6_K(Format, id=14, block=256, n_bytes=210, layout="128u1 ql, 64u1 qh, 16i1 scales, <f2 d"):
    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        scale = _f32(blocks["d"]) * _f32(blocks["scales"])
        q = _planes(blocks["ql"], 64, 4) | _planes(blocks["qh"], 32, 2) << 4
        return (scale[..., None] * (_f32(q) - np.float32(32)).reshape(-1, 16, 16)).reshape(-1, 256)


# ------------------------------------------------------------------------------------------- pieces that formats share


def _pack(format: type[Format], **fields: NDArray[Any]) -> Blocks:
    blocks = np.empty(len(next(iter(fields.values()))), format.layout)
    for name, values in fields.items():
        blocks[name] = values
    return blocks


def _f32(x: NDArray[Any]) -> Floats:
    """float32 of a field; one number per block becomes a column, so that it broadcasts over the block."""
    x = x.astype(np.float32)
    return x[:, None] if x.ndim == 1 else x


def _planes(q: Bytes, group: int, bits: int) -> Bytes:
    """Bit fields (n, m) -> (n, m * 8 / bits): each `group` bytes hold planes, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    planes: Bytes = q.reshape(len(q), -1, 1, group) >> shifts & np.uint8((1 << bits) - 1)
    return planes.reshape(len(q), -1)


def _scales_and_minima(blocks: Blocks) -> tuple[Floats, Floats]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K, times d and dmin: (n, 8, 1) each.

    Bytes 0-3 hold scales 0-3, bytes 4-7 minima 0-3, bytes 8-11 the low nibbles of both 4-7, whose upper two bits lie
    on top of the first eight bytes.
    """
    low, mid, high = blocks["scales"][:, :4], blocks["scales"][:, 4:8], blocks["scales"][:, 8:]
    scale = np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=1)
    minimum = np.concatenate([mid & 63, high >> 4 | mid >> 2 & 48], axis=1)
    return (_f32(blocks["d"]) * _f32(scale))[..., None], (_f32(blocks["dmin"]) * _f32(minimum))[..., None]


def _extreme(x: Floats) -> Floats:
    """The value of largest magnitude of each block, with its sign: (n, 1)."""
    extreme: Floats = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    return extreme


def _inverse(d: Floats) -> Floats:
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _round(x: Floats) -> Floats:
    """Round half away from zero, exactly (adding 0.5 would round 0.49999997 up)."""
    magnitude = np.abs(x)
    floor = np.floor(magnitude)
    return np.copysign(floor + (magnitude - floor >= 0.5), x).astype(np.float32)


# --------------------------------------------------------------------------------------------------------- the tensor


@dataclass(frozen=True, eq=False)
class QTensor:
    """A weight as it lies in the file: rows of blocks, read-only, never copied.

    shape: in weights, outermost first (a linear layer is (out, in)); data: uint8 (rows, bytes per row), where rows is
    the product of all dimensions but the last.
    """

    name: str
    format: type[Format]
    shape: tuple[int, ...]
    data: Bytes

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return int(self.data.nbytes)

    @property
    def n_weights(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    def dequantize(self) -> Floats:
        """A new float32 array of `shape`."""
        n_cols = self.shape[-1]
        out = np.empty((len(self.data), n_cols), np.float32)
        for rows in self._slabs(len(self.data), n_cols):
            out[rows] = self._dequantize(self.data[rows])
        return out.reshape(self.shape)

    def rows(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Floats:
        """Some rows, in the order asked for: float32 (len(indices), shape[-1]). IndexError outside the tensor."""
        chosen = np.asarray(indices, dtype=np.int64)
        out = np.empty((len(chosen), self.shape[-1]), np.float32)
        for rows in self._slabs(len(chosen), self.shape[-1]):
            out[rows] = self._dequantize(self.data[chosen[rows]])
        return out

    def _dequantize(self, data: Bytes) -> Floats:
        # A hostile or damaged file may hold NaN and infinity anywhere; they are values here, not events to warn of.
        with np.errstate(all="ignore"):
            return self.format.dequantize(data.reshape(-1).view(self.format.layout)).reshape(len(data), -1)

    @staticmethod
    def _slabs(n_rows: int, n_cols: int) -> Iterator[slice]:
        step = max(1, _SLAB // n_cols)
        return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))

    @classmethod
    def from_array(cls, name: str, array: NDArray[Any], format: type[Format] = F32) -> QTensor:
        """Quantize `array` (outermost first; at least one dimension). FormatError when its rows are no whole blocks."""
        values = np.ascontiguousarray(array, dtype=np.float32)
        n_row_bytes = format.row_bytes(values.shape[-1])
        with np.errstate(all="ignore"):
            blocks = format.quantize(values.reshape(-1, format.block))
        data = blocks.view(np.uint8).reshape(-1, n_row_bytes)
        data.flags.writeable = False
        return cls(name, format, values.shape, data)
