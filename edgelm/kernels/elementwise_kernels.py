"""Kernels that work on rows of activations one by one: norms, sums, products, activations, copies, RoPE.

A unit of work is a row: a token, or a wanted output. Every reduction runs over the columns in one fixed order, so a
row's result depends on nothing but that row. Buffers are float32 (rows, stride), given as byte offsets into the
workspace; the result may overwrite an input of the same place. Columns come in vectors of 16, the rest one by one.

Knows nothing of what the rows mean. `elementwise` makes the rows of the op table.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from edgelm.kernels.abi import WORD, Env, Row
from edgelm.kernels.quantize import quantize_row
from edgelm.kernels.rope import rotate_head
from edgelm.kernels.simd import (
    F32,
    add_f32,
    call,
    fma,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    mul_f32,
    splat_f32,
    store,
    sub_f32,
    sum_f32,
)
from edgelm.kernels.vector_math import activation_f32, lane_0

_F32 = np.float32
_WORKSPACE, _POSITIONS, _OUTPUTS = WORD * Env.WORKSPACE, WORD * Env.POSITIONS, WORD * Env.OUTPUTS
_COS, _SIN = WORD * Env.COS, WORD * Env.SIN
_ARG = tuple(WORD * (Row.ARGS + i) for i in range(Row.SIZE - Row.ARGS))
# Arguments that most kernels share.
_X, _X_STRIDE, _Y, _Y_STRIDE, _N = _ARG[:5]


@intrinsic
def sqrt(typingctx, x):
    """Square root of a float32, correctly rounded."""
    def codegen(context, b, sig, args):
        return call(b, "llvm.sqrt.f32", F32, *args)
    return types.float32(types.float32), codegen


@njit
def sum_row(x, n):
    """Sum of n float32 at address x."""
    s = splat_f32(_F32(0))
    whole = n - n % 16
    for i in range(0, whole, 16):
        s = add_f32(s, load_f32x16(x + 4 * i))
    total = sum_f32(s)
    for i in range(whole, n):
        total = _F32(total + load_f32(x + 4 * i))
    return total


@njit
def sum_of_squares(x, n, mean):
    """Sum of (x - mean)² of n float32 at address x."""
    s, m = splat_f32(_F32(0)), splat_f32(mean)
    t = s
    whole = n - n % 16
    for i in range(0, whole, 16):
        v = sub_f32(load_f32x16(x + 4 * i), m)
        s, t = t, fma(v, v, s)  # two sums in turn: one would wait for itself
    total = sum_f32(add_f32(s, t))
    for i in range(whole, n):
        v = _F32(load_f32(x + 4 * i) - mean)
        total = _F32(total + _F32(v * v))
    return total


@njit
def normalize(x, y, n, mean, factor, weight, bias):
    """y = (x - mean) * factor * weight + bias, of n columns; weight and bias may be 0: without."""
    m, f = splat_f32(mean), splat_f32(factor)
    whole = n - n % 16
    for i in range(0, whole, 16):
        v = mul_f32(sub_f32(load_f32x16(x + 4 * i), m), f)
        if weight != 0:
            v = mul_f32(v, load_f32x16(weight + 4 * i))
        if bias != 0:
            v = add_f32(v, load_f32x16(bias + 4 * i))
        store(y + 4 * i, v)
    for i in range(whole, n):
        v1 = _F32(_F32(load_f32(x + 4 * i) - mean) * factor)
        if weight != 0:
            v1 = _F32(v1 * load_f32(weight + 4 * i))
        if bias != 0:
            v1 = _F32(v1 + load_f32(bias + 4 * i))
        store(y + 4 * i, v1)


_NORM_HEADS, _NORM_WEIGHT, _NORM_BIAS, _NORM_EPS, _NORM_Q, _NORM_Q_STRIDE = _ARG[5:11]


def rms_norm(op, env, begin, end):
    """Unit: all heads of one row. Zhang & Sennrich 2019, x / sqrt(mean(x²) + eps) * weight."""
    workspace = load_i64(env + _WORKSPACE)
    x, y, q = workspace + load_i64(op + _X), workspace + load_i64(op + _Y), load_i64(op + _NORM_Q)
    x_stride, y_stride, q_stride = load_i64(op + _X_STRIDE), load_i64(op + _Y_STRIDE), load_i64(op + _NORM_Q_STRIDE)
    n, heads, weight, eps = load_i64(op + _N), load_i64(op + _NORM_HEADS), load_i64(op + _NORM_WEIGHT), \
        load_f32(op + _NORM_EPS)
    for r in range(begin, end):
        for h in range(heads):
            source, target = x + r * x_stride + 4 * n * h, y + r * y_stride + 4 * n * h
            mean_square = _F32(sum_of_squares(source, n, _F32(0)) / _F32(n))
            normalize(source, target, n, _F32(0), _F32(_F32(1) / sqrt(_F32(mean_square + eps))), weight, 0)
        if q >= 0:
            quantize_row(y + r * y_stride, n * heads, workspace + q + r * q_stride)


def layer_norm(op, env, begin, end):
    """Unit: one row. Ba et al. 2016, (x - mean) / sqrt(variance + eps) * weight + bias."""
    workspace = load_i64(env + _WORKSPACE)
    x, y, q = workspace + load_i64(op + _X), workspace + load_i64(op + _Y), load_i64(op + _NORM_Q)
    x_stride, y_stride, q_stride = load_i64(op + _X_STRIDE), load_i64(op + _Y_STRIDE), load_i64(op + _NORM_Q_STRIDE)
    n, eps = load_i64(op + _N), load_f32(op + _NORM_EPS)
    weight, bias = load_i64(op + _NORM_WEIGHT), load_i64(op + _NORM_BIAS)
    for r in range(begin, end):
        source, target = x + r * x_stride, y + r * y_stride
        mean = _F32(sum_row(source, n) / _F32(n))
        variance = _F32(sum_of_squares(source, n, mean) / _F32(n))
        normalize(source, target, n, mean, _F32(_F32(1) / sqrt(_F32(variance + eps))), weight, bias)
        if q >= 0:
            quantize_row(target, n, workspace + q + r * q_stride)


_Z, _Z_STRIDE, _Z_BASE, _MULTIPLY = _ARG[5:9]


def combine(op, env, begin, end):
    """Unit: one row of y = x + z, or y = x * z. z is a buffer, or a constant row of stride 0."""
    workspace = load_i64(env + _WORKSPACE)
    x, y, z = workspace + load_i64(op + _X), workspace + load_i64(op + _Y), load_i64(op + _Z)
    x_stride, y_stride, z_stride = load_i64(op + _X_STRIDE), load_i64(op + _Y_STRIDE), load_i64(op + _Z_STRIDE)
    if load_i64(op + _Z_BASE) != 0:
        z += workspace
    n, multiply = load_i64(op + _N), load_i64(op + _MULTIPLY)
    whole = n - n % 16
    for r in range(begin, end):
        xr, yr, zr = x + r * x_stride, y + r * y_stride, z + r * z_stride
        if multiply != 0:
            for i in range(0, whole, 16):
                store(yr + 4 * i, mul_f32(load_f32x16(xr + 4 * i), load_f32x16(zr + 4 * i)))
            for i in range(whole, n):
                store(yr + 4 * i, _F32(load_f32(xr + 4 * i) * load_f32(zr + 4 * i)))
        else:
            for i in range(0, whole, 16):
                store(yr + 4 * i, add_f32(load_f32x16(xr + 4 * i), load_f32x16(zr + 4 * i)))
            for i in range(whole, n):
                store(yr + 4 * i, _F32(load_f32(xr + 4 * i) + load_f32(zr + 4 * i)))


_BEFORE, _AFTER = _ARG[5:7]


@njit(inline="always")
def each_element(kind, op, env, begin, end):
    """Unit: one row of y = after * f(before * x), f the function of vector_math.ACTIVATIONS named `kind`."""
    workspace = load_i64(env + _WORKSPACE)
    x, y, n = workspace + load_i64(op + _X), workspace + load_i64(op + _Y), load_i64(op + _N)
    x_stride, y_stride = load_i64(op + _X_STRIDE), load_i64(op + _Y_STRIDE)
    before, after = splat_f32(load_f32(op + _BEFORE)), splat_f32(load_f32(op + _AFTER))
    for r in range(begin, end):
        xr, yr = x + r * x_stride, y + r * y_stride
        for i in range(0, n, 16):
            at = 4 * i
            if i + 16 <= n:
                store(yr + at, mul_f32(after, activation_f32(kind, mul_f32(before, load_f32x16(xr + at)))))
            else:
                for j in range(at, 4 * n, 4):
                    v = activation_f32(kind, mul_f32(before, splat_f32(load_f32(xr + j))))
                    store(yr + j, lane_0(mul_f32(after, v)))


def scale(op, env, begin, end):
    each_element("identity", op, env, begin, end)


def silu(op, env, begin, end):
    each_element("silu", op, env, begin, end)


def gelu(op, env, begin, end):
    each_element("gelu", op, env, begin, end)


def gelu_erf(op, env, begin, end):
    each_element("gelu_erf", op, env, begin, end)


def relu(op, env, begin, end):
    each_element("relu", op, env, begin, end)


def tanh(op, env, begin, end):
    each_element("tanh", op, env, begin, end)


_GATHER = _ARG[5]


def copy(op, env, begin, end):
    """Unit: one row; with `gather`, row r of y is the row of x that the r-th wanted output stands in."""
    workspace, outputs = load_i64(env + _WORKSPACE), load_i64(env + _OUTPUTS)
    x, y, n = workspace + load_i64(op + _X), workspace + load_i64(op + _Y), load_i64(op + _N)
    x_stride, y_stride, gather = load_i64(op + _X_STRIDE), load_i64(op + _Y_STRIDE), load_i64(op + _GATHER)
    whole = n - n % 16
    for r in range(begin, end):
        source = r
        if gather != 0:
            source = np.int64(load_i32(outputs + 4 * r))
        xr, yr = x + source * x_stride, y + r * y_stride
        for i in range(0, whole, 16):
            store(yr + 4 * i, load_f32x16(xr + 4 * i))
        for i in range(whole, n):
            store(yr + 4 * i, load_f32(xr + 4 * i))


_HEADS, _ROPE, _PAIRS, _HALVES = _ARG[5:9]
ONE = int(np.float32(1).view(np.int32))


def rope(op, env, begin, end):
    """Unit: all heads of one token."""
    workspace, index = load_i64(env + _WORKSPACE), WORD * load_i64(op + _ROPE)
    cos, sin = load_i64(load_i64(env + _COS) + index), load_i64(load_i64(env + _SIN) + index)
    x, y, n = workspace + load_i64(op + _X), workspace + load_i64(op + _Y), load_i64(op + _N)
    x_stride, y_stride, positions = load_i64(op + _X_STRIDE), load_i64(op + _Y_STRIDE), load_i64(env + _POSITIONS)
    heads, pairs, halves = load_i64(op + _HEADS), load_i64(op + _PAIRS), load_i64(op + _HALVES)
    for r in range(begin, end):
        at = 4 * pairs * np.int64(load_i32(positions + 4 * r))
        for h in range(heads):
            source, target = x + r * x_stride + 4 * n * h, y + r * y_stride + 4 * n * h
            rotate_head(source, target, n, pairs, halves, cos + at, sin + at, ONE)
