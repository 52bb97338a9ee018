"""Every tiny model, by every interpreter: against `transformers`, and against itself cut into batches in other ways."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_vocabulary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from edgelm import gguf
from edgelm.arch import ARCHS, Config, tensors
from edgelm.cache import Batch
from edgelm.errors import ContextFull, UsageError
from edgelm.formats import QTensor, by_name
from edgelm.models import model_of
from edgelm.reference import Reference
from edgelm.tokenizer import Tokenizer
from edgelm.weights import Weights

GOLDEN = Path(__file__).parent / "golden"


def model(name: str) -> tuple[Config, Weights]:
    """A tiny model in float32, without a file in between."""
    hf = tiny.hf_config(name)
    config = Config.from_hf(hf)
    f32 = by_name("F32")
    named = {key: QTensor.from_array(key, array, f32) for key, (_, array) in tiny.arrays(name, config, hf).items()}
    return config, Weights.from_gguf(config, named)


def reference(config: Config, weights: Weights, n_ctx: int, **options: Any) -> Reference:
    return Reference(model_of(config), config, weights, n_ctx=n_ctx, **options)


def program(config: Config, weights: Weights, n_ctx: int) -> Any:
    from edgelm.program import Program

    return Program(model_of(config), config, weights, n_ctx=n_ctx, n_threads=2, max_tokens=24)


RUNNERS: dict[str, Callable[..., Any]] = {"reference": reference, "program": program}
Make = Callable[..., Any]


@pytest.fixture(params=RUNNERS)
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Each interpreter: make(config, weights, n_ctx) -> runner; its threads end with the test."""
    made: list[Any] = []

    def make_one(config: Config, weights: Weights, n_ctx: int) -> Any:
        made.append(RUNNERS[request.param](config, weights, n_ctx))
        return made[-1]

    yield make_one
    for runner in made:
        if hasattr(runner, "close"):
            runner.close()


def same(runner: Any, ours: Any, theirs: Any) -> bool:
    """Bit for bit in the program, whose sums have one order; to rounding in the reference, where NumPy chooses it."""
    if not isinstance(runner, Reference):
        return np.array_equal(ours, theirs)
    return np.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(np.abs(theirs).max()))


