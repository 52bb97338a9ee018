"""Programs against the reference interpreter, and against themselves: however a text is cut, the bits are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_threads import in_threads
from numpy.typing import NDArray
from tiny import ALL, VARIANTS, tiny

import edgelm
from edgelm import gguf
from edgelm.arch import ARCHS, Config
from edgelm.cache import Batch, Sequence
from edgelm.errors import ContextFull, UsageError
from edgelm.formats import by_name
from edgelm.kernels import matrix_unit
from edgelm.kernels.abi import Env, Row
from edgelm.kernels.attention import usual_kv_type
from edgelm.kernels.matrix_unit import LEAST
from edgelm.kernels.records import MAX_TOKENS
from edgelm.models import model_of
from edgelm.program import Program
from edgelm.reference import Reference
from edgelm.tokenizer import Tokenizer
from edgelm.weights import Weights

DECODERS = [name for name in ALL if ARCHS[VARIANTS[name].arch].family == "decoder"]
HANGS = 600  # seconds: no limit of speed
Make = Callable[..., Program]
PROSE = (
    "The lighthouse keeper wrote down the weather every evening: the wind, the height of the waves, and the ships that "
    "passed. When the fog came in, he rang the bell until it lifted. One night a boat answered from very near."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def make(folder: Path) -> Iterator[Make]:
    """Makes programs of tiny models: make(variant, fmt, **options); `runner=Reference` for the other interpreter."""
    made: list[Program] = []

    def make(name: str, fmt: str = "F32", runner: type = Program, **options: object) -> Program:
        path = folder / f"{name}-{fmt}.gguf"
        if not path.exists():
            tiny(name, fmt=fmt, folder=folder).rename(path)
        file = gguf.read(path)
        config = Config.from_gguf(file.metadata)
        weights = Weights.from_gguf(config, file.tensors)
        program = runner(model_of(config), config, weights, **{"n_ctx": VARIANTS[name].n_ctx, **options})
        if runner is Program:
            made.append(program)
        return program

    yield make
    for program in made:
        program.close()


def text(program: Program, n: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, program.config.vocab_size, n).astype(np.int32)


def run(program: Program, tokens: NDArray[np.int32], sequence: Sequence | None = None) -> NDArray[np.float32]:
    """All outputs of a text computed at once."""
    return program.forward(Batch.of([(sequence or program.new_cache().new_sequence(), tokens, "all")]))


def nmse(value: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    return float(np.mean((value - truth) ** 2) / np.mean(truth**2))


def test_batch_invariant_models_do_without_a_matrix_unit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there is one is asked here of nobody."""
    path = tiny("llama-gqa", folder=folder)
    monkeypatch.setattr("edgelm.environment.permitted", lambda: True)
    for settings, least in (({}, LEAST), ({"batch_invariant": False}, LEAST), ({"batch_invariant": True}, 0)):
        with edgelm.load(path, interpreter="program", **settings) as model:
            runners: list[Any] = [model.runner, model.hidden_runner]
            for runner in runners:
                assert runner._environment._fields[:, Env.TILES].tolist() == [least, least]


# --- against the reference ---

@pytest.mark.parametrize("name", ALL)
def test_float_weights_agree_with_the_reference(make: Make, name: str) -> None:
    program, reference = make(name, n_threads=2), make(name, runner=Reference)
    tokens = text(program, 60)
    got = run(program, tokens, program.new_cache("f32").new_sequence())
    expected = run(reference, tokens, reference.new_cache("f32").new_sequence())
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("fmt", ["Q4_0", "Q8_0"])
def test_quantized_weights_agree_with_the_reference(make: Make, name: str, fmt: str) -> None:
    """What remains is the rounding of activations to eight bits."""
    program, reference = make(name, fmt, n_threads=2), make(name, fmt, runner=Reference)
    tokens = text(program, 40)
    assert nmse(run(program, tokens), run(reference, tokens)) < 1e-3


