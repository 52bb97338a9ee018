"""The tables: what they read from a file and from a config.json, and everything that they refuse."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm import gguf
from edgelm.arch import ARCHS, Config, Pairing, Role, Rope, TensorSpec, tensors
from edgelm.errors import FormatError, UnsupportedError
from edgelm.formats import QTensor, by_name
from edgelm.weights import Weights

F32 = by_name("F32")


def keys(name: str = "llama-gqa", **changes: Any) -> dict[str, Any]:
    """The metadata of a tiny model; `changes` name keys after the architecture, None removes one."""
    config = Config.from_hf(tiny.hf_config(name))
    kv = config.to_gguf()
    for suffix, value in changes.items():
        full = f"{config.arch}.{suffix.replace('__', '.')}"
        kv.pop(full, None)
        if value is not None:
            kv[full] = value
    return kv


def config(name: str = "llama-gqa", **changes: Any) -> Config:
    return Config.from_gguf(keys(name, **changes))


def named(name: str = "llama-gqa") -> tuple[Config, dict[str, QTensor]]:
    hf = tiny.hf_config(name)
    c = Config.from_hf(hf)
    return c, {key: QTensor.from_array(key, array, F32) for key, (_, array) in tiny.arrays(name, c, hf).items()}


# --- reading ---


@pytest.mark.parametrize("name", tiny.ALL)
def test_gguf_says_what_hugging_face_says(name: str, tmp_path: Path) -> None:
    from_hf = Config.from_hf(tiny.hf_config(name, 3))
    assert Config.from_gguf(from_hf.to_gguf()) == from_hf
    sizes = ("context_length", "embedding_length", "block_count", "attention.head_count", "feed_forward_length")
    assert {f"{from_hf.arch}.{size}" for size in sizes} <= from_hf.to_gguf().keys()
    file = gguf.read(tiny.tiny(name, folder=tmp_path, n_layers=3))
    from_file = Config.from_gguf(file.metadata)
    for field in dataclasses.fields(Config):  # floats go through float32
        ours, theirs = getattr(from_hf, field.name), getattr(from_file, field.name)
        assert theirs == (pytest.approx(ours, rel=1e-6) if isinstance(ours, float) else ours), field.name
    weights = Weights.from_gguf(from_file, file.tensors)
    assert sum(1 for _ in weights) == len(file.tensors)
    assert weights.n_bytes == sum(t.n_bytes for t in file.tensors.values())


def test_a_size_that_only_we_have_a_default_for_is_written() -> None:
    plain = Config.from_hf({**tiny.hf_config("gpt2"), "n_inner": None})
    assert plain.to_gguf()["gpt2.feed_forward_length"] == 4 * plain.dim


def test_gemma3_file(gemma3_path: Path) -> None:
    file = gguf.read(gemma3_path)
    c = Config.from_gguf(file.metadata)
    assert [c.window(i) for i in range(7)] == [512] * 5 + [0, 512]
    assert c.rope(0) == Rope(dim=256, base=1e4, pairing=Pairing.HALVES)
    rope = c.rope(5)
    assert rope is not None
    assert (rope.base, rope.scaling, rope.factor) == (1e6, "none", 1.0)
    assert c.attention_scale == 256**-0.5
    local, full = c.cache_groups()
    assert (local.window, full.window, full.layers) == (512, 0, (5, 11, 17))
    assert len(local.layers) == 15
    w = Weights.from_gguf(c, file.tensors)
    assert w.output is None
    assert w.blk[3].attn_q.weight is file.tensors["blk.3.attn_q.weight"]
    assert w.blk[3].attn_q.bias is None
    assert w.blk[3].attn_qkv is None


def test_windows() -> None:
    assert [config("gemma2", attention__sliding_window_pattern=None).window(i) for i in (0, 1)] == [9, 0]
    assert [config("mistral").window(i) for i in (0, 1)] == [9, 9]
    assert [config("llama-gqa").window(i) for i in (0, 1)] == [0, 0]
    assert [config("qwen2").window(i) for i in (0, 1)] == [0, 0]  # use_sliding_window is false
    every = config("gemma3", block_count=7, attention__sliding_window_pattern=3)
    assert [bool(every.window(i)) for i in range(7)] == [True, True, False, True, True, False, True]
    listed = config("gemma3", attention__sliding_window_pattern=np.array([False, True]))
    assert [listed.window(i) for i in (0, 1)] == [0, 9]
    assert [g.layers for g in listed.cache_groups()] == [(0,), (1,)]
    assert config("gemma2", attention__sliding_window=None).window(0) == 4096


def test_defaults_of_gguf() -> None:
    c = config(attention__head_count_kv=None, rope__freq_base=None)
    assert (c.n_kv_heads, c.head_dim, c.v_head_dim, c.rope_base, c.rope_dim) == (4, 16, 16, 1e4, 16)
    assert c.rope(0) == Rope(16, 1e4, Pairing.INTERLEAVED, orig_context=128)
    assert config(rope__scale_linear=2.0).rope(0) == Rope(
        16, 1e4, Pairing.INTERLEAVED, scaling="linear", factor=2.0, orig_context=128
    )
    tokens = {**keys(), "tokenizer.ggml.tokens": ["a", "b", "c"]}
    assert Config.from_gguf(tokens).vocab_size == 3
    deep = keys("gemma3", block_count=62, attention__sliding_window_pattern=None)
    assert Config.from_gguf(deep).attention_scale == (64 // 4) ** -0.5
    bert = config("bert-cls")
    assert (bert.pooling, bert.causal, bert.activation, bert.rope(0)) == ("cls", False, "gelu_erf", None)
    assert (bert.max_position, config().max_position) == (128, 0)
    assert bert.norm_eps == 1e-12


def test_old_ways_of_config_json() -> None:
    hf = tiny.hf_config("llama-gqa")
    linear = Config.from_hf({**hf, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (linear.rope_base, linear.rope_scaling, linear.rope_factor) == (5e5, "linear", 2.0)
    plain = Config.from_hf({**hf, "rope_scaling": None, "head_dim": None})
    assert plain == Config.from_hf(hf)
    nested = Config.from_hf({"architectures": hf["architectures"], "text_config": hf})
    assert nested == plain
    phi = tiny.hf_config("phi3-longrope")
    rope = phi.pop("rope_parameters")
    su = {"type": "su", **{k: rope[k] for k in ("short_factor", "long_factor")}}
    c = Config.from_hf({**phi, "rope_theta": 1e4, "rope_scaling": su})
    assert c == Config.from_hf(tiny.hf_config("phi3-longrope"))
    assert c.rope_attn_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))
    gemma = tiny.hf_config("gemma3")
    del gemma["rope_parameters"], gemma["layer_types"]
    old = Config.from_hf({**gemma, "rope_theta": 1e6, "rope_local_base_freq": 5e3, "sliding_window_pattern": 2})
    assert (old.rope_base, old.rope_base_local, old.windowed) == (1e6, 5e3, (True, False))


def test_to_gguf_leaves_defaults_out() -> None:
    assert set(keys("llama-mha")) == {
        "general.architecture",
        *(
            f"llama.{k}"
            for k in (
                "block_count",
                "embedding_length",
                "vocab_size",
                "context_length",
                "attention.head_count",
                "feed_forward_length",
                "attention.layer_norm_rms_epsilon",
            )
        ),
    }
    assert "bert.attention.layer_norm_epsilon" in keys("bert-mean")
    assert keys("bert-mean")["bert.attention.causal"] is False
    assert keys("bert-mean")["bert.pooling_type"] == 1


# --- refusing ---


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        *((k, None, FormatError) for k in ("block_count", "embedding_length", "context_length", "feed_forward_length")),
        *((k, None, FormatError) for k in ("attention.head_count", "attention.layer_norm_rms_epsilon", "vocab_size")),
        *(("block_count", v, FormatError) for v in (0, -1, 1025, 1 << 40, 2.0, "2", True)),
        *(("embedding_length", v, FormatError) for v in (0, 1 << 40)),
        *(("attention.head_count", v, FormatError) for v in (0, 3, 1 << 40)),
        *(("attention.head_count_kv", v, FormatError) for v in (0, 3, 8)),
        *(("attention.key_length", v, FormatError) for v in (0, 15, 1 << 40)),
        *(("rope.dimension_count", v, FormatError) for v in (0, 7, 18)),
        *(("attention.layer_norm_rms_epsilon", v, FormatError) for v in (0.0, -1e-5, math.nan, math.inf, "x")),
        *(("rope.freq_base", v, FormatError) for v in (0.0, -1.0, math.nan, math.inf)),
        *(("rope.scaling.factor", v, FormatError) for v in (-1.0, math.nan, math.inf)),
        *(("vocab_size", v, FormatError) for v in (0, -5, 1 << 40)),
        *(("context_length", v, FormatError) for v in (0, 1 << 40)),
        *(("attention.sliding_window_pattern", v, FormatError) for v in (-1, 9999, "x", np.array([True]))),
        ("attention.sliding_window", -1, FormatError),
        ("pooling_type", 9, FormatError),
        ("pooling_type", 1.0, FormatError),
        ("pooling_type", np.array([1]), UnsupportedError),
        ("pooling_type", 4, UnsupportedError),
        ("attention.head_count", np.array([4, 4]), UnsupportedError),
        ("attention.head_count_kv", np.array([2, 1]), UnsupportedError),
        ("feed_forward_length", np.array([96, 96]), UnsupportedError),
        ("rope.scaling.type", "dynamic", UnsupportedError),
        ("rope.scaling.type", 3, FormatError),
        ("hidden_activation", "mish", UnsupportedError),
        ("hidden_activation", ["silu"], UnsupportedError),
        ("expert_count", 8, UnsupportedError),
        ("attention.max_alibi_bias", 8.0, UnsupportedError),
        ("nextn_predict_layers", 1, UnsupportedError),
        ("some.future.switch", 0, UnsupportedError),
    ],
)
def test_refuses_a_hyperparameter(key: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"llama") as caught:
        config(**{key.replace(".", "__"): value})
    assert len(str(caught.value)) < 200


def test_says_what_is_missing_or_unknown() -> None:
    with pytest.raises(UnsupportedError, match="mixture of experts"):
        config(expert_count=8)
    with pytest.raises(FormatError, match=r"llama\.block_count is missing"):
        config(block_count=None)
    with pytest.raises(UnsupportedError, match=r"llama\.new_thing"):
        config(new_thing=1)
    with pytest.raises(UnsupportedError, match=r"mamba.*llama"):
        Config.from_gguf({"general.architecture": "mamba"})
    with pytest.raises(FormatError, match=r"general\.architecture"):
        Config.from_gguf({})
    with pytest.raises(UnsupportedError, match="FooForCausalLM"):
        Config.from_hf({"architectures": ["FooForCausalLM"]})
    with pytest.raises(UnsupportedError):
        Config.from_hf({})
    with pytest.raises(FormatError, match="hidden_size"):
        Config.from_hf({"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.5})
    with pytest.raises(FormatError, match=r"config\.json"):
        Config.from_hf({"architectures": ["LlamaForCausalLM"], "rope_scaling": 7})
    assert config(expert_count=0, rope__scaling__finetuned=True, tensor_data_layout="Meta AI original pth") == config()


@settings(max_examples=300)
@given(
    st.sampled_from(["llama-yarn", "gemma3", "bert-mean", "phi3-longrope"]),
    st.dictionaries(
        st.integers(0, 60),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-(1 << 63), 1 << 64),
            st.floats(),
            st.text(max_size=5),
            st.lists(st.text(max_size=2), max_size=3),
            st.lists(st.integers(0, 9), max_size=3).map(np.array),
        ),
        max_size=4,
    ),
)
def test_any_value_anywhere(name: str, changes: dict[int, Any]) -> None:
    kv = keys(name)
    arch = kv["general.architecture"]
    known = [key for f in dataclasses.fields(Config)[1:] for key in f.metadata["gguf"].split("|")]
    for at, value in changes.items():
        kv[f"{arch}.{known[at % len(known)]}"] = value
    try:
        c = Config.from_gguf(kv)
    except (FormatError, UnsupportedError):
        return
    c.cache_groups()
    assert c.rope(c.n_layers - 1) is None or c.rope_dim <= c.head_dim


# --- weights ---


def refused(c: Config, w: dict[str, QTensor], match: str) -> None:
    with pytest.raises(FormatError, match=match):
        Weights.from_gguf(c, w)


def test_refuses_tensors() -> None:
    c, w = named()
    for name in ("token_embd.weight", "output_norm.weight", "blk.1.ffn_down.weight", "blk.0.attn_q.weight"):
        refused(c, {k: t for k, t in w.items() if k != name}, rf"{name}.*missing")
    extra = QTensor.from_array("blk.2.attn_q.weight", np.zeros((64, 64)), F32)
    refused(c, {**w, "blk.2.attn_q.weight": extra}, r"2 layers.*blk\.2\.attn_q\.weight")
    refused(c, {**w, "x" * 10_000: extra}, "xxx")
    short = QTensor.from_array("token_embd.weight", np.zeros((100, 64)), F32)
    refused(c, {**w, "token_embd.weight": short}, r"token_embd.weight has shape \(100, 64\).*\(512, 64\)")
    flat = QTensor.from_array("blk.0.attn_q.weight", np.zeros(64 * 64), F32)
    refused(c, {**w, "blk.0.attn_q.weight": flat}, "shape")
    norm = QTensor.from_array("output_norm.weight", np.zeros(64), by_name("Q8_0"))
    refused(c, {**w, "output_norm.weight": norm}, "Q8_0")
    fused = QTensor.from_array("blk.0.attn_qkv.weight", np.zeros((128, 64)), F32)
    refused(c, {**w, "blk.0.attn_qkv.weight": fused}, r"both blk\.0\.attn_q\.weight and blk\.0\.attn_qkv\.weight")
    bias = QTensor.from_array("blk.0.attn_q.bias", np.zeros(64), F32)
    only = {k: t for k, t in w.items() if not k.startswith(("blk.0.attn_q.", "blk.0.attn_k.", "blk.0.attn_v."))}
    assert Weights.from_gguf(c, {**only, "blk.0.attn_qkv.weight": fused}).blk[0].attn_q is None
    refused(c, {**only, "blk.0.attn_qkv.weight": fused, "blk.0.attn_q.bias": bias}, "both")
    scale = QTensor.from_array("blk.0.attn_q.scale", np.zeros(2), F32)
    refused(c, {**w, "blk.0.attn_q.scale": scale}, r"\(1,\)")
    c2, w2 = named("qwen2")
    del w2["output.weight"]
    alone = QTensor.from_array("output.bias", np.zeros(512), F32)
    refused(c2, {**w2, "output.bias": alone}, r"output\.bias")
    refused(dataclasses.replace(c, n_layers=3, windowed=(True,) * 3), w, r"blk\.2\..*missing")


def test_only_known_names_are_attributes() -> None:
    w = Weights.from_gguf(*named())
    assert w.position_embd is None  # other models have it
    assert w.blk[0].post_ffw_norm is None
    for owner, name in ((w, "atn_norm"), (w.blk[0], "attn_qq"), (w.blk[0], "token_embd"), (w, "blk_0")):
        with pytest.raises(AttributeError, match=name):
            getattr(owner, name)


# --- the tables themselves ---


@pytest.mark.parametrize("arch", ARCHS)
def test_a_table_is_sound(arch: str) -> None:
    specs = ARCHS[arch].tensors
    names = [spec.gguf for spec in specs]
    assert len(names) == len(set(names))
    for spec in specs:
        assert spec.gguf.endswith((".weight", ".bias"))
        assert (spec.role is Role.VECTOR) == (len(spec.shape) == 1)
        assert spec.unless in ("", *names)
        assert spec.hf == "" or ("{i}" in spec.hf) == ("{i}" in spec.gguf)
    sources = [spec.hf for spec in specs if spec.hf]
    assert len(sources) == len(set(sources))


def test_rows_of_llama_are_permuted() -> None:
    c = config(embedding_length=4, attention__head_count=2, attention__head_count_kv=1, attention__key_length=6)
    c = dataclasses.replace(c, rope_dim=6)
    spec = next(t for t in tensors(c) if t.gguf == "blk.0.attn_q.weight")
    rows = np.arange(12)[:, None] * np.ones((1, 4))
    assert spec.from_hf(rows, c)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    bias = next(t for t in tensors(c) if t.gguf == "blk.0.attn_k.bias")
    assert bias.from_hf(np.arange(6), c).tolist() == [0, 3, 1, 4, 2, 5]


def test_offset_and_transposition() -> None:
    c = config()
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(TensorSpec("x", "x", (3, 2), transpose=True).from_hf(array, c), array.T)
    shifted = TensorSpec("x", "x", (3, 2), offset=1.0).from_hf(array, c)
    assert shifted.dtype == np.float32
    assert np.array_equal(shifted, array + 1)
