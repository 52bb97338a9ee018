"""The public names, loading, facts about models, memory, embeddings, and answers of real models."""

from __future__ import annotations

import gc
import importlib.util
import json
import pickle
import subprocess
import sys
import tomllib
import weakref
from pathlib import Path
from typing import Any

import minilm
import numpy as np
import pytest
import tiny

import edgelm
from edgelm import gguf, memory
from edgelm.arch import Config
from edgelm.cache import KVCache
from edgelm.describe import describe
from edgelm.embedding import POOLINGS
from edgelm.errors import ContextFull, FormatError, SourceError, UnsupportedError, UsageError
from edgelm.model import Model

ROOT = Path(__file__).parent.parent
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Path:
    return tiny.tiny("llama-gqa", folder=folder)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Path:
    return tiny.tiny("bert-mean", folder=folder)


def reference(path: Path, **options: Any) -> Model:
    return edgelm.load(path, interpreter="reference", **options)


# ---------------------------------------------------------------------------------------------------------- the package


def test_all_names_are_there_and_no_others() -> None:
    assert len(set(edgelm.__all__)) == len(edgelm.__all__)
    for name in edgelm.__all__:
        assert getattr(edgelm, name) is not None
    assert set(edgelm._HOME) <= set(edgelm.__all__) <= set(dir(edgelm))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = edgelm.lod


