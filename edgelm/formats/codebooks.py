"""Formats that look weights up in a table: the IQ formats (points of a codebook, or 16 uneven levels), 4-bit floats.

In the IQ2 and IQ3 formats a codebook point gives the magnitudes of 8 or 4 weights, and their signs are stored apart;
where only 7 signs of 8 are stored, the number of minus signs is even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .format import Blocks, Floats, Format, f32, pack, planes
from .grids import grid

__all__ = [
    "IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4",
]  # fmt: skip

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_SIGNS = np.float32(1) - np.float32(2) * _BITS  # (256, 8): what 8 stored signs do
_EVEN_SIGNS = _SIGNS[np.arange(128) | _BITS[:128].sum(axis=1, dtype=np.int64) % 2 << 7]  # (128, 8): what 7 do
IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
# Values of E2M1, twice.
E2M1_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_E2M1_MIDDLES = (E2M1_TWICE[:7] + E2M1_TWICE[1:8]) / 2
_IQ1_DELTA = np.float32(0.125)


# ------------------------------------------------------------------------------------- magnitudes of 8 or 4 weights


class IQ2_XXS(Format, id=16, block=256, n_bytes=66, layout="<f2 d, 16<u4 qs"):
    """Two words for each 32 weights: four indices; four times 7 signs and a 4-bit scale."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        indices, rest = blocks["qs"][:, 0::2], blocks["qs"][:, 1::2]
        scale = f32(blocks["d"]) * (np.float32(0.5) + f32(rest >> 28)) * np.float32(0.25)
        return _lookup(
            "IQ2_XXS", scale, _fields(indices, 0, 8, 16, 24) & 255, _EVEN_SIGNS[_fields(rest, 0, 7, 14, 21) & 127]
        )


class IQ2_XS(Format, id=17, block=256, n_bytes=74, layout="<f2 d, 32<u2 qs, 8u1 scales"):
    """A 9-bit index and 7 signs for each 8 weights; a 4-bit scale for each 16."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        scale = f32(blocks["d"]) * (np.float32(0.5) + f32(planes(blocks["scales"], 1, 4))) * np.float32(0.25)
        return _lookup("IQ2_XS", scale, blocks["qs"] & 511, _EVEN_SIGNS[blocks["qs"] >> 9])


class IQ2_S(Format, id=22, block=256, n_bytes=82, layout="<f2 d, 32u1 qs, 32u1 signs, 8u1 qh, 8u1 scales"):
    """A 10-bit index (upper bits in `qh`) and 8 signs for each 8 weights; a 4-bit scale for each 16."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        scale = f32(blocks["d"]) * (np.float32(0.5) + f32(planes(blocks["scales"], 1, 4))) * np.float32(0.25)
        indices = blocks["qs"] | planes(blocks["qh"], 1, 2).astype(np.uint16) << 8
        return _lookup("IQ2_S", scale, indices, _SIGNS[blocks["signs"]])


class IQ3_XXS(Format, id=18, block=256, n_bytes=98, layout="<f2 d, 64u1 qs, 8<u4 signs"):
    """An index for each 4 weights; for each 32 weights four times 7 signs and a 4-bit scale."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        scale = f32(blocks["d"]) * (np.float32(0.5) + f32(blocks["signs"] >> 28)) * np.float32(0.5)
        return _lookup("IQ3_XXS", scale, blocks["qs"], _EVEN_SIGNS[_fields(blocks["signs"], 0, 7, 14, 21) & 127])


class IQ3_S(Format, id=21, block=256, n_bytes=110, layout="<f2 d, 64u1 qs, 8u1 qh, 32u1 signs, 4u1 scales"):
    """A 9-bit index (upper bit in `qh`) for each 4 weights, 8 signs for each 8, a 4-bit scale for each 32."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        scale = f32(blocks["d"]) * f32(1 + 2 * planes(blocks["scales"], 1, 4))
        indices = blocks["qs"] | planes(blocks["qh"], 1, 1).astype(np.uint16) << 8
        return _lookup("IQ3_S", scale, indices, _SIGNS[blocks["signs"]])


# ------------------------------------------------------------- ternary points of 8 weights, shifted up or down together


