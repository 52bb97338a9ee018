"""Folders with hostile ONNX models: each is refused with a typed error, before or by onnxruntime, and never runs.

A case takes a whole folder and spoils it. What the reader of the file refuses needs no onnxruntime at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import edgelm
from edgelm import onnx_file, onnx_folder
from edgelm.errors import EdgelmError, FormatError, SourceError, UnsupportedError

Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    return tiny_onnx.folder(root, "genai", external=True)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of a folder that works, to be spoiled."""
    path = tmp_path / "model"
    path.mkdir()
    for file in whole.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


# ---------------------------------------------------------------------------------------------------- ways to spoil one


def graph(change: Callable[[Any], None]) -> Spoil:
    """Changes the model without looking at its external data."""

    def spoil(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return spoil


def external(**entries: str) -> Spoil:
    """Says other things about where the first external weight lies."""

    def change(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        for entry in tensor.external_data:
            if entry.key in entries:
                entry.value = entries[entry.key]

    return graph(change)


def link(name: str, target: str) -> Spoil:
    """A link out of the folder, in place of a file of it. The target exists: only the link is wrong."""

    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        outside = folder.parent / target
        outside.write_bytes(data)
        (folder / name).unlink()
        (folder / name).symlink_to(outside)

    return spoil


def text(name: str, content: str | bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def changed(name: str, *path: str, to: Any) -> Spoil:
    """Sets one value of a JSON file."""

    def spoil(folder: Path) -> None:
        whole = json.loads((folder / name).read_text())
        value = whole
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to
        (folder / name).write_text(json.dumps(whole))

    return spoil


def large(name: str) -> Spoil:
    return lambda folder: os.truncate(folder / name, onnx_folder.MAX_JSON_BYTES + 1)


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def cut(name: str, n: int) -> Spoil:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - n)


def pipe(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    os.mkfifo(folder / "model.onnx.data")


def node(op: str, domain: str = "", **attributes: Any) -> Spoil:
    def change(model: Any) -> None:
        model.graph.node.append(helper.make_node(op, ["logits"], ["extra"], domain=domain, **attributes))
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))

    return graph(change)


def operand(op: str, at: int, value: np.ndarray[Any, Any]) -> Spoil:
    """Gives an operation another operand, a constant."""

    def change(model: Any) -> None:
        model.graph.initializer.append(numpy_helper.from_array(value, "evil"))
        for each in model.graph.node:
            if each.op_type == op:
                each.input[at] = "evil"

    return graph(change)


def attribute(op: str, name: str, value: int) -> Spoil:
    def change(model: Any) -> None:
        for each in model.graph.node:
            for said in each.attribute:
                if each.op_type == op and said.name == name:
                    said.i = value

    return graph(change)


def value(kind: str, at: int, dtype: int, *dims: int | str, name: str = "") -> Spoil:
    """Declares an input or output otherwise."""

    def change(model: Any) -> None:
        old = getattr(model.graph, kind)[at]
        old.CopyFrom(tiny_onnx.info(name or old.name, dtype, *dims))

    return graph(change)


def recursive(model: Any) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    for name, other in (("f", "g"), ("g", "f")):
        inner = helper.make_node(other, ["x"], ["y"], domain="own")
        model.functions.append(helper.make_function("own", name, ["x"], ["y"], [inner], opsets))
    model.graph.node.append(helper.make_node("f", ["logits"], ["extra"], domain="own"))
    model.opset_import.append(helper.make_opsetid("own", 1))


def nested(depth: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        inner = [helper.make_node("Identity", ["logits"], ["y"])]
        for _ in range(depth):
            body = helper.make_graph(inner, "g", [], [tiny_onnx.info("y", 1)])
            inner = [helper.make_node("If", ["logits"], ["y"], then_branch=body)]
        model.graph.node.extend(inner)

    return change


def initializer(**fields: Any) -> Spoil:
    """A weight that lies about itself."""

    def change(model: Any) -> None:
        tensor = TensorProto(name="lie", **fields)
        model.graph.initializer.append(tensor)

    return graph(change)


def sparse(model: Any) -> None:
    values = helper.make_tensor("s", 1, [1], [1.0])
    indices = helper.make_tensor("i", 7, [1], [1 << 40])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 41]))


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        parsed = json.loads((folder / "tokenizer.json").read_text())
        change(parsed)
        (folder / "tokenizer.json").write_text(json.dumps(parsed))

    return spoil


