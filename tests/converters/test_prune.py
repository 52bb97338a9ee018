"""Pruning: every architecture cut in every way, beside the whole model with the same parts silenced."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_folder
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import edgelm
from converters import calibrate, gguf_export, prune, prune_depth, prune_fit, refit, vocab_prune
from converters import checkpoint as checkpoints
from converters.arrays import Array
from converters.checkpoint import Checkpoint
from converters.conversion import Conversion, Options
from converters.pipeline import convert
from converters.prune import PruneSpec, pruned
from converters.prune_cut import Cut
from converters.prune_cut import given as computed
from converters.recipe import Recipe, make_plan
from edgelm import gguf
from edgelm.arch import Config, tensors
from edgelm.cache import Batch
from edgelm.errors import EdgelmError, UnsupportedError, UsageError
from edgelm.evaluate import score
from edgelm.tokenizer import Tokenizer

TOKENS = np.random.default_rng(0).integers(3, 60, 512).tolist()


def written(checkpoint: Checkpoint, path: Path, type_: str = "f32", *more: Any) -> Path:
    recipe = Recipe(type_)
    plan = make_plan(checkpoint.config, checkpoint.tensors, recipe)
    keys, notes, n = gguf_export.metadata(checkpoint, plan, Options(check_tokenizer=False))
    conversion = Conversion(checkpoint, checkpoint, recipe, Options(), plan, keys, tuple(notes), n)
    gguf_export.export(conversion, path, lambda draft: {})
    return path


def outputs(path: Path, interpreter: str = "reference", tokens: Any = TOKENS[:24]) -> np.ndarray:
    """Logits of every token, or an encoder's hidden states."""
    model = edgelm.load(path, interpreter=interpreter)
    return model.runner.forward(Batch.of([(model.new_cache().new_sequence(), tokens, "all")]))


def silenced(checkpoint: Checkpoint, layers: list[int]) -> Checkpoint:
    """The whole model in which some layers add nothing to the stream: zeros where they would."""
    changed = dict(checkpoint.tensors)
    for name, layer in itertools.product(("attn_output", "ffn_down"), layers):
        for last in ("weight", "bias"):
            tensor = f"blk.{layer}.{name}.{last}"
            if tensor in changed:
                changed[tensor] = computed(tensor, np.zeros(changed[tensor].shape, np.float32))
    return replace(checkpoint, tensors=changed)


@pytest.mark.parametrize("name", ["llama-bias", "gemma3", "gpt2", "phi3"])
def test_a_layer_less_is_a_layer_that_adds_nothing(name: str, tmp_path: Path) -> None:
    source = checkpoints.read(tiny.tiny(name, folder=tmp_path, n_layers=4))
    smaller = pruned(source, PruneSpec.parse("depth=50%,refit=no"), TOKENS, n_ctx=64, chunks=2)
    removed = smaller.facts["pruned"]["layers_removed"]
    assert smaller.config.n_layers == 2 and len(removed) == 2
    kept = [i for i in range(4) if i not in removed]
    assert smaller.config.windowed == tuple(source.config.windowed[i] for i in kept)
    found = outputs(written(smaller, tmp_path / "small.gguf"))
    expected = outputs(written(silenced(source, removed), tmp_path / "whole.gguf"))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama-bias", "gemma3", "gpt2"])
def test_layers_that_nobody_misses_go_first(name: str, tmp_path: Path) -> None:
    source = silenced(checkpoints.read(tiny.tiny(name, folder=tmp_path, n_layers=5)), [1, 3])
    smaller = pruned(source, PruneSpec.parse("depth=2:loss,refit=no"), TOKENS, n_ctx=64, chunks=4)
    assert smaller.facts["pruned"]["layers_removed"] == [1, 3]


