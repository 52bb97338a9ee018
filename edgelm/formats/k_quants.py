"""K-quants: super-blocks of 256 weights; the scales (and minima) of their sub-blocks of 16 or 32 are quantized, too."""

from __future__ import annotations

import numpy as np

from .format import Blocks, Floats, Format, f32, planes

__all__ = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"]


class Q2_K(Format, id=10, block=256, n_bytes=84, layout="16u1 scales, 64u1 qs, <f2 d, <f2 dmin", coarse=True):
    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        scale = f32(blocks["d"]) * f32(blocks["scales"] & 15)
        minimum = f32(blocks["dmin"]) * f32(blocks["scales"] >> 4)
        q = f32(planes(blocks["qs"], 32, 2)).reshape(-1, 16, 16)
        return (scale[..., None] * q - minimum[..., None]).reshape(-1, 256)


class Q3_K(Format, id=11, block=256, n_bytes=110, layout="32u1 hmask, 64u1 qs, 12u1 scales, <f2 d"):
    """The third bit of a weight lies in `hmask`; the 16 scales have 6 bits, the upper two in the last four bytes."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        scale = planes(blocks["scales"][:, :8], 8, 4) | planes(blocks["scales"][:, 8:], 4, 2) << 4
        scale = f32(blocks["d"]) * (f32(scale) - np.float32(32))
        q = planes(blocks["qs"], 32, 2) | planes(blocks["hmask"], 32, 1) << 2
        return (scale[..., None] * (f32(q) - np.float32(4)).reshape(-1, 16, 16)).reshape(-1, 256)


class Q4_K(Format, id=12, block=256, n_bytes=144, layout="<f2 d, <f2 dmin, 12u1 scales, 128u1 qs"):
    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        scale, minimum = scales_and_minima(blocks)
        q = f32(planes(blocks["qs"], 32, 4)).reshape(-1, 8, 32)
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
        scale, minimum = scales_and_minima(blocks)
        q = planes(blocks["qs"], 32, 4) | planes(blocks["qh"], 32, 1) << 4
        return (scale * f32(q).reshape(-1, 8, 32) - minimum).reshape(-1, 256)


class Q6_K(Format, id=14, block=256, n_bytes=210, layout="128u1 ql, 64u1 qh, 16i1 scales, <f2 d"):
    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        scale = f32(blocks["d"]) * f32(blocks["scales"])
        q = planes(blocks["ql"], 64, 4) | planes(blocks["qh"], 32, 2) << 4
        return (scale[..., None] * (f32(q) - np.float32(32)).reshape(-1, 16, 16)).reshape(-1, 256)


class Q8_K(Format, id=15, block=256, n_bytes=292, layout="<f4 d, 256i1 qs, 16<i2 bsums"):
    """ggml's own format for activations; `bsums` are sums of 16 weights, and change no weight."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return f32(blocks["d"]) * f32(blocks["qs"])


def scales_and_minima(blocks: Blocks) -> tuple[Floats, Floats]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K, times d and dmin: (n, 8, 1) each.

    Bytes 0-3 hold scales 0-3, bytes 4-7 minima 0-3, bytes 8-11 the low nibbles of both 4-7, whose upper two bits lie
    on top of the first eight bytes.
    """
    low, mid, high = blocks["scales"][:, :4], blocks["scales"][:, 4:8], blocks["scales"][:, 8:]
    scale = np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=1)
    minimum = np.concatenate([mid & 63, high >> 4 | mid >> 2 & 48], axis=1)
    return (f32(blocks["d"]) * f32(scale))[..., None], (f32(blocks["dmin"]) * f32(minimum))[..., None]