def nmse(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    return float(np.sum((ours - theirs) ** 2) / np.sum(theirs**2))


def run(runner: Any, tokens: NDArray[np.int32], cuts: tuple[int, ...] = (), cache: Any = None) -> NDArray[np.float32]:
    """All outputs of a text, given to the runner in pieces that end at `cuts`."""
    sequence = (cache or runner.new_cache("f32")).new_sequence()
    pieces = np.split(tokens, sorted(cuts))
    return np.concatenate([runner.forward(Batch.of([(sequence, piece, "all")])) for piece in pieces if len(piece)])


def test_every_architecture_has_a_tiny_model() -> None:
    assert {variant.arch for variant in tiny.VARIANTS.values()} == set(ARCHS)


@pytest.mark.parametrize("name", tiny.ALL)
def test_gives_what_transformers_gives(name: str, make: Make) -> None:
    config, weights = model(name)
    with np.load(GOLDEN / f"{name}.npz") as file:
        tokens, positions, outputs = file["tokens"], file["positions"], file["outputs"]
    r = make(config, weights, tiny.VARIANTS[name].n_ctx)
    assert nmse(run(r, tokens)[positions], outputs) < 2e-12
    if config.causal:
        stepwise = run(r, tokens, (20, *range(33, 40)))
        assert nmse(stepwise[positions], outputs) < 2e-12


CAUSAL = tuple(name for name in tiny.ALL if ARCHS[tiny.VARIANTS[name].arch].family == "decoder")


@pytest.mark.parametrize("name", CAUSAL)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_however_a_text_is_cut(name: str, make: Make, data: st.DataObject) -> None:
    config, weights = model(name)
    r = make(config, weights, 64)
    n = data.draw(st.integers(2, 64), "tokens")
    tokens = np.array(data.draw(st.lists(st.integers(0, config.vocab_size - 1), min_size=n, max_size=n)), np.int32)
    cuts = data.draw(st.lists(st.integers(1, n - 1), max_size=4).map(tuple), "cuts")
    whole = run(r, tokens)
    assert same(r, run(r, tokens, cuts), whole)
    assert same(r, run(r, tokens, tuple(range(1, n))), whole)


@pytest.mark.parametrize("name", tiny.ALL)
def test_beside_other_texts(name: str, make: Make) -> None:
    config, weights = model(name)
    r = make(config, weights, 64)
    texts = [np.arange(n, dtype=np.int32) * 37 % config.vocab_size for n in (3, 40, 1, 17)]
    alone = [run(r, text) for text in texts]
    cache = r.new_cache("f32")
    together = r.forward(Batch.of([(cache.new_sequence(), text, "all") for text in texts]))
    assert same(r, together, np.concatenate(alone))
    last = r.forward(Batch.of([(cache.new_sequence(), text, "last") for text in texts]))
    assert same(r, last, [out[-1] for out in alone])


def test_sequences_grow_and_fork(make: Make) -> None:
    config, weights = model("gemma3")
    r = make(config, weights, 64)
    tokens = np.arange(30, dtype=np.int32)
    sequence = r.new_cache("f32").new_sequence()
    assert r.forward(Batch.of([(sequence, tokens[:20], "none")])).shape == (0, config.vocab_size)
    assert sequence.length == 20
    twin = sequence.fork()
    one = r.forward(Batch.of([(sequence, tokens[20:], "last")]))
    other = r.forward(Batch.of([(twin, tokens[20:], "last")]))
    assert np.array_equal(one, other)
    twin.truncate(12)
    again = r.forward(Batch.of([(twin, tokens[12:], "last")]))
    assert same(r, one, again)


def test_refuses_what_it_cannot_index(make: Make) -> None:
    config, weights = model("gpt2")
    r = make(config, weights, 1000)  # more than its table of 128 positions
    sequence = r.new_cache("f32").new_sequence()
    for token in (-1, config.vocab_size):
        with pytest.raises(UsageError, match="vocabulary"):
            r.forward(Batch.of([(sequence, [0, token], "last")]))
    with pytest.raises(ContextFull) as caught:
        r.forward(Batch.of([(sequence, [0] * 129, "last")]))
    assert (caught.value.n_tokens, caught.value.n_ctx) == (129, 128)
    assert sequence.length == 0
    r.forward(Batch.of([(sequence, [0] * 128, "last")]))
    with pytest.raises(ContextFull):
        r.forward(Batch.of([(sequence, [0], "last")]))
    other = Reference(model_of(config), *model("llama-mqa")).new_cache().new_sequence()
    with pytest.raises(UsageError, match="another model"):
        r.forward(Batch.of([(other, [0], "last")]))


def test_hidden_states_are_what_logits_are_made_of() -> None:
    config, weights = model("qwen3")
    tokens = np.arange(9, dtype=np.int32)
    hidden = run(reference(config, weights, 64, head="hidden"), tokens)
    assert hidden.shape == (9, config.dim)
    logits = hidden @ weights.output.weight.dequantize().T
    assert np.allclose(logits, run(reference(config, weights, 64), tokens), rtol=1e-5, atol=1e-5)


def test_float64_differs_by_rounding_only() -> None:
    config, weights = model("gemma2")
    tokens = np.arange(40, dtype=np.int32)
    single, double = (run(reference(config, weights, 64, dtype=d), tokens) for d in (np.float32, np.float64))
    assert 0 < nmse(single, double) < 1e-12


def test_weights_need_not_be_kept() -> None:
    config, weights = model("llama-gqa")
    tokens = np.arange(9, dtype=np.int32)
    kept, not_kept = (run(reference(config, weights, 64, max_weight_bytes=n), tokens) for n in (1 << 30, 0))
    assert np.array_equal(kept, not_kept)


def test_a_scale_beside_a_weight_multiplies_it() -> None:
    config, plain = model("llama-bias")
    name, f32 = "blk.1.ffn_up", by_name("F32")
    doubled, halved = dict(plain.by_name), dict(plain.by_name)
    doubled[f"{name}.scale"] = QTensor.from_array(f"{name}.scale", np.array([2.0]), f32)
    halved[f"{name}.weight"] = QTensor.from_array(
        f"{name}.weight", plain.by_name[f"{name}.weight"].dequantize() * 2, f32
    )
    tokens = np.arange(9, dtype=np.int32)
    one, other = (run(reference(config, Weights.from_gguf(config, w), 64), tokens) for w in (doubled, halved))
    assert np.allclose(one, other, rtol=1e-5, atol=1e-5)
    assert not np.allclose(one, run(reference(config, plain, 64), tokens), atol=1e-2)


FORMATS = """
    F16 BF16 F64 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K
    IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4 NVFP4 Q1_0
"""


def both(path: Path) -> tuple[float, bool]:
    """Of a file: the error of the program against the reference, and whether it is the same token by token."""
    file = gguf.read(path)
    config = Config.from_gguf(file.metadata)
    weights = Weights.from_gguf(config, file.tensors)
    tokens = np.arange(40, dtype=np.int32) * 37 % config.vocab_size
    p = program(config, weights, 64)
    try:
        ours = run(p, tokens)
        same = not config.causal or np.array_equal(ours, run(p, tokens, tuple(range(1, 40))))
        return nmse(ours, run(reference(config, weights, 64), tokens)), same
    finally:
        p.close()


@pytest.mark.parametrize("fmt", FORMATS.split())
def test_every_format(fmt: str, tmp_path: Path) -> None:
    """Activations become int8 where weights are integers, and int16 where they are short floats, with these weights, on
    some machines: that is all that separates the two interpreters."""
    error, same = both(tiny.tiny("gemma3", fmt=fmt, folder=tmp_path))
    assert error < {"F64": 1e-12, "F16": 1e-6, "BF16": 1e-6}.get(fmt, 2e-3)
    assert same


@pytest.mark.parametrize("name", tiny.ALL)
def test_every_architecture_quantized(name: str, tmp_path: Path) -> None:
    error, same = both(tiny.tiny(name, fmt="Q4_0", folder=tmp_path))
    assert error < 2e-3
    assert same


def test_minilm_embeds_as_transformers_does(minilm_path: Path) -> None:
    hf = json.loads((minilm_path / "config.json").read_text())
    config = Config.from_hf(hf)
    checkpoint = load_file(minilm_path / "model.safetensors")
    f32 = by_name("F32")
    named = {
        spec.gguf: QTensor.from_array(spec.gguf, spec.from_hf(checkpoint.pop(spec.hf), config), f32)
        for spec in tensors(config)
        if spec.hf in checkpoint
    }
    assert all(any(fnmatch.fnmatch(key, p) for p in config.spec.hf_ignored) for key in checkpoint)
    r = reference(config, Weights.from_gguf(config, named), 512)
    with np.load(GOLDEN / "minilm.npz") as file:
        for tokens, embedding in zip(file["tokens"], file["embeddings"], strict=True):
            mean = run(r, tokens[tokens >= 0]).mean(0)
            assert config.pooling == "mean"
            assert nmse(mean / np.linalg.norm(mean), embedding) < 1e-11


PARIS = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]  # in the model's own template


