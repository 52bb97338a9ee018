"""The whole way from a checkpoint to a file with its loss told: texts, measurements, limits, what is left behind."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_folder
import numpy as np
import pytest

from converters.conversion import HELD_OUT, Options, texts
from converters.loss import TooMuchLost
from converters.pipeline import convert, prepare
from converters.recipe import Recipe
from edgelm import gguf, load
from edgelm.errors import FormatError, UsageError
from edgelm.evaluate import perplexity

LINES = [f"Line {i}: the quick brown fox jumps over {i * 7919 % 1000} lazy dogs.\n" for i in range(120)]


def text(folder: Path, lines: list[str] = LINES, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_text("".join(lines))
    return path


def asked(folder: Path, **more: Any) -> Options:
    settings: dict[str, Any] = {"calibrate": text(folder), "n_ctx": 32, "calibrate_chunks": 8, "evaluate_chunks": 4}
    return Options(**{**settings, **more})


def test_the_loss_is_that_of_evaluating_the_file(tmp_path: Path) -> None:
    """What the report and the file tell is what `edgelm eval --against` says of them, with the same text."""
    folder = hf_folder.write(tmp_path, "llama-gqa", hidden_size=128, num_attention_heads=4)
    source, out = tmp_path / "f32.gguf", tmp_path / "out.gguf"
    convert(folder, source, Recipe("f32"))
    report = convert(folder, out, Recipe("q4_0"), asked(tmp_path))
    assert report.loss is not None and report.loss["is_held_out"]
    held_out = (tmp_path / "text.txt").read_text()[-len("".join(LINES[-12:])) :]
    assert hashlib.sha256(held_out.encode()).hexdigest() == report.loss["text_sha256"]
    with load(str(out), ctx_size=32) as model, load(str(source), ctx_size=32, interpreter="reference") as exact:
        figures = perplexity(model, held_out, 32, 4, exact).to_dict()
    assert {name: report.loss[name] for name in figures} == pytest.approx(figures, rel=1e-5)
    assert 0 < figures["mean_kl"] < 1 and figures["ppl_ratio"] != 1
    told = gguf.read(out).metadata
    for name in ("mean_kl", "ppl_ratio", "kl_99", "same_top", "rms_dp"):
        assert told[f"edgelm.loss.{name}"] == pytest.approx(figures[name], rel=1e-5)
    assert told["edgelm.loss.text_sha256"] == report.loss["text_sha256"]
    assert told["edgelm.calibration.text_sha256"] == report.calibration["text_sha256"] != report.loss["text_sha256"]
    assert json.loads((tmp_path / "out.report.json").read_text()) == report.to_dict()
    assert not list(tmp_path.glob("out.gguf.*")), "nothing is left behind"


def test_errors_of_tensors(tmp_path: Path) -> None:
    """The relative error of each tensor, columns weighed as the text drives them."""
    folder = hf_folder.write(tmp_path, "gpt2")
    convert(folder, tmp_path / "f32.gguf", Recipe("f32"))
    options = asked(tmp_path, method="imatrix", calibrate_chunks=None)
    report = convert(folder, tmp_path / "out.gguf", Recipe("q4_0"), options)
    exact, out = gguf.read(tmp_path / "f32.gguf").tensors, gguf.read(tmp_path / "out.gguf")
    importance = importance_of(folder, options)
    for i, facts in enumerate(report.tensors):
        name = facts["tensor"]
        w, q = exact[name].dequantize(), out.tensors[name].dequantize()
        weights = importance.get(name, np.ones(w.shape[-1])) if facts["to"] != "F32" else np.ones(w.shape[-1])
        expected = np.sqrt(np.sum(weights * (q - w) ** 2) / max(np.sum(weights * w**2), 1e-30))
        assert facts["error"] == pytest.approx(expected, rel=1e-4, abs=1e-9), name
        assert out.metadata["edgelm.tensors.error"][i] == pytest.approx(facts["error"], rel=1e-6)
        assert (facts["error"] > 0.01) == (facts["to"] == "Q4_0")
        rounded = "imatrix" if name in importance else "rtn"
        assert facts["method"] == (None if facts["to"] == "F32" else rounded)


def importance_of(folder: Path, options: Options) -> dict[str, Any]:
    from converters import calibrate, imatrix

    calibration, _ = texts(options)
    assert calibration is not None
    source = calibrate.opened(prepare(folder, Recipe("f32"), options).checkpoint)
    found = imatrix.collect(source, calibration.text.text, calibration.n_ctx)
    return {name: found.importance(name) for name in found.entries}


def test_more_is_lost_than_allowed(tmp_path: Path) -> None:
    folder, out = hf_folder.write(tmp_path, "qwen3"), tmp_path / "out.gguf"
    with pytest.raises(TooMuchLost, match=r"more than the 1e-09 of --max-kld; .*out\.gguf\.part"):
        convert(folder, out, Recipe("q4_0"), asked(tmp_path, max_kld=1e-9))
    assert not out.exists() and Path(f"{out}.part").exists(), "the work is kept"
    stages: set[str] = set()
    again = asked(tmp_path, max_kld=10.0)
    report = convert(folder, out, Recipe("q4_0"), again, progress=lambda stage, done, total: stages.add(stage))
    assert "check what is there" in stages and "write" not in stages
    assert report.loss is not None and report.loss["mean_kl"] < 10
    convert(folder, tmp_path / "whole.gguf", Recipe("q4_0"), again)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_texts_never_overlap(tmp_path: Path) -> None:
    whole = "".join(LINES)
    calibration, evaluation = texts(asked(tmp_path))
    assert calibration is not None and evaluation is not None and evaluation.is_held_out
    assert calibration.text.text + evaluation.text.text == whole and calibration.text.text.endswith("\n")
    assert len(evaluation.text.text) == pytest.approx(HELD_OUT * len(whole), rel=0.1)
    calibration, evaluation = texts(asked(tmp_path, evaluate=text(tmp_path, LINES[:5], "other.txt")))
    assert calibration is not None and evaluation is not None and not evaluation.is_held_out
    assert calibration.text.text == whole and evaluation.text.text == "".join(LINES[:5])


def test_a_text_that_is_too_short(tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "qwen3")
    short = text(tmp_path, LINES[:10], "short.txt")
    report = convert(folder, tmp_path / "out.gguf", Recipe("q4_0"), asked(tmp_path, calibrate=short))
    assert report.loss is None and any("loss was not measured" in note for note in report.notes)
    for options in (asked(tmp_path, calibrate=short, max_kld=1.0), asked(tmp_path, evaluate=short, n_ctx=128)):
        with pytest.raises(UsageError, match="less than two chunks"):
            prepare(folder, Recipe("q4_0"), options)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="UTF-8"):
        prepare(folder, Recipe("q4_0"), asked(tmp_path, calibrate=tmp_path / "bytes.txt"))


def test_a_chunk_is_no_longer_than_the_model_can_read(tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "gpt2")  # which knows 128 positions
    options = asked(tmp_path, calibrate=text(tmp_path, LINES * 4), n_ctx=512, method="imatrix")
    report = convert(folder, tmp_path / "out.gguf", Recipe("q4_0"), options)
    assert report.loss is not None and report.loss["n_ctx"] == 128
    assert report.calibration is not None and report.calibration["n_ctx"] == 128


def test_an_encoder_has_no_loss(tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "bert-mean")
    report = convert(folder, tmp_path / "out.gguf", Recipe("q4_0"), asked(tmp_path))
    assert report.loss is None and any("predicts no tokens" in note for note in report.notes)
    assert max(facts["error"] for facts in report.tensors) > 0.01
    with pytest.raises(UsageError, match="predicts no tokens"):
        prepare(folder, Recipe("q4_0"), asked(tmp_path, max_kld=1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "there are auto"),
        ({"method": "gptq"}, "--calibrate"),
        ({"method": "imatrix"}, "--imatrix"),
        ({"method": "rtn", "imatrix": "x.gguf"}, "does not use --imatrix"),
        ({"target_bpw": 4.5}, "--calibrate"),
        ({"target_bytes": 10**8}, "--calibrate"),
        ({"max_kld": 0.1}, "--eval"),
        ({"target_bpw": 4.5, "target_bytes": 10**8, "calibrate": Path("x")}, "twice"),
        ({"max_kld": float("nan"), "calibrate": Path("x")}, "--max-kld nan"),
        ({"target_bpw": float("nan"), "calibrate": Path("x")}, "--target-bpw nan"),
        ({"onnx_ops": "standard"}, "--format onnx"),
        ({"onnx_block": 32, "format": "hf"}, "--format onnx"),
    ],
)
def test_options_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options(**settings)


@pytest.mark.parametrize("method", ["rtn", "imatrix", "gptq", "awq", "auto"])
def test_every_method_goes_all_the_way(method: str, tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "qwen3", hidden_size=64)
    out = tmp_path / "out.gguf"
    report = convert(folder, out, Recipe("q4_0"), asked(tmp_path, method=method))
    used = {facts["method"] for facts in report.tensors if facts["to"] == "Q4_0"}
    assert used <= {"rtn", "imatrix", "gptq", "awq"} and (method == "auto" or method in used)
    assert report.loss is not None and 0 < report.loss["mean_kl"] < 1
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.gguf", "out.report.json"]
    assert (gguf.read(out).metadata["edgelm.methods"]) == sorted(used)


@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_pruned_and_quantized_in_one_pass(source: str, tmp_path: Path) -> None:
    """A smaller model that loads, with its loss against the whole one; the vocabulary may be smaller, too."""
    folder: Path = hf_folder.write(tmp_path, "llama-gqa")
    if source == "gguf":
        convert(folder, tmp_path / "f32.gguf", Recipe("f32"))
        folder = tmp_path / "f32.gguf"
    words = text(tmp_path, LINES, "words.txt")
    options = asked(tmp_path, prune=("depth=1", "ffn=25%", f"vocab={words}"))
    report = convert(folder, tmp_path / "out.gguf", Recipe("q8_0"), options)
    with load(str(tmp_path / "out.gguf"), ctx_size=32) as model:
        facts = gguf.read(tmp_path / "out.gguf")
        assert facts.metadata["llama.block_count"] == 1 and facts.metadata["llama.feed_forward_length"] == 72
        assert model.vocab_size == len(facts.metadata["tokenizer.ggml.tokens"]) < 512
        assert model.detokenize(model.tokenize("the lazy dogs"), skip_special=True) == "the lazy dogs"
    pruned = report.transformations["pruned"]
    assert pruned["parameters_after"] == report.n_weights < pruned["parameters_before"]
    assert json.loads(facts.metadata["edgelm.pruned"])["layers_removed"] == pruned["layers_removed"]
    assert report.loss is not None and np.isfinite(report.loss["mean_kl"]) and report.loss["mean_kl"] > 0


@pytest.mark.parametrize(("name", "share"), [("llama-gqa", 0.9), ("gpt2", 0.85), ("qwen3", 0.8), ("phi3", 0.7)])
def test_a_number_of_parameters(name: str, share: float, tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, name, intermediate_size=256)
    before = prepare(folder, Recipe("f32")).plan.n_weights
    target = int(share * before)
    made = prepare(folder, Recipe("f32"), asked(tmp_path, target_params=target)).plan.n_weights
    assert 0.8 * target < made <= target
    assert prepare(folder, Recipe("f32"), asked(tmp_path, target_params=before)).plan.n_weights == before
    with pytest.raises(UsageError, match="embeddings"):
        prepare(folder, Recipe("f32"), asked(tmp_path, target_params=1000))
    with pytest.raises(UsageError, match="too"):
        prepare(folder, Recipe("f32"), asked(tmp_path, target_params=target, prune=("depth=1",)))


def test_a_hugging_face_folder_out(tmp_path: Path) -> None:
    """Pruned, written for transformers, and told: the folder reads back as the model that a GGUF file holds."""
    pytest.importorskip("converters.hf_export")
    folder = hf_folder.write(tmp_path, "llama-gqa")
    options = asked(tmp_path, prune=("ffn=25%",))
    report = convert(folder, tmp_path / "smaller", Recipe("f32"), replace(options, format="hf"))
    convert(folder, tmp_path / "f32.gguf", Recipe("f32"), options)
    convert(tmp_path / "smaller", tmp_path / "again.gguf", Recipe("f32"))
    one, other = gguf.read(tmp_path / "f32.gguf").tensors, gguf.read(tmp_path / "again.gguf").tensors
    assert all(np.array_equal(one[name].data, other[name].data) for name in one)
    assert report.loss is not None and report.loss["interpreter"] == "reference" and report.loss["mean_kl"] > 0
    assert (tmp_path / "smaller.report.json").exists()


def test_an_onnx_folder_out(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = hf_folder.write(tmp_path, "llama-gqa")
    report = convert(folder, tmp_path / "onnx", Recipe("q4_0"), asked(tmp_path, format="onnx", method="imatrix"))
    assert report.loss is not None and report.loss["interpreter"] == "onnxruntime" and report.loss["mean_kl"] > 0
    assert (tmp_path / "onnx" / "model.onnx").exists() and report.format == "onnx"
    other = convert(folder, tmp_path / "out.gguf", Recipe("q4_0"), asked(tmp_path, method="imatrix"))
    errors = [{facts["tensor"]: facts["error"] for facts in r.tensors} for r in (report, other)]
    assert errors[0] == pytest.approx(errors[1]) and max(errors[0].values()) > 0.01


@pytest.mark.parametrize("block", [0, 16, 128])
def test_rows_of_a_graph_are_rounded_as_the_whole(block: int, tmp_path: Path) -> None:
    """What the errors of ONNX tensors are measured on is what the graph computes with."""
    from converters.onnx_export import weights_of

    made = prepare(hf_folder.write(tmp_path, "gpt2"), Recipe("q4_0"))
    for name, tensor in weights_of(made, block).by_name.items():
        rows = np.arange(3, 9) if len(tensor.shape) == 2 else np.arange(1)
        whole = tensor.dequantize().reshape(-1, tensor.shape[-1])
        np.testing.assert_array_equal(tensor.rows(rows), whole[rows], name)


CHILD = """
import os, signal, sys
from pathlib import Path
from converters.conversion import Options
from converters.pipeline import convert
from converters.recipe import Recipe

