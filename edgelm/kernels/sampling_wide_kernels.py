"""One token chosen by a chain of samplers that begins with the whole vocabulary, or by one that looks at entropies.

Like `sampling_kernels`, whose chains begin with a top-k, it does what `edgelm.filters` defines, with float64 where that
has float32. What remains of the vocabulary is kept either best first or by token id, in arrays as large as the
vocabulary. Nothing sorts it: the best are taken from a heap until they suffice, and only what is near enough to the
best logit gets into that heap. Where thousands would have to be taken, the caller's filters do it.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from edgelm.kernels.sampling import (
    ADD,
    CAPACITY,
    COUNT,
    DYNAMIC,
    IDS,
    LOGITS,
    MIN_KEEP,
    MIN_P,
    MIROSTAT_1,
    MIROSTAT_2,
    N_OPS,
    OP,
    OP_A,
    OP_CODE,
    OPS,
    PENALISE,
    PROBABILITY,
    RESULT,
    SCRATCH,
    TEMPERATURE,
    TOP_K,
    TOP_N_SIGMA,
    TOP_P,
    TYPICAL,
    UNIFORM,
    XTC,
)
from edgelm.kernels.sampling_kernels import _LOWEST, _SLACK, change, copy, load_f64, select
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

_F32, _F64 = np.float32, np.float64
_STEP = 64  # logits looked at together
_STRETCH = 1024  # of which the weights are summed in float32
_ALL = -3e38  # below every logit but -inf
_MOST = 4096  # candidates taken from a heap; to sort many more NumPy is faster
_BY_LOGIT, _BY_DISTANCE, _BY_ID = range(3)
# Arrays of the candidates, n words each: ids, logits, weights; and of the heap: keys, ids, logits.
_WEIGHT, _KEY, _HEAP_ID, _HEAP_LOGIT = 2, 3, 4, 5


@njit
def largest(x, n):
    """(the largest of n logits, the sum of none but finite ones times 0: NaN if one is NaN or infinite)."""
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
    return best, bad, out


@njit
def moments(x, n, best):
    """Sums over n logits of w = exp(logit - best), and of w * (logit - best)."""
    lowest, shift = splat_f32(_F32(_LOWEST)), splat_f32(_F32(best))
    zeroth, first = 0.0, 0.0
    whole = n - n % 16
    for begin in range(0, whole, _STRETCH):
        weights, moment = splat_f32(_F32(0)), splat_f32(_F32(0))
        for i in range(begin, min(begin + _STRETCH, whole), 16):
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
        for begin in range(0, whole, _STRETCH):
            sums, squares = splat_f32(_F32(0)), splat_f32(_F32(0))
            for i in range(begin, min(begin + _STRETCH, whole), 16):
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
        store(wide + 8 * (_WEIGHT * n + i), w)
        zeroth, first = zeroth + w, first + w * d
    return zeroth, first


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

    Returns how many; -1 if it gives up because they are too many.
    """
    keys, tokens, logits = wide + 8 * _KEY * n, wide + 8 * _HEAP_ID * n, wide + 8 * _HEAP_LOGIT * n
    for i in range(count):
        token, logit = load_i64(wide + 8 * i), load_f64(wide + 8 * (n + i))
        key = logit if order == _BY_LOGIT else -abs(logit - center) if order == _BY_DISTANCE else -_F64(token)
        store(keys + 8 * i, key)
        store(tokens + 8 * i, token)
        store(logits + 8 * i, logit)
    for i in range(count // 2 - 1, -1, -1):
        sift(wide, n, i, count, load_f64(keys + 8 * i), load_i64(tokens + 8 * i), load_f64(logits + 8 * i))
    total, taken = 0.0, 0
    while taken < count and (taken < least or total < target):
        if taken == _MOST:
            return -1
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
    """As `take`, of the candidates or, if count < 0, of all logits at address x."""
    if count < 0:
        reach = 8.0
        while True:
            low = max((center if order == _BY_DISTANCE else best) - reach, _ALL) if reach < 100 else _ALL
            count = gather(x, n, low, wide)
            inside, total = 0, 0.0
            for i in range(count):
                logit = load_f64(wide + 8 * (n + i))
                if order == _BY_LOGIT or abs(logit - center) <= reach:
                    inside, total = inside + 1, total + math.exp(logit - best)
            if low <= _ALL or (inside >= least and total >= target):
                break
            if inside >= _MOST:
                return -1
            reach *= 2 if reach < 30 else 100
    return take(wide, n, count, order, center, best, least, target)


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


@njit
def heat(x, n, wide, count, t, best, scratch):
    """Divides logits by a temperature: those of the candidates, or all, to `scratch`. Returns the best one."""
    shift = best if t < 1e-3 else 0.0
    t = max(t, 1e-37)
    if count < 0:
        for i in range(n):
            store(scratch + 4 * i, _F32(_F32(load_f32(x + 4 * i) - _F32(shift)) / _F32(t)))
        return _F64(_F32(_F32(_F32(best) - _F32(shift)) / _F32(t)))
    for i in range(count):
        at = wide + 8 * (n + i)
        store(at, (load_f64(at) - shift) / t)
    return (best - shift) / t


@njit
def mirostat_length(state, found, mu, n):
    """How many of n tokens mirostat 1 looks at, by the `found` best logits."""
    numerator, denominator = 0.0, 0.0
    for i in range(1, found):
        t = math.log((i + 1) / i)
        numerator += t * (load_f64(state + LOGITS + 8 * (i - 1)) - load_f64(state + LOGITS + 8 * i))
        denominator += t * t
    s = min(numerator / denominator, 1e6) if found > 1 else 0.0
    excess, log_vocab = s - 1, math.log(max(n, 2))
    ratio = -math.expm1(-excess * log_vocab) / excess if abs(excess) > 1e-9 else log_vocab
    log_k = mu * math.log(2.0) - math.log(ratio)
    if log_k >= s * log_vocab:
        return n
    return max(np.int64(math.exp(log_k / s)), 1) if s > 0 else 1


@njit
def draw(x, n, wide, count, best, uniform, state):
    """Writes the candidate, or of all logits at x the one, at which the sum of weights passes `uniform` of them all."""
    weights, begin, end = wide + 8 * _WEIGHT * n, 0, count
    total, last, below = 0.0, 0, 0.0
    if count < 0:  # first which stretch it is in
        for i in range(0, n, _STRETCH):
            w, _ = moments(x + 4 * i, min(_STRETCH, n - i), best)
            total += w
            store(weights + 8 * (i // _STRETCH), w)
        i = 0
        while (i + 1) * _STRETCH < n and below + load_f64(weights + 8 * i) <= uniform * total:
            below += load_f64(weights + 8 * i)
            i += 1
        begin, end = i * _STRETCH, min((i + 1) * _STRETCH, n)
    else:
        total, _ = weigh(wide, n, count, best)
    weight = 0.0
    for i in range(begin, end):
        w = math.exp(_F64(load_f32(x + 4 * i)) - best) if count < 0 else load_f64(weights + 8 * i)
        below += w
        if w > 0:
            last, weight = i, w
        if below > uniform * total and w > 0:
            break
    store(state + RESULT, np.int64(last) if count < 0 else load_i64(wide + 8 * last))
    store(state + PROBABILITY, weight / total)


def choose(x, n, state, wide):
    """As `sampling_kernels.choose`; the token is -1 also where too many candidates are left to order them here.

    wide: address of six arrays of n words.
    """
    scratch, min_keep, count, ranked = load_i64(state + SCRATCH), load_i64(state + MIN_KEEP), -1, False
    best, finite, known = 0.0, True, False
    store(state + RESULT, np.int64(-1))
    for i in range(load_i64(state + N_OPS) + 1):
        op = state + OPS + i * OP
        code = load_i64(op + OP_CODE) if i < load_i64(state + N_OPS) else -1
        a, b, c = load_f64(op + OP_A), load_f64(op + OP_A + 8), load_f64(op + OP_A + 16)
        if code in (ADD, PENALISE):
            if x != scratch:
                copy(x, scratch, n)
                x = scratch
            change(x, op)
            known = False
            continue
        if not known:
            value, bad, out = largest(x, n)
            best, finite, known = _F64(value), out == _F32(0), True
            if bad != _F32(0) or value <= _F32(_LOWEST):
                return
        size = count if count >= 0 else n
        if count > 0:
            best = load_f64(wide + 8 * n)
            for j in range(count if not ranked else 0):
                best = max(best, load_f64(wide + 8 * (n + j)))
        total, moment = 0.0, 0.0
        if code in (TOP_P, DYNAMIC, MIROSTAT_2, TYPICAL, XTC):
            total, moment = moments(x, n, best) if count < 0 else weigh(wide, n, count, best)
        order, center, least, target, n_out = -1, 0.0, 1, -1.0, 0  # of what is taken: nothing yet
        if code == TEMPERATURE or (code == DYNAMIC and size > 1):
            if code == DYNAMIC:
                entropy = math.log(total) - moment / total
                share = min(1.0, max(0.0, entropy / math.log(size)))
                low = max(0.0, a - b)
                a = low + (a + b - low) * share**c
            if a <= 0:
                order = _BY_LOGIT
            elif a != 1:
                best = heat(x, n, wide, count, a, best, scratch)
                x = scratch if count < 0 else x
        elif code in (TOP_K, MIROSTAT_1):
            k = np.int64(a)
            if code == MIROSTAT_1:
                k = mirostat_length(state, select(x, n, state, 100), a, n)
            if count < 0 and k <= CAPACITY:
                count, ranked = select(x, n, state, k), True
                for j in range(count):
                    store(wide + 8 * j, load_i64(state + IDS + 8 * j))
                    store(wide + 8 * (n + j), load_f64(state + LOGITS + 8 * j))
            elif ranked:
                count = min(count, k)
            else:
                order, least = _BY_LOGIT, k
        elif code == TOP_P:
            order, least, target = _BY_LOGIT, max(min_keep, 1), (a - _SLACK) * total
        elif code == TYPICAL:
            order, center = _BY_DISTANCE, best + moment / total  # the mean logit is as surprising as is expected
            least, target = max(min_keep, 1), (a + _SLACK) * total
        elif code in (MIN_P, TOP_N_SIGMA, MIROSTAT_2):
            least = min_keep if code == MIN_P else 1
            if code == MIN_P:
                bound = best + math.log(min(a, 1.0))
            elif code == MIROSTAT_2:
                bound = best + math.log(total) - a * math.log(2.0)
            else:
                bound = best - a * (deviation(x, n, best, finite) if count < 0 else spread(wide, n, count))
            kept = gather(x, n, bound, wide) if count < 0 else reaching(wide, n, count, bound)
            if kept < least:  # then by number
                order = _BY_LOGIT
            else:
                count = kept if count < 0 else above(wide, n, count, bound)
        elif code == XTC and b > 0 and count > 1:
            n_out = -1
            for j in range(count):
                w = load_f64(wide + 8 * (_WEIGHT * n + j))
                n_out += 1 if w >= (a - _SLACK) * total and w > 0 else 0
            if n_out > 0 and count - n_out >= min_keep:
                order, least = _BY_LOGIT, count
            else:
                n_out = 0
        while order >= 0:
            count, ranked = first(x, n, wide, count, order, center, best, least, target), order == _BY_LOGIT
            if count < 0:
                return
            order, least, target = _BY_ID if order == _BY_DISTANCE else -1, count, -1.0
        if n_out > 0:
            count -= n_out
            for j in range(count):
                store(wide + 8 * j, load_i64(wide + 8 * (j + n_out)))
                store(wide + 8 * (n + j), load_f64(wide + 8 * (n + j + n_out)))
    store(state + COUNT, np.int64(count))
    draw(x, n, wide, count, best, load_f64(state + UNIFORM), state)


def repetitions(history, n, found, capacity):
    """Where the last of n tokens stood before, and how many tokens up to there equal the last ones.

    found: address of the least and the largest length that count; behind them go the number of places, -1 if there are
    more than `capacity`, and for each the token that followed and the length.
    """
    shortest, longest, count = load_i64(found), load_i64(found + 8), 0
    end = history + 8 * (n - 1)
    last = load_i64(end)
    for at in range(history, end, 8):
        if load_i64(at) == last:
            length = 1
            while length < longest and at - 8 * length >= history:
                if load_i64(at - 8 * length) != load_i64(end - 8 * length):
                    break
                length += 1
            if length >= shortest:
                if count == capacity:
                    store(found + 16, np.int64(-1))
                    return
                store(found + 24 + 16 * count, load_i64(at + 8))
                store(found + 32 + 16 * count, np.int64(length))
                count += 1
    store(found + 16, np.int64(count))
