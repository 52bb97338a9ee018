"""A unit of work of a matrix product: which tokens and rows it is, and what becomes of their sums.

Sums are those of two groups of 16 rows with some tokens, as (token, 2, 16) float32; the groups are neighbours of one
matrix, or the same of the gate and the up projection. Knows the arguments of the rows that `linear` builds.
"""

from __future__ import annotations

from numba import int64, njit

from edgelm.kernels.abi import WORD, Env, Row
from edgelm.kernels.block_tile import ROW
from edgelm.kernels.functions import scratch
from edgelm.kernels.linear import ACTIVATIONS, Arg
from edgelm.kernels.simd import add_f32, load_f32, load_f32x16, load_i64, mul_f32, prefetch_to_write, splat_f32, store
from edgelm.kernels.slab_tiles import PAIR
from edgelm.kernels.vector_math import gelu_f32, silu_f32

(
    _WEIGHTS, _SECOND, _GROUP_STRIDE, _N_GROUPS, _N_UNITS, _X, _X_STRIDE, _Y, _Y_STRIDE, _N_ROWS, _BIAS, _RESIDUAL,
    _RESIDUAL_STRIDE, _ACTIVATION,
) = (WORD * (Row.ARGS + arg) for arg in Arg)  # fmt: skip
_WORKSPACE, _LOGITS, _COUNT, _UNITS, _UNITS_PER = (
    WORD * field for field in (Env.WORKSPACE, Env.LOGITS, Row.COUNT, Row.UNITS, Row.UNITS_PER)
)
GROUP_UNITS, X, X_STRIDE = _N_UNITS, _X, _X_STRIDE  # of a row
_SILU = ACTIVATIONS["silu"]

# Where results go, int64 each: address of the first token's, bytes from one token's to the next, rows that are left,
# bias and residual of these (0: none), bytes from one token's residual to the next, factors of sums, activation or 0.
_Y_STEP, _LEFT, _BIASES, _RESIDUALS, _RESIDUAL_STEP, _POWERS, _GATED = (WORD * i for i in range(1, 8))
RESULTS = WORD * 8


@njit
def n_items(op, env):
    """How many tokens or outputs there are."""
    return load_i64(env + load_i64(op + _COUNT) * WORD)


@njit
def tokens_of(op, env, unit):
    """(chunk, first token, number of tokens) of a unit; those of a chunk have the same."""
    chunk, size = unit // load_i64(op + _UNITS), load_i64(op + _UNITS_PER)
    return chunk, chunk * size, min(size, n_items(op, env) - chunk * size)


@njit
def left_in_chunk(op, unit):
    """How many units, from this one on, have the same tokens."""
    n = load_i64(op + _UNITS)
    return n - unit % n


@njit
def groups_of(op, unit):
    """(first, second, step): addresses of both groups of a unit, and bytes from these to those of the next one."""
    group, stride = unit % load_i64(op + _UNITS), load_i64(op + _GROUP_STRIDE)
    weights, up = load_i64(op + _WEIGHTS), load_i64(op + _SECOND)
    if up != 0:
        return weights + group * stride, up + group * stride, stride
    first = weights + 2 * group * stride
    second = first + stride if 2 * group + 1 < load_i64(op + _N_GROUPS) else first
    return first, second, second - first + stride


@njit
def aim(results, op, env, unit, first_token, powers):
    """Fills in where the results of a unit go, of tokens from `first_token` on; powers: a float32 for each of these,
    with which its sums are multiplied."""
    workspace, y, up = load_i64(env + _WORKSPACE), load_i64(op + _Y), load_i64(op + _SECOND)
    y = load_i64(env + _LOGITS) - 1 - y if y < 0 else workspace + y
    bias, residual = load_i64(op + _BIAS), load_i64(op + _RESIDUAL)
    y_stride, residual_stride = load_i64(op + _Y_STRIDE), load_i64(op + _RESIDUAL_STRIDE)
    group = unit % load_i64(op + _UNITS) * (1 if up != 0 else 2)
    column = group * ROW
    store(results, int64(y + first_token * y_stride + column))
    store(results + _Y_STEP, y_stride)
    store(results + _LEFT, int64(load_i64(op + _N_ROWS) - group * 16))
    store(results + _BIASES, int64(bias + column if bias != 0 else 0))
    residual = workspace + residual + first_token * residual_stride + column if residual >= 0 else 0
    store(results + _RESIDUALS, int64(residual))
    store(results + _RESIDUAL_STEP, residual_stride)
    store(results + _POWERS, powers)
    store(results + _GATED, int64(load_i64(op + _ACTIVATION) if up != 0 else 0))