def kill(stage, done, total):
    if stage == "write" and done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

options = Options(format="onnx", calibrate=Path(sys.argv[3]), n_ctx=32, calibrate_chunks=8, evaluate_chunks=4)
convert(Path(sys.argv[1]), Path(sys.argv[2]), Recipe("q4_0"), options, progress=kill)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
def test_a_killed_onnx_conversion_keeps_what_was_expensive(tmp_path: Path) -> None:
    """The graph is written again, from the matrices that are quantized already."""
    pytest.importorskip("onnxruntime")
    folder, options = hf_folder.write(tmp_path, "llama-gqa"), asked(tmp_path, format="onnx")
    arguments = [str(folder), str(tmp_path / "onnx"), str(tmp_path / "text.txt")]
    assert subprocess.run([sys.executable, "-c", CHILD, *arguments]).returncode == -signal.SIGKILL
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "onnx.work" / "gptq").glob("*.rows")}
    assert len(left) == 14 and (tmp_path / "onnx.part").exists() and not (tmp_path / "onnx").exists()
    seen: dict[Path, int] = {}

    def look(stage: str, done: int, total: int) -> None:
        if stage == "write" and not seen:
            seen.update({path: path.stat().st_mtime_ns for path in left})

    convert(folder, tmp_path / "onnx", Recipe("q4_0"), options, progress=look)
    convert(folder, tmp_path / "whole", Recipe("q4_0"), options)
    assert seen == left
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "onnx" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "onnx.part").exists() and not (tmp_path / "onnx.work").exists()