class IQ1_S(Format, id=19, block=256, n_bytes=50, layout="<f2 d, 32u1 qs, 8<u2 qh"):
    """An 11-bit index for each 8 weights; for each 32 a word: upper bits of the indices, 3-bit scale, shift."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        qh = blocks["qh"]
        scale = f32(blocks["d"]) * f32(2 * (qh >> 12 & 7) + 1)
        points = grid("IQ1_S")[blocks["qs"] | (_fields(qh, 0, 3, 6, 9) & 7) << 8].reshape(-1, 8, 32)
        shift = np.where(qh & 0x8000, -_IQ1_DELTA, _IQ1_DELTA)
        weights: Floats = scale[..., None] * (points + shift[..., None])
        return weights.reshape(-1, 256)


class IQ1_M(Format, id=29, block=256, n_bytes=56, layout="32u1 qs, 16u1 qh, 4<u2 scales"):
    """As IQ1_S, with a 3-bit scale for each 16 weights and a shift for each 8; d is the upper nibbles of `scales`."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        d = (blocks["scales"] >> 12 << np.array([0, 4, 8, 12], np.uint16)).sum(axis=1, dtype=np.uint16).view(np.float16)
        scale = f32(d) * f32(2 * (_fields(blocks["scales"], 0, 3, 6, 9) & 7) + 1)
        qh = planes(blocks["qh"], 1, 4).astype(np.uint16)
        points = grid("IQ1_S")[blocks["qs"] | (qh & 7) << 8].reshape(-1, 16, 2, 8)
        shift = np.where(qh & 8, -_IQ1_DELTA, _IQ1_DELTA).reshape(-1, 16, 2, 1)
        weights: Floats = scale[..., None, None] * (points + shift)
        return weights.reshape(-1, 256)


# ---------------------------------------------------------------------------------------------------- 16 levels


class IQ4_NL(Format, id=20, block=32, n_bytes=18, layout="<f2 d, 16u1 qs"):
    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        return f32(blocks["d"]) * IQ4_LEVELS[planes(blocks["qs"], 16, 4)]


class IQ4_XS(Format, id=23, block=256, n_bytes=136, layout="<f2 d, <u2 scales_h, 4u1 scales_l, 128u1 qs"):
    """The levels of IQ4_NL; a 6-bit scale for each 32 weights, its upper two bits in `scales_h`."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        high = _fields(blocks["scales_h"][:, None], *range(0, 16, 2)) & 3
        scale = f32(blocks["d"]) * (f32(planes(blocks["scales_l"], 1, 4) | high << 4) - np.float32(32))
        return (scale[..., None] * IQ4_LEVELS[planes(blocks["qs"], 16, 4)].reshape(-1, 8, 32)).reshape(-1, 256)


class MXFP4(Format, id=39, block=32, n_bytes=17, layout="u1 e, 16u1 qs"):
    """E2M1 weights with an E8M0 scale, a power of two (OCP microscaling formats 1.0, section 5.3)."""

    @staticmethod
    def quantize(x: Floats) -> Blocks:
        largest = np.abs(x).max(axis=-1)
        e = np.where(largest > 0, np.floor(np.log2(largest)) - 2 + 127, 0).astype(np.uint8)
        magnitude = np.abs(x) / np.ldexp(1.0, e.astype(np.int32) - 128)[:, None].astype(np.float32)
        q = np.searchsorted(_E2M1_MIDDLES, magnitude).astype(np.uint8)  # ties go down
        q += ((x < 0) & (q > 0)).astype(np.uint8) << 3
        return pack(MXFP4, e=e, qs=q[:, :16] | q[:, 16:] << 4)

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        # Half the scale, as the table holds twice the values. The smallest float32 are subnormal: exact as a float64.
        scale = np.ldexp(1.0, blocks["e"].astype(np.int32) - 128)
        return f32(scale) * E2M1_TWICE[planes(blocks["qs"], 16, 4)]


class NVFP4(Format, id=40, block=64, n_bytes=36, layout="4u1 d, 32u1 qs"):
    """E2M1 weights with an unsigned E4M3 scale for each 16 (bias 7; the byte 0x7F, not a number, counts as zero)."""

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        exponent, mantissa = (blocks["d"] >> 3 & 15).astype(np.int32), f32(blocks["d"] & 7)
        scale = np.ldexp(np.where(exponent == 0, mantissa, mantissa + 8), np.maximum(exponent, 1) - 11)
        scale = np.where(blocks["d"] == 0x7F, 0, scale).astype(np.float32)
        return (scale[..., None] * E2M1_TWICE[planes(blocks["qs"], 8, 4)].reshape(-1, 4, 16)).reshape(-1, 64)


def _fields(words: NDArray[Any], *shifts: int) -> NDArray[Any]:
    """(n, m) words -> (n, m * shifts): each word shifted right by each of `shifts`."""
    fields: NDArray[Any] = words[..., None] >> np.array(shifts, words.dtype)
    return fields.reshape(len(words), -1)


def _lookup(name: str, scale: Floats, indices: NDArray[Any], signs: Floats) -> Floats:
    """scale (n, groups), indices (n, points), signs (n, 32, 8) -> weights (n, 256)."""
    n, n_groups = scale.shape
    magnitudes = grid(name)[indices].reshape(n, n_groups, -1)
    weights: Floats = scale[..., None] * magnitudes * signs.reshape(n, n_groups, -1)
    return weights.reshape(n, 256)
