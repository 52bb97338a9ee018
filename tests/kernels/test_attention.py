"""Attention over pages against float64 NumPy, and against itself: no way of dividing the work changes a bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import numpy as np
import pytest
from attention_case import N_CTX, Case

import edgelm
from edgelm.errors import UnsupportedError
from edgelm.kernels.attention import BLOCK, SPLIT_TOKENS, row_attention
from edgelm.kernels.executor import Executor
from edgelm.pages import KV_TYPES, PAGE, GroupLayout

ONE_TYPE = pytest.mark.parametrize("kv_type", [*KV_TYPES])
ANY_TYPE = pytest.mark.parametrize("kv_type", [*KV_TYPES, "q8_0/bf16", "f16/q4_0", "bf16/f16", "q8_0/q4_0"])


def check(case: Case, n: int, tolerance: float = 0.0) -> None:
    """n tokens at once give what NumPy gives."""
    sequence, inputs = case.cache.new_sequence(), case.inputs(n)
    y = case.forward([(sequence, inputs)])
    np.testing.assert_allclose(y, case.exact(*inputs), atol=tolerance or case.tolerance)


def cut(inputs: tuple[np.ndarray, ...], begin: int, end: int) -> tuple[np.ndarray, ...]:
    return tuple(x[begin:end] for x in inputs)


def in_chunks(case: Case, inputs: tuple[np.ndarray, ...], sizes: list[int]) -> np.ndarray:
    """The same tokens appended in pieces, the sizes taken in turns."""
    sequence, results, at = case.cache.new_sequence(), [], 0
    while at < len(inputs[0]):
        end = min(len(inputs[0]), at + sizes[len(results) % len(sizes)])
        results.append(case.forward([(sequence, cut(inputs, at, end))]))
        at = end
    return np.concatenate(results)


@ANY_TYPE
@pytest.mark.parametrize("head_dim", [1, 2, 8, 16, 23, 24, 32, 48, 49, 64, 80, 96, 112, 128, 192, 256, 576])
def test_head_dims(head_dim, kv_type):
    check(Case(head_dim=head_dim, kv_type=kv_type), 150)


@ANY_TYPE
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(8, 24), (40, 16), (192, 128), (64, 20), (33, 64), (64, 33),
                                                      (7, 1)])
def test_values_of_another_size(head_dim, v_head_dim, kv_type):
    check(Case(head_dim=head_dim, v_head_dim=v_head_dim, kv_type=kv_type), 140)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(1, 1), (4, 4), (9, 3), (4, 1), (8, 2), (5, 1), (28, 4), (71, 1),
                                                     (200, 1)])
@pytest.mark.parametrize("n", [1, 7, 140])
@ONE_TYPE
def test_heads_that_share(n_heads, n_kv_heads, n, kv_type):
    check(Case(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=32, kv_type=kv_type), n)


@ONE_TYPE
@pytest.mark.parametrize("window", [1, 5, 64, 100, 128, 129, 300])
def test_window(window, kv_type):
    check(Case(window=window, head_dim=32, kv_type=kv_type), 400)


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 2}, {"window": 63}, {"window": 130},
                                     {"causal": False}, {"n_heads": 71, "n_kv_heads": 1}, {"v_head_dim": 40}], ids=str)
@pytest.mark.parametrize("n", [1, 2, 65, 301])
def test_which_positions_count(options, n):
    """Equal weights, of values that nothing rounds: means, in which each position shows, first and last ones too."""
    case = Case(**{"head_dim": 16, **options})
    q, k, v = case.inputs(n)
    inputs = 0 * q, k, np.rint(20 * v)
    whole, ones = case.forward([(case.cache.new_sequence(), inputs)]), in_chunks(case, inputs, [1])
    np.testing.assert_allclose(whole, case.exact(*inputs), atol=2e-5)
    if case.causal:
        np.testing.assert_array_equal(ones, whole)


@pytest.mark.parametrize("rope_dim", [10, 16, 32, 48, 64])
@pytest.mark.parametrize("halves", [True, False])
def test_rope(rope_dim, halves):
    check(Case(rope_dim=rope_dim, halves=halves), 100, 1e-2)  # float16 keys: rounded to another neighbour now and then
    check(Case(rope_dim=rope_dim, halves=halves, kv_type="f32"), 100)
    check(Case(rope_dim=rope_dim, halves=halves, kv_type="q8_0"), 100, 2e-2)
    check(Case(rope_dim=rope_dim, halves=halves, kv_type="q4_0"), 100, 2e-1)


@ANY_TYPE
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 300])
def test_causal_or_not_with_softcap(causal, softcap, kv_type, n):
    check(Case(causal=causal, softcap=softcap, kv_type=kv_type, n_heads=4, n_kv_heads=4, head_dim=32), n)


def test_large_scores():
    """The running maximum moves by hundreds, and weights underflow."""
    case = Case(kv_type="f32")
    sequence, (q, k, v) = case.cache.new_sequence(), case.inputs(300)
    k = (k * np.linspace(1, 60, 300, dtype=np.float32)[:, None]).astype(np.float32)
    y, want = case.forward([(sequence, (q * 5, k, v))]), case.exact(q * 5, k, v)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y, want, atol=2e-3)  # scores of a thousand have an error of 1e-4


WAYS = [[1], [2], [3], [7], [16, 1], [64], [100, 1, 1, 5], [SPLIT_TOKENS], [SPLIT_TOKENS + 1], [500, 1]]


@pytest.mark.parametrize("options", [
    {}, {"kv_type": "f32"}, {"kv_type": "f16"}, {"window": 70}, {"softcap": 2.0},
    {"n_heads": 4, "n_kv_heads": 1, "head_dim": 256},
    {"n_heads": 3, "n_kv_heads": 3, "head_dim": 80, "rope_dim": 32}, {"head_dim": 8, "v_head_dim": 24},
    {"head_dim": 33, "v_head_dim": 21}, {"n_heads": 71, "n_kv_heads": 1, "head_dim": 16},
    {"kv_type": "q8_0", "softcap": 2.0}, {"kv_type": "q4_0", "window": 70}, {"kv_type": "q8_0/f16"},
    {"kv_type": "f16/q4_0", "rope_dim": 32}, {"kv_type": "q8_0", "head_dim": 80, "n_heads": 2},
    {"kv_type": "q4_0/q8_0", "n_heads": 14, "head_dim": 256},
], ids=str)
def test_chunks_change_no_bit(options):
    n = 2 * BLOCK + 77
    whole = Case(**options)
    inputs = whole.inputs(n)
    want = whole.forward([(whole.cache.new_sequence(), inputs)])
    for sizes in WAYS:
        np.testing.assert_array_equal(in_chunks(Case(**options), inputs, sizes), want, err_msg=str(sizes))


@pytest.mark.parametrize("options", [{}, {"n_heads": 4, "n_kv_heads": 1}, {"window": 200}, {"softcap": 3.0},
                                     {"kv_type": "q8_0"}, {"kv_type": "q4_0", "window": 200}], ids=str)
@pytest.mark.parametrize("n_new", [1, 3, SPLIT_TOKENS])
def test_division_of_positions_changes_no_bit(options, n_new):
    """Long past, few tokens: alone, by many threads, and without room for the results of blocks."""
    depth, results = 900, []
    for more in ({"portions": None}, {"portions": 2}, {"portions": 40}, {"n_scratch": 0}, {"portions": 40, "seed": 9}):
        case = Case(**options, **{"seed": 3, **more})
        case.cos, case.sin = Case(**options, seed=3).cos, Case(**options, seed=3).sin
        sequence = case.cache.new_sequence()
        if "n_scratch" in more:
            case.n_scratch = SPLIT_TOKENS * case.n_kv_heads * 64  # the counters alone
        case.forward([(sequence, case.inputs(depth))])
        for seed in (5, 6):  # twice: counters begin anew
            result = case.forward([(sequence, case.inputs(n_new, seed=seed))])
        results.append(result)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("n_new", [5, SPLIT_TOKENS])
def test_division_of_positions_for_several_tiles_changes_no_bit(n_new):
    """Of many heads, a tile has two tokens; the window of the first begins a block before that of a later one."""
    results = []
    for seed in range(12):  # in two parts, divided elsewhere each time
        case = Case(n_heads=71, n_kv_heads=1, head_dim=16, window=200, portions=1 if seed else None, seed=seed)
        sequence = case.cache.new_sequence()
        case.forward([(sequence, case.inputs(965))])
        case.poisoned()
        results.append(case.forward([(sequence, case.inputs(n_new, seed=5))]))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@ONE_TYPE
def test_threads_change_no_bit(kv_type):
    options = {"n_heads": 8, "n_kv_heads": 2, "head_dim": 32, "kv_type": kv_type}
    alone, inputs = Case(**options), Case(**options).inputs(1500)
    sequence = alone.cache.new_sequence()
    first, second = alone.forward([(sequence, inputs)]), alone.forward([(sequence, alone.inputs(2, seed=7))])
    with Executor(4) as executor:
        case = Case(**options, executor=executor)
        sequence = case.cache.new_sequence()
        np.testing.assert_array_equal(case.forward([(sequence, inputs)]), first)
        for _ in range(60):
            np.testing.assert_array_equal(case.forward([(sequence, case.inputs(2, seed=7))]), second)
            sequence.truncate(1500)


SHOW = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from attention_case import Case
digest = hashlib.sha256()
for options in ({"rope_dim": 64}, {"kv_type": "f32", "head_dim": 80, "softcap": 2.0}, {"head_dim": 24, "window": 50},
                {"kv_type": "q8_0"}, {"kv_type": "q4_0", "head_dim": 80}, {"kv_type": "q8_0/q4_0", "window": 50}):
    case = Case(**options)
    inputs = case.inputs(180)
    y = case.forward([(case.cache.new_sequence(), inputs)])
    assert abs(y - case.exact(*inputs)).max() < 5e-3, options
    digest.update(y.tobytes())
print(digest.hexdigest())
"""