def test_the_layer_without_which_predictions_move_least_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second chunk finds it, the others decide between it and a rival."""
    source = checkpoints.read(tiny.tiny("llama-gqa", folder=tmp_path, n_layers=4))
    chunks = np.array(TOKENS[:256], np.int32).reshape(4, 64)
    monkeypatch.setattr(prune_depth, "_LIKELY", source.config.vocab_size)

    def losses(chunks: np.ndarray, first: int) -> list[float]:
        def logits(without: list[int]) -> np.ndarray:
            path = written(silenced(source, without), tmp_path / "silenced.gguf")
            return np.concatenate([outputs(path, tokens=chunk.tolist())[first:] for chunk in chunks])

        whole = logits([])
        targets = np.zeros(len(whole), np.int64)
        return [float(score(logits([i]), targets, whole).kl.mean()) for i in range(4)]

    best, judge = int(np.argmin(losses(chunks[::2], 32))), losses(chunks[1::2], 32)
    for rival in range(4):
        chosen = prune_depth.chosen(calibrate.opened(source), chunks, 1, (rival,))
        assert chosen == (min(best, rival, key=lambda i: judge[i]),)


def test_likely_tokens_say_what_all_say(tmp_path: Path) -> None:
    source = calibrate.opened(checkpoints.read(tiny.tiny("gemma2", folder=tmp_path)))  # with a softcap
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 20, source.config.dim)).astype(np.float32)
    w, cap = source.weights.token_embd.weight.dequantize(), source.config.final_softcap
    logits = [cap * np.tanh(h @ w.T / cap) for h in (before, after)]
    whole = float(score(logits[1], np.zeros(20, np.int64), logits[0]).kl.mean())
    assert prune_depth.Predictions(source, before).kl(after) == pytest.approx(whole, rel=0.1)
    assert prune_depth.Predictions(source, before).kl(before) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["llama-bias", "gemma3", "gpt2", "phi3"])
def test_what_lies_before_a_gap_need_not_be_computed(name: str, tmp_path: Path) -> None:
    source = calibrate.opened(checkpoints.read(tiny.tiny(name, folder=tmp_path, n_layers=5)))
    trial = prune_depth.Trial(source, np.array(TOKENS[:64], np.int32).reshape(2, 32))
    for gone in ([4], [2, 3], [1, 4], [3]):
        quick = trial.loss(gone)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prune_depth._Without, "_is_known", False)
            assert quick == pytest.approx(trial.loss(gone), rel=1e-3)


def test_an_encoder_predicts_nothing(tmp_path: Path) -> None:
    source = checkpoints.read(tiny.tiny("bert-mean", folder=tmp_path, n_layers=3))
    with pytest.raises(UsageError, match="influence"):
        pruned(source, PruneSpec.parse("depth=1:loss"), TOKENS, n_ctx=32, chunks=2)
    assert pruned(source, PruneSpec.parse("depth=1"), TOKENS, n_ctx=32, chunks=2).config.n_layers == 2


@pytest.mark.parametrize("name", tiny.ALL)
def test_every_cut_of_every_architecture_loads_and_runs(name: str, tmp_path: Path) -> None:
    source = checkpoints.read(tiny.tiny(name, folder=tmp_path, n_layers=3))
    c = source.config
    cuts = ["depth=1,ffn=25%,hidden=8"]
    cuts += ["heads=1,ffn=10"] if c.n_kv_heads > 1 else []
    cuts += ["queries=1,hidden=16"] if c.n_heads > c.n_kv_heads else []
    for cut in cuts:
        smaller = pruned(source, PruneSpec.parse(cut), TOKENS, n_ctx=32, chunks=3)
        assert prune.n_parameters(smaller.tensors) < prune.n_parameters(source.tensors)
        path = written(smaller, tmp_path / "small.gguf")
        loaded = checkpoints.read(path)
        assert loaded.config == smaller.config
        reference, fast = outputs(path), outputs(path, "program")
        assert np.isfinite(reference).all()
        assert np.sum((reference - fast) ** 2) < 1e-3 * np.sum(reference**2), cut
        errors = smaller.facts["pruned"]["errors"].values()
        assert errors and all(error["after"] <= error["before"] for error in errors)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-bias", "gemma2", "gpt2", "phi3", "llama-fused", "bert-mean"])
@pytest.mark.parametrize("what", ["ffn=50%", "heads=1", "queries=1"])
def test_parts_that_do_nothing_go_and_nothing_changes(name: str, what: str, tmp_path: Path) -> None:
    source = checkpoints.read(tiny.tiny(name, folder=tmp_path))
    c = source.config
    if (what == "heads=1" and c.n_kv_heads == 1) or (what == "queries=1" and c.n_heads == c.n_kv_heads):
        pytest.skip("has none to spare")
    changed, rng = dict(source.tensors), np.random.default_rng(1)
    for i in range(c.n_layers):
        matrix = f"blk.{i}.ffn_down.weight" if what.startswith("ffn") else f"blk.{i}.attn_output.weight"
        w = changed[matrix].read().copy()
        if what.startswith("ffn"):
            w[:, rng.permutation(c.ffn_dim)[: c.ffn_dim // 2]] = 0
        elif what.startswith("heads"):
            w.reshape(len(w), c.n_kv_heads, -1)[:, rng.integers(c.n_kv_heads)] = 0
        else:
            groups = w.reshape(len(w), c.n_kv_heads, -1, c.v_head_dim)
            for group in range(c.n_kv_heads):
                groups[:, group, rng.integers(groups.shape[2])] = 0
        changed[matrix] = computed(matrix, w)
    source = replace(source, tensors=changed)
    smaller = pruned(source, PruneSpec.parse(what), TOKENS, n_ctx=64, chunks=8)
    before, after = (outputs(written(c, tmp_path / f"{i}.gguf")) for i, c in enumerate((source, smaller)))
    np.testing.assert_allclose(after, before, atol=2e-3, rtol=1e-3)


def test_channels_of_the_stream_that_hold_nothing(tmp_path: Path) -> None:
    source = checkpoints.read(tiny.tiny("llama-gqa", folder=tmp_path))
    changed, gone = dict(source.tensors), np.arange(5, 60, 7)
    for spec in tensors(source.config):
        if spec.gguf in changed and "dim" in spec.shape:
            values = changed[spec.gguf].read().copy()
            values[gone if spec.shape[0] == "dim" else (slice(None), gone)] = 0
            changed[spec.gguf] = computed(spec.gguf, values)
    source = replace(source, tensors=changed)
    smaller = pruned(source, PruneSpec.parse(f"hidden={len(gone)}"), TOKENS, n_ctx=64, chunks=8)
    before, after = (outputs(written(c, tmp_path / f"{i}.gguf")) for i, c in enumerate((source, smaller)))
    np.testing.assert_allclose(after, before, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_fitting_helps_on_the_text_it_was_fitted_to(name: str, tmp_path: Path) -> None:
    source = checkpoints.read(tiny.tiny(name, folder=tmp_path, n_layers=3))
    original = outputs(written(source, tmp_path / "whole.gguf"), tokens=TOKENS[:64])
    for cut in ("ffn=50%", "depth=1"):
        found = []
        for fit in ("no", "yes"):
            smaller = pruned(source, PruneSpec.parse(f"{cut},refit={fit}"), TOKENS, n_ctx=64)
            logits = outputs(written(smaller, tmp_path / "small.gguf"), tokens=TOKENS[:64])
            found.append(float(np.sum((logits - original) ** 2)))
        assert found[1] < found[0], cut


CHILD = """
import os, signal, sys
from pathlib import Path
from converters.conversion import Options
from converters.pipeline import convert
from converters.recipe import Recipe

