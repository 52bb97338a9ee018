"""Folders with ONNX models, run by onnxruntime behind the same Model and Session, against the reference interpreter."""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import minilm
import numpy as np
import onnx
import pytest
import tiny
import tiny_onnx
from in_threads import in_threads

import edgelm
from converters import onnx_export, pipeline, tokenizer_files
from converters.conversion import Options
from converters.recipe import Recipe
from converters.tokenizer_check import TEXTS
from edgelm import gguf
from edgelm.cache import Batch
from edgelm.describe import describe
from edgelm.errors import ContextFull, FormatError, UnsupportedError, UsageError
from edgelm.model import Model, tokenizer_of
from edgelm.onnx_cache import FIRST

STYLES = ("genai", "optimum", "bare")
PROMPT = "what is the capital of france ? "
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def reference(root: Path) -> Model:
    """The same weights, by their definitions."""
    return edgelm.load(tiny.tiny("llama-gqa", folder=root), interpreter="reference")


@pytest.fixture(scope="module", params=STYLES)
def model(request: pytest.FixtureRequest, root: Path) -> Model:
    return edgelm.load(tiny_onnx.folder(root, request.param, external=request.param == "genai"))


def ids(responses: Any) -> list[int]:
    return [response.token for response in responses]


# ------------------------------------------------------------------------------------------------------------- numbers


def test_logits_are_those_of_the_reference(model: Model, reference: Model) -> None:
    tokens = list(range(4, 104))
    ours, theirs = model.logits(tokens), reference.logits(tokens)
    assert np.square(ours - theirs).sum() / np.square(theirs).sum() < 1e-10


def test_the_same_tokens_greedily(model: Model, reference: Model) -> None:
    answer = ids(model.stream_generate(PROMPT, max_tokens=80, **GREEDY))
    assert answer == ids(reference.stream_generate(PROMPT, max_tokens=80, **GREEDY))


def test_a_prompt_in_pieces(root: Path, reference: Model) -> None:
    model = edgelm.load(tiny_onnx.folder(root / "pieces", "genai"), max_tokens_per_run=7, threads=1)
    assert model.runner.max_tokens == 7 and model.n_threads == 1
    tokens = list(range(4, 64))
    np.testing.assert_allclose(model.logits(tokens), reference.logits(tokens), atol=1e-5)


