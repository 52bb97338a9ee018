"""One token chosen by a chain of samplers that begins with the whole vocabulary, or by one that looks at entropies.

Like `sampling_kernels`, whose chains begin with a top-k, it does what `edgelm.filters` defines, with float64 where that
has float32. `sampling_candidates` holds what remains of the vocabulary after each step; where thousands would have to
be put in order, the caller's filters do it.
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
from edgelm.kernels.sampling_candidates import (
    BY_DISTANCE,
    BY_LOGIT,
    NONE,
    STRETCH,
    TOO_MANY,
    WEIGHT,
    WHOLE,
    above,
    best_of,
    deviation,
    first,
    gather,
    largest,
    moments,
    reaching,
    spread,
    weigh,
)
from edgelm.kernels.sampling_kernels import _SLACK, change, copy, load_f64, select
from edgelm.kernels.simd import load_f32, load_i64, store

_F32, _F64 = np.float32, np.float64
_MIROSTAT_BEST = 100  # logits that mirostat 1 judges a distribution by


@njit
def changed(x, n, op, scratch):
    """Biases or penalises n logits, in `scratch`, where those at address x are copied first: where they are now."""
    if x != scratch:
        copy(x, scratch, n)
    change(scratch, op)
    return scratch


@njit
def temperature(op, code, size, total, moment):
    """The one that a step names, or within its span the one that the entropy of `size` candidates asks for."""
    t, span, exponent = load_f64(op + OP_A), load_f64(op + OP_A + 8), load_f64(op + OP_A + 16)
    if code == TEMPERATURE:
        return t
    if size < 2:
        return 1.0
    entropy = math.log(total) - moment / total
    share = min(1.0, max(0.0, entropy / math.log(size)))
    low = max(0.0, t - span)
    return low + (t + span - low) * share**exponent


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
def selected(wide, n, state, count):
    """Makes those that `select` has found the candidates: how many there are."""
    for i in range(count):
        store(wide + 8 * i, load_i64(state + IDS + 8 * i))
        store(wide + 8 * (n + i), load_f64(state + LOGITS + 8 * i))
    return count


@njit
def bound(x, n, wide, count, best, finite, code, a, total):
    """The least logit that min-p, mirostat 2 or top-n-sigma leave."""
    if code == MIN_P:
        return best + math.log(min(a, 1.0))
    if code == MIROSTAT_2:
        return best + math.log(total) - a * math.log(2.0)
    return best - a * (deviation(x, n, best, finite) if count < 0 else spread(wide, n, count))


@njit
def excluded(wide, n, count, least, min_keep):
    """How many of the best candidates xtc takes out: all with the weight `least` but the last of them."""
    n_out = -1
    for i in range(count):
        w = load_f64(wide + 8 * (WEIGHT * n + i))
        n_out += 1 if w >= least and w > 0 else 0
    return n_out if n_out > 0 and count - n_out >= min_keep else 0


@njit
def drop(wide, n, count, n_out):
    """Leaves all but the first `n_out` candidates: how many these are."""
    for i in range(count - n_out):
        store(wide + 8 * i, load_i64(wide + 8 * (i + n_out)))
        store(wide + 8 * (n + i), load_f64(wide + 8 * (n + i + n_out)))
    return count - n_out


@njit
def draw(x, n, wide, count, best, uniform, state):
    """Writes the candidate, or of all logits at x the one, at which the sum of weights passes `uniform` of them all."""
    weights, begin, end = wide + 8 * WEIGHT * n, 0, count
    total, last, below = 0.0, 0, 0.0
    if count < 0:  # first which stretch it is in
        for i in range(0, n, STRETCH):
            w, _ = moments(x + 4 * i, min(STRETCH, n - i), best)
            total += w
            store(weights + 8 * (i // STRETCH), w)
        i = 0
        while (i + 1) * STRETCH < n and below + load_f64(weights + 8 * i) <= uniform * total:
            below += load_f64(weights + 8 * i)
            i += 1
        begin, end = i * STRETCH, min((i + 1) * STRETCH, n)
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
    scratch, n_ops, min_keep = load_i64(state + SCRATCH), load_i64(state + N_OPS), load_i64(state + MIN_KEEP)
    count, ranked = WHOLE, False  # candidates; whether the best comes first
    best, finite, known = 0.0, True, False  # of their logits
    store(state + RESULT, np.int64(-1))
    for i in range(n_ops + 1):
        op = state + OPS + i * OP
        code = load_i64(op + OP_CODE) if i < n_ops else -1  # after the last step: the best of what is left
        a = load_f64(op + OP_A)
        if code in (ADD, PENALISE):
            x, known = changed(x, n, op, scratch), False
            continue
        if not known:
            best, finite, known = largest(x, n)
            if not known:
                return
        best = best_of(wide, n, count, ranked, best)
        total, moment = 0.0, 0.0
        if code in (TOP_P, DYNAMIC, MIROSTAT_2, TYPICAL, XTC):
            total, moment = moments(x, n, best) if count < 0 else weigh(wide, n, count, best)
        order, center, least, target, n_out = NONE, 0.0, 1, -1.0, 0  # of what is taken: nothing yet
        if code in (TEMPERATURE, DYNAMIC):
            t = temperature(op, code, n if count < 0 else count, total, moment)
            if t <= 0:
                order = BY_LOGIT
            elif t != 1:
                best = heat(x, n, wide, count, t, best, scratch)
                x = scratch if count < 0 else x
        elif code in (TOP_K, MIROSTAT_1):
            k = np.int64(a)
            if code == MIROSTAT_1:
                k = mirostat_length(state, select(x, n, state, _MIROSTAT_BEST), a, n)
            if ranked:
                count = min(count, k)
            elif count < 0 and k <= CAPACITY:
                count, ranked = selected(wide, n, state, select(x, n, state, k)), True
            else:
                order, least = BY_LOGIT, k
        elif code == TOP_P:
            order, least, target = BY_LOGIT, max(min_keep, 1), (a - _SLACK) * total
        elif code == TYPICAL:
            order, center = BY_DISTANCE, best + moment / total  # the mean logit is as surprising as is expected
            least, target = max(min_keep, 1), (a + _SLACK) * total
        elif code in (MIN_P, TOP_N_SIGMA, MIROSTAT_2):
            least = min_keep if code == MIN_P else 1
            low = bound(x, n, wide, count, best, finite, code, a, total)
            kept = gather(x, n, low, wide) if count < 0 else reaching(wide, n, count, low)
            if kept < least:  # then by number
                order = BY_LOGIT
            else:
                count = kept if count < 0 else above(wide, n, count, low)
        elif code == XTC and load_f64(op + OP_A + 8) > 0 and count > 1:
            n_out = excluded(wide, n, count, (a - _SLACK) * total, min_keep)
            order, least = BY_LOGIT if n_out else NONE, count
        if order != NONE:
            count, ranked = first(x, n, wide, count, order, center, best, least, target), order == BY_LOGIT
            if count == TOO_MANY:
                return
        if n_out:
            count = drop(wide, n, count, n_out)
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