def kill(stage, done, total):
    if stage == "prune" and done == int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)

options = Options(prune=(sys.argv[4],), calibrate=Path(sys.argv[3]), n_ctx=32, calibrate_chunks=4)
convert(Path(sys.argv[1]), Path(sys.argv[2]), Recipe("q8_0"), options, progress=kill)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
@pytest.mark.parametrize(("cut", "name"), [("depth=1,ffn=16,heads=1,hidden=8", "fits"), ("sparse=2:4", "sparse")])
def test_a_process_that_was_killed_goes_on(cut: str, name: str, tmp_path: Path) -> None:
    """It takes what was fitted before, and writes the file that an undisturbed process writes."""
    source, text, out = tiny.tiny("qwen3", folder=tmp_path, n_layers=4), tmp_path / "text", tmp_path / "out.gguf"
    text.write_text("the quick brown fox jumps over the lazy dog . " * 40)
    kill_at = ["-c", CHILD, str(source), str(out), str(text), cut, "2"]
    assert subprocess.run([sys.executable, *kill_at]).returncode == -signal.SIGKILL
    files = list((tmp_path / "out.gguf.work" / name).glob("*.rows"))
    left, seen = {path: path.stat().st_mtime_ns for path in files}, dict[Path, int]()
    stages = set[str]()
    assert {path.name.split(".")[1] for path in files} == {"0", "1"} and not out.exists()

    def look(stage: str, done: int, total: int) -> None:
        stages.add(stage)
        if stage == "write" and not seen:
            seen.update({path: path.stat().st_mtime_ns for path in left})

    options = Options(prune=(cut,), calibrate=text, n_ctx=32, calibrate_chunks=4)
    convert(source, out, Recipe("q8_0"), options, progress=look)
    assert not stages & {"score", "choose layers"} and "prune" in stages
    convert(source, tmp_path / "whole.gguf", Recipe("q8_0"), options)
    assert seen == left and out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not (tmp_path / "out.gguf.work").exists()


