"""What a chain of samplers leaves of a vocabulary, in arrays as large as the vocabulary: found, ordered, counted.

The candidates are kept either best first or by token id. Nothing sorts them: the best are taken from a heap until they
suffice, and only what is near enough to the best logit gets into that heap. A number of candidates that is negative
stands for all n logits at an address, of which none was taken yet.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from edgelm.kernels.sampling_kernels import _LOWEST, load_f64
from edgelm.kernels.simd import (
    add_f32,
    fma,
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
from edgelm.kernels.vector_math import exp_f32

WHOLE, TOO_MANY = -1, -2  # instead of a number of candidates: all n logits; more than are ordered here
NONE, BY_LOGIT, BY_DISTANCE, BY_ID = range(-1, 3)  # orders; by the distance of a logit from another one
# Arrays of the candidates, n words each: ids, logits, weights; and of the heap: keys, ids, logits.
WEIGHT, _KEY, _HEAP_ID, _HEAP_LOGIT = 2, 3, 4, 5
STRETCH = 1024  # logits of which the weights are summed in float32
_F32, _F64 = np.float32, np.float64
_STEP = 64  # logits looked at together
_ALL = -3e38  # below every logit but -inf
_MOST = 4096  # candidates taken from a heap; to sort many more NumPy is faster


@njit
def largest(x, n):
    """The largest of n logits at address x, whether all are finite, and whether none is NaN or +inf and one finite."""
    lowest = splat_f32(_F32(_LOWEST))
    high, odd, wrong = lowest, splat_f32(_F32(0)), splat_f32(_F32(0))
    whole = n - n % 16
    for at in range(x, x + 4 * whole, 64):
        value = load_f32x16(at)
        above = max_f32(lowest, value)  # gives the second if one is NaN
        high = max_f32(above, high)
        odd = add_f32(odd, sub_f32(above, above))  # NaN with NaN or +inf
        wrong = add_f32(wrong, sub_f32(value, value))  # with -inf too
    best, out, bad = lanes_max_f32(high), sum_f32(wrong), sum_f32(odd)
    for at in range(x + 4 * whole, x + 4 * n, 4):
        value = load_f32(at)
        if not value < _F32(math.inf):
            bad = _F32(math.nan)
        out += value - value
        best = max(best, value)
    return _F64(best), out == _F32(0), bad == _F32(0) and best > _F32(_LOWEST)


@njit
def moments(x, n, best):
    """Sums over n logits of w = exp(logit - best), and of w * (logit - best)."""
    lowest, shift = splat_f32(_F32(_LOWEST)), splat_f32(_F32(best))
    zeroth, first = 0.0, 0.0
    whole = n - n % 16
    for begin in range(0, whole, STRETCH):
        weights, moment = splat_f32(_F32(0)), splat_f32(_F32(0))
        for i in range(begin, min(begin + STRETCH, whole), 16):
            d = sub_f32(max_f32(lowest, load_f32x16(x + 4 * i)), shift)
            w = exp_f32(d)
            weights, moment = add_f32(weights, w), fma(w, d, moment)
        zeroth, first = zeroth + _F64(sum_f32(weights)), first + _F64(sum_f32(moment))
    for i in range(whole, n):
        d = _F64(load_f32(x + 4 * i)) - best
        if d > -1e3:
            zeroth, first = zeroth + math.exp(d), first + math.exp(d) * d
    return zeroth, first


@njit
def deviation(x, n, best, finite):
    """Standard deviation of n logits, those that are -inf left out."""
    if not finite:
        total, square, count = 0.0, 0.0, 0
        for i in range(n):
            d = _F64(load_f32(x + 4 * i)) - best
            if d > -math.inf:
                total, square, count = total + d, square + d * d, count + 1
        return math.sqrt(max(square / count - (total / count) ** 2, 0.0))
    mean = best
    square = 0.0
    for _ in range(2):
        total, square, shift = 0.0, 0.0, splat_f32(_F32(mean))
        whole = n - n % 16
        for begin in range(0, whole, STRETCH):
            sums, squares = splat_f32(_F32(0)), splat_f32(_F32(0))
            for i in range(begin, min(begin + STRETCH, whole), 16):
                d = sub_f32(load_f32x16(x + 4 * i), shift)
                sums, squares = add_f32(sums, d), fma(d, d, squares)
            total, square = total + _F64(sum_f32(sums)), square + _F64(sum_f32(squares))
        for i in range(whole, n):
            d = _F64(load_f32(x + 4 * i) - _F32(mean))
            total, square = total + d, square + d * d
        mean = _F64(_F32(mean)) + total / n
    return math.sqrt(square / n)


@njit
def spread(wide, n, count):
    """Standard deviation of the logits of the candidates."""
    mean, square = 0.0, 0.0
    for i in range(count):
        mean += load_f64(wide + 8 * (n + i)) / count
    for i in range(count):
        square += (load_f64(wide + 8 * (n + i)) - mean) ** 2
    return math.sqrt(square / count)


@njit
def gather(x, n, low, wide):
    """Makes the logits at address x that are at least `low` the candidates, by id: how many there are."""
    low, count = _F32(low), 0
    for begin in range(0, n, _STEP):
        at, end = x + 4 * begin, min(begin + _STEP, n)
        if end - begin == _STEP:
            high = max_f32(load_f32x16(at), load_f32x16(at + 64))
            if lanes_max_f32(max_f32(high, max_f32(load_f32x16(at + 128), load_f32x16(at + 192)))) < low:
                continue
        for i in range(begin, end):
            value = load_f32(x + 4 * i)
            if value >= low:
                store(wide + 8 * count, np.int64(i))
                store(wide + 8 * (n + count), _F64(value))
                count += 1
    return count


@njit
def weigh(wide, n, count, best):
    """exp(logit - best) of the candidates; their sum, and that of them times (logit - best)."""
    zeroth, first = 0.0, 0.0
    for i in range(count):
        d = load_f64(wide + 8 * (n + i)) - best
        w = math.exp(d)
        store(wide + 8 * (WEIGHT * n + i), w)
        zeroth, first = zeroth + w, first + w * d
    return zeroth, first


@njit
def best_of(wide, n, count, ranked, best):
    """The largest logit of the candidates; `best` if that is the whole vocabulary."""
    if count > 0:
        best = load_f64(wide + 8 * n)
        for i in range(count if not ranked else 0):
            best = max(best, load_f64(wide + 8 * (n + i)))
    return best


@njit
def sift(wide, n, at, count, key, token, logit):
    """Puts an item in its place at or below `at` in the heap: the largest key on top, of equals the lowest token."""
    keys, tokens, logits = wide + 8 * _KEY * n, wide + 8 * _HEAP_ID * n, wide + 8 * _HEAP_LOGIT * n
    while 2 * at + 1 < count:
        child = 2 * at + 1
        value = load_f64(keys + 8 * child)
        if child + 1 < count:
            other = load_f64(keys + 8 * child + 8)
            if other > value or (
                other == value and load_i64(tokens + 8 * child + 8) < load_i64(tokens + 8 * child)
            ):
                child, value = child + 1, other
        if key > value or (key == value and token < load_i64(tokens + 8 * child)):
            break
        store(keys + 8 * at, value)
        store(tokens + 8 * at, load_i64(tokens + 8 * child))
        store(logits + 8 * at, load_f64(logits + 8 * child))
        at = child
    store(keys + 8 * at, key)
    store(tokens + 8 * at, token)
    store(logits + 8 * at, logit)


@njit
def take(wide, n, count, order, center, best, least, target):
    """Leaves the first candidates in some order: at least `least`, until the sum of their weights reaches `target`.

    Returns how many; TOO_MANY if it gives up.
    """
    keys, tokens, logits = wide + 8 * _KEY * n, wide + 8 * _HEAP_ID * n, wide + 8 * _HEAP_LOGIT * n
    for i in range(count):
        token, logit = load_i64(wide + 8 * i), load_f64(wide + 8 * (n + i))
        key = logit if order == BY_LOGIT else -abs(logit - center) if order == BY_DISTANCE else -_F64(token)
        store(keys + 8 * i, key)
        store(tokens + 8 * i, token)
        store(logits + 8 * i, logit)
    for i in range(count // 2 - 1, -1, -1):
        sift(wide, n, i, count, load_f64(keys + 8 * i), load_i64(tokens + 8 * i), load_f64(logits + 8 * i))
    total, taken = 0.0, 0
    while taken < count and (taken < least or total < target):
        if taken == _MOST:
            return TOO_MANY
        logit = load_f64(logits)
        store(wide + 8 * taken, load_i64(tokens))
        store(wide + 8 * (n + taken), logit)
        total += math.exp(logit - best)
        taken += 1
        last = count - taken
        if last > 0:
            end = 8 * last
            sift(wide, n, 0, last, load_f64(keys + end), load_i64(tokens + end), load_f64(logits + end))
    return taken


@njit
def first(x, n, wide, count, order, center, best, least, target):
    """As `take`, of the candidates or, if count is WHOLE, of all logits at address x; by distance, these then by id."""
    if count < 0:
        reach = 8.0
        while True:
            low = max((center if order == BY_DISTANCE else best) - reach, _ALL) if reach < 100 else _ALL
            count = gather(x, n, low, wide)
            inside, total = 0, 0.0
            for i in range(count):
                logit = load_f64(wide + 8 * (n + i))
                if order == BY_LOGIT or abs(logit - center) <= reach:
                    inside, total = inside + 1, total + math.exp(logit - best)
            if low <= _ALL or (inside >= least and total >= target):
                break
            if inside >= _MOST:
                return TOO_MANY
            reach *= 2 if reach < 30 else 100
    while True:
        count = take(wide, n, count, order, center, best, least, target)
        if order != BY_DISTANCE or count == TOO_MANY:
            return count
        order, least, target = BY_ID, count, -1.0


@njit
def reaching(wide, n, count, bound):
    """How many candidates have at least the logit `bound`."""
    found = 0
    for i in range(count):
        found += 1 if load_f64(wide + 8 * (n + i)) >= bound else 0
    return found


@njit
def above(wide, n, count, bound):
    """Leaves the candidates whose logit is at least `bound`, in their order: how many there are."""
    kept = 0
    for i in range(count):
        logit = load_f64(wide + 8 * (n + i))
        if logit >= bound:
            store(wide + 8 * kept, load_i64(wide + 8 * i))
            store(wide + 8 * (n + kept), logit)
            kept += 1
    return kept
