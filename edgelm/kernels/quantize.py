"""Writing the records of `records`: activations as int8. Knows nothing of weights.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from edgelm.kernels.abi import WORD, Env, Row
from edgelm.kernels.records import (
    BLOCK,
    OFFSET,
    OFFSET_HIGH,
    OFFSET_LOW,
    RECORD,
    SCALE,
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
    max_f32,
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


@njit
def quantize_row(x, n_cols, out):
    """Writes the record of the `n_cols` float32 at address `x` to address `out`."""
    for i in range(n_cols // BLOCK):
        source, block = x + 4 * BLOCK * i, out + RECORD * i
        low, high = load_f32x16(source), load_f32x16(source + 64)
        scale = _F32(lanes_max_f32(max_f32(abs_f32(low), abs_f32(high))) / _F32(127))
        inverse = _F32(0)
        if scale >= _TINY:
            inverse = _F32(_F32(1) / scale)
        else:
            scale = _F32(0)
        low = round_i32(mul_f32(low, splat_f32(inverse)))
        high = round_i32(mul_f32(high, splat_f32(inverse)))
        store(block, to_i8(low))
        store(block + 16, to_i8(high))
        sum_low, sum_high = sum_i32(low), sum_i32(high)
        both = np.int32(sum_low + sum_high)
        store(block + SCALE, scale)
        store(block + SCALED_SUM, _F32(scale * _F32(both)))
        store(block + SCALED_SUM_LOW, _F32(scale * _F32(sum_low)))
        store(block + SCALED_SUM_HIGH, _F32(scale * _F32(sum_high)))
        store(block + OFFSET, np.int32(-128 * both))
        store(block + OFFSET_LOW, np.int32(-128 * sum_low))
        store(block + OFFSET_HIGH, np.int32(-128 * sum_high))
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