@pytest.mark.parametrize("type_", ["q4_k_m", "q8_0", "bf16"])
def test_a_pruned_file_keeps_the_types_of_its_tensors(type_: str, tmp_path: Path) -> None:
    """Without --type; the matrices that were refitted, too."""
    text, wide = tmp_path / "text", {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16}
    text.write_text("the quick brown fox jumps over the lazy dog . " * 40)
    source, out = tmp_path / "source.gguf", tmp_path / "out.gguf"
    convert(tiny.tiny("llama-gqa", folder=tmp_path, n_layers=3, **wide), source, Recipe(type_))
    report = convert(source, out, Recipe("auto"), Options(prune=("depth=1,ffn=256",), calibrate=text, n_ctx=32))
    before, after = gguf.read(source), gguf.read(out)
    (gone,) = report.transformations["pruned"]["layers_removed"]
    new = {f"blk.{i}.": f"blk.{i - (i > gone)}." for i in range(3) if i != gone}
    for name, tensor in before.tensors.items():
        layer = name[:6] if name.startswith("blk.") else ""
        if not layer or layer in new:
            assert after.tensors[new.get(layer, "") + name.removeprefix(layer)].format is tensor.format, name
    assert before.metadata["general.file_type"] == after.metadata["general.file_type"]


def test_pruned_and_quantized_in_one_pass(tmp_path: Path) -> None:
    source = checkpoints.read(hf_folder.write(tmp_path, "qwen3"))
    smaller = pruned(source, PruneSpec.parse("ffn=32,vocab=the quick brown fox"), TOKENS, n_ctx=64)
    path = written(smaller, tmp_path / "small.gguf", "q4_0")
    model = checkpoints.read(path)
    assert model.config.ffn_dim == 64 and model.tensors["blk.0.ffn_down.weight"].kind == "Q4_0"
    assert np.isfinite(outputs(path, tokens=[5, 6, 7])).all()


# ------------------------------------------------------------------------------------------------------- vocabularies


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha", "gemma3", "qwen3", "gpt2", "bert-mean"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_text_keeps_its_tokens_when_others_go(name: str, is_folder: bool, tmp_path: Path) -> None:
    text = "the quick brown fox jumps over 13 lazy dogs!\n Paris is the capital <|im_end|> of Zürich"
    path = hf_folder.write(tmp_path, name) if is_folder else tiny.tiny(name, folder=tmp_path)
    source = checkpoints.read(path)
    smaller = pruned(source, PruneSpec.parse(f"vocab={text}"))
    kept = smaller.kept_tokens
    assert kept is not None and len(kept) == smaller.config.vocab_size < source.config.vocab_size
    before = Tokenizer.from_gguf(calibrate.vocabulary(source))
    after = Tokenizer.from_gguf(calibrate.vocabulary(smaller))
    assert kept[after.encode(text)].tolist() == before.encode(text)
    assert after.decode(after.encode("Other words, 42")) == before.decode(before.encode("Other words, 42"))
    embedding = "token_embd.weight"
    np.testing.assert_array_equal(smaller.tensors[embedding].read(), source.tensors[embedding].read()[kept])
    out = written(smaller, tmp_path / "small.gguf")
    whole = written(source, tmp_path / "whole.gguf")
    ids = after.encode(text)[:20]
    found, expected = outputs(out, tokens=ids), outputs(whole, tokens=kept[ids].tolist())
    np.testing.assert_allclose(found, expected[:, kept] if found.shape != expected.shape else expected, atol=1e-5)


