"""One token chosen from a row of logits in one pass of machine code; `sampling` says what of.

The arithmetic is that of `edgelm.filters`, which says what each step means: the same order, the same precision. After
a token's weights have gone by, nothing of Python or NumPy is left in a core's cache: a NumPy call then costs ten times
what it costs in a loop, and the filters of the usual chain more than a twentieth of the token.

Knows no parameters' names: a list of operations, and where their items lie.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from edgelm.kernels.emit import ir, load_at
from edgelm.kernels.sampling import (
    ADD,
    COUNT,
    IDS,
    LOGITS,
    MIN_KEEP,
    MIN_P,
    N_OPS,
    OP,
    OP_A,
    OP_CODE,
    OP_ITEMS,
    OP_N_ITEMS,
    OPS,
    PENALISE,
    RESULT,
    SCRATCH,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    UNIFORM,
    VALUES,
    WEIGHTS,
)
from edgelm.kernels.simd import (
    add_f32,
    lanes_max_f32,
    load_f32,
    load_f32x16,
    load_i64,
    max_f32,
    splat_f32,
    store,
    sub_f32,
    sum_f32,
)

_F32, _F64 = np.float32, np.float64
_LOWEST = -1e37  # stands for -inf where infinities are looked for
_STEP = 64  # logits looked at together
_SLACK = 1e-7  # as in filters


@intrinsic
def load_f64(typingctx, address):
    """The float64 at `address`."""
    def codegen(context, b, sig, args):
        return load_at(b, args[0], ir.DoubleType())
    return types.float64(types.int64), codegen


@njit
def insert(state, value, token, count, k):
    """Puts a token in its place among the best k, behind its equals; the last falls out if there were k already."""
    at = min(count, k - 1)
    while at > 0 and load_f32(state + VALUES + 4 * (at - 1)) < value:
        store(state + VALUES + 4 * at, load_f32(state + VALUES + 4 * (at - 1)))
        store(state + IDS + 8 * at, load_i64(state + IDS + 8 * (at - 1)))
        at -= 1
    store(state + VALUES + 4 * at, value)
    store(state + IDS + 8 * at, token)
    return min(count + 1, k)


@njit
def select(x, n, state, k):
    """The k largest of n logits at address x, best first: how many there are; 0 if one is NaN or +inf."""
    count = 0
    worst = _F32(-math.inf)  # only what is larger gets in: never -inf, and of equals the first
    lowest, odd = splat_f32(_F32(_LOWEST)), splat_f32(_F32(0))
    whole = n - n % _STEP
    for begin in range(0, whole, _STEP):
        at = x + 4 * begin
        # Of its two arguments max_f32 gives the second if one is NaN.
        a, b = max_f32(lowest, load_f32x16(at)), max_f32(lowest, load_f32x16(at + 64))
        c, d = max_f32(lowest, load_f32x16(at + 128)), max_f32(lowest, load_f32x16(at + 192))
        total = add_f32(add_f32(a, b), add_f32(c, d))
        odd = add_f32(odd, sub_f32(total, total))  # stays 0 as long as everything is finite
        if lanes_max_f32(max_f32(max_f32(a, b), max_f32(c, d))) > worst:
            for i in range(begin, begin + _STEP):
                value = load_f32(x + 4 * i)
                if value > worst:
                    count = insert(state, value, i, count, k)
                    if count == k:
                        worst = load_f32(state + VALUES + 4 * (k - 1))
    finite = sum_f32(odd) == _F32(0)
    for i in range(whole, n):
        value = load_f32(x + 4 * i)
        if not value < _F32(math.inf):
            finite = False
        if value > worst:
            count = insert(state, value, i, count, k)
            if count == k:
                worst = load_f32(state + VALUES + 4 * (k - 1))
    for i in range(count):
        store(state + LOGITS + 8 * i, _F64(load_f32(state + VALUES + 4 * i)))
    return count if finite else 0


@njit
def weigh(state, count):
    """exp(logit - best logit) of the candidates; their sum."""
    total = 0.0
    best = load_f64(state + LOGITS)
    for i in range(count):
        w = math.exp(load_f64(state + LOGITS + 8 * i) - best)
        store(state + WEIGHTS + 8 * i, w)
        total += w
    return total


@njit
def reach(state, count, target):
    """How many of the candidates' weights it takes for their sum to reach `target`."""
    total = 0.0
    for i in range(count):
        total += load_f64(state + WEIGHTS + 8 * i)
        if total >= target:
            return i + 1
    return count


