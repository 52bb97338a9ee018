"""Quantized weights as ONNX: the graph computes with what the plan says, and integers of GGUF stay what they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_case import EXACT, Evaluator, Runtime, expected, export, in_steps, nmse, tokens

from converters import onnx_export, onnx_weights, pipeline
from converters.conversion import Options
from converters.onnx_export import DIALECTS
from converters.onnx_nodes import Settings
from converters.recipe import Recipe
from edgelm import gguf
from edgelm.errors import FormatError, UnsupportedError, UsageError
from edgelm.formats import QTensor, by_name

NAMES = ("llama-bias", "qwen3", "gemma3", "gpt2", "phi3", "bert-mean")
TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl")
STEPS = [9, 1, 1, 1]


def logits(case, run=Runtime):  # type: ignore[no-untyped-def]
    """What the graph gives and what the reference gives for the same text."""
    ids = tokens(case, sum(STEPS))
    if case.config.spec.family == "encoder":
        return run(case.folder).run(np.array([ids]), np.ones((1, len(ids)), np.int64))[0], expected(case, ids)
    return in_steps(run(case.folder), ids, STEPS), expected(case, ids)


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("type_", TYPES)
def test_types(type_: str, ops: str, tmp_path: Path) -> None:
    """All matrices of a model whose embedding is its output, in one type."""
    case = export(tmp_path, "llama-mqa", type_, ops=ops, recipe={"pure": True})
    assert nmse(*logits(case)) < 1e-10
    if ops == "standard":
        assert nmse(*logits(case, Evaluator)) < 1e-10


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("name", NAMES)
def test_architectures(name: str, ops: str, tmp_path: Path) -> None:
    case = export(tmp_path, name, "q4_0", ops=ops)
    assert nmse(*logits(case)) < 1e-10


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("type_", ["q4_k", "q5_k", "q6_k"])
def test_super_blocks(type_: str, ops: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    case = export(tmp_path, "llama-mqa", f"{type_}{'_m' if type_ != 'q6_k' else ''}", ops=ops, **sizes)
    assert nmse(*logits(case)) < 1e-10


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("type_", ["q4_0", "q8_0"])
def test_other_blocks(type_: str, block: int, ops: str, tmp_path: Path) -> None:
    case = export(
        tmp_path,
        "llama-gqa",
        type_,
        ops=ops,
        block=block,
        recipe={"pure": True},
        hidden_size=128,
        intermediate_size=256,
    )
    assert nmse(*logits(case)) < 1e-10


@pytest.mark.parametrize("type_", ["q4_0", "q4_1", "q8_0"])
def test_rounded_activations(type_: str, tmp_path: Path) -> None:
    """What is written by default: activations of int8."""
    case = export(tmp_path, "llama-gqa", type_, settings=Settings())
    assert nmse(*logits(case)) < 2e-3


@pytest.mark.parametrize("ops", DIALECTS)
def test_int8_encoder(ops: str, tmp_path: Path) -> None:
    case = export(tmp_path, "bert-mean", "q8_0", ops=ops, settings=replace(EXACT, dynamic=True))
    kinds = {node.op_type for node in onnx.load(case.folder / "model.onnx", load_external_data=False).graph.node}
    assert kinds & {"DynamicQuantizeMatMul", "MatMulInteger"}
    assert nmse(*logits(case)) < 2e-3


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "gpt2", "bert-cls"])
@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_half_floats(type_: str, name: str, ops: str, tmp_path: Path) -> None:
    """F16: activations are float16, too, but not the stream that norms read. BF16: weights alone."""
    settings = replace(EXACT, dtype=onnx.TensorProto.FLOAT16) if type_ == "f16" else EXACT
    case = export(tmp_path, name, type_, ops=ops, settings=settings)
    assert nmse(*logits(case)) < (1e-5 if type_ == "f16" else 1e-10)


@pytest.mark.parametrize("fmt", ["Q4_0", "Q8_0", "Q4_1"])
def test_integers_of_gguf_are_kept(fmt: str, tmp_path: Path) -> None:
    """The very nibbles and bytes of the file, and its scales."""
    path = tiny.tiny("llama-gqa", fmt=fmt, folder=tmp_path)
    conversion = pipeline.prepare(path, Recipe("copy"), Options(format="onnx"))
    onnx_export.export(conversion, tmp_path / "onnx", settings=EXACT)
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    stored = gguf.read(path).tensors
    groups = [key.removesuffix(".codes").split("+") for key in found if key.endswith(".codes")]
    assert {name for names in groups for name in names} == {n for n, t in stored.items() if t.format.name == fmt}
    for names in groups:  # queries, keys and values lie on top of each other
        codes, scales = (found[f"{'+'.join(names)}.{part}"] for part in ("codes", "scales"))
        blocks = np.concatenate([stored[n].data.reshape(-1).view(stored[n].format.layout) for n in names])
        if fmt == "Q8_0":
            assert np.array_equal(codes.reshape(-1, 32) ^ 128, blocks["qs"].view(np.uint8))
        else:
            ours = np.stack([codes.reshape(-1, 16) & 15, codes.reshape(-1, 16) >> 4], axis=2).reshape(-1, 32)
            assert np.array_equal(ours, np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=1))
        assert np.array_equal(scales, blocks["d"].astype(np.float32).reshape(scales.shape))
        if fmt == "Q4_1":
            offsets = blocks["d"].astype(np.float32) * 8 + blocks["m"].astype(np.float32)
            ours = found[f"{'+'.join(names)}.offsets"].reshape(-1)
            np.testing.assert_allclose(ours, offsets, rtol=1e-4, atol=1e-6)


def test_chosen_bytes_and_importances(tmp_path: Path) -> None:
    """What GPTQ chose is written as it is; importances reach the quantizer."""
    case = export(tmp_path, "llama-gqa", "q4_0", recipe={"pure": True})
    name = "blk.1.ffn_down.weight"
    plain = onnx_export.weights_of(case.conversion).by_name[name].dequantize()
    chosen = QTensor.from_array(name, plain * np.float32(0.5), by_name("Q4_0"))
    importance = np.linspace(0.01, 100, plain.shape[1], dtype=np.float32) ** 2
    for change, same in (
        ({"ready": {name: chosen.data}}, chosen.dequantize()),
        ({"importance": {name: importance}}, None),
    ):
        conversion, folder = replace(case.conversion, **change), tmp_path / next(iter(change))
        onnx_export.export(conversion, folder, settings=EXACT)
        graph = onnx.load(folder / "model.onnx").graph
        found = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.startswith(name)}
        codes = found[f"{name}.codes"]
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1, 32).astype(np.float32)
        weights = ((codes - 8) * found[f"{name}.scales"][..., None]).reshape(plain.shape)
        assert np.array_equal(weights, onnx_export.weights_of(conversion).by_name[name].dequantize())
        assert np.array_equal(weights, same) if same is not None else not np.array_equal(weights, plain)


def test_whole_minima_become_zero_points(tmp_path: Path) -> None:
    """Blocks of Q4_1 whose minimum is a multiple of the scale, as GPTQ and AWQ have them, need no floats."""
    codes = np.random.default_rng(0).integers(0, 16, (8, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15  # the whole range in each block
    zeros = np.repeat(np.arange(16).reshape(8, 2), 32, axis=1)
    array = ((codes - zeros) * 0.25).astype(np.float32)
    tensor = QTensor.from_array("w", array, by_name("Q4_1"))
    blocked = onnx_weights._integers(tensor)
    assert blocked.zeros is not None and blocked.zeros.dtype == np.uint8
    assert np.array_equal(blocked.zeros, zeros[:, ::32])
    assert np.array_equal(blocked.dequantize(), array)


@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]), st.sampled_from([16, 32, 128]), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_plain_rounding(seed: int, bits: int, block: int, n_cols: int) -> None:
    """No weight is off by more than half a step, but at the end of the range that has one step less."""
    rows = np.random.default_rng(seed).standard_normal((3, n_cols)).astype(np.float32)
    blocked = onnx_weights.rounded(rows, bits, block)
    found = blocked.dequantize()[:, :n_cols]
    step = np.abs(np.repeat(blocked.scales, block, axis=1)[:, :n_cols])
    assert (np.abs(found - rows) <= step * 1.01 + 1e-6).all()
    inside = np.repeat(blocked.codes.reshape(3, -1) < (1 << bits) - 1, 1, axis=1)[:, :n_cols]
    slack = 1e-6 + np.abs(rows) * 2.0**-10  # scales are float16
    assert (np.abs(found - rows)[inside] <= (step * 0.5 + slack)[inside]).all()


@pytest.mark.parametrize("fmt", sorted(onnx_weights.LAYOUTS))
def test_layouts_hold_the_very_weights(fmt: str) -> None:
    format = by_name(fmt)
    tensor = tiny.random_weights("w", format, (4, 512), 0.1)
    blocked = onnx_weights._integers(tensor)
    want = tensor.dequantize()
    np.testing.assert_allclose(blocked.dequantize(), want, rtol=1e-5, atol=1e-6 * float(np.abs(want).max()))


def test_infinite_weights(tmp_path: Path) -> None:
    tensor = QTensor.from_array("w", np.ones((2, 32), np.float32), by_name("Q8_0"))
    data = tensor.data.copy()
    data[:, :2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(FormatError, match="infinity"):
        onnx_weights._integers(replace(tensor, data=data))


def test_a_format_without_integers(tmp_path: Path) -> None:
    path = tiny.tiny("llama-gqa", fmt="IQ2_XS", folder=tmp_path)
    conversion = pipeline.prepare(path, Recipe("copy"), Options(format="onnx"))
    with pytest.raises(UnsupportedError, match=r"MatMulNBits.*IQ2_XS"):
        onnx_export.export(conversion, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_types_of_onnx_tools() -> None:
    assert onnx_export.named(Recipe("INT4")) == Recipe("q4_0", pure=True)
    assert onnx_export.named(Recipe("fp16")) == Recipe("f16")
    assert onnx_export.named(Recipe("q4_k_m", pure=True)) == Recipe("q4_k_m", pure=True)


def test_refusals(tmp_path: Path) -> None:
    case = export(tmp_path, "llama-gqa")
    for change, message in (({}, "exists"), ({"ops": "plain"}, "ort, standard"), ({"block": 48}, "16, 32")):
        with pytest.raises(UsageError, match=message):
            onnx_export.export(case.conversion, case.folder, **change)


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = export(tmp_path, "llama-gqa")

    def fails(*args: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(onnx_export, "_neighbours", fails)
    with pytest.raises(OSError, match="no space"):
        onnx_export.export(case.conversion, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-gqa", "onnx"]
