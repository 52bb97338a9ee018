"""Kernels that work on rows of activations one by one: norms, sums, products, activations, copies, RoPE.

A unit of work is a row: a token, or a wanted output. Every reduction runs over the columns in one fixed order, so a
row's result depends on nothing but that row. Buffers are float32 (rows, stride), given as byte offsets into the
workspace; the result may overwrite an input of the same place. Columns come in vectors of 16, the rest one by one.

Knows nothing of what the rows mean. `elementwise` makes the rows of the op table.
"""

from __future__ import annotations

from edgelm.kernels.abi import WORD, Env, Row, float_bits
from edgelm.kernels.activation_tiles import in_tiles
from edgelm.kernels.quantize import write_record
from edgelm.kernels.rope import rotate
from edgelm.kernels.simd import load_f32, load_i64
from edgelm.kernels.vector_math import ACTIVATIONS
from edgelm.kernels.words import intrinsic_of

_WORKSPACE, _POSITIONS, _OUTPUTS = WORD * Env.WORKSPACE, WORD * Env.POSITIONS, WORD * Env.OUTPUTS
_COS, _SIN = WORD * Env.COS, WORD * Env.SIN
_ARG = tuple(WORD * (Row.ARGS + i) for i in range(Row.SIZE - Row.ARGS))
# Arguments that all kernels share.
_X, _X_STRIDE, _Y, _Y_STRIDE, _N = _ARG[:5]


def _places(e, op, env, row):
    """Addresses of a row of x and of y."""
    workspace = e.load_word(env + _WORKSPACE)
    return tuple(workspace + e.load_word(op + at) + e.load_word(op + stride) * row
                 for at, stride in ((_X, _X_STRIDE), (_Y, _Y_STRIDE)))


def _each(e, n, make, y, *inputs):
    """y = make(vectors of the inputs), n columns; all addresses."""
    whole = n // 16 * 16
    with e.loop(0, whole, 16) as i:
        e.store(y + 4 * i, make(*(e.load(x + 4 * i) for x in inputs)))
    with e.loop(whole, n) as i:
        e.store(y + 4 * i, e.lane(make(*(e.vector(e.load_f32(x + 4 * i)) for x in inputs))))


def _sum(e, x, n, add):
    """The sum of n columns at address x: add(sum, vector) for vectors, in four sums that do not wait for each other."""
    sums = [e.variable(e.vector(0.0)) for _ in range(4)]
    most, whole = n // 64 * 64, n // 16 * 16
    with e.loop(0, most, 64) as i:
        for j, s in enumerate(sums):
            s.set(add(s.get(), e.load(x + 4 * i + 64 * j)))
    a, b, c, d = sums
    with e.loop(most, whole, 16) as i:
        a.set(add(a.get(), e.load(x + 4 * i)))
    total = e.variable(e.vector(e.sum((a.get() + b.get()) + (c.get() + d.get()))))
    with e.loop(whole, n) as i:
        total.set(add(total.get(), e.vector(e.load_f32(x + 4 * i))))
    return total.get()


# --- norms

_HEADS, _WEIGHT, _BIAS, _EPS, _Q, _Q_STRIDE, _LIMIT = _ARG[5:12]


def _one_over_root(e, x):
    return e.vector(1.0) / e.intrinsic("llvm.sqrt.v16f32", x)


def _rms_norm_row(e, op, env, row):
    x, y = _places(e, op, env, row)
    n, weight, eps = e.load_word(op + _N), e.load_word(op + _WEIGHT), e.vector(e.load_f32(op + _EPS))
    with e.loop(0, e.load_word(op + _HEADS)) as head:
        source, target = x + 4 * n * head, y + 4 * n * head
        squares = _sum(e, source, n, lambda s, v: e.fma(v, v, s))
        factor = _one_over_root(e, squares / e.vector(e.to_f32(n)) + eps)
        with e.choose(weight.is_not(0)) as (weighted, bare):
            with weighted:
                _each(e, n, lambda v, w: v * factor * w, target, source, weight)
            with bare:
                _each(e, n, lambda v: v * factor, target, source)


def _layer_norm_row(e, op, env, row):
    x, y = _places(e, op, env, row)
    n, weight, bias = (e.load_word(op + at) for at in (_N, _WEIGHT, _BIAS))
    columns = e.vector(e.to_f32(n))
    mean = _sum(e, x, n, lambda s, v: s + v) / columns
    squares = _sum(e, x, n, lambda s, v: e.fma(v - mean, v - mean, s))
    factor = _one_over_root(e, squares / columns + e.vector(e.load_f32(op + _EPS)))
    _each(e, n, lambda v: (v - mean) * factor, y, x)
    with e.when(weight.is_not(0)):
        _each(e, n, lambda v, w: v * w, y, y, weight)
    with e.when(bias.is_not(0)):
        _each(e, n, lambda v, w: v + w, y, y, bias)


_rms_norm_of, _layer_norm_of = intrinsic_of(_rms_norm_row, 3), intrinsic_of(_layer_norm_row, 3)