def test_other_processors():
    """Narrower registers give the same bits; so does a machine without float16 or fused multiply-add, but for those.

    And one that multiplies pairs of bfloat16, if told not to.
    """
    features = llvmlite.binding.get_host_cpu_features()
    if not (features.get("avx2") and features.get("fma") and features.get("f16c")):
        pytest.skip("the processors that are tried are x86-64, and this one runs code for all of them")

    def run(name: str, features: str) -> str:
        extra = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features} if name else {}
        environment = {**os.environ, **extra, "PYTHONPATH": str(Path(edgelm.__file__).parents[1])}
        command = [sys.executable, "-c", SHOW, str(Path(__file__).parent)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    host = features.flatten().replace("+avx512bf16", "-avx512bf16")
    name = llvmlite.binding.get_host_cpu_name()
    narrow, without_dots = "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2", host.replace("+avx512vnni", "-avx512vnni")
    assert len({run(name, host), run(name, without_dots), run("haswell", narrow)}) == 1
    assert run("", "")
    assert run("nehalem", "+sse4.2")


@pytest.mark.parametrize("options", [{}, {"window": 33, "rope_dim": 64}, {"causal": False}, {"kv_type": "q8_0"},
                                     {"kv_type": "q4_0", "window": 33}], ids=str)
def test_beside_other_sequences(options):
    """A ragged batch: prompts, continuations and single tokens, each as if it were alone."""
    lengths, more = [1, 200, 64, 5, 130, 300], [40, 1, 1, 70, 3, 1]
    alone, together = [], Case(**options)
    sequences = [together.cache.new_sequence() for _ in lengths]
    firsts = [together.inputs(n, seed=10 + i) for i, n in enumerate(lengths)]
    nexts = [together.inputs(n, seed=20 + i) for i, n in enumerate(more)]
    for first, following in zip(firsts, nexts, strict=True):
        case = Case(**options)
        sequence = case.cache.new_sequence()
        alone.append((case.forward([(sequence, first)]), case.forward([(sequence, following)])))
    for step, parts in enumerate((firsts, nexts)):
        y = together.forward(list(zip(sequences, parts, strict=True)))
        np.testing.assert_array_equal(y, np.concatenate([result[step] for result in alone]))


@pytest.mark.parametrize("options", [{}, {"window": 70, "rope_dim": 64}, {"causal": False}, {"kv_type": "q8_0"}],
                         ids=str)
def test_of_tokens_that_want_an_output(options):
    """Queries and results of some tokens alone, keys and values of all of them."""
    for wanted in ([299], [0, 1, 2, 299], range(310), [5, 130, 131, 132, 300, 309], range(20, 307, 7)):
        results = []
        for outputs in (None, np.array(wanted)):
            case = Case(**options)
            sequences = [case.cache.new_sequence() for _ in range(2)]
            case.forward([(sequences[1], case.inputs(400, seed=3))])
            parts = list(zip(sequences, (case.inputs(300), case.inputs(10, seed=4)), strict=True))
            results.append(case.forward(parts, outputs=outputs))
        np.testing.assert_array_equal(results[1], results[0][wanted])


def test_batch_of_single_tokens():
    """More sequences than positions are divided for, and fewer."""
    for count in (2, SPLIT_TOKENS, SPLIT_TOKENS + 1, 20):
        case = Case(head_dim=32)
        sequences = [case.cache.new_sequence() for _ in range(count)]
        firsts = [case.inputs(1 + 37 * i, seed=i) for i in range(count)]
        case.forward(list(zip(sequences, firsts, strict=True)))
        last = [case.inputs(1, seed=100 + i) for i in range(count)]
        y = case.forward(list(zip(sequences, last, strict=True)))
        for i, (first, new) in enumerate(zip(firsts, last, strict=True)):
            want = case.exact(*(np.concatenate(pair) for pair in zip(first, new, strict=True)))[-1]
            np.testing.assert_allclose(y[i], want, atol=case.tolerance)


@ANY_TYPE
@pytest.mark.parametrize("n", [1, 6, 65, 150])
def test_what_pages_held_before_does_not_leak(kv_type, n):
    """Pages full of NaN, as recycled ones may be: nothing beyond the last position counts."""
    for causal in (True, False):
        case = Case(kv_type=kv_type, causal=causal, v_head_dim=24)
        sequence = case.cache.new_sequence()
        sequence.reserve(2 * N_CTX)  # make pages, give them back
        sequence.truncate(0)
        case.poisoned()
        inputs = case.inputs(n)
        y = case.forward([(sequence, inputs)])
        np.testing.assert_allclose(y, case.exact(*inputs), atol=case.tolerance)
        one = case.inputs(1, seed=8)
        y = case.forward([(sequence, one)])
        both = tuple(np.concatenate(pair) for pair in zip(inputs, one, strict=True))
        np.testing.assert_allclose(y[0], case.exact(*both)[-1], atol=case.tolerance)


@ANY_TYPE
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_a_number_stays_in_its_sequence(kv_type, which, value):
    """A broken sequence in a batch does not spoil the others, nor the future the past."""
    case = Case(kv_type=kv_type)
    good, bad = case.inputs(90), case.inputs(90, seed=2)
    bad[which][60:] = value
    a, b = case.cache.new_sequence(), case.cache.new_sequence()
    y = case.forward([(a, good), (b, bad)])
    np.testing.assert_allclose(y[:90], case.exact(*good), atol=case.tolerance)
    np.testing.assert_allclose(y[90:150], case.exact(*cut(bad, 0, 60)), atol=case.tolerance)
    if np.isnan(value):
        assert np.isnan(y[150:]).all()


@ONE_TYPE
@pytest.mark.parametrize("broken", [127, 130, 255])
@pytest.mark.parametrize("portions", [None, 40])
def test_not_a_number_stays_where_blocks_are_merged(kv_type, broken, portions):
    """One key among many, also the last of its block, and however the blocks are divided: who sees it, says so."""
    case = Case(kv_type=kv_type, portions=portions)
    sequence, inputs = case.cache.new_sequence(), case.inputs(300)
    inputs[1][broken] = np.nan
    y = case.forward([(sequence, inputs)])
    np.testing.assert_allclose(y[:broken], case.exact(*cut(inputs, 0, broken)), atol=case.tolerance)
    assert np.isnan(y[broken:]).all()
    assert np.isnan(case.forward([(sequence, case.inputs(1, seed=8))])).all()


@ANY_TYPE
@pytest.mark.parametrize("head_dim", [23, 24, 32])
def test_stored_as_the_cache_reads(kv_type, head_dim):
    """What store_kv writes is what Sequence.write does, to the bit, and only that is written."""
    case = Case(kv_type=kv_type, head_dim=head_dim, v_head_dim=40 + head_dim % 2, rope_dim=0)
    sequence, inputs = case.cache.new_sequence(), case.inputs(200)
    for x in inputs[1:]:  # outliers, nothing, next to nothing, and what no float16 holds
        x[::7, ::5] *= 300
        x[20:30] = 0
        x[30:40] *= 1e-9
        x[40:50, 7:11] = -0.0
        x[50:60] *= 1e-4
        x[60:62] *= 1e-40
    case.forward([(sequence, inputs)], layer=1)
    keys, values = sequence.read(1, 200)
    np.testing.assert_array_equal(keys, case.rounded(inputs[1].reshape(keys.shape), keys=True))
    np.testing.assert_array_equal(values, case.rounded(inputs[2].reshape(values.shape), keys=False))
    for layer in (0, 2, 3):
        assert not sequence.read(layer, 200)[0].any()
        assert not sequence.read(layer, 200)[1].any()


@ANY_TYPE
def test_saved_bytes_hold_nothing_of_other_sequences(kv_type):
    """Kernels write whole vectors, what follows the last value in its buffer too: none of that is saved."""
    saved = []
    for seed in (5, 6):
        case = Case(kv_type=kv_type, v_head_dim=20)
        a, b = case.cache.new_sequence(), case.cache.new_sequence()
        case.forward([(a, case.inputs(PAGE)), (b, case.inputs(30, seed=seed))])
        saved.append(a.to_bytes())
    assert saved[0] == saved[1]


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_faint_weights(kv_type):
    """Scores so far apart that weights vanish, values of very different sizes: what counts is kept."""
    case = Case(kv_type=kv_type, head_dim=32)
    sequence, (q, k, v) = case.cache.new_sequence(), case.inputs(300)
    v = v * np.logspace(-3, 3, 300, dtype=np.float32)[:, None]
    for factor in (0, 1, 30, 1000):
        sequence.truncate(0)
        y, want = case.forward([(sequence, (q * factor, k, v))]), case.exact(q * factor, k, v)
        y, want = (x.reshape(300, case.n_heads, -1) for x in (y, want))
        error = abs(y - want).max(axis=2) / abs(want).max(axis=2)
        assert np.median(error) < 1e-4
        assert error.max() < 4e-4 * max(factor, 1)  # queries have 15 bits: the error of a score grows with it


def test_forks_and_truncation():
    case = Case()
    trunk, inputs = case.cache.new_sequence(), case.inputs(100)
    case.forward([(trunk, inputs)])
    fork = trunk.fork()
    left, right = case.inputs(50, seed=2), case.inputs(50, seed=3)
    case.forward([(trunk, left), (fork, right)])
    trunk.truncate(110)
    last = case.inputs(1, seed=4)
    y = case.forward([(trunk, last), (fork, last)])
    for i, middle in enumerate((cut(left, 0, 10), right)):
        whole = tuple(np.concatenate(three) for three in zip(inputs, middle, last, strict=True))
        np.testing.assert_allclose(y[i], case.exact(*whole)[-1], atol=case.tolerance)


def test_windowed_pages_are_given_back():
    case = Case(window=70)
    sequence, inputs = case.cache.new_sequence(), case.inputs(700)
    y = in_chunks_of(case, sequence, inputs, 50)
    assert np.count_nonzero(sequence.table(1)) <= 70 // PAGE + 2
    np.testing.assert_allclose(y, case.exact(*inputs), atol=case.tolerance)


def in_chunks_of(case: Case, sequence: object, inputs: tuple[np.ndarray, ...], size: int) -> np.ndarray:
    return np.concatenate([
        case.forward([(sequence, cut(inputs, at, at + size))]) for at in range(0, len(inputs[0]), size)
    ])


def test_refusals():
    group = Case(head_dim=64, window=8).cache.layouts[1].group
    options = {"scale": 1.0, "scratch_off": 0, "n_scratch": 0}
    with pytest.raises(UnsupportedError, match="window"):
        row_attention(GroupLayout(group, "f16"), 0, 0, 6, 0, 0, 0, 0, causal=False, **options)
    huge = Case(head_dim=16).cache.layouts[1].group.__class__((0,), 1, 2048, 64, 0)
    with pytest.raises(UnsupportedError, match="2048"):
        row_attention(GroupLayout(huge, "f16"), 0, 0, 6, 0, 0, 0, 0, **options)