@njit
def ask_for(results, first, n_tokens):
    """Asks for what `finish` will store to."""
    y, y_stride = load_i64(results), load_i64(results + _Y_STEP)
    both = load_i64(results + _GATED) == 0 and load_i64(results + _LEFT) > 16
    for t in range(first, first + n_tokens):
        prefetch_to_write(y + t * y_stride)
        if both:
            prefetch_to_write(y + t * y_stride + ROW)


@njit
def finish(results, out, rests, first, n_tokens):
    """Stores what becomes of the sums at `out`, plus those at `rests` (0: none), of some tokens.

    results: where to, `RESULTS` bytes. What most tokens need has a loop of its own: tiles wait for it.
    """
    y_stride, left = load_i64(results + _Y_STEP), load_i64(results + _LEFT)
    bias, residual_stride = load_i64(results + _BIASES), load_i64(results + _RESIDUAL_STEP)
    y, residual = load_i64(results) + first * y_stride, load_i64(results + _RESIDUALS)
    powers, activation = load_i64(results + _POWERS), load_i64(results + _GATED)
    if activation != 0:
        for t in range(first, first + n_tokens):
            gate, up = both_sums(out, rests, powers, t)
            put(mul_f32(silu_f32(gate) if activation == _SILU else gelu_f32(gate), up), left, y, 0, 0)
            y += y_stride
    elif left >= 32:
        for t in range(first, first + n_tokens):
            low, high = both_sums(out, rests, powers, t)
            if bias != 0:
                low, high = add_f32(low, load_f32x16(bias)), add_f32(high, load_f32x16(bias + ROW))
            if residual != 0:
                r = residual + t * residual_stride
                low, high = add_f32(low, load_f32x16(r)), add_f32(high, load_f32x16(r + ROW))
            store(y, low)
            store(y + ROW, high)
            y += y_stride
    else:
        for t in range(first, first + n_tokens):
            low, high = both_sums(out, rests, powers, t)
            r = residual + t * residual_stride if residual != 0 else 0
            put(low, left, y, bias, r)
            if left > 16:
                put(high, left - 16, y + ROW, bias + ROW if bias != 0 else 0, r + ROW if r != 0 else 0)
            y += y_stride


@njit
def both_sums(out, rests, powers, t):
    """Sums of a token with both groups of rows, in full."""
    low, high = load_f32x16(out + t * PAIR), load_f32x16(out + t * PAIR + ROW)
    if rests != 0:
        low = add_f32(low, load_f32x16(rests + t * PAIR))
        high = add_f32(high, load_f32x16(rests + t * PAIR + ROW))
    factor = splat_f32(load_f32(powers + 4 * t))
    return mul_f32(low, factor), mul_f32(high, factor)


@njit
def put(value, n, y, bias, residual):
    """Stores the first `n` of 16 results, plus 16 float32 at `bias` and at `residual` (0: none), to `y`."""
    if n >= 16:
        if bias != 0:
            value = add_f32(value, load_f32x16(bias))
        if residual != 0:
            value = add_f32(value, load_f32x16(residual))
        store(y, value)
        return
    rest = scratch(64)
    store(rest, value)
    for i in range(0, 4 * n, 4):
        single = load_f32(rest + i)
        if bias != 0:
            single += load_f32(bias + i)
        if residual != 0:
            single += load_f32(residual + i)
        store(y + i, single)
