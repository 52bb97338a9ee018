"""The filters: llama.cpp's published results, then properties that must hold whatever the logits are."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgelm import filters
from edgelm.errors import FormatError, UsageError
from edgelm.filters import Candidates

UP = (0.1, 0.2, 0.3, 0.4)  # probabilities of four tokens, the last one the best


def given_probabilities(p):
    """As a model would give it: the whole vocabulary, float32 logits."""
    with np.errstate(divide="ignore"):
        return Candidates(None, np.log(np.array(p, np.float32)))


def by_token(c, vocab_size):
    """Probabilities by token id, 0 for those that are out."""
    p = np.zeros(vocab_size)
    p[slice(None) if c.ids is None else c.ids] = filters.softmax(c)
    return p


# Expected numbers: the unit tests of llama.cpp (tests/test-sampling.cpp), in the order of the tokens.
@pytest.mark.parametrize(
    ("apply", "before", "after"),
    [
        (partial(filters.temperature, t=1.0), UP, UP),
        (partial(filters.temperature, t=0.0), UP, (0, 0, 0, 1)),
        (partial(filters.dynamic_temperature, t=1.0, span=0.0, exponent=1.0), UP, UP),
        (partial(filters.dynamic_temperature, t=0.0, span=0.0, exponent=1.0), UP, (0, 0, 0, 1)),
        (partial(filters.top_k, k=1), UP, (0, 0, 0, 1)),
        (partial(filters.top_k, k=3), UP, (0, 0.22222, 0.33333, 0.44444)),
        (partial(filters.top_k, k=4), UP, UP),
        (partial(filters.top_k, k=0), UP, UP),
        (partial(filters.top_p, p=0.0), UP, (0, 0, 0, 1)),
        (partial(filters.top_p, p=0.7), UP, (0, 0, 0.428571, 0.571429)),
        (partial(filters.top_p, p=0.8), UP, (0, 0.22222, 0.33333, 0.44444)),
        (partial(filters.top_p, p=1.0), UP, UP),
        (partial(filters.min_p, p=0.00), UP, UP),
        (partial(filters.min_p, p=0.24), UP, UP),
        (partial(filters.min_p, p=0.26), UP, (0, 2 / 9, 3 / 9, 4 / 9)),
        (partial(filters.min_p, p=0.49), UP, (0, 2 / 9, 3 / 9, 4 / 9)),
        (partial(filters.min_p, p=0.51), UP, (0, 0, 3 / 7, 4 / 7)),
        (partial(filters.min_p, p=0.74), UP, (0, 0, 3 / 7, 4 / 7)),
        (partial(filters.min_p, p=0.76), UP, (0, 0, 0, 1)),
        (partial(filters.min_p, p=1.00), UP, (0, 0, 0, 1)),
        (partial(filters.min_p, p=1.05), UP, (0, 0, 0, 1)),
        (partial(filters.xtc, threshold=0.09), UP[::-1], (0, 0, 0, 1)),
        (partial(filters.xtc, threshold=0.19), UP[::-1], (0, 0, 2 / 3, 1 / 3)),
        (partial(filters.xtc, threshold=0.29), UP[::-1], (0, 3 / 6, 2 / 6, 1 / 6)),
        (partial(filters.xtc, threshold=0.39), UP[::-1], UP[::-1]),
        (partial(filters.typical, p=0.5), (0.97, 0.01, 0.01, 0.01), (1, 0, 0, 0)),
        (partial(filters.typical, p=0.5), (0.4, 0.2, 0.2, 0.2), (0, 1 / 3, 1 / 3, 1 / 3)),
        (partial(filters.top_n_sigma, n=1.0), UP, (0, 0, 0.428571, 0.571429)),
        (partial(filters.top_n_sigma, n=0.0), UP, UP),
        (partial(filters.top_n_sigma, n=3.0), UP, UP),
    ],
)
def test_against_llama_cpp(apply, before, after):
    c = apply(given_probabilities(before))
    assert by_token(c, 4) == pytest.approx(after, abs=1e-5)


def seen(*tokens):
    return {token: tokens.count(token) for token in tokens}


@pytest.mark.parametrize(
    ("tokens", "repeat", "frequency", "presence", "after"),
    [
        ((0,), 50.0, 0.0, 0.0, (0, 0.25, 0.25, 0.25, 0.25)),
        ((0, 1, 2), 50.0, 0.0, 0.0, (0, 0, 0, 0.5, 0.5)),
        ((0, 1, 2, 0, 0), 50.0, 0.0, 0.0, (0, 0, 0, 0.5, 0.5)),
        ((0,), 1.0, 5.0, 5.0, (0.000011, 0.249997, 0.249997, 0.249997, 0.249997)),
        ((0, 1, 2), 1.0, 5.0, 5.0, (0.000023, 0.000023, 0.000023, 0.499966, 0.499966)),
        ((0, 1, 2, 0, 0), 1.0, 5.0, 5.0, (0.0, 0.000023, 0.000023, 0.499977, 0.499977)),
    ],
)
def test_penalties_against_llama_cpp(tokens, repeat, frequency, presence, after):
    c = filters.penalties(given_probabilities([0.2] * 5), seen(*tokens), repeat, frequency, presence)
    assert by_token(c, 5) == pytest.approx(after, abs=1e-5)


def test_a_positive_logit_is_divided_and_a_negative_one_multiplied():
    c = Candidates(None, np.array([2.0, -2.0, 1.0], np.float32))
    assert filters.penalties(c, {0: 1, 1: 2}, 1.5, 0.25, 0.5).logits == pytest.approx([2 / 1.5 - 0.75, -3 - 1.0, 1])


def expected_queue(letters, n_vocab, k, p, m):
    """Tokens that are left of logits log(0), log(1), … : whole numbers, so that nothing depends on rounding."""
    low = 0
    for letter in letters:
        if letter == "k":
            low = max(low, n_vocab - k)
        elif letter == "m":
            low = max(low, math.ceil(m * (n_vocab - 1)))
        else:
            total, running, token = sum(range(low, n_vocab)), 0, n_vocab
            while running < p * total:
                token -= 1
                running += token
            low = token
    return low


@pytest.mark.parametrize("letters", ["k", "p", "m", "kp", "km", "pk", "pm", "mk", "mp", "kpm", "pmk", "mkp", "mpk"])
@pytest.mark.parametrize(
    ("k", "p", "m"), [(100, 0.8, 0.1), (1, 0.3, 0.9), (10000, 0.0003, 9997.5 / 9999), (5000, 0.5, 0.5)]
)
def test_filters_in_a_row(letters, k, p, m):
    with np.errstate(divide="ignore"):
        c = Candidates(None, np.log(np.arange(10000, dtype=np.float32)))
    by_letter = {"k": partial(filters.top_k, k=k), "p": partial(filters.top_p, p=p), "m": partial(filters.min_p, p=m)}
    for letter in letters:
        c = by_letter[letter](c)
    # Token 0 has probability 0: it is out as soon as anything looks.
    assert sorted(c.ids.tolist()) == list(range(max(1, expected_queue(letters, 10000, k, p, m)), 10000))


# --- properties --------------------------------------------------------------------------------------------------

finite = st.floats(-60, 60, width=32)
rows = st.one_of(
    st.lists(finite, min_size=1, max_size=40),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.5, -math.inf, 3e38, -3e38]), min_size=1, max_size=40),
    st.builds(
        lambda seed, n, width: (np.random.default_rng(seed).standard_normal(n) * width).round(1).tolist(),
        st.integers(0, 2**32), st.integers(1, 9000), st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    ),
)  # fmt: skip
cuts = st.one_of(
    st.builds(lambda k: partial(filters.top_k, k=k), st.integers(1, 400)),
    st.builds(lambda p, n: partial(filters.top_p, p=p, min_keep=n), st.floats(0, 1.1), st.integers(0, 60)),
    st.builds(lambda p, n: partial(filters.min_p, p=p, min_keep=n), st.floats(0, 1.1), st.integers(0, 60)),
    st.builds(lambda p, n: partial(filters.typical, p=p, min_keep=n), st.floats(0, 1.1), st.integers(0, 60)),
    st.builds(lambda n: partial(filters.top_n_sigma, n=n), st.floats(0, 4)),
    st.builds(lambda t, n: partial(filters.xtc, threshold=t, min_keep=n), st.floats(0, 1), st.integers(0, 60)),
    st.builds(lambda mu: partial(filters.mirostat_1, mu=mu, vocab_size=9000), st.floats(-5, 40)),
    st.builds(lambda mu: partial(filters.mirostat_2, mu=mu), st.floats(-5, 40)),
)


def whole(row):
    c = Candidates(None, np.array(row, np.float32))
    assume(c.logits.max() > -math.inf)
    return c


def check_form(c, logits):
    """Ids are tokens, each once, with the logits they came with, and in the order that `ranked` promises."""
    ids = np.arange(len(logits)) if c.ids is None else c.ids
    assert 0 < len(ids) == len(c.logits)
    assert np.array_equal(c.logits, logits[ids])
    if c.ranked:
        assert ids.tolist() == sorted(ids.tolist(), key=lambda i: (-logits[i], i))
    else:
        assert (np.diff(ids) > 0).all()


@settings(deadline=None, max_examples=400)
@given(rows, st.lists(cuts, min_size=1, max_size=4))
def test_a_cut_keeps_tokens_with_their_logits_and_never_takes_the_last(row, chain):
    c = whole(row)
    logits, before = c.logits.copy(), len(row)
    c.logits.flags.writeable = False  # a filter that writes into its argument fails here
    for cut in chain:
        c = cut(c)
        check_form(c, logits)
        assert len(c.logits) <= before
        before = len(c.logits)
    p = filters.softmax(c)
    assert (p >= 0).all() and p.sum() == pytest.approx(1, abs=1e-5)


@given(rows, st.floats(1e-45, 100))
def test_temperature_keeps_the_order_and_sums_to_one(row, t):
    c = whole([x if abs(x) < 1e35 else 0.0 for x in row])
    warmed = filters.temperature(c, t)
    order = np.argsort(-c.logits, kind="stable")
    assert (warmed.logits[order][:-1] >= warmed.logits[order][1:]).all()
    assert filters.softmax(warmed).sum() == pytest.approx(1, abs=1e-5)


@settings(deadline=None)
@given(rows, st.integers(1, 9000))
def test_top_k_is_a_sort(row, k):
    c = whole(row)
    expected = [i for i in sorted(range(len(row)), key=lambda i: (-c.logits[i], i)) if c.logits[i] > -math.inf][:k]
    assert filters.top_k(c, k).ids.tolist() == expected


@settings(deadline=None)
@given(rows, st.floats(0, 0.9999), st.floats(0, 0.9999))
def test_more_probability_keeps_more_and_just_enough(row, p, q):
    c = whole(row)
    small, large = (filters.top_p(c, x) for x in sorted((p, q)))
    assert set(small.ids) <= set(large.ids)
    shares = np.sort(filters.softmax(Candidates(None, c.logits.astype(np.float64))))[::-1].cumsum()
    n = len(large.ids)
    assert shares[n - 1] >= max(p, q) - 1e-5
    assert n == 1 or shares[n - 2] < max(p, q) + 1e-5


@settings(deadline=None)
@given(rows, st.floats(0.0001, 1))
def test_min_p_is_its_definition(row, p):
    c = whole(row)
    exact = c.logits.astype(np.float64)
    ratio = np.exp(exact - exact.max())
    kept = np.zeros(len(row), bool)
    kept[filters.min_p(c, p).ids] = True
    assert (kept == (ratio >= p))[np.abs(ratio / p - 1) > 1e-5].all()


@pytest.mark.parametrize("n", [3, 700, 5000, 50257, 49152])
def test_typical_is_its_definition(n):
    c = Candidates(None, (np.random.default_rng(n).standard_normal(n) * 3).astype(np.float32))
    p = filters.softmax(Candidates(None, c.logits.astype(np.float64)))
    order = np.argsort(np.abs(-np.log(p) + (p * np.log(p)).sum()))
    for share in (0.2, 0.9):
        expected = set(order[: int(np.searchsorted(p[order].cumsum(), share)) + 1].tolist())
        got = set(filters.typical(c, share).ids.tolist())
        assert len(expected ^ got) <= 2 + n // 1000  # float32 may swap neighbours at the border


@pytest.mark.parametrize("mu", [0.5, 3.0, 10.0])
def test_mirostat_2_cuts_by_surprise(mu):
    c = given_probabilities(np.random.default_rng(0).dirichlet(np.ones(50)))
    p = filters.softmax(c)
    expected = np.flatnonzero(-np.log2(p) <= mu).tolist() or [int(p.argmax())]
    assert filters.mirostat_2(c, mu).ids.tolist() == expected


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
def test_mirostat_1_on_an_exact_law_of_zipf(exponent):
    """With p ~ rank ** -s the estimate of s is exact, and k follows from the formula of the paper."""
    n, mu = 3000, 6.0
    c = Candidates(None, (-exponent * np.log(np.arange(1, n + 1))).astype(np.float32))
    e = exponent - 1
    k = (e * 2**mu / (1 - n**-e)) ** (1 / exponent) if e else 2**mu / math.log(n)
    assert abs(len(filters.mirostat_1(c, mu, n).ids) - k) <= 1


def test_dynamic_temperature_is_low_when_sure_and_high_when_not():
    for p, t in (([0.25] * 4, 1.5), ([1.0, 1e-30, 1e-30, 1e-30], 0.5)):
        c = given_probabilities(p)
        got = filters.dynamic_temperature(c, 1.0, 0.5, 1.0)
        assert got.logits == pytest.approx(c.logits / t, rel=1e-5)


def test_adaptive_p_prefers_what_is_near_the_target():
    c = filters.near(given_probabilities(UP), 0.21)
    assert filters.softmax(c).argmax() == 1
    d = np.abs(np.array(UP) - 0.21) / 0.3
    assert c.logits == pytest.approx(5 - 10 * d**2 / (1 + d), abs=1e-5)


# --- choosing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 4096, 4097, 50257])
def test_draw_is_the_inverse_of_the_cumulated_probability(n):
    rng = np.random.default_rng(n)
    c = Candidates(None, (rng.standard_normal(n) * 2).astype(np.float32))
    cumulative = np.cumsum(np.exp(c.logits.astype(np.float64)))
    cumulative /= cumulative[-1]
    for u in (0.0, 0.5, 1 - 2**-53, *rng.random(200)):
        index = filters.draw(c, u)
        assert cumulative[index] > u - 1e-5 and (index == 0 or cumulative[index - 1] < u + 1e-5)


@settings(deadline=None)
@given(rows, st.floats(0, 1, exclude_max=True))
def test_draw_never_takes_the_impossible(row, u):
    c = whole(row)
    assert filters.weights(c)[filters.draw(c, u)] > 0


@given(rows)
def test_greedy_is_the_first_of_the_largest(row):
    c = whole(row)
    assert filters.greedy(c) == max(range(len(row)), key=lambda i: (c.logits[i], -i))


def test_frequencies_follow_the_probabilities():
    c = given_probabilities(UP)
    counts = np.bincount([filters.draw(c, (i + 0.5) / 1000) for i in range(1000)], minlength=4)
    assert counts.tolist() == [100, 200, 300, 400]


# --- logits that no healthy model gives --------------------------------------------------------------------------

ALL = [
    partial(filters.top_k, k=2), partial(filters.top_p, p=0.5), partial(filters.min_p, p=0.5), filters.greedy,
    partial(filters.typical, p=0.5), partial(filters.top_n_sigma, n=1.0), partial(filters.xtc, threshold=0.1),
    partial(filters.dynamic_temperature, t=1.0, span=0.5, exponent=1.0), partial(filters.temperature, t=0.0),
    partial(filters.draw, uniform=0.5), partial(filters.mirostat_1, mu=5.0, vocab_size=9),
    partial(filters.mirostat_2, mu=5.0), partial(filters.near, target=0.5),
]  # fmt: skip


@pytest.mark.parametrize("f", ALL)
@pytest.mark.parametrize("n", [5, 20000])
@pytest.mark.parametrize("at", [0, -1])
def test_nan_is_an_error_that_says_so(f, n, at):
    logits = np.arange(n, dtype=np.float32)
    logits[at] = math.nan
    with pytest.raises(FormatError, match="not a number"):
        f(Candidates(None, logits))


@pytest.mark.parametrize("f", ALL)
@pytest.mark.parametrize("n", [2, 20000])
def test_nothing_allowed_is_an_error_that_says_so(f, n):
    with pytest.raises(UsageError, match="excluded"):
        f(Candidates(None, np.full(n, -math.inf, np.float32)))


@pytest.mark.parametrize("f", ALL)
def test_infinite_logits_share_everything(f):
    logits = np.zeros(20000, np.float32)
    logits[[7, 9000]] = math.inf
    got = f(Candidates(None, logits))
    if isinstance(got, Candidates):
        p = by_token(got, 20000)
        if f.func is filters.near or (f.func is filters.xtc):
            assert p.sum() == pytest.approx(1, abs=1e-5)
        else:
            assert p[7] + p[9000] == 1
    else:
        assert got in (7, 9000)


def test_bias_and_penalties_find_tokens_after_a_selection():
    c = filters.top_k(Candidates(None, np.array([5.0, 1, 4, 2, 3], np.float32)), 3)
    biased = filters.add(c, {4: 10.0, 1: 99.0, 0: -math.inf})
    assert dict(zip(biased.ids.tolist(), biased.logits.tolist(), strict=True)) == {0: -math.inf, 2: 4.0, 4: 13.0}
    assert not biased.ranked and biased.ids.tolist() == [0, 2, 4]
    assert filters.penalties(c, {0: 1}, 2.0, 0.0, 0.0).logits.tolist() == [2.5, 4.0, 3.0]
