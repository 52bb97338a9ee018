"""Attention through the matrix unit against float64 NumPy, and against itself: what a row gives depends on no other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from attention_case import N_CTX, Case
from op_rows import UNIT

from edgelm.kernels.attention import BLOCK, SPLIT_TOKENS
from edgelm.kernels.executor import Executor

pytestmark = pytest.mark.skipif(not UNIT, reason="there is no matrix unit, or the system does not give it")
LEAST = SPLIT_TOKENS + 1

SHAPES = [
    {}, {"v_head_dim": 40}, {"head_dim": 80, "n_heads": 3, "n_kv_heads": 3}, {"head_dim": 96}, {"head_dim": 128},
    {"head_dim": 256, "n_heads": 4, "n_kv_heads": 1}, {"head_dim": 24, "v_head_dim": 20}, {"head_dim": 2},
    {"head_dim": 576, "v_head_dim": 512}, {"head_dim": 1024, "n_heads": 2}, {"head_dim": 16, "n_heads": 71,
    "n_kv_heads": 1}, {"n_heads": 28, "n_kv_heads": 4, "head_dim": 32}, {"n_heads": 1100, "n_kv_heads": 1,
    "head_dim": 8},
]
WAYS = [{}, {"window": 1}, {"window": 33}, {"window": 70}, {"window": 129}, {"window": 200, "softcap": 2.0},
        {"softcap": 0.7}, {"causal": False}, {"causal": False, "softcap": 3.0}, {"rope_dim": 64, "halves": False}]


def run(case: Case, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    return case.forward([(case.cache.new_sequence(), inputs)])


def cut(inputs: tuple[np.ndarray, ...], begin: int, end: int) -> tuple[np.ndarray, ...]:
    return tuple(x[begin:end] for x in inputs)


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("n", [15, 150])
def test_shapes(options, n):
    case = Case(tiles=LEAST, **options)
    inputs = case.inputs(n)
    np.testing.assert_allclose(run(case, inputs), case.exact(*inputs), atol=case.tolerance)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("n", [9, 64, 65, 127, 400, 1200])
def test_ways(options, n):
    case = Case(tiles=LEAST, **options)
    inputs = case.inputs(n)
    tolerance = 1e-2 if case.rope_dim else case.tolerance  # keys rounded to another neighbour now and then
    np.testing.assert_allclose(run(case, inputs), case.exact(*inputs), atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 2}, {"window": 63}, {"window": 130},
                                     {"causal": False}, {"v_head_dim": 40}], ids=str)
@pytest.mark.parametrize("n", [9, 65, 301])
def test_which_positions_count(options, n):
    """Equal weights, of values that nothing rounds: means, in which each position shows, first and last ones too."""
    case = Case(tiles=LEAST, **{"head_dim": 16, **options})
    q, k, v = case.inputs(n)
    inputs = 0 * q, k, np.rint(20 * v)
    np.testing.assert_allclose(run(case, inputs), case.exact(*inputs), atol=2e-5)


def test_large_scores():
    """The largest score moves by hundreds, upwards and downwards, and weights underflow."""
    for slope in (np.linspace(1, 60, 700), np.linspace(60, 1, 700)):
        case = Case(tiles=LEAST)
        q, k, v = case.inputs(700)
        inputs = q * 5, (k * slope[:, None]).astype(np.float32), v
        y, plain = run(case, inputs), run(Case(), inputs)
        assert np.isfinite(y).all()
        assert abs(y - case.exact(*inputs)).max() < max(0.02, 2 * abs(plain - case.exact(*inputs)).max())


@pytest.mark.parametrize("factor", [1, 3, 8])
def test_no_less_exact_than_without(factor):
    """Weights of many positions, of a few, and of next to one; values with a mean."""
    errors = []
    for tiles in (0, LEAST):
        case = Case(tiles=tiles)
        q, k, v = case.inputs(600)
        inputs = factor * q, k, v + np.float32(1)
        errors.append(np.sqrt(((run(case, inputs) - case.exact(*inputs)) ** 2).mean()))
    assert errors[1] < 1.3 * errors[0]


def test_only_from_so_many_tokens_on():
    """Fewer give the same bits as without the unit; as many do not: they went through it."""
    inputs = Case().inputs(200)
    plain = run(Case(), inputs)
    np.testing.assert_array_equal(run(Case(tiles=201), inputs), plain)
    assert (run(Case(tiles=200), inputs) != plain).any()
    for options in ({"kv_type": "f32"}, {"kv_type": "bf16/f16"}, {"kv_type": "q8_0"}):
        np.testing.assert_array_equal(run(Case(tiles=9, **options), inputs), run(Case(**options), inputs))


@pytest.mark.parametrize("options", [{}, {"window": 70}, {"softcap": 2.0}, {"head_dim": 80, "rope_dim": 32},
                                     {"n_heads": 4, "n_kv_heads": 1, "head_dim": 256}, {"head_dim": 24,
                                     "v_head_dim": 40}], ids=str)
@pytest.mark.parametrize("size", [9, 64, 100, 333])
def test_chunks_and_portions_change_no_bit(options, size):
    n = 3 * BLOCK + 77
    whole = Case(tiles=LEAST, portions=None, **options)
    inputs = whole.inputs(n)
    want, case, results = run(whole, inputs), Case(tiles=LEAST, portions=9, **options), []
    sequence = case.cache.new_sequence()
    edges = [*range(0, n - LEAST, size), n]
    for begin, end in itertools.pairwise(edges):
        results.append(case.forward([(sequence, cut(inputs, begin, end))]))
    np.testing.assert_array_equal(np.concatenate(results), want)


def test_threads_change_no_bit():
    options = {"n_heads": 8, "n_kv_heads": 2, "head_dim": 32, "tiles": LEAST}
    inputs = Case(**options).inputs(1500)
    want = run(Case(**options), inputs)
    with Executor(4) as executor:
        for _ in range(5):
            np.testing.assert_array_equal(run(Case(**options, executor=executor), inputs), want)


@pytest.mark.parametrize("options", [{}, {"window": 33, "rope_dim": 64}, {"causal": False}], ids=str)
def test_beside_other_sequences(options):
    """Prompts, continuations and single tokens: those of prompts go through the unit, each as if it were alone."""
    lengths, more = [1, 200, 64, 5, 130, 300], [40, 1, 1, 70, 3, 1]
    together, alone = Case(tiles=LEAST, **options), []
    sequences = [together.cache.new_sequence() for _ in lengths]
    firsts = [together.inputs(n, seed=10 + i) for i, n in enumerate(lengths)]
    nexts = [together.inputs(n, seed=20 + i) for i, n in enumerate(more)]
    for first, following in zip(firsts, nexts, strict=True):
        case = Case(tiles=LEAST, **options)
        sequence = case.cache.new_sequence()
        alone.append((case.forward([(sequence, first)]), case.forward([(sequence, following)])))
    for step, parts in enumerate((firsts, nexts)):
        y = together.forward(list(zip(sequences, parts, strict=True)))
        at = 0
        for result in alone:
            want = result[step]
            got, at = y[at : at + len(want)], at + len(want)
            if len(want) in (3, 5):  # alone these do not go through the unit, of three heads among others they do
                np.testing.assert_allclose(got, want, atol=together.tolerance)
            else:
                np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("n", [9, 63, 65, 150])
@pytest.mark.parametrize("causal", [True, False])
def test_what_pages_held_before_does_not_leak(n, causal):
    """Pages full of NaN, as recycled ones may be: nothing beyond the last position counts."""
    case = Case(tiles=LEAST, causal=causal, v_head_dim=24)
    sequence = case.cache.new_sequence()
    sequence.reserve(2 * N_CTX)  # make pages, give them back
    sequence.truncate(0)
    case.poisoned()
    first, second = case.inputs(n), case.inputs(20, seed=8)
    np.testing.assert_allclose(case.forward([(sequence, first)]), case.exact(*first), atol=case.tolerance)
    y = case.forward([(sequence, second)])
    both = tuple(np.concatenate(pair) for pair in zip(first, second, strict=True))
    np.testing.assert_allclose(y, case.exact(*both)[n:], atol=case.tolerance)


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("window", [0, 50])
def test_not_a_number_stays_in_its_sequence(which, value, window):
    """A broken sequence in a batch does not spoil the others, nor the future the past."""
    case = Case(tiles=LEAST, window=window)
    good, bad = case.inputs(190), case.inputs(190, seed=2)
    bad[which][60:] = value
    a, b = case.cache.new_sequence(), case.cache.new_sequence()
    y = case.forward([(a, good), (b, bad)])
    np.testing.assert_allclose(y[:190], case.exact(*good), atol=case.tolerance)
    np.testing.assert_allclose(y[190:250], case.exact(*cut(bad, 0, 60)), atol=case.tolerance)
    if np.isnan(value):
        assert np.isnan(y[250:]).all()
        after = case.forward([(b, case.inputs(100, seed=3))])
        assert np.isnan(after[: window - 1 if window else 100]).all()


def test_queries_that_are_no_numbers():
    case = Case(tiles=LEAST)
    inputs = case.inputs(150)
    inputs[0][70] = np.nan
    y = run(case, inputs)
    assert np.isnan(y[70]).all()
    inputs[0][70] = 0
    others = np.arange(150) != 70
    np.testing.assert_allclose(y[others], case.exact(*inputs)[others], atol=case.tolerance)


def test_what_tiles_and_stack_held_does_not_count():
    case = Case(tiles=LEAST, head_dim=40)
    inputs = case.inputs(100)
    want = run(case, inputs)
    broken = Case(tiles=LEAST, head_dim=128)
    run(broken, tuple(np.full_like(x, np.nan) for x in broken.inputs(300)))
    np.testing.assert_array_equal(run(Case(tiles=LEAST, head_dim=40), inputs), want)
