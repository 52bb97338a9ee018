"""Formats that look weights up in a table: the IQ formats (points of a codebook, or 16 uneven levels), 4-bit floats.

In the IQ2 and IQ3 formats a codebook point gives the magnitudes of 8 or 4 weights, and their signs are stored apart;
where only 7 signs of 8 are stored, the number of minus signs is even.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .format import Blocks, Floats, Format, f32, pack, planes
from .grids import coordinates, grid

__all__ = [
    "IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4",
]  # fmt: skip

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_SIGNS = 1 - 2 * _BITS.astype(np.int8)  # (256, 8): what 8 stored signs do
_EVEN_SIGNS = _SIGNS[np.arange(128) | _BITS[:128].sum(axis=1, dtype=np.int64) % 2 << 7]  # (128, 8): what 7 do
IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
# Values of E2M1, twice.
E2M1_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_E2M1_MIDDLES = (E2M1_TWICE[:7] + E2M1_TWICE[1:8]) / 2


# ------------------------------------------------------------- points of a codebook: whole numbers, times a whole scale


class Levels(NamedTuple):
    """Blocks of 256 weights as products of three numbers, which float32 holds exactly."""

    d: Floats  # (n,)
    scales: NDArray[np.int8]  # (n, groups): odd, up to 31
    levels: NDArray[np.int8]  # (n, 256)


class Leveled:
    """Formats of such weights. groups: scales of a block; values: the levels that there are."""

    groups: ClassVar[int]
    values: ClassVar[tuple[int, ...]]

    @staticmethod
    def levels(blocks: Blocks) -> Levels:
        """What (n,) blocks are made of."""
        raise NotImplementedError

    @classmethod
    def dequantize(cls, blocks: Blocks) -> Floats:
        d, scales, levels = cls.levels(blocks)
        scale = f32(d) * f32(scales)
        return (scale[..., None] * f32(levels.reshape(len(blocks), cls.groups, -1))).reshape(-1, 256)


def _both_signs(name: str) -> tuple[int, ...]:
    return tuple(sign * level for sign in (1, -1) for level in coordinates(name))


class IQ2_XXS(Leveled, Format, id=16, block=256, n_bytes=66, layout="<f2 d, 16<u4 qs", coarse=True):
    """Two words for each 32 weights: four indices; four times 7 signs and a 4-bit scale."""

    groups, values = 8, _both_signs("IQ2_XXS")

    @staticmethod
    def levels(blocks: Blocks) -> Levels:
        indices, rest = blocks["qs"][:, 0::2], blocks["qs"][:, 1::2]
        signs = _EVEN_SIGNS[_fields(rest, 0, 7, 14, 21) & 127]
        return Levels(_d(blocks, 8), _odd(rest >> 28), _signed("IQ2_XXS", _fields(indices, 0, 8, 16, 24) & 255, signs))


class IQ2_XS(Leveled, Format, id=17, block=256, n_bytes=74, layout="<f2 d, 32<u2 qs, 8u1 scales", coarse=True):
    """A 9-bit index and 7 signs for each 8 weights; a 4-bit scale for each 16."""

    groups, values = 16, _both_signs("IQ2_XS")

    @staticmethod
    def levels(blocks: Blocks) -> Levels:
        weights = _signed("IQ2_XS", blocks["qs"] & 511, _EVEN_SIGNS[blocks["qs"] >> 9])
        return Levels(_d(blocks, 8), _odd(planes(blocks["scales"], 1, 4)), weights)


class IQ2_S(
    Leveled, Format, id=22, block=256, n_bytes=82, layout="<f2 d, 32u1 qs, 32u1 signs, 8u1 qh, 8u1 scales", coarse=True
):
    """A 10-bit index (upper bits in `qh`) and 8 signs for each 8 weights; a 4-bit scale for each 16."""

    groups, values = 16, _both_signs("IQ2_S")

    @staticmethod
    def levels(blocks: Blocks) -> Levels:
        indices = blocks["qs"] | planes(blocks["qh"], 1, 2).astype(np.uint16) << 8
        weights = _signed("IQ2_S", indices, _SIGNS[blocks["signs"]])
        return Levels(_d(blocks, 8), _odd(planes(blocks["scales"], 1, 4)), weights)


class IQ3_XXS(Leveled, Format, id=18, block=256, n_bytes=98, layout="<f2 d, 64u1 qs, 8<u4 signs"):
    """An index for each 4 weights; for each 32 weights four times 7 signs and a 4-bit scale."""

    groups, values = 8, _both_signs("IQ3_XXS")

    @staticmethod
    def levels(blocks: Blocks) -> Levels:
        signs = _EVEN_SIGNS[_fields(blocks["signs"], 0, 7, 14, 21) & 127]
        return Levels(_d(blocks, 4), _odd(blocks["signs"] >> 28), _signed("IQ3_XXS", blocks["qs"], signs))


class IQ3_S(Leveled, Format, id=21, block=256, n_bytes=110, layout="<f2 d, 64u1 qs, 8u1 qh, 32u1 signs, 4u1 scales"):
    """A 9-bit index (upper bit in `qh`) for each 4 weights, 8 signs for each 8, a 4-bit scale for each 32."""

    groups, values = 8, _both_signs("IQ3_S")

    @staticmethod
    def levels(blocks: Blocks) -> Levels:
        indices = blocks["qs"] | planes(blocks["qh"], 1, 1).astype(np.uint16) << 8
        weights = _signed("IQ3_S", indices, _SIGNS[blocks["signs"]])
        return Levels(_d(blocks, 1), _odd(planes(blocks["scales"], 1, 4)), weights)


_SHIFTED = tuple(8 * level + shift for level in coordinates("IQ1_S") for shift in (-1, 1))


class IQ1_S(Leveled, Format, id=19, block=256, n_bytes=50, layout="<f2 d, 32u1 qs, 8<u2 qh", coarse=True):
    """An 11-bit index for each 8 weights; for each 32 a word: upper bits of the indices, 3-bit scale, shift."""

    groups, values = 8, _SHIFTED

    @staticmethod
    def levels(blocks: Blocks) -> Levels:
        qh = blocks["qh"]
        indices = blocks["qs"] | (_fields(qh, 0, 3, 6, 9) & 7) << 8
        return Levels(_d(blocks, 8), _odd(qh >> 12 & 7), _shifted(indices, qh & 0x8000))


class IQ1_M(Leveled, Format, id=29, block=256, n_bytes=56, layout="32u1 qs, 16u1 qh, 4<u2 scales", coarse=True):
    """As IQ1_S, with a 3-bit scale for each 16 weights and a shift for each 8; d is the upper nibbles of `scales`."""

    groups, values = 16, _SHIFTED

    @staticmethod
    def levels(blocks: Blocks) -> Levels:
        d = (blocks["scales"] >> 12 << np.array([0, 4, 8, 12], np.uint16)).sum(axis=1, dtype=np.uint16).view(np.float16)
        qh = planes(blocks["qh"], 1, 4).astype(np.uint16)
        scales = _odd(_fields(blocks["scales"], 0, 3, 6, 9) & 7)
        return Levels(d.astype(np.float32) / 8, scales, _shifted(blocks["qs"] | (qh & 7) << 8, qh & 8))


LEVELED: tuple[type[Leveled], ...] = (IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S)


def _d(blocks: Blocks, part: int) -> Floats:
    """The scale of blocks, divided by a power of two so that all else is whole."""
    return blocks["d"].astype(np.float32) / np.float32(part)


def _odd(stored: NDArray[Any]) -> NDArray[np.int8]:
    return (2 * stored + 1).astype(np.int8)


def _signed(name: str, indices: NDArray[Any], signs: NDArray[np.int8]) -> NDArray[np.int8]:
    """Points of a codebook, (n, points), with signs: (n, 256)."""
    n = len(indices)
    weights: NDArray[np.int8] = grid(name)[indices].reshape(n, 256) * signs.reshape(n, 256)
    return weights


def _shifted(indices: NDArray[Any], down: NDArray[Any]) -> NDArray[np.int8]:
    """Points (n, 32) of IQ1_S in eighths, each of as many as come to one of `down` shifted by one: (n, 256)."""
    n, shift = len(indices), np.where(down, -1, 1).astype(np.int8)
    points: NDArray[np.int8] = 8 * grid("IQ1_S")[indices].reshape(n, down.shape[1], -1) + shift[..., None]
    return points.reshape(n, 256)


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
