"""The orthonormal Hadamard transform of blocks of a head: what protects quantized keys and values from outliers.

The same sums in the same order as `kv_types.hadamard`, so that both give the same bits.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from edgelm.kernels.emit import F32x16
from edgelm.kernels.words import Value, function
from edgelm.kv_types import BLOCK

FACTOR = float(np.float32(1) / np.sqrt(np.float32(BLOCK)))


def _within(e, x, step):
    """Sums and differences of lanes that are `step` apart."""
    signs = Value(e, ir.Constant(F32x16, [-1.0 if lane & step else 1.0 for lane in range(16)]))
    return e.fma(x, signs, e.shuffle(x, x, [lane ^ step for lane in range(16)]))


@function
def turn(e, x, n, width):
    """Transforms each BLOCK of n float32 at x, in place. Up to `width`, whole blocks, zeros are put behind them."""
    with e.loop(n, width) as i:
        e.store(x + 4 * i, e.lane(e.vector(0.0)))
    with e.loop(0, 4 * width, 4 * BLOCK) as at:
        halves = [e.load(x + at + 64 * i) for i in range(2)]
        for step in (1, 2, 4, 8):
            halves = [_within(e, half, step) for half in halves]
        e.store(x + at, (halves[0] + halves[1]) * FACTOR)
        e.store(x + at + 64, (halves[0] - halves[1]) * FACTOR)
