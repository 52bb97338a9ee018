"""Weights of formats without kernels as blocks of a format that has some: integers times a scale, or plain floats.

In NumPy, piece by piece while weights are packed. Imports no Numba.
"""

from __future__ import annotations

import numpy as np

from edgelm.formats import TQ1_0, TQ2_0, QTensor
from edgelm.kernels.units import INT8_BLOCK

# Largest integers that 16 weights may be multiples of: the usual ones of codebooks first, then all that int8 holds.
_LARGEST = tuple(dict.fromkeys([1, 43, 25, 9, 7, 15, 13, 11, 5, 3, 62, 52, 44, 36, 28, 12, 8, 6, 4, *range(1, 129)]))


def transcoded(tensor: QTensor, data: np.ndarray, format: str) -> np.ndarray:
    """Some rows of a weight in the file form of another format: bytes (rows, bytes per row)."""
    if format == "TQ1_0":
        return _two_bits(data.reshape(-1).view(TQ1_0.layout)).view(np.uint8).reshape(len(data), -1)
    weights = QTensor(tensor.name, tensor.format, (len(data), tensor.shape[-1]), data)
    values = weights.dequantize()
    if format == "F32":
        return values.view(np.uint8)
    scales, quants = integers(values.reshape(-1, 16))
    blocks = np.empty(len(scales) // 2, INT8_BLOCK)
    blocks["d"], blocks["q"] = scales.reshape(-1, 2), quants.reshape(-1, 32)
    return blocks.view(np.uint8).reshape(len(values), -1)


def _two_bits(blocks: np.ndarray) -> np.ndarray:
    """Blocks of TQ1_0 as those of TQ2_0."""
    made = np.empty(len(blocks), TQ2_0.layout)
    fields = TQ1_0.digits(blocks).reshape(-1, 2, 4, 32) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    made["d"], made["qs"] = blocks["d"], np.bitwise_or.reduce(fields, axis=2).reshape(-1, 64)
    return made


def integers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 16) float32 that are int8 times one scale for each row, as (scales (n,), int8 (n, 16)).

    Finds the largest integer by trial: different fractions of integers up to 128 are further apart than rounding takes
    them. A scale may be negative, as only -128 fits. Rows that are no such multiples are rounded to 127 steps; of rows
    with something that is not a number the scale is none.
    """
    with np.errstate(all="ignore"):
        peaks = np.abs(values).max(axis=1)
        scales, quants = np.where(np.isnan(peaks), peaks, np.float32(0)), np.zeros(values.shape, np.int8)
        todo = np.flatnonzero(peaks > 0)
        for largest in _LARGEST:
            if len(todo) == 0:
                break
            steps = values[todo] / peaks[todo, None] * np.float32(largest)
            whole = np.rint(steps)
            fits = (np.abs(steps - whole) < 2e-3).all(axis=1)
            found, whole = todo[fits], whole[fits]
            sign = np.where(whole.max(axis=1) > 127, np.float32(-1), np.float32(1))
            scales[found], quants[found] = sign * peaks[found] / np.float32(largest), sign[:, None] * whole
            todo = todo[~fits]
        scales[todo] = peaks[todo] / np.float32(127)
        quants[todo] = np.nan_to_num(np.rint(values[todo] / scales[todo, None]), posinf=127, neginf=-127)
    return scales, quants
