"""Parameters and the sampler: llama.cpp's names and order, what is composed, reproducibility, log-probabilities."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm import filters
from edgelm.errors import FormatError, UsageError
from edgelm.filters import Candidates
from edgelm.sampling import DEFAULT_ORDER, GREEDY, Sampler, Sampling, logprobs, parse_logit_bias, parse_samplers

VOCAB = 5000
LOGITS = (np.random.default_rng(7).standard_normal((60, VOCAB)) * 3).astype(np.float32)


def run(sampler, rows=LOGITS):
    tokens = []
    for row in rows:
        tokens.append(sampler(row))
        sampler.accept(tokens[-1])
    return tokens


# --- parameters --------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_llama_cpp():
    assert dataclasses.asdict(Sampling()) == {
        "seed": -1, "temperature": 0.8, "dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "top_k": 40, "top_p": 0.95,
        "min_p": 0.05, "typical_p": 1.0, "top_n_sigma": -1.0, "xtc_probability": 0.0, "xtc_threshold": 0.1,
        "min_keep": 0, "repeat_last_n": 64, "repeat_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
        "dry_multiplier": 0.0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": 64,
        "dry_sequence_breakers": ("\n", ":", '"', "*"), "adaptive_target": -1.0, "adaptive_decay": 0.9,
        "mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "logit_bias": (), "ignore_eos": False,
        "samplers": ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature", DEFAULT_ORDER),
        ("edskypmxt", DEFAULT_ORDER),
        ("top-k; Top-P ;temp", ("top_k", "top_p", "temperature")),
        ("topk;nucleus;minp;typical", ("top_k", "top_p", "min_p", "typ_p")),
        (("min_p", "temperature"), ("min_p", "temperature")),
        ("temp", ("temperature",)),
        ("tk", ("temperature", "top_k")),
        ("kpa", ("top_k", "top_p", "adaptive_p")),
        ("", ()),
    ],
)
def test_order_of_samplers(text, order):
    assert parse_samplers(text) == order == Sampling(samplers=text).samplers


@pytest.mark.parametrize("text", ["top_x", "kz", "top_k;kp", ("k",), "infill"])
def test_an_unknown_sampler_is_named(text):
    with pytest.raises(UsageError, match="there is no sampler"):
        parse_samplers(text)


@pytest.mark.parametrize(
    ("text", "pair"),
    [("15043+1", (15043, 1.0)), ("3-1.5", (3, -1.5)), ("2-inf", (2, -math.inf)), (" 7 + .5e1 ", (7, 5.0))],
)
def test_logit_bias_from_text(text, pair):
    assert parse_logit_bias(text) == pair


@pytest.mark.parametrize("text", ["", "15043", "+1", "a+1", "1*2", "1+", "1+nan", "-1+1", "1+1+1"])
def test_logit_bias_of_another_form(text):
    with pytest.raises(UsageError, match="such as"):
        parse_logit_bias(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": "hot"}, {"top_k": 1.5}, {"top_k": None},
        {"top_p": -0.1}, {"min_p": -1}, {"xtc_probability": 1.1}, {"repeat_penalty": 0}, {"repeat_penalty": -1},
        {"repeat_last_n": -2}, {"mirostat": 3}, {"seed": -2}, {"min_keep": -1}, {"logit_bias": {1: math.nan}},
        {"logit_bias": {"a": 1}}, {"dry_base": -1}, {"adaptive_decay": 1.0}, {"top_k": True},
        {"top_k": 2**31}, {"top_k": 2**63}, {"top_k": -(10**400)}, {"min_keep": 2**63}, {"seed": 10**400},
        {"repeat_last_n": 10**5000}, {"logit_bias": {10**400: 1}}, {"temperature": 10**5000},
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_meant_is_named(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_bias_as_mapping_or_pairs_and_whole_numbers_as_floats():
    params = Sampling(logit_bias=[(3, 1), (3, 2.5), (4, -1)], temperature=1, top_k=20.0)
    assert params.logit_bias == ((3, 3.5), (4, -1.0)) and params == dataclasses.replace(params)
    assert Sampling(logit_bias={3: 1}).logit_bias == Sampling(logit_bias=("3+1",)).logit_bias == ((3, 1.0),)
    assert Sampling(dry_sequence_breakers=("none",)).dry_sequence_breakers == ()
    assert type(params.temperature) is float and type(params.top_k) is int
    assert hash(params) == hash(dataclasses.replace(params))


# --- composition -------------------------------------------------------------------------------------------------


def distribution(sampler, row):
    """What a sampler would draw from, as (ids, probabilities)."""
    c = Candidates(None, row)
    for step in sampler._chain:
        c = step.apply(c)
    return c


def test_the_default_chain_is_top_k_top_p_min_p_temperature():
    c = Candidates(None, LOGITS[0])
    for f in (
        partial(filters.top_k, k=40), partial(filters.top_p, p=0.95), partial(filters.min_p, p=0.05),
        partial(filters.temperature, t=0.8),
    ):  # fmt: skip
        c = f(c)
    got = distribution(Sampler(Sampling(), VOCAB), LOGITS[0])
    assert np.array_equal(got.ids, c.ids) and np.array_equal(got.logits, c.logits)


@pytest.mark.parametrize("order", ["kt", "tk", "pt", "tp", "mtk", "ypk", "skpx", "t", "", "etd"])
def test_any_order_is_applied_as_it_is_written(order):
    params = Sampling(
        samplers=order, top_k=30, top_p=0.7, typical_p=0.8, top_n_sigma=2, temperature=0.5, xtc_probability=1,
        xtc_threshold=0.02, repeat_penalty=1.3, dry_multiplier=0.9, min_keep=2,
    )  # fmt: skip
    sampler = Sampler(params, VOCAB)
    for token in (5, 6, 7, 5, 6):
        sampler.accept(token)
    by_letter = {
        "k": lambda c: filters.top_k(c, 30), "p": lambda c: filters.top_p(c, 0.7, 2),
        "m": lambda c: filters.min_p(c, 0.05, 2), "y": lambda c: filters.typical(c, 0.8, 2),
        "s": lambda c: filters.top_n_sigma(c, 2), "t": lambda c: filters.temperature(c, 0.5),
        "x": lambda c: filters.xtc(c, 0.02, 2), "e": lambda c: filters.penalties(c, {5: 2, 6: 2, 7: 1}, 1.3, 0, 0),
        "d": lambda c: filters.add(c, {7: -0.9}),
    }  # fmt: skip
    c = Candidates(None, LOGITS[1])
    for letter in order:
        c = by_letter[letter](c)
    got = distribution(sampler, LOGITS[1])
    assert np.array_equal(got.logits, c.logits)
    assert got.ids is c.ids is None or np.array_equal(got.ids, c.ids)


def test_greedy_is_argmax_with_the_lowest_index_and_costs_no_other_step():
    sampler = Sampler(GREEDY, VOCAB)
    assert sampler._chain == ()
    row = LOGITS[0].copy()
    row[[77, 3000]] = row.max() + 1
    assert sampler(row) == 77
    assert run(sampler) == LOGITS.argmax(axis=1).tolist()
    assert Sampler(Sampling(temperature=-1, samplers="kpm"), VOCAB)(row) == 77


@pytest.mark.parametrize("order", ["edskypmxt", "tkpm", "kpmte", "xkt", "yt", "epkt"])
def test_greedy_chooses_the_best_of_what_the_whole_chain_leaves(order):
    """Steps left out because they keep the best candidate must not change the choice."""
    params = Sampling(
        samplers=order, temperature=0, typical_p=0.3, xtc_probability=1, xtc_threshold=0.01, repeat_penalty=1.5,
        top_n_sigma=1, dry_multiplier=1,
    )  # fmt: skip
    greedy, whole = Sampler(params, VOCAB), Sampler(dataclasses.replace(params, temperature=1e-6), VOCAB)
    assert run(greedy) == run(whole)


@pytest.mark.parametrize(
    ("params", "rows"),
    [
        ({"repeat_penalty": 1e30, "repeat_last_n": 3}, 3),
        ({"presence_penalty": 1e5, "repeat_last_n": -1}, 60),
        ({"frequency_penalty": 1e5, "repeat_last_n": 60}, 60),
    ],
)
def test_penalties_look_back_as_far_as_they_are_told(params, rows):
    """A penalty that forbids: with the same logits again and again no token returns while it is remembered."""
    tokens = run(Sampler(Sampling(temperature=0, **params), VOCAB), [np.abs(LOGITS[0])] * 60)
    for i in range(60):
        assert tokens[i] not in tokens[max(0, i - rows) : i]
    assert len(set(tokens)) == (4 if rows == 3 else 60)


@pytest.mark.parametrize("n", [1, 64, 700])
def test_what_is_remembered_in_a_long_text(n):
    sampler = Sampler(Sampling(repeat_last_n=n, repeat_penalty=2, dry_multiplier=1, dry_penalty_last_n=40), VOCAB)
    text = np.random.default_rng(0).integers(0, 300, 5000).tolist()
    for token in text:
        sampler.accept(token)
    assert sampler._counts == {token: text[-n:].count(token) for token in set(text[-n:])}
    assert max(n, 40) < len(sampler._said) <= 2 * max(n, 40) + 1000


def test_a_token_that_is_none():
    for token in (-1, VOCAB):
        with pytest.raises(UsageError, match="no token"):
            Sampler(Sampling(), VOCAB).accept(token)


def test_nothing_is_remembered_with_a_window_of_zero():
    sampler = Sampler(Sampling(temperature=0, repeat_last_n=0, repeat_penalty=2, presence_penalty=9), VOCAB)
    assert run(sampler) == LOGITS.argmax(axis=1).tolist()


# Probabilities of llama.cpp's tests/test-sampling.cpp, from equal logits.
@pytest.mark.parametrize(
    ("history", "params", "breakers", "expected"),
    [
        ([0, 1], (1.0, 1.1, 2, 4), "", (0.25, 0.25, 0.25, 0.25)),
        ([0, 1, 2, 0, 1], (1.0, 1.1, 2, 5), "", (0.296923, 0.296923, 0.109232, 0.296923)),
        ([0, 1, 3, 4, 0, 1], (1.0, 1.1, 2, 6), "d", (0.2, 0.2, 0.2, 0.2, 0.2)),
        ([0, 1, 2, 0, 1], (2.0, 1.1, 2, 5), "", (0.241818, 0.241818, 0.032727, 0.241818, 0.241818)),
        ([0, 1, 2, 3, 4, 0, 1], (1.0, 1.1, 4, 7), "", (0.2, 0.2, 0.2, 0.2, 0.2)),
    ],
)
def test_dry_against_llama_cpp(history, params, breakers, expected):
    names = ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n")
    dry = Sampling(samplers="d", dry_sequence_breakers=tuple(breakers), **dict(zip(names, params, strict=True)))
    sampler = Sampler(dry, len(expected), token_text=lambda i: chr(97 + i))
    for token in history:
        sampler.accept(token)
    row = np.full(len(expected), math.log(1 / len(expected)), np.float32)
    assert filters.softmax(distribution(sampler, row)) == pytest.approx(expected, abs=1e-5)


def test_dry_looks_back_as_far_as_it_is_told():
    history = [1, 2, 3, *range(10, 90), 1, 2]
    for n, forbidden in ((-1, True), (85, True), (84, False), (64, False), (0, False)):
        sampler = Sampler(Sampling(samplers="d", dry_multiplier=5, dry_penalty_last_n=n), VOCAB)
        for token in history:
            sampler.accept(token)
        assert bool(distribution(sampler, LOGITS[0]).logits[3] < LOGITS[0][3]) is forbidden


@pytest.mark.parametrize("compiled", [True, False])
def test_dry_of_a_long_repetition_stays_finite(compiled):
    params = Sampling(dry_multiplier=5, dry_penalty_last_n=-1, seed=1)
    sampler = Sampler(params, 500, compiled=compiled)
    for token in (*range(400), *range(399)):
        sampler.accept(token)
    assert -math.inf < sampler._repetitions()[399] < -1e38
    assert sampler(np.zeros(500, np.float32)) != 399


def test_bias_and_end_of_generation():
    best = int(LOGITS[0].argmax())
    assert Sampler(Sampling(temperature=0, logit_bias={best: -math.inf, 12: 100}), VOCAB)(LOGITS[0]) == 12
    assert Sampler(Sampling(temperature=0, ignore_eos=True), VOCAB, eog_ids=(best, 10**9))(LOGITS[0]) != best
    assert Sampler(Sampling(temperature=0), VOCAB, eog_ids=(best,))(LOGITS[0]) == best
    for mirostat in (1, 2):  # which replaces the other samplers, but not the bias
        params = Sampling(mirostat=mirostat, logit_bias={12: 100}, repeat_penalty=1e9, samplers="e")
        assert run(Sampler(params, VOCAB)) == [12] * 60
    with pytest.raises(UsageError, match="no token 5000"):
        Sampler(Sampling(logit_bias={VOCAB: 1}), VOCAB)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [2.0, 4.0])
def test_mirostat_reaches_its_surprise(version, tau):
    """The mean surprise, measured over the distribution that is drawn from, comes near tau."""
    rng, surprises = np.random.default_rng(1), []
    sampler = Sampler(Sampling(mirostat=version, mirostat_tau=tau, temperature=1, seed=1), 2000)
    row = (-1.1 * np.log(np.arange(1, 2001))).astype(np.float32)
    for i in range(500):
        logits = rng.permutation(row)
        mu = sampler._mu
        token = sampler(logits)
        if i >= 100:
            surprises.append(tau + (mu - sampler._mu) / 0.1)
            assert logits[token] > -math.inf
    assert np.mean(surprises) == pytest.approx(tau, abs=0.25)


def test_adaptive_p_keeps_the_mean_probability_near_its_target():
    sampler = Sampler(Sampling(samplers="a", adaptive_target=0.3, seed=3), 5)
    p = np.array([0.5, 0.3, 0.1, 0.06, 0.04])
    chosen = []
    for _ in range(400):
        token = sampler(np.log(p).astype(np.float32))
        sampler.accept(token)
        chosen.append(p[token])
    assert np.mean(chosen) == pytest.approx(0.3, abs=0.05)
    undirected = Sampler(Sampling(samplers="a", seed=3), 5)
    assert np.mean([p[undirected(np.log(p).astype(np.float32))] for _ in range(400)]) == pytest.approx(0.3662, abs=0.05)


# --- randomness --------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_tokens_on_every_machine():
    """The numbers are pinned: a change of NumPy, of the platform or of the code that shows here breaks users' seeds."""
    rows = np.log1p(np.arange(64, dtype=np.float32))[None].repeat(12, 0)
    expected = [56, 42, 59, 53, 19, 63, 55, 56, 22, 42, 38, 61]
    assert run(Sampler(Sampling(seed=42, samplers="t", temperature=1), 64), rows) == expected


