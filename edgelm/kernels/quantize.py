"""Writing the records of `records`: activations as int8. Knows nothing of weights.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from edgelm.kernels.abi import WORD, Env, Row
from edgelm.kernels.records import (
    BLOCK,
    OFFSET_HIGH,
    OFFSET_LOW,
    RECORD,
    SCALE_HIGH,
    SCALE_LOW,
    SCALED_SUM,
    SCALED_SUM_HIGH,
    SCALED_SUM_LOW,
    activation_bytes,
)
from edgelm.kernels.simd import (
    abs_f32,
    lanes_max_f32,
    load_f32x16,
    load_i64,
    mul_f32,
    round_i32,
    splat_f32,
    splat_i32,
    store,
    sum_i32,
    to_i8,
)

__all__ = ["activation_bytes", "quantize", "quantize_row"]

_TINY = np.float32(np.finfo(np.float32).tiny)
_F32 = np.float32
_WORKSPACE = WORD * Env.WORKSPACE
_X, _X_STRIDE, _N_COLS, _Q, _Q_STRIDE = (WORD * (Row.ARGS + i) for i in range(5))


@njit(inline="always")
def quantize_half(source, target, scale_at, sum_at, offset_at):
    """Sixteen float32 to int8 at `target`; their scale, scaled sum and offset to the other addresses."""
    x = load_f32x16(source)
    scale = _F32(lanes_max_f32(abs_f32(x)) / _F32(127))
    inverse = _F32(0)
    if scale >= _TINY:
        inverse = _F32(_F32(1) / scale)
    else:
        scale = _F32(0)
    q = round_i32(mul_f32(x, splat_f32(inverse)))
    total = sum_i32(q)
    scaled = _F32(scale * _F32(total))
    store(target, to_i8(q))
    store(scale_at, scale)
    store(sum_at, scaled)
    store(offset_at, np.int32(-128 * total))
    return scaled


@njit
def quantize_row(x, n_cols, out):
    """Writes the record of the `n_cols` float32 at address `x` to address `out`."""
    for i in range(n_cols // BLOCK):
        source, block = x + 4 * BLOCK * i, out + RECORD * i
        low = quantize_half(source, block, block + SCALE_LOW, block + SCALED_SUM_LOW, block + OFFSET_LOW)
        high = quantize_half(
            source + 64, block + 16, block + SCALE_HIGH, block + SCALED_SUM_HIGH, block + OFFSET_HIGH
        )
        store(block + SCALED_SUM, _F32(low + high))
        store(block + 60, np.int32(0))
    if n_cols // BLOCK % 2 == 1:
        block = out + RECORD * (n_cols // BLOCK)
        for i in range(0, RECORD, 16):
            store(block + i, to_i8(splat_i32(np.int32(0))))


def quantize(op, env, begin, end):
    """Unit: the record of one token."""
    workspace = load_i64(env + _WORKSPACE)
    x, q = workspace + load_i64(op + _X), workspace + load_i64(op + _Q)
    n_cols, x_stride, q_stride = load_i64(op + _N_COLS), load_i64(op + _X_STRIDE), load_i64(op + _Q_STRIDE)
    for token in range(begin, end):
        quantize_row(x + token * x_stride, n_cols, q + token * q_stride)