def test_the_version_is_that_of_the_project() -> None:
    assert edgelm.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = "import sys, edgelm; print([m for m in sys.modules if m in %r])"
    heavy = ["numpy", "numba", "llvmlite", "tokenizers", "jinja2", "click", "rich", "huggingface_hub"]
    done = subprocess.run([sys.executable, "-c", program % heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arch", ["llama-gqa", "gemma2", "bert-mean"])
def test_the_memory_of_a_model_goes_with_the_last_reference(arch: str, folder: Path) -> None:
    """Nothing that holds weights is in a cycle, which a process may look for late."""
    path = tiny.tiny(arch, folder=folder)
    gc.collect()
    gc.disable()
    try:
        with edgelm.load(path, threads=2) as loaded:
            if not loaded.is_encoder:
                loaded.generate("hello", max_tokens=3, **GREEDY)
            loaded.embed(["hello"])
            runners = (loaded.runner, loaded.hidden_runner)
            held = [weakref.ref(one) for one in (loaded, *runners, *(runner._resources for runner in runners))]
        del loaded, runners
        assert not [one for one in held if one() is not None]
    finally:
        gc.enable()


def test_a_reference_model_loads_no_numba(decoder: Path) -> None:
    """Nor does it look for compiled kernels, which it would have to compile where there are none."""
    program = (
        "import sys, edgelm; model = edgelm.load(sys.argv[1], interpreter='reference')\n"
        "model.generate('the', max_tokens=3, dry_multiplier=1, seed=1)\n"
        "print([m for m in ('numba', 'llvmlite', 'edgelm.kernels.sampling') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(decoder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_start_with_compiled_kernels_loads_nothing_that_makes_code(decoder: Path) -> None:
    program = (
        "import sys, edgelm; from edgelm.kernels import elf; edgelm.load(sys.argv[1]).generate([1], max_tokens=2); "
        "print([m for m in ('numba', 'llvmlite.ir', 'llvmlite.binding') if m in sys.modules], elf.USABLE)"
    )
    for _ in range(2):  # the first one may have to compile
        done = subprocess.run([sys.executable, "-c", program, str(decoder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[] True", "['llvmlite.ir', 'llvmlite.binding'] False")


# -------------------------------------------------------------------------------------------------------------- loading


def test_load(decoder: Path) -> None:
    with reference(decoder) as model:
        assert model.path == decoder and model.name == model.gguf.metadata["general.name"]
        assert (model.n_ctx, model.vocab_size, model.kv_type, model.interpreter) == (128, 512, "f32", "reference")
        assert model.detokenize(model.tokenize("hello world", add_special=False)) == "hello world"
        logits = model.logits("what is the capital")
        assert logits.shape == (len(model.tokenize("what is the capital")), 512) and logits.dtype == np.float32
        text = model.generate("hello", max_tokens=5, **GREEDY)
        assert edgelm.generate(model, "hello", max_tokens=5, **GREEDY) == text
        [response] = edgelm.stream_generate(model, "hello", max_tokens=1, **GREEDY)
        assert isinstance(response, edgelm.Response)
        assert isinstance(model.session(), edgelm.Session) and isinstance(model.tokenizer, edgelm.Tokenizer)


@pytest.mark.parametrize(("options", "message"), [
    ({"interpreter": "magic"}, "interpreter is 'magic'"), ({"ctx_size": -1}, "ctx_size is -1"),
    ({"kv_type": "q3"}, "unknown KV cache type 'q3'"), ({"chat_template": "x"}, "no built-in chat template"),
])  # fmt: skip
def test_arguments_that_cannot_be_meant(decoder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        edgelm.load(decoder, **{"interpreter": "reference", **options})


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no file"):
        edgelm.load(tmp_path / "missing.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(FormatError):
        edgelm.load(tmp_path / "x.gguf")


@pytest.mark.parametrize("interpreter", ["reference", "program"])
@pytest.mark.parametrize("fmt", ["Q4_0", "F32"])
def test_a_weight_that_is_no_number_is_told(
    fmt: str, interpreter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes through all that follows, up to where a token is chosen."""
    arrays = tiny.arrays

    def damaged(*args: Any) -> dict[str, Any]:
        found = arrays(*args)
        found["output_norm.weight"][1][5] = np.nan
        return found

    monkeypatch.setattr(tiny, "arrays", damaged)
    path = tiny.tiny("llama-gqa", fmt=fmt, folder=tmp_path)
    with edgelm.load(path, interpreter=interpreter) as model, pytest.raises(FormatError, match="not a number"):
        model.generate("hello", max_tokens=2, **GREEDY)


def test_a_table_of_positions_bounds_the_context(folder: Path) -> None:
    path = tiny.tiny("gpt2", folder=folder)
    with pytest.raises(UsageError, match="a table of 128 positions"):
        reference(path, ctx_size=200)
    with pytest.warns(UserWarning, match="longer than the 128 that the model was trained on"):
        assert reference(tiny.tiny("llama-gqa", folder=folder), ctx_size=200).n_ctx == 200


def test_without_numba(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find(name))
    assert edgelm.load(decoder).interpreter == "reference"
    with pytest.raises(UnsupportedError, match="pip install numba"):
        edgelm.load(decoder, interpreter="program")


# ----------------------------------------------------------------------------------------------------- facts and memory


def test_describe(folder: Path) -> None:
    path = tiny.tiny("gemma3", fmt="Q4_0", folder=folder)
    facts = describe(path, metadata=True, tensors=True)
    json.dumps(facts)
    assert facts["architecture"] == "gemma3" and facts["type"] == "Q4_0" and facts["types"]["Q4_0"] > 5
    assert facts["n_bytes"] == path.stat().st_size and facts["context_length"] == 128
    n = sum(int(np.prod([int(x) for x in t["shape"].split("x")])) for t in facts["tensors"])
    assert facts["n_parameters"] == n
    assert facts["bits_per_weight"] == pytest.approx(8 * sum(t["n_bytes"] for t in facts["tensors"]) / n)
    assert 4.5 < facts["bits_per_weight"] < 6
    assert facts["sliding_window"] == "9 in 1 of 2 layers" and facts["chat_template"] == "file"
    assert facts["tokenizer"]["model"] == "llama" and facts["tokenizer"]["special"]["bos"] == "2 <bos>"
    assert facts["metadata"]["tokenizer.ggml.tokens"][-1] == "… 512 in all"
    assert describe(path, ctx_size=64, kv_type="f32")["memory"]["context"] == 64


def test_info_of_a_loaded_model(decoder: Path) -> None:
    facts = reference(decoder).info()
    assert facts["interpreter"] == "reference" and facts["transcoded"] == {} and facts["context_window"] == 128
    json.dumps(facts)


def test_describe_a_model_that_cannot_run(folder: Path) -> None:
    path, tensor = folder / "unknown.gguf", tiny.quantized("x", tiny.by_name("F32"), np.zeros((2, 32)))
    tiny.write(path, {"general.architecture": "rwkv9"}, {"x": tensor})
    facts = describe(path)
    assert facts["architecture"] == "rwkv9" and "rwkv9" in facts["not_supported"] and facts["types"] == {"F32": 1}


def test_types_without_kernels_are_said(folder: Path) -> None:
    facts = describe(tiny.tiny("llama-gqa", fmt="F64", folder=folder), tensors=True)
    assert facts["transcoded"] == {"F64 as F32": facts["types"]["F64"]}
    assert facts["memory"]["weights"] < 0.6 * sum(t["n_bytes"] for t in facts["tensors"] if t["type"] == "F64")
    with edgelm.load(facts["path"], interpreter="program") as model:
        assert model.info()["memory"]["weights"] == pytest.approx(model.runner.n_bytes, rel=0.01)
        forms = [form for form in model.runner._resources.packed.values() if form.transcoded_from]
        assert {f"{form.transcoded_from} as {form.format}" for form in forms} == {"F64 as F32"}


def test_memory_counts_the_tokens_that_are_computed_at_once(decoder: Path, encoder: Path) -> None:
    few, more = (
        edgelm.load(decoder, interpreter="reference", max_tokens_per_run=n).memory(100).workspace for n in (16, 64)
    )
    assert more == 4 * few
    config = Config.from_gguf(gguf.read(encoder).metadata)
    short, long = (memory.estimate(config, (), n, "f16").workspace for n in (600, 1800))
    assert long == 3 * short, "in an encoder all see each other"


@pytest.mark.parametrize("kv_type", ["f16", "bf16", "f32", "q8_0", "q4_0/f16"])
@pytest.mark.parametrize("name", ["llama-mha", "llama-mqa", "mistral", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("n_tokens", [1, 64, 65, 1000, 3000])
def test_memory_of_keys_and_values_is_what_a_cache_takes(name: str, kv_type: str, n_tokens: int) -> None:
    """Windows, grouped heads and the real size of a head: what estimates get wrong (-81 % to +682 %)."""
    config = Config.from_hf(tiny.hf_config(name, max_position_embeddings=4096))
    step, cache = 256, KVCache(config.cache_groups(), kv_type)
    sequence, most = cache.new_sequence(), 0
    for at in range(0, n_tokens, step):
        n = min(step, n_tokens - at)
        sequence.reserve(n)
        pages = zip(cache._pools, cache.layouts, strict=True)
        most = max(most, sum(len(pool.counts) * layout.page_bytes for pool, layout in pages))
        sequence.advance(n)
    estimate = memory.kv_bytes(config, n_tokens, kv_type, step)
    slack = 2 * sum(layout.page_bytes for layout in cache.layouts if layout.group.window)  # where pages begin
    assert most <= estimate <= most + slack


def test_bytes_per_token(decoder: Path, folder: Path) -> None:
    model = reference(decoder)
    untied = sum(t.n_bytes for t in model.weights if t.name != "token_embd.weight")
    assert model.bytes_per_token(0) == untied
    assert model.bytes_per_token(100) - untied == 100 * 2 * 2 * (2 * 16 * 4)  # layers, K and V, heads of 16 floats
    tied = reference(tiny.tiny("llama-mqa", folder=folder))
    assert tied.bytes_per_token(0) == sum(t.n_bytes for t in tied.weights)


# ----------------------------------------------------------------------------------------------------------- embeddings


def test_embeddings_of_an_encoder(encoder: Path) -> None:
    model = reference(encoder)
    texts = ["the quick brown fox", "hello", "the capital of france is paris . " * 4]
    states = [model.embed([text], pooling="none", normalize=False) for text in texts]
    for text, state in zip(texts, states, strict=True):
        tokens = model.tokenize(text)
        assert state.shape == (len(tokens), 64) and tokens[0] == model.tokenizer.bos_id
    for pooling, pool in {"mean": lambda s: s.mean(axis=0), "cls": lambda s: s[0], "last": lambda s: s[-1]}.items():
        vectors = model.embed(texts, pooling=pooling, normalize=False)  # together, of three lengths
        np.testing.assert_allclose(vectors, np.stack([pool(s) for s in states]), rtol=2e-5, atol=2e-6)
    unit = model.embed(texts)
    assert unit.dtype == np.float32 and unit.shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    mean = np.stack([s.mean(axis=0) for s in states])
    np.testing.assert_allclose(unit, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)


def test_the_pooling_of_the_file_is_the_default(folder: Path) -> None:
    model = reference(tiny.tiny("bert-cls", folder=folder))
    np.testing.assert_array_equal(model.embed(["the fox"]), model.embed(["the fox"], pooling="cls"))
    assert not np.allclose(model.embed(["the fox"]), model.embed(["the fox"], pooling="mean"))


def test_embeddings_of_a_decoder(decoder: Path) -> None:
    """Hidden states before the head: with the head they give the logits."""
    model = reference(decoder)
    states = model.embed("what is the capital", pooling="none", normalize=False)
    head = model.weights.output.weight.dequantize()
    np.testing.assert_allclose(states @ head.T, model.logits("what is the capital"), rtol=1e-4, atol=1e-4)
    mean = states.mean(axis=0)
    np.testing.assert_allclose(model.embed("what is the capital")[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_embeddings_of_much_at_once(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference(encoder)
    texts = [("the fox and the hen . " * (1 + i % 5)).strip() for i in range(40)]
    seen: list[tuple[str, int, int]] = []
    together = model.embed(texts, progress=lambda *args: seen.append(args))
    assert seen[-1] == ("embed", 40, 40) and len(seen) > 1
    np.testing.assert_allclose(together, np.concatenate([model.embed([t]) for t in texts]), atol=1e-6)
    assert model.new_cache().n_pages == 0


def test_texts_that_cannot_be_embedded(encoder: Path) -> None:
    model = reference(encoder)
    long = "the fox " * 200
    with pytest.raises(ContextFull):
        model.embed([long])
    cut = model.tokenize(long)[:127] + model.tokenize(long)[-1:]
    np.testing.assert_array_equal(model.embed([long], truncate=True), model.embed([cut]))
    with pytest.raises(UsageError, match="pooling is 'max'"):
        model.embed(["x"], pooling="max")
    with pytest.raises(UsageError, match="one text at a time"):
        model.embed(["x", "y"], pooling="none")
    with pytest.raises(UsageError, match="no tokens"):
        model.embed([[]])
    assert model.embed([]).shape == (0, 64)
    assert set(POOLINGS) == {"none", "mean", "cls", "last"}


@pytest.mark.parametrize("name", ["ctx_size", "threads", "threads_batch", "max_tokens_per_run"])
@pytest.mark.parametrize("value", [-1, 10**30, 0.5, "2", True])
def test_settings_that_cannot_be_meant_are_named(decoder: Path, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} is"):
        edgelm.load(decoder, interpreter="reference", **{name: value})


@pytest.mark.parametrize("prompt", [["a"], [1.5], None, 5, b"hi", bytearray(b"hi"), np.array([28.5]), [[28]]])
def test_what_is_no_prompt(decoder: Path, prompt: Any) -> None:
    with reference(decoder) as model:
        for use in (model.generate, model.logits, lambda p: model.embed([p])):
            with pytest.raises(UsageError, match="a prompt is a text or whole numbers"):
                use(prompt)
        assert model.tokens_of(np.array([28, 29])) == model.tokens_of((28, 29)) == [28, 29]


def test_errors_survive_pickle() -> None:
    """As pools of processes pass them on."""
    errors = [error("what") for error in (FormatError, SourceError, UnsupportedError, UsageError)]
    for error in (*errors, ContextFull(5, 3), ContextFull(5, 3, "do something")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(SourceError, match="too long"):
        edgelm.load("x" * 5000)


# ---------------------------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def minilm_gguf(minilm_path: Path, folder: Path) -> Path:
    return minilm.convert(minilm_path, folder / "minilm.gguf")


SENTENCES = (
    "The capital of France is Paris.",
    "Paris is where the French government sits.",
    "A recipe for onion soup.",
)


@pytest.mark.parametrize("interpreter", ["reference", "program"])
def test_sentences_as_sentence_transformers_embeds_them(minilm_gguf: Path, interpreter: str) -> None:
    """tests/golden/minilm.npz: `transformers`, mean of the token vectors, length one."""
    with np.load(ROOT / "tests" / "golden" / "minilm.npz") as file:
        tokens, expected = file["tokens"], file["embeddings"]
    with edgelm.load(minilm_gguf, interpreter=interpreter) as model:
        for text, row in zip(SENTENCES, tokens, strict=True):
            assert model.tokenize(text) == row[row >= 0].tolist()
        vectors = model.embed(SENTENCES)
        np.testing.assert_allclose(vectors, expected, atol=1e-5 if interpreter == "reference" else 1e-3)
        similar = vectors @ vectors.T
        assert similar[0, 1] > 0.5 > similar[0, 2]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Model:
    return edgelm.load(smollm2_path)


FRANCE = [
    {"role": "system", "content": "You are a helpful AI assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]


def test_the_capital_of_france(smollm2: Model) -> None:
    session = smollm2.session(temperature=0)
    responses = list(session.chat(FRANCE, max_tokens=32))
    assert "".join(r.text for r in responses) == "The capital of France is Paris."
    assert responses[-1].finish_reason == "stop"
    messages = [*FRANCE, {"role": "assistant", "content": "The capital of France is Paris."},
                {"role": "user", "content": "And of Italy?"}]  # fmt: skip
    cached = list(session.chat(messages, max_tokens=30))
    assert cached[-1].cached_tokens >= responses[-1].prompt_tokens + 7
    fresh = list(smollm2.chat(messages, max_tokens=30, temperature=0))
    assert [r.token for r in cached] == [r.token for r in fresh] and fresh[-1].cached_tokens == 0


def test_known_models_say_what_they_always_say(smollm2: Model, gemma3_path: Path) -> None:
    text = smollm2.generate("Once upon a time, there was a little", max_tokens=4, temperature=0)
    assert text == " girl named Emma who"
    with edgelm.load(gemma3_path, ctx_size=1024) as gemma:
        text = gemma.generate("The capital of France is", max_tokens=8, temperature=0)
    assert text == " the capital of the country of France."


@pytest.mark.parametrize("name", ["smollm2_path", "gemma3_path"])
def test_memory_of_a_real_model(name: str, request: pytest.FixtureRequest) -> None:
    """What is estimated from the header is what a loaded model takes."""
    path = request.getfixturevalue(name)
    with edgelm.load(path, ctx_size=1024) as model:
        need = memory.estimate(model.config, model.weights, 1024, "f16")
        runner: Any = model.runner
        assert need.weights == pytest.approx(runner.n_bytes, rel=0.002)  # and norms
        assert need.workspace == pytest.approx(len(runner._environment.workspace), rel=0.15)
        for key in ("weights", "kv_cache", "workspace", "total"):
            assert model.info()["memory"][key] == getattr(need, key)
