"""Checkpoints read as if an enemy had written them: safetensors headers, indices, config.json; types of numbers."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import hf_folder
import numpy as np
import pytest

from converters import arrays, checkpoint, safetensors_file
from edgelm.arch import Config
from edgelm.errors import EdgelmError, FormatError, SourceError, UnsupportedError, UsageError

# ---------------------------------------------------------------------------------------------------- safetensors


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


BROKEN = {
    "empty": b"",
    "seven bytes": bytes(7),
    "header longer than the file": raw({}, length=1 << 20),
    "header of 2^63 bytes": raw({}, length=1 << 63),
    "no JSON": raw(b"not json"),
    "nested": raw(b"[" * 100_000),
    "a list": raw([]),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "twice": raw(b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": {}}'),
    "no entry": raw({"a": 3}),
    "entry with more": raw({"a": {**entry(), "extra": 1}}, bytes(8)),
    "dtype is a number": raw({"a": entry(3)}, bytes(8)),
    "shape is text": raw({"a": entry(shape="12")}, bytes(8)),
    "negative size": raw({"a": entry(shape=(-2,))}, bytes(8)),
    "true as size": raw({"a": entry(shape=[True, 2])}, bytes(8)),
    "float size": raw({"a": entry(shape=[2.0])}, bytes(8)),
    "too many dimensions": raw({"a": entry(shape=(1,) * 40, end=4)}, bytes(4)),
    "product that would wrap": raw({"a": entry(shape=(4194305, 4194305, 211106198978564))}, bytes(8)),
    "past the end": raw({"a": entry(shape=(4,), end=16)}, bytes(8)),
    "end before begin": raw({"a": entry(shape=(0,), begin=8, end=0)}, bytes(8)),
    "shape and extent differ": raw({"a": entry(shape=(3,))}, bytes(8)),
    "overlap": raw({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)),
    "hole": raw({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)),
    "bytes behind": raw({"a": entry()}, bytes(9)),
    "offset is text": raw({"a": entry(begin="0")}, bytes(8)),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_safetensors(how: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BROKEN[how])
    with pytest.raises(FormatError):
        safetensors_file.read(path)


def test_any_flipped_byte_is_survived(tmp_path: Path) -> None:
    whole = hf_folder.safetensors_bytes({"a": ("F32", (2, 3), bytes(24)), "b": ("BF16", (4,), bytes(8))})
    path, rng = tmp_path / "model.safetensors", np.random.default_rng(0)
    for position in rng.permutation(len(whole) - 32):
        data = bytearray(whole)
        data[position] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            for array in safetensors_file.read(path).values():
                array.read()
        except EdgelmError:
            pass


def test_unknown_types_and_what_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"a": entry("F4")}, bytes(8)))
    with pytest.raises(UnsupportedError, match="F4"):
        safetensors_file.read(path)
    for other in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(SourceError):
            safetensors_file.read(other)


def test_safetensors_as_the_library_reads_them(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.standard_normal((3, 4)).astype(np.float32),
        "a": rng.standard_normal((2, 2, 2)).astype(np.float16),
        "n": np.array(5, np.int64),
        "e": np.zeros((0, 3), np.float32),
        "u": np.arange(4, dtype=np.uint8),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    ours, theirs = safetensors_file.read(path), load_file(path)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].shape == array.shape
        assert np.array_equal(ours[name].read(), array.astype(np.float32))


def test_float8_has_the_values_of_its_definition() -> None:
    e4m3, e5m2 = (arrays.to_float32(np.arange(256, dtype=np.uint8), kind) for kind in ("F8_E4M3", "F8_E5M2"))
    assert (e4m3[0x08], e4m3[0x38], e4m3[0x7E], e4m3[0x01], e4m3[0xB8]) == (2.0**-6, 1.0, 448.0, 2.0**-9, -1.0)
    assert np.isnan(e4m3[[0x7F, 0xFF]]).all() and np.isnan(e4m3).sum() == 2
    assert (e5m2[0x3C], e5m2[0x7B], e5m2[0x01]) == (1.0, 57344.0, 2.0**-16)
    assert np.isinf(e5m2[[0x7C, 0xFC]]).all() and np.isnan(e5m2).sum() == 6
    as_halves = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)  # E5M2 is half of a half
    assert np.array_equal(e5m2, as_halves, equal_nan=True)


# --------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "C:\\x.safetensors", "a\0b", 7]
)
def test_an_index_stays_in_its_folder(name: Any, tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "llama-gqa", shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][min(index["weight_map"])] = name
    path.write_text(json.dumps(index))
    with pytest.raises((FormatError, SourceError)):
        checkpoint.read(folder)


def test_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "llama-gqa", shards=2)
    first, second = sorted(folder.glob("model-*.safetensors"))
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(SourceError, match="missing"):
        checkpoint.read(folder)
    second.write_bytes(first.read_bytes())
    with pytest.raises(FormatError, match="differ about the tensor"):
        checkpoint.read(folder)
    second.write_bytes(whole[:-5])
    with pytest.raises(FormatError):
        checkpoint.read(folder)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "llama-gqa")
    with pytest.raises(UsageError, match="folder"):
        checkpoint.read(folder / "model.safetensors")
    with pytest.raises(SourceError):
        checkpoint.read(tmp_path / "nothing")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"no model\.safetensors"):
        checkpoint.read(folder)
    for text in ("", "[]", "{", '{"architectures": 3}', '{"architectures": ["LlamaForCausalLM"]}'):
        (folder / "config.json").write_text(text)
        with pytest.raises((FormatError, UnsupportedError)):
            checkpoint.read(folder)


@pytest.mark.parametrize("pooling", ["../..", "/etc", 3, None])
def test_the_pooling_of_sentence_transformers_stays_in_its_folder(pooling: Any, tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "bert-cls")
    assert checkpoint.read(folder).config.pooling == "cls"
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": pooling}]))
    with pytest.raises(FormatError):
        checkpoint.read(folder)


# ------------------------------------------------------------------------------------------------------ config.json

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "vocab_size": 100, "intermediate_size": 96, "rms_norm_eps": 1e-5, "max_position_embeddings": 100,
}  # fmt: skip


@pytest.mark.parametrize(
    "extra",
    [
        {"mystery_factor": 1},
        {"logit_scale": 0.5},
        {"num_local_experts": 8},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "mystery": 1}},
        {"rope_scaling": {"type": "mystery", "factor": 2.0}},
        {"alibi": True},
        {"hidden_act": "mystery"},
    ],
)
def test_keys_that_nobody_knows_are_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        Config.from_hf({**LLAMA, **extra})


@pytest.mark.parametrize(
    "extra",
    [{"mystery_factor": None}, {"logit_scale": 1.0}, {"_private": 3}, {"torch_dtype": "float16"}, {"alibi": False}],
)
def test_keys_that_change_nothing_are_passed(extra: dict[str, Any]) -> None:
    assert Config.from_hf({**LLAMA, **extra}) == Config.from_hf(LLAMA)


@pytest.mark.parametrize("strange", [{}, {"a": 1}, [], [1], True, "x", -1, 1e30])
def test_whatever_stands_in_config_json_is_survived(strange: Any) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}  # fmt: skip
    for key in LLAMA:
        with contextlib.suppress(EdgelmError):
            Config.from_hf({**LLAMA, key: strange})
    for key in rope:
        with contextlib.suppress(EdgelmError):
            Config.from_hf({**LLAMA, "rope_scaling": {**rope, key: strange}})


@pytest.mark.parametrize("lie", [{"factor": 0.0}, {"factor": "x"}, {"factor": float("nan")}])
def test_a_scaling_of_rope_that_has_no_factors(lie: dict[str, Any], tmp_path: Path) -> None:
    path = hf_folder.write(tmp_path, "llama3")
    hf = json.loads((path / "config.json").read_text())
    hf["rope_parameters"].update(lie)
    (path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(FormatError, match="scaling of RoPE"):
        checkpoint.read(path)


def test_defaults_that_only_transformers_knows() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 12, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    config = Config.from_hf(
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {"x": 1}}
    )
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert (config.rope_base, config.rope_base_local, config.rope_factor) == (1e6, 1e4, 8.0)
    assert config.windowed == (True, True, True, True, True, False) * 2
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 9, "use_sliding_window": True}
    assert Config.from_hf({**qwen, "max_window_layers": 3}).windowed == (False, False, False, True)
    gemma = {**LLAMA, "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "head_dim": 32}
    assert Config.from_hf(gemma).activation == "gelu"
