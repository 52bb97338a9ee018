"""Hugging Face folders: what was read is written again, from folders and from GGUF files, of every architecture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import hf_folder
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from converters import checkpoint as checkpoints
from converters import hf_export, safetensors_file, tokenizer_check
from converters.checkpoint import Checkpoint
from converters.conversion import Conversion, Options
from converters.hf_config import config_json
from converters.recipe import Recipe, make_plan
from edgelm.arch import ARCHS, Config, tensors
from edgelm.errors import UnsupportedError, UsageError
from edgelm.tokenizer import Tokenizer

FROM_GGUF = [n for n in tiny.ALL if n not in ("llama3", "phi3-longrope", "phi3-longrope-short")]


def exported(checkpoint: Checkpoint, path: Path, type_: str = "f32") -> Path:
    recipe = Recipe(type_)
    plan = make_plan(checkpoint.config, checkpoint.tensors, recipe)
    conversion = Conversion(checkpoint, checkpoint, recipe, Options(format="hf"), plan, {}, ())
    hashes = hf_export.export(conversion, path, lambda draft: {})
    assert hashes.keys() <= checkpoint.tensors.keys()
    return path


def stored(path: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= {name: array.numbers for name, array in safetensors_file.read(file).items()}
    return found


@pytest.mark.parametrize("arch", ARCHS)
@given(st.data())
def test_to_hf_undoes_from_hf(arch: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([n for n in tiny.ALL if tiny.VARIANTS[n].arch == arch]))
    config = Config.from_hf(tiny.hf_config(name))
    spec = data.draw(st.sampled_from(list(tensors(config))))
    shape = spec.shape_for(config)
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    theirs = (rng.integers(-999, 999, shape[::-1] if spec.transpose else shape) / 1024).astype(np.float32)
    ours = spec.from_hf(theirs, config)
    assert ours.shape == shape
    np.testing.assert_array_equal(spec.to_hf(ours, config), theirs)
    np.testing.assert_array_equal(spec.from_hf(spec.to_hf(ours, config), config), ours)


@pytest.mark.parametrize("name", tiny.ALL)
def test_folders_come_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    source = hf_folder.write(tmp_path, name)
    path = exported(checkpoints.read(source), tmp_path / "out")
    there, back = stored(source), stored(path)
    assert there.keys() == back.keys()
    for tensor in there:
        np.testing.assert_array_equal(there[tensor], back[tensor], tensor)
    written = json.loads((path / "config.json").read_text())
    assert {**json.loads((source / "config.json").read_text()), "torch_dtype": "float32"} == written
    assert (path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("dtype", "kind"), [("F16", "f16"), ("BF16", "bf16")])
def test_short_floats_come_back_too(dtype: str, kind: str, tmp_path: Path) -> None:
    source = hf_folder.write(tmp_path, "gemma3", dtype=dtype)
    back = stored(exported(checkpoints.read(source), tmp_path / "out", kind))
    for tensor, values in stored(source).items():
        np.testing.assert_array_equal(values, back[tensor], tensor)


@pytest.mark.parametrize("name", FROM_GGUF)
def test_gguf_files_become_folders_of_the_same_model(name: str, tmp_path: Path) -> None:
    source = checkpoints.read(tiny.tiny(name, folder=tmp_path))
    back = checkpoints.read(exported(source, tmp_path / "out"))
    assert config_json(source.config) == config_json(back.config)
    for tensor, array in back.tensors.items():
        if tensor in source.tensors:
            np.testing.assert_allclose(array.read(), source.tensors[tensor].read(), rtol=2e-7, atol=1e-7)
    if tiny.VARIANTS[name].fused:
        qkv = source.tensors["blk.0.attn_qkv.weight"].read()
        np.testing.assert_array_equal(
            np.concatenate([back.tensors[f"blk.0.attn_{x}.weight"].read() for x in "qkv"]), qkv
        )


def test_heads_whose_size_does_not_follow_from_the_width(tmp_path: Path) -> None:
    """Three heads of 16 in a width of 64, as pruning leaves them."""
    whole = checkpoints.read(tiny.tiny("llama-mha", folder=tmp_path)).config
    fewer = dataclasses.replace(whole, n_heads=3, n_kv_heads=3)
    for start in (None, tiny.hf_config("llama-mha")):
        assert Config.from_hf(config_json(fewer, start)) == fewer


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha", "gemma3", "qwen3", "bert-mean", "gpt2"])
def test_tokenizers_made_from_gguf_cut_text_alike(name: str, tmp_path: Path) -> None:
    import tokenizers

    from converters import calibrate

    source = checkpoints.read(tiny.tiny(name, folder=tmp_path))
    path = exported(source, tmp_path / "out")
    theirs = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    ours = Tokenizer.from_gguf(calibrate.vocabulary(source))
    for text in tokenizer_check.TEXTS:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text, add_special=False), text
        assert theirs.encode(text).ids == ours.encode(text), text


def test_large_models_lie_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_export, "SHARD_BYTES", 100_000)
    source = hf_folder.write(tmp_path, "qwen3")
    path = exported(checkpoints.read(source), tmp_path / "out")
    parts = sorted(p.name for p in path.glob("*.safetensors"))
    assert len(parts) > 2 and parts[0] == f"model-00001-of-{len(parts):05}.safetensors"
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(parts)
    for tensor, values in stored(source).items():
        np.testing.assert_array_equal(stored(path)[tensor], values)


def test_what_a_folder_cannot_hold(tmp_path: Path) -> None:
    source = checkpoints.read(tiny.tiny("llama-gqa", fmt="Q4_0", folder=tmp_path))
    with pytest.raises(UsageError, match="f16 or bf16"):
        exported(source, tmp_path / "out", "copy")
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        exported(checkpoints.read(tiny.tiny("llama3", folder=tmp_path)), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UsageError, match="no empty folder"):
        exported(checkpoints.read(tiny.tiny("llama-gqa", folder=tmp_path)), tmp_path / "full")


def test_bfloat16_is_rounded_to_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, np.inf, -np.inf, 0.0], np.float32)
    bits = np.frombuffer(hf_export.to_bytes(values, "BF16"), "<u2").astype(np.uint32) << 16
    assert bits.view(np.float32).tolist() == [1.0, 1.0, 1 + 2**-6, -1 - 2**-7, np.inf, -np.inf, 0.0]
    nan = np.frombuffer(hf_export.to_bytes(np.array([np.nan], np.float32), "BF16"), "<u2").astype(np.uint32) << 16
    assert np.isnan(nan.view(np.float32)).all()
