"""The compiled chain of samplers against the filters it stands for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgelm.errors import FormatError, UsageError
from edgelm.kernels.sampling import CAPACITY, Chooser, _kernel
from edgelm.sampling import GREEDY, Sampler, Sampling

rows = st.builds(
    lambda seed, n, width, n_out, digits: _row(seed, n, width, n_out, digits),
    st.integers(0, 2**32), st.integers(1, 400), st.sampled_from([0.0, 0.3, 3.0, 30.0]), st.integers(0, 500),
    st.integers(0, 7),
)  # fmt: skip
# Changes of a logit are no smaller than its last places: beyond that, ties are decided by how each side rounds.
penalties = st.integers(-2000, 2000).map(lambda n: n / 1000)
chains = st.fixed_dictionaries(
    {"top_k": st.integers(1, CAPACITY), "seed": st.integers(0, 2**64 - 1)},
    optional={
        "samplers": st.tuples(st.text("ed", max_size=3), st.text("kpmt", max_size=6), st.text("xyskptae", max_size=3))
        .map(lambda parts: parts[0] + "k" + parts[1] + parts[2]),
        "xtc_probability": st.floats(0, 1), "xtc_threshold": st.floats(0, 0.6), "typical_p": st.floats(0, 1.1),
        "top_n_sigma": st.floats(-1, 3), "adaptive_target": st.floats(-1, 1), "dynatemp_range": st.floats(0, 1),
        "temperature": st.sampled_from([0.0, 1e-20, 1e-4, 0.1, 0.8, 1.0, 3.0]),
        "top_p": st.floats(0, 1.1), "min_p": st.floats(0, 1.1), "min_keep": st.integers(0, 200),
        "repeat_penalty": st.floats(0.1, 10), "frequency_penalty": penalties,
        "presence_penalty": penalties, "repeat_last_n": st.integers(-1, 9),
        "dry_multiplier": st.floats(0, 5), "dry_allowed_length": st.integers(0, 3),
        "logit_bias": st.sampled_from([{}, {0: 3.5}, {0: -math.inf}]),
    },
)  # fmt: skip


def _row(seed, n, width, n_out, digits):
    """Logits with ties (few digits) and tokens that are out."""
    rng = np.random.default_rng(seed)
    row = (rng.standard_normal(n) * width).round(digits)
    row[rng.integers(0, n, n_out if n_out < n else 0)] = -math.inf
    return row.astype(np.float32)


def outcome(sampler, row):
    try:
        return sampler(row)
    except (FormatError, UsageError) as error:
        return type(error), str(error)


@settings(deadline=None, max_examples=600)
@given(chains, rows)
@example(  # penalties that no logarithm of a probability shows
    {"top_k": 3, "seed": 0, "typical_p": 0.0, "dry_allowed_length": 0, "dry_multiplier": 1.401298464324817e-45},
    np.zeros(3, np.float32),
)
@example(  # penalties after one candidate alone was left of equal ones
    {"top_k": 2, "seed": 0, "samplers": "kte", "temperature": 0.0, "presence_penalty": 0.001}, np.zeros(2, np.float32)
)
def test_gives_the_same_tokens_as_the_filters(params, row):
    compiled, plain = (Sampler(Sampling(**params), len(row), compiled=on) for on in (True, False))
    assert plain._chooser is None
    for _ in range(6):
        token = outcome(compiled, row)
        assert token == outcome(plain, row)
        if isinstance(token, int):
            compiled.accept(token)
            plain.accept(token)


WIDE = [
    {"samplers": "t"}, {"samplers": "t", "temperature": 1e-4}, {"samplers": ""}, {"samplers": "pt", "top_p": 0.9},
    {"samplers": "pt", "top_p": 0.3, "min_keep": 5}, {"samplers": "mt", "min_p": 0.1},
    {"samplers": "mt", "min_p": 0.5, "min_keep": 7}, {"samplers": "ypt", "typical_p": 0.7},
    {"samplers": "y", "typical_p": 0.2, "min_keep": 4}, {"top_n_sigma": 1}, {"samplers": "st", "top_n_sigma": 2},
    {"mirostat": 1}, {"mirostat": 2}, {"mirostat": 1, "mirostat_tau": 2}, {"samplers": "kt", "top_k": 500},
    {"mirostat": 2, "mirostat_tau": 2, "temperature": 2, "logit_bias": {0: 3.5}}, {"dynatemp_range": 0.5},
    {"xtc_probability": 0.5, "xtc_threshold": 0.05}, {"samplers": "t", "dynatemp_range": 0.5}, {"typical_p": 0.5},
    {"samplers": "edsmxt", "xtc_probability": 0.7, "xtc_threshold": 0.02, "repeat_penalty": 1.2, "min_p": 0.01},
    {"samplers": "pk", "top_k": 3, "top_p": 0.9}, {"samplers": "tkp", "top_k": 30},
    {"samplers": "mkp", "top_k": 10, "min_p": 0.01}, {"samplers": "kpxk", "xtc_probability": 0.5, "top_k": 20},
    {"samplers": "ykpmx", "typical_p": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.01},
    {"samplers": "myst", "typical_p": 0.6, "top_n_sigma": 1, "min_p": 0.001},
    {"samplers": "t", "temperature": 0.5, "dynatemp_range": 1.5, "dynatemp_exponent": 3},
]  # fmt: skip


@pytest.mark.parametrize("params", WIDE, ids=str)
def test_chains_of_the_whole_vocabulary(params):
    """What the filters do in float32 is done in float64: the rows are fixed, so that no draw is near a border."""
    rng = np.random.default_rng(0)
    for n in (1, 5, 77, 400, 5000):
        for width, digits in ((3, 7), (1, 1), (0.3, 7), (8, 0)):
            rows = (rng.standard_normal((6, n)) * width).round(digits).astype(np.float32)
            rows[:, rng.integers(1, n, n // 10) if n > 10 else []] = -math.inf
            samplers = [Sampler(Sampling(seed=5, **params), n, compiled=on) for on in (True, False)]
            assert samplers[0]._chooser.wide and not samplers[0]._uncompiled and samplers[1]._chooser is None
            for row in rows:
                token, expected = (sampler(row) for sampler in samplers)
                assert token == expected
                for sampler in samplers:
                    sampler.accept(token)
            assert samplers[0]._mu == pytest.approx(samplers[1]._mu, rel=1e-4)


@pytest.mark.parametrize("params", [{"samplers": "pt"}, {"mirostat": 2}, {"top_n_sigma": 1, "xtc_probability": 0.5}])
def test_wide_chains_leave_what_is_odd_to_the_filters(params):
    n = 70
    plain = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    for value in (math.nan, math.inf, -math.inf):
        for at in (3, 69, slice(n)):
            samplers = [Sampler(Sampling(seed=5, **params), n, compiled=on) for on in (True, False)]
            odd = plain.copy()
            odd[at] = value
            expected = outcome(samplers[1], odd)
            assert outcome(samplers[0], odd) == expected
            if isinstance(expected, int):  # and one number is drawn for each token
                assert samplers[0](plain) == samplers[1](plain)


def test_the_largest_numbers_of_tokens():
    most = 2**31 - 1
    row = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    for params in ({"min_keep": most}, {"samplers": "tkp", "top_k": most}, {"samplers": "tkp", "top_k": -most}):
        wide = {"top_k": 0, **params}
        samplers = [Sampler(Sampling(seed=5, **wide), 500, compiled=on) for on in (True, False)]
        assert samplers[0]._chooser.wide
        assert [samplers[0](row) for _ in range(9)] == [samplers[1](row) for _ in range(9)]


@pytest.mark.parametrize(
    ("params", "used"),
    [
        ({}, True), ({"repeat_penalty": 1.1, "dry_multiplier": 1, "ignore_eos": True}, True),
        ({"samplers": "kpt"}, True), ({"top_k": CAPACITY}, True), ({"temperature": 0, "repeat_penalty": 2}, True),
        ({"temperature": 0, "logit_bias": {1: 1}}, True), ({"samplers": "ep", "repeat_penalty": 2}, True),
        ({"temperature": 0}, False),  # nothing but the best one: NumPy's argmax
        ({"samplers": "xt", "xtc_probability": 0.5}, False), ({"samplers": "pe", "repeat_penalty": 2}, False),
        ({"samplers": "pa", "adaptive_target": 0.5}, False),
    ],
)  # fmt: skip
def test_which_chains_it_knows(params, used):
    sampler = Sampler(Sampling(**params), 300, compiled=True)
    assert (sampler._chooser is not None) is used
    assert len(sampler._uncompiled) == (0 if used else len(sampler._chain))


@pytest.mark.parametrize(
    ("params", "left"),
    [
        ({"samplers": "kept", "repeat_penalty": 2}, 3), ({"samplers": "kxx", "xtc_probability": 0.5}, 2),
        ({"samplers": "kya", "adaptive_target": 0.5, "typical_p": 0.5}, 1),
    ],
)  # fmt: skip
def test_of_which_chains_it_knows_the_beginning(params, left):
    sampler = Sampler(Sampling(**params), 300, compiled=True)
    assert sampler._chooser is not None and len(sampler._uncompiled) == left


@pytest.mark.parametrize("n", [1, 63, 64, 65, 49152, 50257])
@pytest.mark.parametrize("k", [1, 40, CAPACITY])
def test_vocabularies_of_any_size(n, k):
    rng = np.random.default_rng(n)
    for row in (rng.standard_normal(n), np.sort(rng.standard_normal(n)), -np.sort(rng.standard_normal(n)), np.zeros(n)):
        params = Sampling(top_k=k, seed=n, repeat_penalty=1.5, samplers="ekt", temperature=3)
        samplers = [Sampler(params, n, compiled=on) for on in (True, False)]
        for _ in range(10):
            token, expected = (sampler(row.astype(np.float32)) for sampler in samplers)
            assert token == expected
            for sampler in samplers:
                sampler.accept(token)


@pytest.mark.parametrize("at", [0, 15, 16, 40, 63, 64, 127, 128, 129])
def test_what_is_not_finite_anywhere_is_left_to_the_filters(at):
    row = np.random.default_rng(0).standard_normal(130).astype(np.float32)
    chooser = Chooser(130, [("top_k", (5,))], 0)
    assert len(chooser.candidates(row, ())[0]) == 5
    for value in (math.nan, -math.nan, math.inf):
        wrong = row.copy()
        wrong[at] = value
        assert chooser.token(wrong, (), 0.5) is chooser.candidates(wrong, ()) is None
    row[at] = -math.inf
    assert chooser.token(row, (), 0.5) not in (None, at)
    assert chooser.token(np.full(130, -math.inf, np.float32), (), 0.5) is None


def test_errors_are_those_of_the_filters():
    sampler = Sampler(Sampling(), 100, compiled=True)
    with pytest.raises(FormatError, match="not a number"):
        sampler(np.full(100, math.nan, np.float32))
    with pytest.raises(UsageError, match="excluded"):
        sampler(np.full(100, -math.inf, np.float32))
    row = np.zeros(100, np.float32)
    row[7] = math.inf
    assert sampler(row) == 7


def test_one_number_is_drawn_for_each_token_whoever_chooses():
    """A row that the kernel hands back does not shift the randomness of the next."""
    odd = np.zeros(500, np.float32)
    odd[7] = math.inf
    plain = np.random.default_rng(0).standard_normal((20, 500)).astype(np.float32)
    sequences = []
    for on in (True, False):
        sampler = Sampler(Sampling(seed=3), 500, compiled=on)
        sequences.append([sampler(row) for row in (plain[0], odd, *plain[1:])])
    assert sequences[0] == sequences[1]


def test_clones_work_in_memory_of_their_own():
    row = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    sampler = Sampler(Sampling(seed=3, repeat_penalty=1.3), 500, compiled=True)
    twin = sampler.clone()
    assert twin._chooser is not sampler._chooser
    assert [sampler(row) for _ in range(20)] == [twin(row) for _ in range(20)]


def test_the_row_is_not_written():
    row = np.ones(100, np.float32)
    row.flags.writeable = False
    sampler = Sampler(Sampling(repeat_penalty=2, samplers="ek", seed=0), 100, compiled=True)
    sampler.accept(3)
    sampler(row)
    assert (row == 1).all()


def test_greedy_with_changes():
    row = np.array([1.0, 3.0, 2.0], np.float32)
    sampler = Sampler(Sampling(temperature=0, repeat_penalty=2), 3, compiled=True)
    sampler.accept(1)
    assert sampler(row) == 2
    assert Sampler(GREEDY, 3, compiled=True)(row) == 1


def test_without_numba_the_filters_do_it_all(monkeypatch):
    def missing(kernel):
        raise ImportError("No module named 'numba'")

    _kernel.cache_clear()
    monkeypatch.setattr("edgelm.kernels.compiler.address", missing)
    row = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    for more in ({"repeat_penalty": 1.2}, {"dry_multiplier": 0.8}, {"dry_multiplier": 0.8, "mirostat": 1}):
        samplers = [Sampler(Sampling(seed=1, **more), 500, compiled=on) for on in (True, False)]
        assert samplers[0]._chooser is None
        for sampler in samplers:
            for token in (5, 6, 7, 8, 5, 6, 7):
                sampler.accept(token)
        assert samplers[0](row) == samplers[1](row)
    _kernel.cache_clear()
