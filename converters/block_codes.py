"""The integers of blocks, apart from their scales: what they stand for, and how they are put into a file's bits.

For whoever chooses the integers otherwise than by rounding. Knows the layouts of `edgelm.formats`, no quantizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import UnsupportedError
from edgelm.formats import Format
from edgelm.formats.codebooks import IQ4_LEVELS

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def lines(format: type[Format], data: Bytes) -> tuple[Floats, Floats]:
    """What a code of a weight stands for, start + step * its level (`levels`): two float32 (n_rows, n_cols)."""
    if format.name in _LEVELS:
        step = decode(format, with_codes(format, data, np.full(format.block, IQ4_LEVELS.tolist().index(1), np.uint8)))
        return np.zeros_like(step), step
    start, first = (with_codes(format, data, np.full(format.block, code, np.uint8)) for code in (0, 1))
    base = decode(format, start)
    return base, decode(format, first) - base


def levels(format: type[Format]) -> Floats:
    """What the codes of the format stand for before they are scaled, ascending: 0, 1, 2 … for most formats."""
    return _LEVELS.get(format.name, np.arange(1 << _writer(format)[0], dtype=np.float32))


def nearest(levels: Floats, x: Floats) -> Bytes:
    """The codes whose levels are nearest to x, of any shape."""
    if levels[0] == 0:  # evenly spaced
        return np.rint(x).clip(0, len(levels) - 1).astype(np.uint8)
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, x).astype(np.uint8)


def scale_fields(format: type[Format]) -> tuple[str, ...]:
    """The float16 numbers of a block that its weights are linear in."""
    return tuple(name for name in ("d", "m", "dmin") if name in (format.layout.names or ()))


def derivative(format: type[Format], data: Bytes, field: str) -> Floats:
    """By how much weights grow with one of the `scale_fields` of their block: float32 (n_rows, n_cols)."""
    blocks = np.ascontiguousarray(data).reshape(-1).view(format.layout).copy()
    for name in scale_fields(format):
        blocks[name] = name == field
    return decode(format, blocks.view(np.uint8).reshape(data.shape))


def decode(format: type[Format], data: Bytes) -> Floats:
    """Rows of blocks, uint8 (n_rows, bytes), as float32 (n_rows, n_cols)."""
    return format.dequantize(np.ascontiguousarray(data).reshape(-1).view(format.layout)).reshape(len(data), -1)


def with_codes(format: type[Format], data: Bytes, codes: Bytes) -> Bytes:
    """Rows of blocks with other codes: uint8 (n_rows, n_cols), or (block,) for the same ones in each block."""
    blocks = np.ascontiguousarray(data).reshape(-1).view(format.layout).copy()
    codes = np.broadcast_to(codes, (len(blocks), format.block)) if codes.ndim == 1 else codes.reshape(len(blocks), -1)
    for name, values in _writer(format)[1](codes).items():
        blocks[name] = values
    return blocks.view(np.uint8).reshape(data.shape)


def _planes(codes: NDArray[Any], group: int, bits: int) -> Bytes:
    """The inverse of `formats.format.planes`: each `group` bytes hold planes of codes, the first in the lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = codes.astype(np.uint8).reshape(len(codes), -1, 8 // bits, group) << shifts
    packed: Bytes = np.bitwise_or.reduce(fields, axis=2).reshape(len(codes), -1)
    return packed


def _fifth(codes: Bytes) -> dict[str, NDArray[Any]]:
    return {"qs": _planes(codes & 15, 16, 4), "qh": _planes(codes >> 4, 1, 1)}


_WRITERS: dict[str, tuple[int, Callable[[Bytes], dict[str, NDArray[Any]]]]] = {
    "Q4_0": (4, lambda codes: {"qs": _planes(codes, 16, 4)}),
    "Q4_1": (4, lambda codes: {"qs": _planes(codes, 16, 4)}),
    "Q5_0": (5, _fifth),
    "Q5_1": (5, _fifth),
    "Q8_0": (8, lambda codes: {"qs": (codes ^ 128).view(np.int8)}),
    "Q2_K": (2, lambda codes: {"qs": _planes(codes, 32, 2)}),
    "Q3_K": (3, lambda codes: {"qs": _planes(codes & 3, 32, 2), "hmask": _planes(codes >> 2, 32, 1)}),
    "Q4_K": (4, lambda codes: {"qs": _planes(codes, 32, 4)}),
    "Q5_K": (5, lambda codes: {"qs": _planes(codes & 15, 32, 4), "qh": _planes(codes >> 4, 32, 1)}),
    "Q6_K": (6, lambda codes: {"ql": _planes(codes & 15, 64, 4), "qh": _planes(codes >> 4, 32, 2)}),
    "IQ4_NL": (4, lambda codes: {"qs": _planes(codes, 16, 4)}),
    "IQ4_XS": (4, lambda codes: {"qs": _planes(codes, 16, 4)}),
}
_LEVELS: dict[str, Floats] = {"IQ4_NL": IQ4_LEVELS, "IQ4_XS": IQ4_LEVELS}  # of formats whose codes are not even
FORMATS_WITH_CODES = tuple(_WRITERS)


def _writer(format: type[Format]) -> tuple[int, Callable[[Bytes], dict[str, NDArray[Any]]]]:
    if format.name not in _WRITERS:
        raise UnsupportedError(f"{format.name} has no codes of single weights; those that have: {', '.join(_WRITERS)}")
    return _WRITERS[format.name]