def test_beside_coarse_weights_activations_are_rounded_less(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(make("llama-gqa", "Q8_0", runner=Reference), text(make("llama-gqa", "Q8_0"), 100))
    errors = []
    for coarse in (False, True):
        monkeypatch.setattr(by_name("Q8_0"), "coarse", coarse)
        program = make("llama-gqa", "Q8_0", matrix_unit=False)
        errors.append(nmse(run(program, text(program, 100)), expected))
    assert errors[1] < 0.9 * errors[0]


def test_hidden_states(make: Make) -> None:
    for name in ("llama-gqa", "gemma2"):
        program, reference = make(name, head="hidden"), make(name, runner=Reference, head="hidden")
        tokens = text(program, 20)
        got = run(program, tokens, program.new_cache("f32").new_sequence())
        assert got.shape == (20, program.config.dim)
        np.testing.assert_allclose(got, run(reference, tokens), atol=1e-4)


# --- against themselves, bit for bit ---

@pytest.fixture
def exact(make: Make) -> Make:
    """Makes programs whose results do not depend on how many tokens are computed at once."""
    return partial(make, matrix_unit=False)


def chunks(n: int, sizes: list[int]) -> list[tuple[int, int]]:
    """[0, n) cut into pieces of these sizes, again and again."""
    cuts, at, i = [], 0, 0
    while at < n:
        cuts.append((at, min(n, at + sizes[i % len(sizes)])))
        at, i = cuts[-1][1], i + 1
    return cuts


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("fmt", ["F32", "Q4_0"])
def test_cutting_a_text_changes_no_bit(exact: Make, name: str, fmt: str) -> None:
    n = 62
    once = exact(name, fmt, n_threads=1)
    tokens = text(once, n)
    expected = run(once, tokens)
    for n_threads in (1, 2, 3):
        program = exact(name, fmt, n_threads=n_threads)
        for sizes in ([n], [1], [7], [3, 20, 1, 9], [33]):
            sequence = program.new_cache().new_sequence()
            parts = [run(program, tokens[a:b], sequence) for a, b in chunks(n, sizes)]
            assert np.array_equal(np.concatenate(parts), expected), (n_threads, sizes)


@pytest.mark.parametrize("name", ALL)
def test_other_sequences_change_no_bit(exact: Make, name: str) -> None:
    """A text beside others, cut into runs of few tokens, in another order, and with some outputs only."""
    program, small = exact(name, "Q4_0", n_threads=2), exact(name, "Q4_0", n_threads=2, max_tokens=16)
    texts = [text(program, n, seed=n) for n in (23, 1, 40, 5, 60)]
    expected = [run(program, t) for t in texts]
    for runner in (program, small):
        cache = runner.new_cache()
        together = runner.forward(Batch.of([(cache.new_sequence(), t, "all") for t in texts]))
        assert np.array_equal(together, np.concatenate(expected))
        order = [3, 0, 4, 2, 1]
        wanted = ["last", "none", "all", "last", "none"]
        some = runner.forward(
            Batch.of([(cache.new_sequence(), texts[i], w) for i, w in zip(order, wanted, strict=True)])
        )
        assert np.array_equal(some, np.concatenate([expected[3][-1:], expected[4], expected[2][-1:]]))


def test_a_run_of_as_many_tokens_as_there_are_sequences(exact: Make) -> None:
    """Two tokens that see each other, in a run of their own, beside a text that has no room in it."""
    program = exact("bert-mean", "Q4_0", head="hidden", max_tokens=1)  # as many as the context has
    assert program.max_tokens == program.n_ctx
    texts = [text(program, n, seed=n) for n in (2, program.n_ctx)]
    expected = [run(program, t) for t in texts]
    cache = program.new_cache()
    together = program.forward(Batch.of([(cache.new_sequence(), t, "all") for t in texts]))
    assert np.array_equal(together, np.concatenate(expected))


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_batched_decoding_changes_no_bit(exact: Make, name: str) -> None:
    """Sequences of different lengths that grow by a token each, all in one batch: as if each were alone."""
    program = exact(name, "Q4_0", n_threads=3)
    texts = [text(program, n, seed=n) for n in (50, 31, 64)]
    expected = [run(program, t) for t in texts]
    cache = program.new_cache()
    sequences = [cache.new_sequence() for _ in texts]
    at = [n - 20 for n in map(len, texts)]
    program.forward(Batch.of([(s, t[:n], "none") for s, t, n in zip(sequences, texts, at, strict=True)]))
    for step in range(20):
        parts = [(s, t[n + step : n + step + 1], "all") for s, t, n in zip(sequences, texts, at, strict=True)]
        out = program.forward(Batch.of(parts))
        for row, logits, n in zip(out, expected, at, strict=True):
            assert np.array_equal(row, logits[n + step])


@pytest.mark.parametrize("kv_type", ["bf16", "f16", "f32", "q8_0", "q4_0", "q8_0/f16"])
def test_going_back_and_forking_change_no_bit(exact: Make, kv_type: str) -> None:
    program = exact("gemma3", "Q4_0")
    tokens, cache = text(program, 100), program.new_cache(kv_type)
    expected = run(program, tokens, cache.new_sequence())
    sequence = cache.new_sequence()
    run(program, tokens[:90], sequence)
    fork = sequence.fork()
    sequence.truncate(70)
    assert np.array_equal(run(program, tokens[70:], sequence), expected[70:])
    assert np.array_equal(run(program, tokens[90:], fork), expected[90:])


@pytest.mark.parametrize(("fmt", "by_unit"), [("Q4_0", True), ("Q4_0", False), ("F32", True)])
def test_many_tokens_are_a_unit_of_work_only_where_the_matrix_unit_does_it(
    make: Make, fmt: str, by_unit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere they are no more than caches hold; matrices of float32 never go through it."""
    monkeypatch.setattr(matrix_unit, "permitted", lambda: True)
    program = make("llama-gqa", fmt, matrix_unit=by_unit)
    [plan] = program._plans.values()
    products = plan.table[plan.table[:, Row.READS] != 0]
    wanted = {MAX_TOKENS, MAX_TOKENS // 2} if fmt == "Q4_0" and by_unit else {120}
    assert len(products) > 5 and set(products[:, Row.UNITS_PER].tolist()) == wanted


@pytest.mark.parametrize("name", DECODERS)
def test_pieces_that_all_go_through_a_matrix_unit_change_no_bit(make: Make, name: str) -> None:
    """Nor does what stands beside them, if there are enough tokens; where there is no such unit, nothing does."""
    program = make(name, "Q4_0", n_threads=2)
    tokens, other = text(program, 3 * LEAST + 1), text(program, LEAST - 1, seed=1)
    if program.n_ctx < len(tokens):
        tokens = tokens[: program.n_ctx]
    expected, cache = run(program, tokens), program.new_cache()
    first, rest = cache.new_sequence(), tokens[LEAST:]
    parts = [run(program, tokens[:LEAST], first)]
    together = [(cache.new_sequence(), other, "none"), (first, rest, "all")]
    parts.append(program.forward(Batch.of(together)))
    assert np.array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("name", ALL)
def test_the_last_layer_has_queries_of_wanted_outputs_alone(make: Make, name: str) -> None:
    program = make(name, "Q4_0")
    (plan,) = program._plans.values()
    counts = [row[Row.COUNT] for step, row in zip(plan.steps, plan.table, strict=True) if step.name == "attention"]
    assert counts == [Env.N_TOKENS] * (program.config.n_layers - 1) + [Env.N_OUTPUTS]


# --- the rest of the contract ---

def test_several_threads_may_call(make: Make) -> None:
    program = make("llama-gqa", "Q4_0", n_threads=2)
    texts = [text(program, 30, seed=i) for i in range(4)]
    expected = [run(program, t) for t in texts]

    def work(i: int) -> None:
        for _ in range(5):
            sequence = program.new_cache().new_sequence()
            parts = [run(program, texts[i][a:b], sequence) for a, b in chunks(30, [11, 1])]
            np.testing.assert_array_equal(np.concatenate(parts), expected[i])

    in_threads(work, 4)


def test_results_are_the_callers(make: Make) -> None:
    program = make("llama-gqa")
    tokens = text(program, 8)
    first = run(program, tokens)
    kept = first.copy()
    run(program, tokens[::-1].copy())
    assert np.array_equal(first, kept)


def test_batches_that_make_no_sense_are_refused(make: Make) -> None:
    program = make("llama-gqa")
    sequence = program.new_cache().new_sequence()
    for bad in (-1, program.config.vocab_size):
        with pytest.raises(UsageError, match="vocabulary"):
            run(program, np.array([1, bad], np.int32), sequence)
        with pytest.raises(UsageError, match="vocabulary"):
            run(program, np.array([bad], np.int32), sequence)
    run(program, text(program, 128), sequence)
    with pytest.raises(ContextFull):
        run(program, text(program, 1), sequence)
    with pytest.raises(ContextFull):
        run(program, text(program, 129))
    assert sequence.length == 128
    other = make("gemma3").new_cache().new_sequence()
    with pytest.raises(UsageError, match="another model"):
        run(program, text(program, 1), other)
    mixed = [(program.new_cache(kv).new_sequence(), text(program, 2), "all") for kv in ("f16", "f32")]
    with pytest.raises(UsageError, match="same kind"):
        program.forward(Batch.of(mixed))


def test_a_batch_of_the_past_is_refused(make: Make) -> None:
    """Its positions are not the next ones any more: kernels would write where no page is."""
    program = make("llama-gqa")
    sequence = program.new_cache().new_sequence()
    stale = Batch.of([(sequence, text(program, 3), "last")])
    program.forward(stale)
    with pytest.raises(UsageError, match="has changed"):
        program.forward(stale)
    assert sequence.length == 3


def test_a_program_of_the_same_weights_packs_none(make: Make, folder: Path) -> None:
    program = make("llama-gqa")
    weights = Weights.from_gguf(program.config, gguf.read(folder / "llama-gqa-F32.gguf").tensors)
    first = Program(model_of(program.config), program.config, weights, n_ctx=64)
    other = Program(model_of(program.config), program.config, weights, head="hidden", n_ctx=64, shared=first)
    ours, theirs = other._resources.packed, first._resources.packed
    assert ours and all(ours[matrix] is packed for matrix, packed in theirs.items() if matrix in ours)
    assert run(other, text(other, 4)).shape == (4, program.config.dim)
    first.close()
    other.close()


def test_weights_are_packed_once(make: Make) -> None:
    """llama-mqa has tied embeddings: one matrix is both the first and the last layer."""
    program = make("llama-mqa")
    packed = program._resources.packed
    assert len({p.address for p in packed.values()}) == len(packed) == 1 + 7 * program.config.n_layers


def test_rows_of_a_layer(make: Make) -> None:
    """What is fused, and where threads must wait for each other."""
    program = make("llama-gqa", "Q4_0", n_threads=1)
    plan = program._plans[usual_kv_type()]
    layer = ["rms_norm", "linear", "linear", "linear", "store_kv", "attention", "quantize", "linear"]
    feed_forward = ["rms_norm", "gated", "quantize", "linear"]
    names = [step.name for step in plan.steps]
    assert names[: 1 + 12] == ["embed", *layer, *feed_forward]
    assert names[-2:] == ["rms_norm", "logits"]


def test_progress_is_told(make: Make) -> None:
    told: list[tuple[str, int, int]] = []
    make("llama-gqa", "Q8_0", progress=lambda *progress: told.append(progress))
    assert told
    for stage in {stage for stage, _, _ in told}:
        done = [(done, total) for s, done, total in told if s == stage]
        assert all(before <= now or before[0] == before[1] for before, now in pairwise(done)), "one after the other"
        assert done[-1][0] == done[-1][1]


FORKED = """
import os, sys, threading, warnings, numpy as np, edgelm
from edgelm.kernels import compiler
warnings.simplefilter("ignore")
model = edgelm.load(sys.argv[1], interpreter=sys.argv[2])
session = model.session(temperature=0, max_tokens=4, ignore_eos=True)
answer = lambda: [response.token for response in session.stream([1, 2, 3])]
expected, answered = model.logits([1, 2, 3]), answer()
session.reset()
held, forked = threading.Event(), threading.Event()
def call():
    with session._busy, session._sequence.cache._lock, model.runner._lock, compiler._lock:
        held.set()
        forked.wait()
thread = threading.Thread(target=call)
thread.start()
held.wait()
child = os.fork()
if child:
    forked.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
else:
    assert np.array_equal(model.logits([1, 2, 3]), expected)
    assert answer() == answered
    if sys.argv[2] == "program":
        del compiler._loaded["walk:spin"]
        assert compiler.address("walk:spin")
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("interpreter", ["program", "reference"])
def test_a_process_that_was_forked_during_a_call_makes_its_own(folder: Path, interpreter: str) -> None:
    """The thread whose call or answer it was, that held the cache, or was compiling, has stayed behind."""
    path = tiny("llama-gqa", folder=folder)
    subprocess.run([sys.executable, "-c", FORKED, str(path), interpreter], check=True, timeout=HANGS)


@pytest.mark.model
def test_real_model_agrees_with_the_reference(smollm2_path: Path) -> None:
    file = gguf.read(smollm2_path)
    config = Config.from_gguf(file.metadata)
    weights = Weights.from_gguf(config, file.tensors)
    program = Program(model_of(config), config, weights, n_ctx=512)
    reference = Reference(model_of(config), config, weights, n_ctx=512)
    tokens = np.array(Tokenizer.from_gguf(file.metadata).encode(PROSE), np.int32)
    got, expected = run(program, tokens), run(reference, tokens)
    assert nmse(got, expected) < 1e-3
    assert (got.argmax(1) == expected.argmax(1)).mean() > 0.9
    exact = Program(model_of(config), config, weights, n_ctx=512, shared=program, matrix_unit=False)
    sequence = exact.new_cache().new_sequence()
    parts = [run(exact, tokens[a:b], sequence) for a, b in chunks(len(tokens), [19, 1, 1])]
    assert np.array_equal(np.concatenate(parts), run(exact, tokens))
    program.close()
    exact.close()