@pytest.mark.parametrize(
    "params",
    [{}, {"samplers": "t"}, {"xtc_probability": 0.5}, {"mirostat": 2}, {"repeat_penalty": 1.2, "dry_multiplier": 1}],
)
def test_seed_reset_and_clone(params):
    sampler = Sampler(Sampling(seed=5, **params), VOCAB)
    first = run(sampler)
    assert run(Sampler(Sampling(seed=5, **params), VOCAB)) == first
    assert run(Sampler(Sampling(seed=6, **params), VOCAB)) != first
    sampler.reset()
    assert run(sampler, LOGITS[:30]) == first[:30]
    twin = sampler.clone()
    assert run(twin, LOGITS[30:]) == first[30:] == run(sampler, LOGITS[30:])


def test_a_random_seed_differs_each_time_and_can_be_read():
    sampler = Sampler(Sampling(), VOCAB)
    first, seed = run(sampler), sampler.seed
    sampler.reset()
    assert sampler.seed != seed and run(sampler) != first
    assert run(Sampler(Sampling(seed=seed), VOCAB)) == first


def test_one_number_is_drawn_for_each_token():
    """Also where nothing is left to choose: what one row looks like does not shift the randomness of the next."""
    certain = np.full(VOCAB, -100, np.float32)
    certain[4] = 100
    params = Sampling(seed=9, xtc_probability=0.5)
    assert run(Sampler(params, VOCAB), [certain, *LOGITS[1:]])[1:] == run(Sampler(params, VOCAB))[1:]