@given(text=st.text(min_size=1, max_size=60), other=st.text(max_size=30))
def test_any_text_keeps_its_tokens(text: str, other: str) -> None:
    for kind, pre in (("bpe", "llama-bpe"), ("spm", ""), ("gemma", ""), ("wordpiece", "")):
        keys = _numpy(tiny.tiny_vocabulary.metadata(kind, pre, 512))
        if not text.strip():
            return
        kept = vocab_prune.kept_tokens(keys, text)
        before, after = Tokenizer.from_gguf(keys), Tokenizer.from_gguf(vocab_prune.cut_keys(keys, kept))
        assert kept[after.encode(text)].tolist() == before.encode(text)
        if kind != "wordpiece":  # which has a token for what it does not know
            assert after.decode(after.encode(other)) == before.decode(before.encode(other))


def _numpy(keys: dict[str, Any]) -> dict[str, Any]:
    """Lists of numbers as a file has them."""
    kinds = {"tokenizer.ggml.token_type": np.int32, "tokenizer.ggml.scores": np.float32}
    return {key: np.array(value, kinds[key]) if key in kinds else value for key, value in keys.items()}


# --------------------------------------------------------------------------------------------------------- the algebra


def test_the_columns_that_cost_least_go() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 12)).astype(np.float32)
    x[:, 6:] = x[:, :6] @ rng.normal(size=(6, 6)) + 0.1 * x[:, 6:]  # half of the columns nearly follow from the others
    w = rng.normal(size=(5, 12)).astype(np.float32)
    sums = refit.Sums.of(x, np.zeros((400, 5), np.float32))

    def loss(kept: np.ndarray) -> float:
        best = np.linalg.lstsq(x[:, kept], x @ w.T, rcond=None)[0]
        return float(np.sum((x @ w.T - x[:, kept] @ best) ** 2))

    kept = refit.choose(w, sums, np.arange(12).reshape(1, 12, 1), 3)
    losses = sorted(loss(np.array(c)) for c in itertools.combinations(range(12), 9))
    assert loss(kept) < losses[len(losses) // 20]
    families = refit.choose(w, sums, np.arange(12).reshape(3, 2, 2), 1)
    assert len(families) == 6 and all(np.isin(families, range(4 * i, 4 * i + 4)).sum() == 2 for i in range(3))


def test_what_makes_a_token_massive_stays() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(400, 100)).astype(np.float32), rng.normal(size=(8, 100)).astype(np.float32)
    x[:, 11], x[7, 11] = 0, 1700  # a channel for one token, whose stream becomes some 170 times as large as others
    stream = x @ w.T
    weights = prune_fit._importance(stream)
    sums = refit.Sums.of(x * weights, np.zeros((400, 8), np.float32))
    assert 11 in refit.choose(w, sums, np.arange(100).reshape(1, 100, 1), 50)
    usual = np.delete(weights * np.sqrt(np.mean(stream * stream, axis=1, keepdims=True)), 7)
    np.testing.assert_allclose(usual, 1, rtol=1e-5)


def test_fits_that_unseen_tokens_do_not_confirm_are_not_made() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(60, 50)).astype(np.float32), rng.normal(size=(60, 4)).astype(np.float32)
    change = refit.fit(refit.Sums.of(x[:40], noise[:40]), refit.Sums.of(x[40:], noise[40:]))
    assert np.abs(change).max() < 0.1
    true = rng.normal(size=(4, 50)).astype(np.float32)
    x = rng.normal(size=(500, 50)).astype(np.float32)
    y = x @ true.T
    change = refit.fit(refit.Sums.of(x[:400], y[:400]), refit.Sums.of(x[400:], y[400:]))
    np.testing.assert_allclose(change, true, atol=0.02)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(EdgelmError, match="not a number"):
        refit.Sums.of(np.full((3, 3), bad, np.float32), np.zeros((3, 2), np.float32))


def test_lists_with_an_entry_for_each_layer_are_cut(tmp_path: Path) -> None:
    source = checkpoints.read(tiny.tiny("gemma2", folder=tmp_path, n_layers=4))
    smaller = Cut(source.config, (0, 1, 3)).applied(source)
    assert smaller.config.windowed == tuple(source.config.windowed[i] for i in (0, 1, 3))
    assert Config.from_gguf(checkpoints.gguf.read(written(smaller, tmp_path / "o.gguf")).metadata) == smaller.config


