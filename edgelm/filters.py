"""The samplers of llama.cpp as pure functions: candidates in, candidates out.

Every function here takes the tokens that may still be chosen and returns those that remain, or the same ones with
other logits. None keeps state, draws a random number or writes into what it is given, so they compose in any order.
Names, defaults, order and meaning are llama.cpp's. Knows nothing of models, text or parameters: see `sampling`.

Two things differ from llama.cpp, on purpose. A token whose logit is -inf is out: it is dropped by the next filter
that looks, where llama.cpp carries it along (only the dynamic temperature can tell the difference). And ties are
always broken towards the lowest token id, where llama.cpp leaves them to the sorting algorithm of the C++ library.

A whole vocabulary is only ever scanned by whole-array NumPy calls; what is left after the first filter is small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import FormatError, UsageError

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]

_ROWS = 64  # a vocabulary is scanned as (64, n/64), so that one maximum per column costs one pass of SIMD
_SLACK = 1e-7  # logits are float32: a sum that misses its target by less than that has reached it


class Candidates(NamedTuple):
    """The tokens that may still be chosen: either best first (`ranked`) or by ascending token id.

    Attributes:
        ids: (n,) token ids; None means every token of the vocabulary.
        logits: (n,) float32 as long as the whole vocabulary is there, float64 after a selection.
        ranked: whether the best token comes first; equal ones are in the order of their ids.
    """

    ids: IntArray | None
    logits: FloatArray
    ranked: bool = False

    def take(self, where: IntArray | slice, ranked: bool) -> Candidates:
        """The candidates at `where`, in that order, in float64."""
        if self.ids is not None:
            ids = self.ids[where]
        elif isinstance(where, slice):
            ids = np.arange(*where.indices(len(self.logits)), dtype=np.int64)
        else:
            ids = where
        return Candidates(ids, self.logits[where].astype(np.float64, copy=False), ranked)

    def token(self, index: int) -> int:
        return int(index if self.ids is None else self.ids[index])


# --- looking at the distribution ---------------------------------------------------------------------------------


def peak(c: Candidates) -> float:
    """The largest logit.

    Raises:
        FormatError: a logit is NaN, which only damaged weights or a defect of a kernel can cause.
        UsageError: every token is excluded.
    """
    best = float(c.logits[0] if c.ranked else c.logits.max())
    _check_peak(best)
    return best


def _check_peak(best: float) -> None:
    if not best > -math.inf:
        if math.isnan(best):
            raise FormatError("the model computed a logit that is not a number; its file is probably damaged")
        raise UsageError("every token is excluded (all logits are -inf); allow some token in logit_bias")


@np.errstate(over="ignore")
def weights(c: Candidates) -> FloatArray:
    """exp(logit - largest logit), (n,): the probabilities before they are divided by their sum."""
    best = peak(c)
    if best == math.inf:  # inf - inf is no number; infinite logits share everything among themselves
        return np.where(c.logits == math.inf, c.logits.dtype.type(1), c.logits.dtype.type(0))
    w: FloatArray = c.logits - c.logits.dtype.type(best)
    np.exp(w, out=w)
    return w


def softmax(c: Candidates) -> FloatArray:
    """The probabilities of the candidates, (n,)."""
    w = weights(c)
    w /= w.sum()
    return w


# --- selecting ---------------------------------------------------------------------------------------------------


def _largest(x: FloatArray, k: int) -> IntArray:
    """Indices of at least the k largest of x and few more, ascending; never of -inf. 0 < k <= len(x).

    The k-th largest of the column maxima of x seen as (64, n) is a lower bound of the k-th largest element, because
    k columns hold one element each that reaches it. Only columns that reach it need a closer look.
    """
    n = len(x) // _ROWS
    if 4 * k > n:
        _check_peak(float(x.max()))
        bound = np.partition(x, len(x) - k)[len(x) - k]
        return np.flatnonzero(x >= bound) if bound > -math.inf else np.flatnonzero(x > -math.inf)
    table = x[: n * _ROWS].reshape(_ROWS, n)
    columns = np.concatenate((table.max(axis=0), x[n * _ROWS :]))
    _check_peak(float(columns.max()))
    bound = np.partition(columns, len(columns) - k)[len(columns) - k]
    if bound == -math.inf:
        return np.flatnonzero(x > -math.inf)
    near = np.flatnonzero(columns[:n] >= bound)
    row, column = np.nonzero(table[:, near] >= bound)
    found = row * n + near[column]  # ascending, because the rows are
    if n * _ROWS < len(x):
        found = np.concatenate((found, n * _ROWS + np.flatnonzero(x[n * _ROWS :] >= bound)))
    return found


def _best(x: FloatArray, k: int) -> IntArray:
    """Indices of the k largest of x (fewer where -inf is reached), the largest first, equal ones by index."""
    found = _largest(x, k)
    return found[_falling(x[found])[:k]]


def _falling(x: FloatArray) -> IntArray:
    """Indices that sort x, the largest first, equal ones by index. No NaN."""
    if len(x) < 1024 or x.dtype != np.float32:
        return np.argsort(-x, kind="stable")
    bits = (x + np.float32(0)).view(np.int32).astype(np.int64)  # + 0: there is only one zero
    keys = ~np.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32 | np.arange(len(x))
    keys.sort()  # one sort of integers by SIMD, several times as fast as a stable argsort of floats
    return keys & 0xFFFFFFFF


def _until(score: FloatArray, weight: FloatArray, target: float, side: Literal["left", "right"]) -> IntArray:
    """Indices by falling score, as few as it takes for their weights to reach ("left") or pass ("right") `target`."""
    k = min(256, len(score))
    while True:
        best = _best(score, k)
        cumulative = np.cumsum(weight[best], dtype=np.float64)
        if len(best) < k or k == len(score) or cumulative[-1] > target:
            return best[: int(cumulative.searchsorted(target, side)) + 1]
        k = min(8 * k, len(score))


def _by_id(c: Candidates) -> Candidates:
    """The same candidates by ascending token id."""
    return c.take(np.argsort(c.ids), False) if c.ranked and c.ids is not None else c


def top_k(c: Candidates, k: int) -> Candidates:
    """The k candidates with the largest logits, best first; all of them, as they are, if k <= 0."""
    if k <= 0:
        return c
    if c.ranked:
        return c.take(slice(0, k), True) if k < len(c.logits) else c
    return c.take(_best(c.logits, min(k, len(c.logits))), True)


def top_p(c: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """The fewest best candidates that hold a share p of the probability, best first (Holtzman et al. 2019)."""
    if p >= 1:
        return c
    w = weights(c)
    target = (p - _SLACK) * float(w.sum())
    if c.ranked:
        n = int(np.cumsum(w, dtype=np.float64).searchsorted(target)) + 1
        return c.take(slice(0, max(n, min_keep)), True)
    kept = c.take(_until(c.logits, w, target, "left"), True)
    return kept if len(kept.logits) >= min_keep else top_k(c, min_keep)


def min_p(c: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """The candidates at least p times as probable as the best one (Nguyen et al. 2024)."""
    if p <= 0:
        return c
    bound = peak(c) + math.log(min(p, 1.0))
    kept = c.take(np.flatnonzero(c.logits >= bound), c.ranked)
    return kept if len(kept.logits) >= min_keep else top_k(c, min_keep)


def typical(c: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """The candidates whose surprise is nearest the expected one, until they hold more than p (Meister et al. 2022).

    A surprise is a logit but for its sign and a constant; a logarithm of probabilities would lose small differences.
    """
    if p >= 1:
        return c
    c = _by_id(c)
    probability, best = softmax(c), peak(c)
    possible = probability > 0
    below = np.zeros(len(probability))
    np.subtract(c.logits, best, out=below, where=c.logits < best, dtype=np.float64)  # inf - inf is no number
    mean = float(np.dot(probability[possible], below[possible]))
    score = np.where(possible, -np.abs(below - mean), -math.inf)
    kept = _until(score, probability, p + _SLACK, "right")
    if len(kept) < min_keep:
        kept = _best(score, min(min_keep, len(score)))
    return c.take(np.sort(kept), False)


@np.errstate(over="ignore")
def top_n_sigma(c: Candidates, n: float) -> Candidates:
    """The candidates within n standard deviations of the best logit (Tang et al. 2024)."""
    if n <= 0 or len(c.logits) <= 1:
        return c
    best = peak(c)
    if best == math.inf:
        return c.take(np.flatnonzero(c.logits == best), c.ranked)
    x = c.logits if c.logits.min() > -math.inf else c.logits[c.logits > -math.inf]
    deviation = x - x.dtype.type(x.mean(dtype=np.float64))
    bound = best - n * math.sqrt(float(np.dot(deviation, deviation)) / len(x))
    return c.take(np.flatnonzero(c.logits >= bound), c.ranked)


def xtc(c: Candidates, threshold: float, min_keep: int = 0) -> Candidates:
    """Of the candidates that reach `threshold` only the least probable stays, and all below ("exclude top choices").

    The caller draws whether this is done to a token at all.
    """
    if threshold > 0.5 or len(c.logits) < 2:
        return c
    w = weights(c)
    out = int(np.count_nonzero((w >= (threshold - _SLACK) * float(w.sum())) & (w > 0))) - 1
    if out <= 0 or len(c.logits) - out < min_keep:
        return c
    return top_k(c, len(c.logits)).take(slice(out, None), True)


# --- changing logits ---------------------------------------------------------------------------------------------


@np.errstate(over="ignore")
def temperature(c: Candidates, t: float) -> Candidates:
    """Logits divided by t; t <= 0 leaves the best candidate alone."""
    if t <= 0:
        return c.take(np.array([greedy(c)], np.int64), True)
    if t == 1:
        return c
    logits, kind = c.logits, c.logits.dtype.type
    if t < 1e-3 and peak(c) < math.inf:
        logits = logits - kind(peak(c))  # else a tiny temperature makes all positive logits infinite, and so equal
    return c._replace(logits=logits / kind(max(t, 1e-37)))


def dynamic_temperature(c: Candidates, t: float, span: float, exponent: float) -> Candidates:
    """A temperature between t - span and t + span by how uncertain the model is (normalised entropy ** exponent)."""
    if span <= 0:
        return temperature(c, t)
    if len(c.logits) <= 1:
        return c
    p = softmax(c).astype(np.float64, copy=False)
    possible = p[p > 0]
    entropy = -float(np.dot(possible, np.log(possible)))
    low, high = max(0.0, t - span), t + span
    uncertainty = min(1.0, max(0.0, entropy / math.log(len(p))))
    return temperature(c, low + (high - low) * uncertainty**exponent)


def add(c: Candidates, bias: Mapping[int, float]) -> Candidates:
    """Logits of some tokens changed by a bias each; -inf excludes a token."""
    c, where, ids = _find(c, bias)
    if not ids:
        return c
    logits = c.logits.copy()
    logits[where] += np.array([bias[i] for i in ids], logits.dtype)
    return Candidates(c.ids, logits)


def penalties(c: Candidates, counts: Mapping[int, int], repeat: float, frequency: float, presence: float) -> Candidates:
    """Tokens seen before made less likely: `counts` says how often each one was (Keskar et al. 2019; OpenAI's API).

    A positive logit is divided by `repeat`, a negative one multiplied by it; then count * frequency + presence is
    subtracted.
    """
    c, where, ids = _find(c, counts)
    if not ids:
        return c
    logits = c.logits.copy()
    seen = logits[where]
    seen = np.where(seen <= 0, seen * repeat, seen / repeat)
    logits[where] = seen - (np.array([counts[i] for i in ids]) * frequency + presence)
    return Candidates(c.ids, logits)


def _find(c: Candidates, tokens: Mapping[int, Any]) -> tuple[Candidates, IntArray, list[int]]:
    """The candidates by id, where among them some tokens are, and which ones those are."""
    wanted = np.fromiter(tokens, np.int64, len(tokens))
    if c.ids is None:
        return c, wanted, wanted.tolist()
    order = np.argsort(c.ids)
    ids = c.ids[order]
    where = np.flatnonzero(np.isin(ids, wanted))
    return Candidates(ids, c.logits[order]), where, ids[where].tolist()


# --- cuts that follow a target -----------------------------------------------------------------------------------


def mirostat_1(c: Candidates, mu: float, vocab_size: int) -> Candidates:
    """The k best candidates, k such that the expected surprise is near mu bits (Basu et al. 2020).

    The exponent s of Zipf's law is estimated from the 100 best candidates.
    """
    best = top_k(c, 100)
    if best.logits[0] == math.inf:
        return best.take(np.flatnonzero(best.logits == math.inf), True)
    ranks = np.arange(1, len(best.logits))
    t, falls = np.log((ranks + 1) / ranks), -np.diff(best.logits)
    s = min(float(np.dot(t, falls) / np.dot(t, t)), 1e6) if len(t) else 0.0
    excess, log_vocab = s - 1, math.log(max(vocab_size, 2))
    # (1 - vocab ** -excess) / excess, by its limit where that is 0 / 0
    ratio = -math.expm1(-excess * log_vocab) / excess if abs(excess) > 1e-9 else log_vocab
    log_k = mu * math.log(2) - math.log(ratio)
    k = vocab_size if log_k >= s * log_vocab else int(math.exp(log_k / s)) if s > 0 else 1
    return top_k(c, max(k, 1))


def mirostat_2(c: Candidates, mu: float) -> Candidates:
    """The candidates whose surprise is at most mu bits, at least the best one (Basu et al. 2020)."""
    w = weights(c)
    kept = np.flatnonzero(w >= 2.0**-mu * float(w.sum()))
    return c.take(kept, c.ranked) if len(kept) else top_k(c, 1)


def near(c: Candidates, target: float) -> Candidates:
    """The same candidates, with logits that favour those whose probability is near `target` (llama.cpp's adaptive-p).

    To draw from at once: they are neither ranked nor by id.
    """
    distance = np.abs(softmax(c) - min(max(target, 0.0), 1.0)) / 0.3
    logits = 5.0 - 10.0 * distance * distance / (1.0 + distance)
    return c._replace(logits=np.where(c.logits > -math.inf, logits, -math.inf), ranked=False)


# --- choosing ----------------------------------------------------------------------------------------------------


def greedy(c: Candidates) -> int:
    """Index of the candidate with the largest logit; among equals that of the lowest token id."""
    index = 0 if c.ranked else int(c.logits.argmax())
    if not c.logits[index] > -math.inf:
        peak(c)  # explains what is wrong
    return index


def draw(c: Candidates, uniform: float) -> int:
    """Index of the candidate at which the cumulated probability passes `uniform`, a number in [0, 1)."""
    w = weights(c)
    if len(w) <= 64 * _ROWS:
        return _passes(w, uniform)
    n = -(-len(w) // _ROWS)  # first which of 64 stretches, then where in it: no cumulative sum over a vocabulary
    starts = np.arange(0, len(w), n)
    sums = np.add.reduceat(w, starts)
    stretch = _passes(sums, uniform)
    below, total = float(sums[:stretch].sum(dtype=np.float64)), float(sums.sum(dtype=np.float64))
    inner = (uniform * total - below) / float(sums[stretch])
    return stretch * n + _passes(w[stretch * n : (stretch + 1) * n], min(max(inner, 0.0), 1.0))


def _passes(w: FloatArray, uniform: float) -> int:
    """The first index at which the cumulated w exceed `uniform` times their sum; never one whose w is 0."""
    cumulative = np.cumsum(w, dtype=np.float64)
    index = min(int(cumulative.searchsorted(uniform * cumulative[-1], side="right")), len(w) - 1)
    while w[index] == 0:  # rounding went past the last possible one
        index -= 1
    return index
