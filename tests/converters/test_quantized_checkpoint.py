"""Checkpoints in GPTQ's, AWQ's and FP8's layouts: packed here number by number, read back as the same floats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_folder
import numpy as np
import pytest
import tiny
from numpy.typing import NDArray

from converters import checkpoint, quantized_checkpoint
from converters.arrays import Array, stored
from converters.pipeline import convert
from converters.recipe import Recipe
from edgelm import gguf
from edgelm.errors import FormatError, UnsupportedError, UsageError
from edgelm.formats import QTensor, by_name

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def array(name: str, values: NDArray[Any]) -> Array:
    kinds = {"int32": "I32", "float16": "F16", "float32": "F32", "uint8": "F8_E4M3"}
    return stored(name, kinds[str(values.dtype)], values, None)


def packed(values: NDArray[Any], bits: int, axis: int, order: tuple[int, ...] | None = None) -> NDArray[np.int32]:
    """Whole numbers in words of 32 bits, one loop for each number."""
    values = values if axis == 0 else values.T
    n = 32 // bits
    order = order or tuple(range(n))
    out = np.zeros((len(values) // n, values.shape[1]), np.uint32)
    for row in range(len(out)):
        for i in range(n):
            out[row] |= values[row * n + order[i]].astype(np.uint32) << np.uint32(bits * i)
    return (out if axis == 0 else np.ascontiguousarray(out.T)).view(np.int32)


def layer(rng: Any, bits: int, n_in: int = 64, n_out: int = 32, group: int = 16) -> dict[str, NDArray[Any]]:
    n_groups = n_in // group
    return {
        "q": rng.integers(0, 1 << bits, (n_in, n_out)),
        "z": rng.integers(1, 1 << bits, (n_groups, n_out)),
        "s": rng.uniform(0.5, 2, (n_groups, n_out)).astype(np.float16),
        "g": rng.permutation(np.repeat(np.arange(n_groups), group)).astype(np.int32),
    }


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2", "no g_idx"])
def test_gptq(bits: int, version: str) -> None:
    a = layer(np.random.default_rng(bits), bits)
    groups = np.arange(64) // 16 if version == "no g_idx" else a["g"]
    offset = 0 if version == "gptq_v2" else 1
    parts = {"qweight": packed(a["q"], bits, 0), "qzeros": packed(a["z"] - offset, bits, 1), "scales": a["s"]}
    parts |= {} if version == "no g_idx" else {"g_idx": a["g"]}
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 16, "checkpoint_format": version.split()[0]}
    if version == "no g_idx":
        settings["checkpoint_format"] = "gptq"
    made = quantized_checkpoint.as_floats(settings, {f"x.{k}": array(f"x.{k}", v) for k, v in parts.items()})
    assert list(made) == ["x.weight"]
    expected = (a["s"][groups].astype(np.float32) * (a["q"] - a["z"][groups])).T
    assert made["x.weight"].shape == (32, 64)
    assert np.array_equal(made["x.weight"].read(), expected)
    assert np.array_equal(made["x.weight"].rows(5, 13), expected[5:13])


def test_awq() -> None:
    a = layer(np.random.default_rng(0), 4)
    parts = {"qweight": packed(a["q"], 4, 1, AWQ_ORDER), "qzeros": packed(a["z"], 4, 1, AWQ_ORDER), "scales": a["s"]}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    made = quantized_checkpoint.as_floats(settings, {f"x.{k}": array(f"x.{k}", v) for k, v in parts.items()})
    groups = np.arange(64) // 16
    expected = (a["s"][groups].astype(np.float32) * (a["q"] - a["z"][groups])).T
    assert np.array_equal(made["x.weight"].read(), expected)
    assert np.array_equal(made["x.weight"].rows(3, 21), expected[3:21])


@pytest.mark.parametrize("shape", [(), (1,), (20,), (20, 1), (3, 4)])
def test_fp8(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    weight = array("x.weight", rng.integers(0, 120, (20, 30)).astype(np.uint8))
    scale = rng.uniform(0.5, 2, shape).astype(np.float32)
    name = "x.weight_scale_inv" if shape == (3, 4) else "x.weight_scale"
    arrays = {
        "x.weight": weight,
        name: array(name, np.asarray(scale)),
        "x.input_scale": array("y", np.ones(1, np.float32)),
    }
    made = quantized_checkpoint.as_floats({"quant_method": "fp8"}, arrays)
    assert list(made) == ["x.weight"]
    whole = np.repeat(np.repeat(scale, 7, 0), 8, 1)[:20, :30] if shape == (3, 4) else scale.reshape(-1, 1)
    assert np.array_equal(made["x.weight"].read(), weight.read() * whole)
    assert np.array_equal(made["x.weight"].rows(6, 15), (weight.read() * whole)[6:15])


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"quant_method": "bitsandbytes"}, UnsupportedError),
        ({"quant_method": "gptq", "bits": 3, "group_size": 16}, UnsupportedError),
        ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemv"}, UnsupportedError),
        ({"quant_method": "awq", "bits": 4, "group_size": 0}, FormatError),
        ({"quant_method": "awq", "bits": 4, "group_size": 8}, FormatError),
        ({"quant_method": "gptq", "bits": 8, "group_size": 16}, FormatError),
    ],
)
def test_what_does_not_fit(settings: dict[str, Any], error: type[Exception]) -> None:
    a = layer(np.random.default_rng(0), 4)
    parts = {"qweight": packed(a["q"], 4, 1, AWQ_ORDER), "qzeros": packed(a["z"], 4, 1, AWQ_ORDER), "scales": a["s"]}
    with pytest.raises(error):
        quantized_checkpoint.as_floats(settings, {f"x.{k}": array(f"x.{k}", v) for k, v in parts.items()})


def test_groups_that_do_not_exist() -> None:
    a = layer(np.random.default_rng(0), 4)
    parts = {"qweight": packed(a["q"], 4, 0), "qzeros": packed(a["z"] - 1, 4, 1), "scales": a["s"], "g_idx": a["g"] + 1}
    with pytest.raises(FormatError):
        quantized_checkpoint.as_floats(
            {"quant_method": "gptq", "bits": 4}, {f"x.{k}": array(f"x.{k}", v) for k, v in parts.items()}
        )


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q8_0"])
def test_integers_are_kept(format: str) -> None:
    """A format that can hold them gets the very integers, and so the very weights."""
    bits = 8 if format == "Q8_0" else 4
    a = layer(np.random.default_rng(3), bits, 128, 32, 64)
    if format != "Q4_1":
        a["z"][:] = 1 << (bits - 1)
    a["s"] = (2.0 ** np.random.default_rng(4).integers(-6, 3, a["s"].shape)).astype(np.float16)
    parts = {"qweight": packed(a["q"], bits, 0), "qzeros": packed(a["z"] - 1, bits, 1), "scales": a["s"]}
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 64}
    made = quantized_checkpoint.as_floats(settings, {f"x.{k}": array(f"x.{k}", v) for k, v in parts.items()})[
        "x.weight"
    ]
    assert set(made.kept) == ({"Q8_0"} if bits == 8 else {"Q4_1"} | ({"Q4_0"} if format == "Q4_0" else set()))
    tensor = QTensor("x", by_name(format), (9, 128), made.kept[format](5, 14))
    assert np.array_equal(tensor.dequantize(), made.rows(5, 14))
    act_order = {**parts, "g_idx": np.random.default_rng(5).permutation(np.arange(128) // 64).astype(np.int32)}
    arrays = {f"x.{k}": array(f"x.{k}", v) for k, v in act_order.items()}
    assert not quantized_checkpoint.as_floats(settings, arrays)["x.weight"].kept


def test_kept_integers_are_rearranged_like_any_rows(tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "llama-gqa")
    query, a = "model.layers.0.self_attn.q_proj", layer(np.random.default_rng(0), 4, 64, 64, 32)
    write_layer(folder, query, a, {"group_size": 32})
    a["s"][:] = np.float16(0.5)
    write_layer(folder, query, a, {"group_size": 32})
    recipe = Recipe("f32", overrides=(("blk.0.attn_q.weight", "q4_1"),))
    report = convert(folder, tmp_path / "out.gguf", recipe)
    assert not report.notes
    tensor = gguf.read(tmp_path / "out.gguf").tensors["blk.0.attn_q.weight"]
    groups = np.arange(64) // 32
    weight = (a["s"][groups].astype(np.float32) * (a["q"] - a["z"][groups])).T
    assert tensor.format.name == "Q4_1"
    assert np.array_equal(tensor.dequantize(), weight.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64))


def write_layer(folder: Path, stem: str, a: dict[str, NDArray[Any]], settings: dict[str, Any]) -> None:
    """Puts a layer of GPTQ's into a folder of llama-gqa, with g_idx where the settings say act-order."""
    hf = tiny.hf_config("llama-gqa")
    arrays = {n: ("F32", x.shape, x.tobytes()) for n, x in hf_folder.state("llama-gqa", hf).items()}
    del arrays[f"{stem}.weight"]
    words, zeros = packed(a["q"], 4, 0), packed(a["z"] - 1, 4, 1)
    arrays[f"{stem}.qweight"] = ("I32", words.shape, words.tobytes())
    arrays[f"{stem}.qzeros"] = ("I32", zeros.shape, zeros.tobytes())
    arrays[f"{stem}.scales"] = ("F16", a["s"].shape, a["s"].tobytes())
    if settings.get("desc_act"):
        arrays[f"{stem}.g_idx"] = ("I32", a["g"].shape, a["g"].tobytes())
    (folder / "model.safetensors").write_bytes(hf_folder.safetensors_bytes(arrays))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, **settings}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    """A model of which one layer is GPTQ's: its weights go through llama's rearrangement like any other."""
    folder = hf_folder.write(tmp_path, "llama-gqa")
    query, a = "model.layers.0.self_attn.q_proj", layer(np.random.default_rng(0), 4, 64, 64)
    write_layer(folder, query, a, {"group_size": 16, "desc_act": True})
    convert(folder, tmp_path / "out.gguf", Recipe("f32"))
    made = checkpoint.read(folder)
    weight = (a["s"][a["g"]].astype(np.float32) * (a["q"] - a["z"][a["g"]])).T
    expected = weight.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    assert np.array_equal(gguf.read(tmp_path / "out.gguf").tensors["blk.0.attn_q.weight"].dequantize(), expected)
    assert made.tensors["blk.0.attn_q.weight"].kind == "GPTQ4"
    with pytest.raises(UsageError, match="--allow-requantize"):
        convert(folder, tmp_path / "out.gguf", Recipe("q8_0"))
