"""Weights that kernels cannot pack as they are: digits of base three, points of codebooks, other plain numbers.

In NumPy, piece by piece while weights are packed. Imports no Numba. What the bits mean is in `edgelm.formats`.
"""

from __future__ import annotations

import numpy as np

from edgelm.formats import TQ1_0, TQ2_0, QTensor
from edgelm.formats.codebooks import Leveled
from edgelm.kernels.units import UNITS


def transcoded(tensor: QTensor, data: np.ndarray, format: str) -> np.ndarray:
    """Some rows of a weight as kernels pack them for `format`: bytes (rows, bytes per row)."""
    blocks = data.reshape(-1).view(tensor.format.layout)
    if format == "F32":
        made = QTensor(tensor.name, tensor.format, (len(data), tensor.shape[-1]), data).dequantize()
    elif issubclass(tensor.format, Leveled):
        made = _numbers(tensor.format, blocks)
    else:
        made = _two_bits(blocks)
    return made.view(np.uint8).reshape(len(data), -1)


def _two_bits(blocks: np.ndarray) -> np.ndarray:
    """Blocks of TQ1_0 as those of TQ2_0."""
    made = np.empty(len(blocks), TQ2_0.layout)
    fields = TQ1_0.digits(blocks).reshape(-1, 2, 4, 32) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    made["d"], made["qs"] = blocks["d"], np.bitwise_or.reduce(fields, axis=2).reshape(-1, 64)
    return made


def _numbers(format: type[Leveled], blocks: np.ndarray) -> np.ndarray:
    """Blocks with the number of each weight's level in the unit's table."""
    unit = UNITS[format.__name__]
    number_of = np.zeros(256, np.uint8)  # a level, as a byte
    number_of[np.array(format.values, np.int8).view(np.uint8)] = np.arange(len(format.values))
    made = np.empty(len(blocks), unit.source)
    with np.errstate(all="ignore"):  # d may be anything
        made["d"], made["scales"], levels = format.levels(blocks)
    made["numbers"] = number_of[levels.view(np.uint8)]
    return made