def test_smollm2_knows_the_capital_of_france(smollm2_path: Path) -> None:
    file = gguf.read(smollm2_path)
    config = Config.from_gguf(file.metadata)
    r = reference(config, Weights.from_gguf(config, file.tensors), 64)
    sequence, tokens, answer = r.new_cache().new_sequence(), PARIS, []
    while len(answer) < 8:
        tokens = [int(r.forward(Batch.of([(sequence, tokens, "last")]))[0].argmax())]
        answer.append(file.metadata["tokenizer.ggml.tokens"][tokens[0]])
    assert answer == ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis", "ĠParis", ".", "<|im_end|>"]


# llama-perplexity -c 64 --chunks 3 -fa off, the same weights and cache in F32. Its GELU is a table of float16.
PERPLEXITY = {"smollm2_path": (57.1268, 1e-5), "gemma3_path": (53.5466, 1e-4)}


@pytest.mark.model
@pytest.mark.parametrize("fixture", PERPLEXITY)
def test_perplexity_is_that_of_llama_cpp(fixture: str, request: pytest.FixtureRequest) -> None:
    file = gguf.read(request.getfixturevalue(fixture))
    config, tokenizer = Config.from_gguf(file.metadata), Tokenizer.from_gguf(file.metadata)
    r = reference(config, Weights.from_gguf(config, file.tensors), 64)
    tokens = tokenizer.encode((GOLDEN / "prose.txt").read_text())
    expected, tolerance = PERPLEXITY[fixture]
    assert math.exp(loss(r, tokenizer, tokens, 3)) == pytest.approx(expected, rel=tolerance)


LLAMA_CPP = json.loads((GOLDEN / "llama_cpp.json").read_text())


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_a_file_means_what_it_means_to_llama_cpp(name: str, make: Make, tmp_path: Path) -> None:
    """transformers never sees our keys and tensors as they are in files; llama.cpp sees nothing else."""
    file = gguf.read(tiny.tiny(name, folder=tmp_path))
    config, tokenizer = Config.from_gguf(file.metadata), Tokenizer.from_gguf(file.metadata)
    r = make(config, Weights.from_gguf(config, file.tensors), 256)
    tokens = tokenizer.encode((tiny_vocabulary.TEXT + " ") * 4)
    assert loss(r, tokenizer, tokens, 2) == pytest.approx(math.log(LLAMA_CPP[name]), abs=1e-4)


def loss(runner: Any, tokenizer: Tokenizer, tokens: list[int], n_chunks: int) -> float:
    """Mean negative log likelihood of the second half of each chunk of 64 tokens, as llama-perplexity has it."""
    losses = []
    for chunk in np.array(tokens[: n_chunks * 64]).reshape(n_chunks, 64):
        if tokenizer.add_bos:
            chunk[0] = tokenizer.bos_id
        logits = run(runner, chunk)[32:63].astype(np.float64)
        losses.append(np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1))
        losses[-1] -= logits[np.arange(31), chunk[33:]]
    return float(np.mean(losses))