def test_what_sizes_imply_is_kept(tmp_path: Path) -> None:
    """Gemma 2 27B scales attention by the width per head, which a file cannot say otherwise."""
    hf = tiny.hf_config("gemma2", 46, query_pre_attn_scalar=None)
    config = Config.from_hf({k: v for k, v in hf.items() if v is not None})
    assert config.attention_scale == (config.dim // config.n_heads) ** -0.5 != config.head_dim**-0.5
    q = Array("q", (config.q_dim, config.dim), "F32", lambda a, b: np.ones((b - a, config.dim), np.float32))
    checkpoint = Checkpoint(tmp_path, config, {"blk.0.attn_q.weight": q})
    smaller = Cut(config, tuple(range(45))).applied(checkpoint)
    assert smaller.config.attention_scale == config.head_dim**-0.5
    scaled = float(smaller.tensors["blk.0.attn_q.weight"].rows(0, 1)[0, 0]) * smaller.config.attention_scale
    assert scaled == pytest.approx(config.attention_scale)
    assert not any("attention.scale" in key for key in smaller.config.to_gguf())


# ------------------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    "spec",
    [
        "", "depth", "depth=", "width=10%", "depth=100%", "depth=-1", "depth=1e9%", "depth=nan%", "depth=10%,depth=2",
        "ffn=20%:magic", "depth=20%:magic", "heads=1,queries=1", "depth=10%;ffn=3", "ffn=99999999999999999999",
        "hidden=½", "depth=ten", "=3", ",", "ffn=5%%", "ffn=5%,refit=maybe",
    ],
)  # fmt: skip
def test_requests_that_make_no_sense(spec: str) -> None:
    with pytest.raises(UsageError, match="--prune"):
        PruneSpec.parse(spec)


@pytest.mark.parametrize(
    "spec", ["depth=2", "depth=99%", "ffn=96", "ffn=1000", "heads=2", "heads=99", "queries=2", "hidden=64", "depth=77"]
)
def test_more_than_there_is(spec: str, tmp_path: Path) -> None:
    source = checkpoints.read(tiny.tiny("llama-gqa", folder=tmp_path))
    with pytest.raises(UsageError, match="at least one must stay"):
        pruned(source, PruneSpec.parse(spec), TOKENS, n_ctx=32)


def test_other_requests_that_cannot_be_met(tmp_path: Path) -> None:
    source = checkpoints.read(tiny.tiny("llama-gqa", folder=tmp_path))
    with pytest.raises(UnsupportedError, match="experts"):
        PruneSpec.parse("experts=50%")
    with pytest.raises(UsageError, match="--calibrate"):
        pruned(source, PruneSpec.parse("ffn=10%"))
    with pytest.raises(UsageError, match="at least one chunk"):
        pruned(source, PruneSpec.parse("ffn=10%"), TOKENS[:20], n_ctx=32)
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(UsageError, match="empty"):
        pruned(source, PruneSpec.parse(f"vocab={tmp_path / 'empty'}"))
    with pytest.raises(UsageError, match="no such file"):
        pruned(source, PruneSpec.parse("vocab=missing.txt"))


def test_specs_say_what_they_are() -> None:
    text = "depth=25%:angular,ffn=12.5%,heads=1,vocab=a, b"
    spec = PruneSpec.parse(text)
    assert str(spec) == text and spec.vocab == "a, b" and spec.depth.method == "angular"
    assert PruneSpec.parse(str(spec)) == spec and spec.refit
    spec = PruneSpec.parse("queries=1,sparse=2:4:wanda,refit=no")
    assert PruneSpec.parse(str(spec)) == spec and not spec.refit


def test_what_other_runtimes_will_not_load_is_said(tmp_path: Path) -> None:
    for name, is_said in (("llama-gqa", False), ("qwen2", True)):
        source = checkpoints.read(tiny.tiny(name, folder=tmp_path))
        smaller = pruned(source, PruneSpec.parse("queries=1"), TOKENS, n_ctx=32, chunks=2)
        assert any("llama.cpp" in note for note in smaller.notes) is is_said