@njit
def above(state, count, bound):
    """How many candidates have at least the logit `bound`."""
    n = 0
    while n < count and load_f64(state + LOGITS + 8 * n) >= bound:
        n += 1
    return n


@njit
def heat(state, count, t):
    """Divides the logits of the candidates by the temperature."""
    best = load_f64(state + LOGITS) if t < 1e-3 else 0.0
    for i in range(count):
        at = state + LOGITS + 8 * i
        store(at, (load_f64(at) - best) / max(t, 1e-37))


@njit
def draw(state, count, uniform):
    """The candidate at which the sum of the weights passes `uniform` times their total."""
    target = uniform * weigh(state, count)
    total, last = 0.0, 0
    for i in range(count):
        w = load_f64(state + WEIGHTS + 8 * i)
        total += w
        if w > 0:
            last = i
        if total > target:
            break
    return load_i64(state + IDS + 8 * last)


@njit
def copy(x, y, n):
    """n float32 from address x to address y."""
    for at in range(0, 4 * (n - n % 16), 64):
        store(y + at, load_f32x16(x + at))
    for at in range(4 * (n - n % 16), 4 * n, 4):
        store(y + at, load_f32(x + at))


@njit
def change(x, op):
    """Adds biases to the logits at address x, or penalises tokens that were seen."""
    penalise = load_i64(op + OP_CODE) == PENALISE
    repeat, frequency = _F32(load_f64(op + OP_A)), load_f64(op + OP_A + 8)
    presence = load_f64(op + OP_A + 16)
    items = load_i64(op + OP_ITEMS)
    for i in range(load_i64(op + OP_N_ITEMS)):
        at = x + 4 * load_i64(items + 16 * i)
        value, amount = load_f32(at), load_f64(items + 16 * i + 8)
        if penalise:
            value = _F32(value * repeat) if value <= _F32(0) else _F32(value / repeat)
            value = _F32(_F64(value) - (amount * frequency + presence))
        else:
            value = _F32(value + _F32(amount))
        store(at, value)


def choose(x, n, state, _):
    """Writes the candidates that n logits at address x leave to the state, how many, and one of them that is drawn.

    None, and the token -1, if a logit is NaN or +inf, or all are -inf.
    """
    scratch, min_keep, count = load_i64(state + SCRATCH), load_i64(state + MIN_KEEP), -1
    for i in range(load_i64(state + N_OPS)):
        op = state + OPS + i * OP
        code, a = load_i64(op + OP_CODE), load_f64(op + OP_A)
        if code in (ADD, PENALISE):
            if x != scratch:
                copy(x, scratch, n)
                x = scratch
            change(x, op)
        elif code == TOP_K:
            k = np.int64(a)
            count = select(x, n, state, k) if count < 0 else min(count, k)
        elif code == TOP_P and count > 0:
            target = (a - _SLACK) * weigh(state, count)
            count = min(count, max(reach(state, count, target), min_keep))
        elif code == MIN_P and count > 0:
            bound = load_f64(state + LOGITS) + math.log(min(a, 1.0))
            count = min(count, max(above(state, count, bound), min_keep))
        elif code == TEMPERATURE and count > 0:
            if a > 0:
                heat(state, count, a)
            else:
                count = 1
    store(state + COUNT, np.int64(count))
    store(state + RESULT, draw(state, count, load_f64(state + UNIFORM)) if count > 0 else np.int64(-1))