GENAI, CONFIG, JSON = "genai_config.json", "config.json", "tokenizer.json"
GQA = "GroupQueryAttention"
CASES: dict[str, tuple[Spoil, type[EdgelmError], str]] = {
    # files
    "data_missing": (remove("model.onnx.data"), FormatError, "not there"),
    "data_truncated": (cut("model.onnx.data", 1), FormatError, "truncated"),
    "data_empty": (text("model.onnx.data", b""), FormatError, "truncated"),
    "data_absolute": (external(location="/etc/passwd"), FormatError, "leaves the folder"),
    "data_above": (external(location="../model.onnx.data"), FormatError, "leaves the folder"),
    "data_above_within": (external(location="x/../../model.onnx.data"), FormatError, "leaves the folder"),
    "data_of_windows": (external(location="C:\\model.onnx.data"), FormatError, "leaves the folder"),
    "data_in_memory": (external(location="*/_ORT_MEM_ADDR_/*"), FormatError, "not there"),
    "data_link": (link("model.onnx.data", "other.data"), FormatError, "a link that leaves"),
    "data_nowhere": (external(location=""), FormatError, "leaves the folder"),
    "data_itself_a_folder": (external(location="."), FormatError, "no file"),
    "data_pipe": (pipe, FormatError, "no file"),
    "data_offset_negative": (external(offset="-4096"), FormatError, "truncated, or of another model"),
    "data_offset_beyond": (external(offset=str(1 << 62)), FormatError, "truncated, or of another model"),
    "data_offset_text": (external(offset="0x10"), FormatError, "no number"),
    "data_length_short": (external(length="4"), FormatError, "given are 4"),
    "graph_link": (link("model.onnx", "other.onnx"), FormatError, "a link that leaves"),
    "graph_empty": (text("model.onnx", b""), FormatError, "empty"),
    "graph_truncated": (cut("model.onnx", 9), FormatError, "truncated"),
    "graph_garbage": (text("model.onnx", bytes(range(256)) * 9), FormatError, "no ONNX model|damaged|truncated"),
    "graph_of_nothing": (text("model.onnx", b"\x08\x08"), FormatError, "no graph"),
    "graph_of_zeros": (text("model.onnx", bytes(5000)), FormatError, "no graph"),
    # operators
    "operator_unknown": (node("Nonesuch"), FormatError, "onnxruntime cannot load"),
    "operator_of_others": (node("Run", "evil.ops"), UnsupportedError, "evil.ops"),
    "operator_of_python": (node("PyOp", "ai.onnx.contrib"), UnsupportedError, "no libraries"),
    "operator_aten": (node("ATen", "com.microsoft"), UnsupportedError, "ATen"),
    "operator_loop": (node("Loop"), UnsupportedError, "Loop"),
    "functions_call_each_other": (graph(recursive), FormatError, "calls itself"),
    "graphs_nested": (graph(nested(20)), FormatError, "nested"),
    "for_training": (graph(lambda m: m.training_info.add()), UnsupportedError, "for training"),
    "cache_goes_round": (
        graph(lambda m: [n.attribute.append(helper.make_attribute("sliding_window_cache", 1)) for n in m.graph.node
                         if n.op_type == GQA]), UnsupportedError, "sliding_window_cache",
    ),
    # weights
    "weight_short": (initializer(data_type=1, dims=[64], raw_data=bytes(8)), FormatError, "takes 256 bytes"),
    "weight_negative": (initializer(data_type=1, dims=[-1], raw_data=bytes(8)), FormatError, "shape"),
    "weight_huge": (initializer(data_type=1, dims=[1 << 62, 1 << 62], raw_data=bytes(8)), FormatError, "takes"),
    "weight_of_many_dims": (initializer(data_type=1, dims=[1] * 99, raw_data=bytes(4)), FormatError, "shape"),
    "weight_of_no_type": (initializer(data_type=99, dims=[1], raw_data=bytes(4)), FormatError, "unknown type"),
    "weight_sparse": (graph(sparse), UnsupportedError, "sparse"),
    # inputs and outputs
    "ids_of_floats": (value("input", 0, 1, "b", "t"), UnsupportedError, "input_ids is float32"),
    "ids_of_rank_3": (value("input", 0, 7, "b", "t", 4), UnsupportedError, "not 2 dimensions"),
    "ids_missing": (value("input", 0, 7, "b", "t", name="pixels"), UnsupportedError, "no input_ids"),
    "past_of_integers": (value("input", 2, 7, "b", 2, "p", 16), UnsupportedError, "past_key_values.0.key is int64"),
    "past_without_heads": (value("input", 2, 1, "b", "h", "p", 16), UnsupportedError, "has the shape"),
    "past_of_rank_5": (value("input", 2, 1, 2, "b", 2, "p", 16), UnsupportedError, "not 4 dimensions"),
    "past_of_other_heads": (value("input", 2, 1, "b", 4, "p", 8), FormatError, "the graph has 4"),
    "past_unknown": (value("input", 2, 1, "b", 2, "p", 16, name="memory"), UnsupportedError, "memory"),
    "present_missing": (value("output", 1, 1, "b", 2, "p", 16, name="gone"), FormatError, "no present.0.key"),
    "logits_missing": (value("output", 0, 1, "b", "t", 512, name="gone"), UnsupportedError, "it gives gone"),
    "logits_of_rank_2": (value("output", 0, 1, "b", 512), UnsupportedError, "not 3 dimensions"),
    "logits_of_other_size": (value("output", 0, 1, "b", "t", 400), FormatError, "vocabulary of 512"),
    # configuration
    "json_large": (large(CONFIG), FormatError, "make sense"),
    "json_nested": (text(CONFIG, '{"a":' + "[" * 200_000), FormatError, "nested too deeply|not valid JSON"),
    "json_broken": (text(CONFIG, "{"), FormatError, "not valid JSON"),
    "json_no_text": (text(CONFIG, b"\xff\xfe"), FormatError, "UTF-8"),
    "json_no_object": (text(CONFIG, "[]"), FormatError, "no JSON object"),
    "json_long_number": (text(CONFIG, '{"vocab_size": ' + "9" * 9999 + "}"), FormatError, "not valid JSON"),
    "json_link": (link(CONFIG, "other.json"), FormatError, "a link that leaves"),
    "context_text": (changed(CONFIG, "max_position_embeddings", to="many"), FormatError, "cannot be"),
    "context_negative": (changed(GENAI, "model", "context_length", to=-1), FormatError, "cannot be"),
    "context_infinite": (changed(GENAI, "model", "context_length", to=1 << 60), FormatError, "cannot be"),
    "vocabulary_lies": (changed(GENAI, "model", "vocab_size", to=511), FormatError, "the graph has 512"),
    "layers_lie": (changed(GENAI, "model", "decoder", "num_hidden_layers", to=3), FormatError, "the graph has 2"),
    "heads_lie": (changed(GENAI, "model", "decoder", "num_key_value_heads", to=1), FormatError, "the graph has 2"),
    "head_size_lies": (changed(GENAI, "model", "decoder", "head_size", to=64), FormatError, "the graph has 16"),
    "filename_above": (changed(GENAI, "model", "decoder", "filename", to="../x.onnx"), FormatError, "leaves"),
    "filename_absolute": (changed(GENAI, "model", "decoder", "filename", to="/etc/passwd"), FormatError, "leaves"),
    "filename_missing": (changed(GENAI, "model", "decoder", "filename", to="x.onnx"), SourceError, "not there"),
    "model_no_object": (changed(GENAI, "model", to=[]), FormatError, "no object"),
    "decoder_no_object": (changed(GENAI, "model", "decoder", to=7), FormatError, "no object"),
    "end_no_token": (changed(GENAI, "model", "eos_token_id", to="</s>"), FormatError, "no token"),
    # the tokenizer
    "tokenizer_missing": (remove(JSON), SourceError, "no tokenizer.json"),
    "tokenizer_broken": (text(JSON, "{"), FormatError, "cannot read it"),
    "tokenizer_nested": (text(JSON, '{"model":' + "[" * 200_000), FormatError, "cannot read it"),
    "tokenizer_empty": (text(JSON, "{}"), FormatError, "cannot read it"),
    "tokenizer_link": (link(JSON, "other.json"), FormatError, "a link that leaves"),
    "tokenizer_of_no_kind": (tokenizer(lambda t: t["model"].update(type="Magic")), FormatError, "cannot read it"),
    "tokenizer_of_another": (tokenizer(lambda t: t["model"]["vocab"].update(zzz=512)), FormatError, "another's"),
    "tokenizer_tiny": (
        tokenizer(lambda t: t["model"].update(vocab={"a": 0, "b": 1}, merges=[])), FormatError, "another's",
    ),
    "tokenizer_merges": (
        tokenizer(lambda t: t["model"]["merges"].append(["not", "there"])), FormatError, "cannot read it",
    ),
    "tokenizer_regex": (
        tokenizer(lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("})),
        FormatError, "cannot read it",
    ),
    "tokenizer_of_long_tokens": (
        tokenizer(lambda t: t["model"]["vocab"].update({"z" * 70_000: 400})), FormatError, "characters",
    ),
    "template_large": (text("chat_template.jinja", "x" * (1 << 21)), FormatError, "make sense"),
}  # fmt: skip
# Graphs that load: onnxruntime notices when it runs them.
RUNNING: dict[str, Spoil] = {
    "length_beyond": operand(GQA, 5, np.array([100_000_000], np.int32)),
    "length_negative": operand(GQA, 5, np.array([-5], np.int32)),
    "total_beyond": operand(GQA, 6, np.array(100_000, np.int32)),
    "total_negative": operand(GQA, 6, np.array(-4, np.int32)),
    "past_of_another_layer": graph(lambda m: m.graph.node.remove(next(n for n in m.graph.node if n.op_type == "Mul"))),
    "heads_wrong": attribute(GQA, "kv_num_heads", 1),
    "rows_beyond_the_table": operand("Gather", 1, np.array([[1 << 40]])),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, folder: Path) -> None:
    spoil, kind, message = CASES[name]
    spoil(folder)
    with pytest.raises(kind, match=message) as caught:
        assert edgelm.load(folder).template is None  # templates are read when they are needed
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", RUNNING)
def test_refused_when_it_runs(name: str, folder: Path) -> None:
    RUNNING[name](folder)
    with pytest.raises((FormatError, UnsupportedError)):
        edgelm.load(folder).generate(list(range(4, 40)), max_tokens=3, temperature=0)


def test_the_folder_that_they_are_made_of_is_valid(folder: Path) -> None:
    assert edgelm.load(folder).generate("hello", max_tokens=3, temperature=0, ignore_eos=True)


def test_a_cut_anywhere_is_an_error(whole: Path, tmp_path: Path) -> None:
    data = (whole / "model.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    (tmp_path / "model.onnx.data").write_bytes((whole / "model.onnx.data").read_bytes())
    ends = 0
    for n in range(1, len(data), 37):
        path.write_bytes(data[:n])
        try:
            onnx_file.read(path)
            ends += 1  # between two fields of the model, everything that is there is whole
        except (FormatError, UnsupportedError):
            pass
    assert ends < 4


@given(st.data())
def test_noise_is_an_error_or_a_graph(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes that were changed at random never do more than raise what is meant to be raised."""
    folder = tmp_path_factory.getbasetemp() / "noise"
    folder.mkdir(exist_ok=True)
    content = bytearray((whole / "model.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "model.onnx").write_bytes(content)
    (folder / "model.onnx.data").write_bytes((whole / "model.onnx.data").read_bytes())
    try:
        read = onnx_folder.OnnxFolder(folder, onnx_file.read(folder / "model.onnx"), {}, {})
        read.prove()
    except (FormatError, UnsupportedError):
        pass


def test_links_of_the_hub_cache_are_no_escape(folder: Path, tmp_path: Path) -> None:
    """A snapshot of huggingface_hub is a folder of links to the blobs beside it."""
    snapshot, blobs = tmp_path / "models--o--m" / "snapshots" / "main", tmp_path / "models--o--m" / "blobs"
    for each in (snapshot, blobs, tmp_path / "models--o--m" / "refs"):
        each.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(blobs / str(i))
    assert onnx_folder.read(snapshot).vocab_size == 512


@pytest.mark.parametrize("name", ["data_missing", "operator_unknown", "graph_garbage", "tokenizer_missing"])
def test_one_line_and_exit_2(name: str, folder: Path) -> None:
    CASES[name][0](folder)
    command = [sys.executable, "-m", "edgelm", "run", str(folder), "-p", "hello", "-n", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