def test_xtc_happens_as_often_as_asked():
    row = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(Sampling(samplers="x", xtc_probability=0.25, xtc_threshold=0.25, seed=1), 3)
    tokens = np.bincount([sampler(row) for _ in range(2000)], minlength=3) / 2000
    assert tokens == pytest.approx([0.75 * 0.5, 0.75 * 0.3 + 0.25 * 0.6, 0.75 * 0.2 + 0.25 * 0.4], abs=0.04)


@settings(deadline=None, max_examples=200)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(-1, 5), "top_k": st.integers(-1, 100), "top_p": st.floats(0, 1.2),
            "min_p": st.floats(0, 1.2), "typical_p": st.floats(0, 1.2), "top_n_sigma": st.floats(-1, 5),
            "xtc_probability": st.floats(0, 1), "xtc_threshold": st.floats(0, 1), "min_keep": st.integers(0, 20),
            "repeat_penalty": st.floats(0.1, 10), "frequency_penalty": st.floats(-5, 5),
            "presence_penalty": st.floats(-5, 5), "repeat_last_n": st.integers(-1, 9),
            "dry_multiplier": st.floats(0, 10), "dry_base": st.floats(0, 1e30), "dry_allowed_length": st.integers(0, 5),
            "dry_penalty_last_n": st.integers(-1, 50), "dynatemp_range": st.floats(0, 3),
            "dynatemp_exponent": st.floats(0, 4), "mirostat": st.integers(0, 2), "mirostat_tau": st.floats(0, 12),
            "samplers": st.text("edskypmxta", max_size=12), "adaptive_target": st.floats(-1, 1),
            "seed": st.integers(-1, 2**64 - 1),
        },
    ),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.5, 10.0]),
)  # fmt: skip
def test_any_parameters_give_a_token_that_was_possible(params, seed, width):
    rng = np.random.default_rng(seed)
    sampler = Sampler(Sampling(**params), 50)
    for _ in range(12):
        row = (rng.standard_normal(50) * width).astype(np.float32)
        row[rng.integers(0, 50, 20)] = -math.inf
        token = sampler(row)
        assert 0 <= token < 50 and row[token] > -math.inf
        sampler.accept(token)