def rms_norm(op, env, begin, end):
    """Unit: all heads of one row. Zhang & Sennrich 2019, x / sqrt(mean(x²) + eps) * weight."""
    workspace, q = load_i64(env + _WORKSPACE), load_i64(op + _Q)
    y, y_stride, q_stride = workspace + load_i64(op + _Y), load_i64(op + _Y_STRIDE), load_i64(op + _Q_STRIDE)
    n = load_i64(op + _N) * load_i64(op + _HEADS)
    tiled = in_tiles(op, env)
    for row in range(begin, end):
        _rms_norm_of(op, env, row)
        if q >= 0:
            write_record(y + y_stride * row, n, workspace + q, q_stride, row, load_f32(op + _LIMIT), tiled)


def layer_norm(op, env, begin, end):
    """Unit: one row. Ba et al. 2016, (x - mean) / sqrt(variance + eps) * weight + bias."""
    workspace, q = load_i64(env + _WORKSPACE), load_i64(op + _Q)
    y, y_stride, q_stride = workspace + load_i64(op + _Y), load_i64(op + _Y_STRIDE), load_i64(op + _Q_STRIDE)
    n = load_i64(op + _N)
    tiled = in_tiles(op, env)
    for row in range(begin, end):
        _layer_norm_of(op, env, row)
        if q >= 0:
            write_record(y + y_stride * row, n, workspace + q, q_stride, row, load_f32(op + _LIMIT), tiled)


# --- sums and products

_Z, _Z_STRIDE, _Z_BASE, _MULTIPLY = _ARG[5:9]


def _combine(e, op, env, begin, end):
    base = e.select(e.load_word(op + _Z_BASE).is_(0), 0, e.load_word(env + _WORKSPACE))
    n = e.load_word(op + _N)
    with e.loop(begin, end) as row:
        x, y = _places(e, op, env, row)
        z = base + e.load_word(op + _Z) + e.load_word(op + _Z_STRIDE) * row
        with e.choose(e.load_word(op + _MULTIPLY).is_(0)) as (add, multiply):
            with add:
                _each(e, n, lambda v, w: v + w, y, x, z)
            with multiply:
                _each(e, n, lambda v, w: v * w, y, x, z)


_combine_code = intrinsic_of(_combine)


def combine(op, env, begin, end):
    """Unit: one row of y = x + z, or y = x * z. z is a buffer, or a constant row of stride 0."""
    _combine_code(op, env, begin, end)


# --- activations

_BEFORE, _AFTER = _ARG[5:7]


def _activation(kind):
    def write(e, op, env, begin, end):
        before, after = e.vector(e.load_f32(op + _BEFORE)), e.vector(e.load_f32(op + _AFTER))
        with e.loop(begin, end) as row:
            x, y = _places(e, op, env, row)
            _each(e, e.load_word(op + _N), lambda v: after * e.apply(ACTIVATIONS[kind], before * v), y, x)
    return intrinsic_of(write)


_scale, _silu, _gelu, _gelu_erf, _relu, _tanh = (
    _activation(kind) for kind in ("identity", "silu", "gelu", "gelu_erf", "relu", "tanh")
)


def scale(op, env, begin, end):
    """Unit: one row of y = after * before * x."""
    _scale(op, env, begin, end)


def silu(op, env, begin, end):
    """Unit: one row of y = after * f(before * x), as in the others that follow."""
    _silu(op, env, begin, end)


def gelu(op, env, begin, end):
    _gelu(op, env, begin, end)


def gelu_erf(op, env, begin, end):
    _gelu_erf(op, env, begin, end)


def relu(op, env, begin, end):
    _relu(op, env, begin, end)


def tanh(op, env, begin, end):
    _tanh(op, env, begin, end)


# --- copies

_GATHER = _ARG[5]


def _copy(e, op, env, begin, end):
    with e.loop(begin, end) as row:
        source = e.variable(row)
        with e.when(e.load_word(op + _GATHER).is_not(0)):
            source.set(e.load_i32(e.load_word(env + _OUTPUTS) + 4 * row))
        x, _ = _places(e, op, env, source.get())
        _, y = _places(e, op, env, row)
        _each(e, e.load_word(op + _N), lambda v: v, y, x)


_copy_code = intrinsic_of(_copy)


def copy(op, env, begin, end):
    """Unit: one row; with `gather`, row r of y is the row of x that the r-th wanted output stands in."""
    _copy_code(op, env, begin, end)


# --- RoPE

_ROPE_HEADS, _ROPE, _PAIRS, _HALVES, _ENVIRONMENT = _ARG[5:10]


def _rope(e, op, env, begin, end):
    env = env + e.load_word(op + _ENVIRONMENT)
    index, n, pairs = WORD * e.load_word(op + _ROPE), e.load_word(op + _N), e.load_word(op + _PAIRS)
    cos, sin = (e.load_word(e.load_word(env + table) + index) for table in (_COS, _SIN))
    with e.loop(begin, end) as row:
        x, y = _places(e, op, env, row)
        angle = 4 * pairs * e.load_i32(e.load_word(env + _POSITIONS) + 4 * row)
        with e.loop(0, e.load_word(op + _ROPE_HEADS)) as head:
            at = 4 * n * head
            rotate(e, x + at, y + at, n, pairs, e.load_word(op + _HALVES), cos + angle, sin + angle, float_bits(1.0))


_rope_code = intrinsic_of(_rope)


def rope(op, env, begin, end):
    """Unit: all heads of one token."""
    _rope_code(op, env, begin, end)
