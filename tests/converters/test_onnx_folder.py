"""What lies beside the graph, and where in the data file weights lie."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import hf_folder
import numpy as np
import onnx
import pytest
import tiny
from click.testing import CliRunner
from onnx_case import EXACT, Runtime, export, padded, tokens

import edgelm
from converters import onnx_export, pipeline
from converters.conversion import Options
from converters.genai_config import genai_config
from converters.onnx_graph import DATA
from converters.recipe import Recipe
from edgelm import gguf
from edgelm.arch import Config
from edgelm.cli import main
from edgelm.errors import FormatError
from edgelm.tokenizer import Tokenizer


@pytest.mark.parametrize("lie", ["x", True, [1], float("nan")])
def test_a_default_of_sampling_that_is_no_number(lie: Any, tmp_path: Path) -> None:
    keys = gguf.read(tiny.tiny("llama-gqa", folder=tmp_path)).metadata
    config = Config.from_gguf(keys)
    assert genai_config(config, {**keys, "general.sampling.top_k": 7}, 64, False)["search"]["top_k"] == 7
    with pytest.raises(FormatError, match="top_k is"):
        genai_config(config, {**keys, "general.sampling.top_k": lie}, 64, False)


def test_genai_config(tmp_path: Path) -> None:
    """Names of inputs and outputs are those of the graph."""
    case = export(tmp_path, "gemma3")
    facts = json.loads((case.folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    runtime, decoder = Runtime(case.folder), facts["decoder"]
    names = {entry.name for entry in runtime.inputs}
    layers = range(decoder["num_hidden_layers"])
    for group, known in (("inputs", names), ("outputs", set(runtime.names))):
        told = {text % i if "%d" in text else text for text in decoder[group].values() for i in layers}
        assert told == known
    assert facts["type"] == "gemma3_text"
    assert Tokenizer.from_gguf(case.conversion.keys).eog_ids == set(np.atleast_1d(facts["eos_token_id"]).tolist())
    assert (facts["vocab_size"], decoder["head_size"]) == (case.config.vocab_size, case.config.head_dim)


def test_symbolic_dimensions(tmp_path: Path) -> None:
    case = export(tmp_path, "llama-gqa")
    inputs = {entry.name: entry.shape for entry in Runtime(case.folder).inputs}
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16]


@pytest.mark.parametrize("ops", onnx_export.DIALECTS)
def test_versions_are_the_lowest(ops: str, tmp_path: Path) -> None:
    """An encoder in onnxruntime's operators needs no more than GELU does; the standard's Attention needs opset 23."""
    case = export(tmp_path, "bert-mean", ops=ops)
    model = onnx.load(case.folder / "model.onnx", load_external_data=False)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    assert (versions[""], model.ir_version) == ((20, 9) if ops == "ort" else (23, 11))
    assert ("com.microsoft" in versions) == (ops == "ort")


def test_places_of_weights(tmp_path: Path) -> None:
    """Aligned to pages, inside the file, apart from each other but for views of the same weight."""
    case = export(tmp_path, "llama-mqa", "q4_0", recipe={"pure": True})
    model = onnx.load(case.folder / "model.onnx", load_external_data=False)
    size = (case.folder / DATA).stat().st_size
    places = set()
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            assert where["location"] == DATA
            start, length = int(where["offset"]), int(where["length"])
            assert start % 4096 == 0
            assert start + length <= size
            places.add((start, start + length))
    ordered = sorted(places)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))


def test_hashes(tmp_path: Path) -> None:
    """The same source gives the same bytes; every weight is told."""
    source = tiny.tiny("qwen3", fmt="Q8_0", folder=tmp_path)
    conversion = pipeline.prepare(source, Recipe("copy"), Options(format="onnx"))
    hashes = [onnx_export.export(conversion, tmp_path / name) for name in ("a", "b")]
    assert hashes[0] == hashes[1]
    assert (tmp_path / "a" / DATA).read_bytes() == (tmp_path / "b" / DATA).read_bytes()
    assert (tmp_path / "a" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["bert-mean", "bert-cls"])
@pytest.mark.parametrize("ops", onnx_export.DIALECTS)
def test_sentence_embedding(name: str, ops: str, tmp_path: Path) -> None:
    case = export(tmp_path, name, ops=ops)
    ids, mask = padded([tokens(case, n, seed=n) for n in (4, 9, 7)])
    states, vectors = Runtime(case.folder).session.run(None, {"input_ids": ids, "attention_mask": mask})
    for i, row in enumerate(mask):
        real = states[i][row == 1]
        pooled = real.mean(axis=0) if name == "bert-mean" else real[0]
        np.testing.assert_allclose(vectors[i], pooled / np.linalg.norm(pooled), atol=1e-6)


def test_own_files_of_a_folder_are_kept(tmp_path: Path) -> None:
    case = export(tmp_path, "bert-cls", settings=EXACT)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json"):
        assert (case.folder / name).read_bytes() == (tmp_path / "bert-cls" / name).read_bytes()
    assert not (case.folder / "genai_config.json").exists()


@pytest.mark.parametrize(("package", "flags"), [("onnx", ()), ("onnxruntime", ("--eval", __file__))])
def test_a_package_that_is_missing(package: str, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before anything is read, in one line."""
    monkeypatch.setitem(sys.modules, package, None)
    done = CliRunner().invoke(main, ["convert", "nowhere", "out", "--format", "onnx", *flags])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    assert f"needs the package {package}: pip install edgelm[onnx]" in done.stderr


def test_the_command(tmp_path: Path) -> None:
    """From a checkpoint to a model that runs: the same text as the GGUF file gives, both in float32."""
    source = hf_folder.write(tmp_path, "gemma3")
    texts = []
    for format_, type_ in (("onnx", "fp32"), ("gguf", "f32")):
        out = tmp_path / f"out.{format_}"
        done = CliRunner().invoke(
            main, ["convert", str(source), str(out), "--format", format_, "--type", type_, "--json"]
        )
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout)
        assert (report["format"], report["out"]) == (format_, str(out))
        assert all(len(tensor["sha256"]) == 64 for tensor in report["tensors"])
        with edgelm.load(out, **({"interpreter": "reference"} if format_ == "gguf" else {})) as model:
            texts.append(str(model.generate("the quick brown", max_tokens=24, temperature=0)))
    assert texts[0] == texts[1]