# --- what it is given --------------------------------------------------------------------------------------------


def test_damaged_logits_and_wrong_shapes():
    sampler = Sampler(Sampling(), VOCAB)
    row = LOGITS[0].copy()
    row[17] = math.nan
    with pytest.raises(FormatError, match="not a number"):
        sampler(row)
    with pytest.raises(UsageError, match="shape"):
        sampler(LOGITS[:1])
    with pytest.raises(UsageError, match="excluded"):
        Sampler(Sampling(logit_bias={0: -math.inf}), 1)(np.zeros(1, np.float32))


@pytest.mark.parametrize("params", [{}, {"repeat_penalty": 2}, {"samplers": "t"}, {"mirostat": 2}, {"temperature": 0}])
def test_logits_are_not_written_and_need_not_be_float32(params):
    row = LOGITS[0].copy()
    row.flags.writeable = False
    sampler = Sampler(Sampling(seed=1, **params), VOCAB)
    sampler.accept(3)
    token = sampler(row)
    for other in (row.astype(np.float64), np.stack((row, row), 1)[:, 0]):
        again = Sampler(Sampling(seed=1, **params), VOCAB)
        again.accept(3)
        assert again(other) == token


# --- log-probabilities -------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_logits():
    row = LOGITS[3]
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    order = np.argsort(-exact)
    chosen, alternatives = logprobs(row, 17, 5)
    assert chosen == pytest.approx(exact[17], abs=1e-5)
    assert [i for i, _ in alternatives] == order[:5].tolist()
    assert [p for _, p in alternatives] == pytest.approx(exact[order[:5]], abs=1e-5)
    assert logprobs(row, 17, 0)[1] == []
    assert len(logprobs(row[:3], 1, 20)[1]) == 3
    with pytest.raises(FormatError):
        logprobs(np.full(3, math.nan, np.float32), 0, 1)
