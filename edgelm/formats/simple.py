"""Plain numbers, and blocks with one scale (and perhaps a minimum) over weights of a few bits."""

from __future__ import annotations

import numpy as np

from .format import Blocks, Bytes, Floats, Format, extreme, f32, inverse, pack, planes, round_half_away

__all__ = [
    "BF16", "F16", "F32", "F64", "I8", "I16", "I32", "I64", "Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    "Q8_1", "TQ1_0", "TQ2_0",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------- plain numbers


class F32(Format, id=0, block=1, n_bytes=4, layout="<f4 x"):
    @staticmethod
    def quantize(x: Floats) -> Blocks:
        return pack(F32, x=x[:, 0])

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return f32(blocks["x"])


class F16(Format, id=1, block=1, n_bytes=2, layout="<f2 x"):
    @staticmethod
    def quantize(x: Floats) -> Blocks:
        return pack(F16, x=x[:, 0].astype(np.float16))

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return f32(blocks["x"])


class BF16(Format, id=30, block=1, n_bytes=2, layout="<u2 x"):
    """The upper half of a float32, rounded to nearest even; NaN stays a quiet NaN."""

    @staticmethod
    def quantize(x: Floats) -> Blocks:
        bits = np.ascontiguousarray(x[:, 0]).view(np.uint32)
        quiet = (bits >> 16) | 64
        rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return pack(BF16, x=np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).astype(np.uint16))

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return (blocks["x"].astype(np.uint32) << 16).view(np.float32)[:, None]


def _number(blocks: Blocks) -> Floats:
    """The nearest float32 of a plain number."""
    return f32(blocks["x"])


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
        return pack(Q8_0, d=d[:, 0].astype(np.float16), qs=round_half_away(x * inverse(d)).astype(np.int8))

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return f32(blocks["d"]) * f32(blocks["qs"])


class Q4_0(Format, id=2, block=32, n_bytes=18, layout="<f2 d, 16u1 qs"):
    @staticmethod
    def quantize(x: Floats) -> Blocks:
        d = extreme(x) / np.float32(-8)
        q = np.trunc(x * inverse(d) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
        return pack(Q4_0, d=d[:, 0].astype(np.float16), qs=q[:, :16] | q[:, 16:] << 4)

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return f32(blocks["d"]) * (f32(planes(blocks["qs"], 16, 4)) - np.float32(8))


class Q4_1(Format, id=3, block=32, n_bytes=20, layout="<f2 d, <f2 m, 16u1 qs"):
    @staticmethod
    def quantize(x: Floats) -> Blocks:
        m = x.min(axis=-1, keepdims=True)
        d = (x.max(axis=-1, keepdims=True) - m) / np.float32(15)
        q = np.trunc((x - m) * inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, 15)
        return pack(Q4_1, d=d[:, 0].astype(np.float16), m=m[:, 0].astype(np.float16), qs=q[:, :16] | q[:, 16:] << 4)

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return f32(blocks["d"]) * f32(planes(blocks["qs"], 16, 4)) + f32(blocks["m"])


class Q5_0(Format, id=6, block=32, n_bytes=22, layout="<f2 d, 4u1 qh, 16u1 qs"):
    @staticmethod
    def quantize(x: Floats) -> Blocks:
        d = extreme(x) / np.float32(-16)
        q = np.trunc(x * inverse(d) + np.float32(16.5)).astype(np.uint8).clip(0, 31)
        qh = np.packbits(q >> 4, axis=-1, bitorder="little")
        return pack(Q5_0, d=d[:, 0].astype(np.float16), qh=qh, qs=q[:, :16] & 15 | q[:, 16:] << 4)

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        q = planes(blocks["qs"], 16, 4) | planes(blocks["qh"], 1, 1) << 4
        return f32(blocks["d"]) * (f32(q) - np.float32(16))


class Q5_1(Format, id=7, block=32, n_bytes=24, layout="<f2 d, <f2 m, 4u1 qh, 16u1 qs"):
    @staticmethod
    def quantize(x: Floats) -> Blocks:
        m = x.min(axis=-1, keepdims=True)
        d = (x.max(axis=-1, keepdims=True) - m) / np.float32(31)
        q = np.trunc((x - m) * inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, 31)
        qh, qs = np.packbits(q >> 4, axis=-1, bitorder="little"), q[:, :16] & 15 | q[:, 16:] << 4
        return pack(Q5_1, d=d[:, 0].astype(np.float16), m=m[:, 0].astype(np.float16), qh=qh, qs=qs)

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        q = planes(blocks["qs"], 16, 4) | planes(blocks["qh"], 1, 1) << 4
        return f32(blocks["d"]) * f32(q) + f32(blocks["m"])


class Q8_1(Format, id=9, block=32, n_bytes=36, layout="<f2 d, <f2 s, 32i1 qs"):
    """ggml's own format for activations; `s` is d times the sum of the block, and changes no weight."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return f32(blocks["d"]) * f32(blocks["qs"])


# --------------------------------------------------------------------------------------------- one, two or three values


class Q1_0(Format, id=41, block=128, n_bytes=18, layout="<f2 d, 16u1 qs"):
    """A sign per weight."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return f32(blocks["d"]) * (f32(planes(blocks["qs"], 1, 1)) * np.float32(2) - np.float32(1))


class Q2_0(Format, id=42, block=64, n_bytes=18, layout="<f2 d, 16u1 qs"):
    """-1, 0, 1 or 2 times the scale."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return f32(blocks["d"]) * (f32(planes(blocks["qs"], 1, 2)) - np.float32(1))


class TQ1_0(Format, id=34, block=256, n_bytes=54, layout="48u1 qs, 4u1 qh, <f2 d"):
    """Ternary, five weights to a byte: the byte is a fraction of 256, its base-three digits are the weights plus one.

    32 bytes hold 160 weights, 16 bytes hold 80, the last 4 hold four each; a plane of first digits, of second digits, …
    """

    @staticmethod
    def digits(blocks: Blocks) -> Bytes:
        """(n, 256): the weights plus one."""
        n = len(blocks)
        shift = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]  # multiplying modulo 256 drops the digits before
        parts = (
            blocks["qs"][:, None, :32] * shift,
            blocks["qs"][:, None, 32:] * shift,
            blocks["qh"][:, None] * shift[:4],
        )
        fraction = np.concatenate([part.reshape(n, -1) for part in parts], axis=1)
        return (fraction.astype(np.uint16) * 3 >> 8).astype(np.uint8)

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return f32(blocks["d"]) * (f32(TQ1_0.digits(blocks)) - np.float32(1))


class TQ2_0(Format, id=35, block=256, n_bytes=66, layout="64u1 qs, <f2 d"):
    """Ternary, two bits per weight."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return f32(blocks["d"]) * (f32(planes(blocks["qs"], 32, 2)) - np.float32(1))