@pytest.mark.parametrize("wanted", ["all", "last", "none"])
def test_ragged_batches(model: Model, reference: Model, wanted: str) -> None:
    parts, outputs = [list(range(4, 30)), [7], [9, 8, 300]], []
    for each in (model, reference):
        sequences = [each.new_cache().new_sequence() for _ in parts]
        each.runner.forward(Batch.of((s, [5, 6], "none") for s in sequences))
        more = list(zip(sequences, parts, [wanted, "all", wanted], strict=True))
        outputs.append(each.runner.forward(Batch.of(more)))
        assert [s.length for s in sequences] == [2 + len(part) for part in parts]
    np.testing.assert_allclose(*outputs, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- the cache


def test_sessions_reuse_and_go_back(model: Model) -> None:
    session = model.session(**GREEDY)
    first = list(session.stream(PROMPT, max_tokens=12))
    prompt = model.tokenize(PROMPT)
    again = list(session.stream([*prompt, *ids(first)[:3], 9], max_tokens=12))
    assert again[-1].cached_tokens == len(prompt) + 3
    assert ids(again) == ids(model.stream_generate([*prompt, *ids(first)[:3], 9], max_tokens=12, **GREEDY))
    session.truncate(3)
    assert len(session.tokens) == 3
    assert ids(session.stream(PROMPT, max_tokens=12)) == ids(first)


def test_forks_do_not_disturb_each_other(model: Model) -> None:
    session = model.session(**GREEDY)
    list(session.stream(PROMPT, max_tokens=4))
    base = list(session.tokens)
    twins = [session.fork() for _ in range(3)]
    for i, each in enumerate([*twins, session, *twins]):
        prompt = [*base, 20 + i]
        answer = ids(each.stream(prompt, max_tokens=6, **GREEDY))
        assert answer == ids(model.stream_generate(prompt, max_tokens=6, **GREEDY))
    twins[0].close()
    assert ids(session.stream(base, max_tokens=6)) == ids(model.stream_generate(base, max_tokens=6, **GREEDY))


def test_sessions_in_threads(model: Model) -> None:
    expected = [ids(model.stream_generate([i, 5, 6], max_tokens=20, **GREEDY)) for i in range(4)]
    assert in_threads(lambda i: ids(model.stream_generate([i, 5, 6], max_tokens=20, **GREEDY)), 4) == expected


def test_arrays_grow(root: Path) -> None:
    folder = tiny_onnx.folder(root / "long", "genai", max_position_embeddings=1024)
    (folder / "genai_config.json").unlink()
    model = edgelm.load(folder)
    tokens = [int(t) for t in np.random.default_rng(0).integers(4, 300, 2 * FIRST + 40)]
    whole = model.logits(tokens)
    sequence = model.new_cache().new_sequence()
    for at in range(0, len(tokens), 50):
        out = model.runner.forward(Batch.of([(sequence, tokens[at : at + 50], "all")]))
        np.testing.assert_allclose(out, whole[at : at + 50], atol=1e-4)


def test_save_and_load(model: Model, tmp_path: Path) -> None:
    session = model.session(**GREEDY)
    expected = ids(session.stream(PROMPT, max_tokens=8))
    session.save(tmp_path / "s")
    other = model.session(**GREEDY)
    other.load(tmp_path / "s")
    assert other.tokens == session.tokens
    responses = list(other.stream([*session.tokens, expected[-1]], max_tokens=5))
    assert responses[0].cached_tokens == len(session.tokens)
    assert ids(responses) == ids(model.stream_generate([*session.tokens, expected[-1]], max_tokens=5, **GREEDY))


def test_damaged_saves(model: Model, reference: Model, tmp_path: Path) -> None:
    session = model.session(**GREEDY)
    list(session.stream(PROMPT, max_tokens=3))
    file = io.BytesIO()
    session._sequence.save(file)
    data = file.getvalue()
    cache = model.new_cache()
    for damaged in (data[:-1], data[:40], b"", data[:-9] + b"\x01" + data[-8:], b"x" + data[1:]):
        with pytest.raises(FormatError):
            cache.load(io.BytesIO(damaged))
    with pytest.raises(FormatError, match="at most 2 fit"):
        cache.load(io.BytesIO(data), 2)
    with pytest.raises(FormatError):
        reference.new_cache().load(io.BytesIO(data))


def test_sequences_of_others_are_refused(model: Model, reference: Model) -> None:
    for runner, stranger in ((model, reference), (reference, model)):
        with pytest.raises(UsageError, match="was made for another"):
            runner.runner.forward(Batch.of([(stranger.new_cache().new_sequence(), [5], "last")]))


# ---------------------------------------------------------------------------------------------------- what a model says


def test_limits(model: Model) -> None:
    with pytest.raises(ContextFull):
        model.generate(list(range(4, 140)))
    with pytest.raises(UsageError, match="outside the vocabulary"):
        model.runner.forward(Batch.of([(model.new_cache().new_sequence(), [512], "last")]))
    last = list(model.stream_generate([5] * 126, **GREEDY))[-1]
    assert last.finish_reason == "context"
    shifted = list(model.stream_generate([5] * 126, overflow="shift", max_tokens=8, **GREEDY))[-1]
    assert shifted.finish_reason == "length" and shifted.dropped_tokens > 0


def test_facts(model: Model, root: Path) -> None:
    facts = model.info()
    json.dumps(facts)
    assert facts["interpreter"] == model.interpreter == "onnxruntime"
    assert facts["type"] == "fp32" and facts["context_length"] == facts["context_window"] == 128
    assert 120_000 < facts["n_parameters"] < 130_000 and facts["chat_template"] == "folder"
    assert (model.vocab_size, model.is_encoder, model.architecture, model.dim) == (512, False, "llama", 64)
    described = describe(model.path.parent, tensors=True, metadata=True)
    assert described["memory"] == facts["memory"] and described["tensors"]
    assert model.bytes_per_token(10) > model.bytes_per_token(0) or model.path.parent.name.startswith("bare")
    assert 0 < model.bytes_per_token(0) < facts["n_bytes"]


def test_the_tokenizer_is_that_of_the_gguf_file(model: Model, reference: Model) -> None:
    ours, theirs = model.tokenizer, reference.tokenizer
    assert (ours.bos_id, ours.eos_id, ours.add_bos, ours.eog_ids) == (
        theirs.bos_id, theirs.eos_id, theirs.add_bos, theirs.eog_ids,
    )  # fmt: skip
    messages = [{"role": "user", "content": "hello 🦙 <|im_end|>"}]
    assert model.render(messages) == reference.render(messages)
    for parse in (True, False):
        text = "hello <|im_start|> world\ufffd\ud800🦙"
        assert ours.encode(text, parse_special=parse) == theirs.encode(text, parse_special=parse)
    assert [ours.token_bytes(t) for t in range(340)] == [theirs.token_bytes(t) for t in range(340)]


@pytest.mark.parametrize(("options", "message"), [
    ({"interpreter": "program"}, "computed by onnxruntime"), ({"ctx_size": -1}, "ctx_size is -1"),
    ({"kv_type": "q8_0"}, "of this graph are f32"), ({"packed": "file"}, "GGUF"), ({"ctx_size": 4096}, "128 positions"),
    ({"chat_template": "x"}, "no built-in chat template"),
])  # fmt: skip
def test_arguments_that_cannot_be_meant(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        edgelm.load(root / "genai-external", **options)


def test_gguf_models_have_no_onnxruntime(reference: Model) -> None:
    with pytest.raises(UsageError, match="models in ONNX"):
        edgelm.load(reference.path, interpreter="onnxruntime")


def test_without_onnxruntime(root: Path) -> None:
    path = str(tiny_onnx.folder(root / "without", "bare"))
    program = "import sys; sys.modules['onnxruntime'] = None; import edgelm; edgelm.load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=False)
    assert "edgelm.errors.UnsupportedError" in done.stderr and "pip install edgelm[onnx]" in done.stderr


def test_an_answer_loads_no_numba(root: Path) -> None:
    path = str(tiny_onnx.folder(root / "alone", "optimum"))
    program = (
        "import sys, edgelm; edgelm.load(sys.argv[1]).generate('the', max_tokens=3, seed=1)\n"
        "print([m for m in ('numba', 'llvmlite', 'edgelm.kernels.sampling') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_onnxruntime_that_is_too_old(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.25.9")
    with pytest.raises(UnsupportedError, match=r"too old.*pip install -U"):
        edgelm.load(root / "genai-external")


def test_a_file_a_folder_or_a_folder_inside(root: Path, reference: Model) -> None:
    folder = tiny_onnx.folder(root / "inside", "optimum")
    assert edgelm.load(folder / "model.onnx").generate(PROMPT, max_tokens=3, **GREEDY)
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx" / "decoder_model.onnx")
    for path in (folder, folder / "onnx" / "decoder_model.onnx"):
        assert edgelm.load(path).name == "optimum-whole"


# --------------------------------------------------------------------------------------------------- folders of our own

OURS = ("llama-gqa", "llama-mqa", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2", "phi3-longrope",
        "bert-mean", "nomic-bert")  # fmt: skip


@pytest.mark.parametrize("ops", ["ort", "standard"])
@pytest.mark.parametrize("name", OURS)
def test_what_the_converter_makes_runs(name: str, ops: str, tmp_path: Path) -> None:
    source = tiny.tiny(name, folder=tmp_path)
    theirs = edgelm.load(source, interpreter="reference")
    conversion = pipeline.prepare(source, Recipe("f32"), Options(format="onnx"))
    onnx_export.export(conversion, tmp_path / "out", ops=ops)
    ours = edgelm.load(tmp_path / "out")
    assert (ours.n_ctx, ours.vocab_size, ours.dim, ours.is_encoder) == (
        theirs.n_ctx, theirs.vocab_size, theirs.dim, theirs.is_encoder,
    )  # fmt: skip
    assert ours.architecture == theirs.architecture
    if theirs.is_encoder:
        texts = ["the quick brown fox", "hello"]
        np.testing.assert_allclose(ours.embed(texts), theirs.embed(texts), atol=1e-6)
        return
    tokens = [5 + i % 300 for i in range(60)]
    ours_logits, theirs_logits = ours.logits(tokens), theirs.logits(tokens)
    assert np.square(ours_logits - theirs_logits).sum() / np.square(theirs_logits).sum() < 1e-10
    session = ours.session(**GREEDY)
    answer = ids(session.stream(tokens[:20], max_tokens=40))
    assert answer == ids(theirs.stream_generate(tokens[:20], max_tokens=40, **GREEDY))
    list(session.stream([*tokens[:20], *answer[:10], 7], max_tokens=1))
    again = list(session.stream([*tokens[:20], *answer[:25]], max_tokens=15))  # back, and on in another way
    assert ids(again) == answer[25:] and again[0].cached_tokens == 30


# ------------------------------------------------------------------------------------------------------------- encoders


def test_embeddings(root: Path) -> None:
    """The vector of a token is its row of the table: what pooling makes of them is known."""
    model = edgelm.load(tiny_onnx.encoder(root))
    assert model.is_encoder and model.pooling == "none" and model.tokenizer.add_bos
    texts = ["the fox", "hello world and all the others", "the"]
    rows = tiny_onnx.words()[model.tokenize(texts[1])]
    np.testing.assert_allclose(model.embed(texts, normalize=False)[1], rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(model.embed(texts, "cls", normalize=False)[1], rows[0], atol=1e-6)
    np.testing.assert_allclose(model.embed([texts[1]], "none", normalize=False), rows, atol=1e-6)
    with pytest.raises(UsageError, match="is an encoder"):
        model.generate("hello")
    pooled = edgelm.load(tiny_onnx.encoder(root, ("sentence_embedding",)))
    np.testing.assert_allclose(pooled.embed(texts), model.embed(texts), atol=1e-6)
    with pytest.raises(UsageError, match="vector of a whole text"):
        pooled.embed(texts, "cls")


@pytest.mark.parametrize("name", ["smollm2_path", "gemma3_path"])
def test_tokens_are_those_of_the_gguf_file(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The vocabulary of a real file as tokenizer.json, beside a graph of the right size, cuts text as the file does."""
    file = gguf.read(request.getfixturevalue(name))
    theirs = edgelm.Tokenizer.from_gguf(file.metadata)
    onnx.save_model(tiny_onnx.look_up(np.zeros((theirs.vocab_size, 4), np.float32)), str(tmp_path / "model.onnx"))
    tokenizer_files.write(tmp_path, file.metadata)
    ours = tokenizer_of(tmp_path)
    rng = random.Random(0)
    letters = "abc ABC  \n\t12,.!?'éß漢字🦙\u200d-_ﬁ½" + "".join(chr(rng.randrange(32, 0x3000)) for _ in range(40))
    parts = [*letters, "<|im_start|>", "<bos>", "</s>", "<end_of_turn>"]
    for text in (*TEXTS, *("".join(rng.choices(parts, k=rng.randrange(1, 60))) for _ in range(500))):
        for parse in (True, False):
            tokens = ours.encode(text, parse_special=parse)
            assert tokens == theirs.encode(text, parse_special=parse)
        assert ours.decode(tokens) == theirs.decode(tokens)
    assert (ours.bos_id, ours.eos_id, ours.eog_ids, ours.add_bos) == (
        theirs.bos_id, theirs.eos_id, theirs.eog_ids, theirs.add_bos,
    )  # fmt: skip
    every = range(0, theirs.vocab_size, 17)
    assert [ours.token_bytes(t) for t in every] == [theirs.token_bytes(t) for t in every]
    assert [ours.is_special(t) for t in every] == [theirs.is_special(t) for t in every]


def test_a_model_that_others_exported(minilm_path: Path, minilm_onnx_path: Path, tmp_path: Path) -> None:
    """Eight bits lose little; and its tokenizer.json cuts as the vocabulary of a GGUF file does."""
    folder = tmp_path / "minilm"
    shutil.copytree(minilm_path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(minilm_onnx_path / "model.onnx", folder)
    source = edgelm.load(minilm.convert(minilm_path, tmp_path / "minilm.gguf"), interpreter="reference")
    model = edgelm.load(folder)
    assert (model.n_ctx, model.pooling, model.dim) == (source.n_ctx, source.pooling, source.dim) == (512, "mean", 384)
    assert [model.tokenize(text) for text in TEXTS] == [source.tokenize(text) for text in TEXTS]
    sentences = [text for text in TEXTS if len(text.split()) > 2]
    cosines = np.sum(model.embed(sentences) * source.embed(sentences), axis=1)
    assert cosines.min() > 0.98 and cosines.mean() > 0.995
    assert model.info()["type"] == "int8"


@pytest.mark.parametrize(("mode", "pooling"), [("cls_token", "cls"), ("lasttoken", "last"), ("mean_tokens", "mean")])
def test_pooling_that_the_folder_says(tmp_path: Path, mode: str, pooling: str) -> None:
    folder = tiny_onnx.encoder(tmp_path)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
    assert edgelm.load(folder).pooling == pooling


def test_decoders_do_not_embed(model: Model) -> None:
    with pytest.raises(UnsupportedError, match="no hidden states"):
        model.embed("hello")


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("command", [
    ["run", "-p", "hello", "-n", "3", "--temp", "0"], ["info", "--json"], ["tokenize", "-p", "hello"],
    ["eval", "-f", "{text}", "-c", "32"], ["bench", "-p", "16", "-n", "4", "-r", "1"],
    ["chat", "-p", "hello", "-st", "-n", "3", "--temp", "0", "--ignore-eos"],
])  # fmt: skip
def test_commands(command: list[str], root: Path, tmp_path: Path, capsys: Any) -> None:
    from edgelm.cli import main

    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 12)
    rest = [part.format(text=tmp_path / "text") for part in command[1:]]
    main([command[0], str(root / "genai-external"), *rest], standalone_mode=False)
    assert capsys.readouterr().out.strip()


def test_evaluation_is_that_of_the_reference(model: Model, reference: Model) -> None:
    from edgelm.evaluate import perplexity

    text = "the quick brown fox jumps over the lazy dog while the other dogs look at the fox and the hen . " * 3
    report = perplexity(model, text, n_ctx=32, chunks=2, against=reference)
    assert report.mean_kl is not None and abs(report.mean_kl) < 1e-6 and report.same_top == 1.0
