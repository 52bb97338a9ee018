"""Tiny random models of every architecture, as GGUF files with a real small vocabulary: what most tests run on.

    path = tiny("qwen3", fmt="Q4_0", folder=tmp_path)

A variant is the config.json of a Hugging Face model; its weights are random, seeded by the names they have there, and
go through the tables of `edgelm.architectures` into the file. `tools/make_golden.py` gives the same weights to
`transformers`.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_vocabulary
from blocks import random_blocks
from numpy.typing import NDArray

from edgelm.arch import Config, Role, TensorSpec, tensors
from edgelm.formats import QTensor, by_name
from edgelm.formats.format import Format
from edgelm.rope import factors_from_hf

VOCAB_SIZE = 512
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Variant:
    """A tiny model: config.json beyond COMMON, vocabulary, and what only GGUF files can be.

    optional: patterns of optional tensors that it has; fused: q, k, v in one tensor; n_ctx: context to run it with.
    """

    arch: str
    hf: dict[str, Any]
    vocabulary: tuple[str, str] = ("bpe", "llama-bpe")
    optional: tuple[str, ...] = ()
    fused: bool = False
    n_ctx: int = 128


def _llama(**hf: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **hf}


_GEMMA = {
    "head_dim": 32,
    "num_key_value_heads": 1,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
_SPM, _GEMMA_SPM = ("spm", ""), ("gemma", "")
_PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0, "sliding_window": None}
_BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
}
_NOMIC = {
    "architectures": ["NomicBertModel"],
    "model_type": "nomic_bert",
    "hidden_act": "silu",
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "rope_theta": 1000.0,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
}

VARIANTS: dict[str, Variant] = {
    "llama-mha": Variant("llama", _llama(num_key_value_heads=4), _SPM),
    "llama-gqa": Variant("llama", _llama()),
    "llama-mqa": Variant("llama", _llama(num_key_value_heads=1, tie_word_embeddings=True)),
    "llama-bias": Variant("llama", _llama(attention_bias=True, mlp_bias=True), optional=("blk.*.bias",)),
    "llama-fused": Variant("llama", _llama(head_dim=32), fused=True),
    "llama-linear": Variant(
        "llama", _llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    ),
    "llama-yarn": Variant(
        "llama",
        _llama(
            rope_parameters={
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
            }
        ),
    ),
    "llama3": Variant(
        "llama",
        _llama(
            rope_parameters={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
            }
        ),
    ),
    "mistral": Variant(
        "llama", {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 9}, _SPM
    ),
    "qwen2": Variant(
        "qwen2",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "sliding_window": 9,
            "use_sliding_window": False,
        },
        ("bpe", "qwen2"),
    ),
    "qwen3": Variant(
        "qwen3", {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}, ("bpe", "qwen2")
    ),
    "gemma": Variant("gemma", {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", **_GEMMA}, _GEMMA_SPM),
    "gemma2": Variant(
        "gemma2",
        {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            **_GEMMA,
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        _GEMMA_SPM,
    ),
    "gemma3": Variant(
        "gemma3",
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            **_GEMMA,
            "sliding_window": 9,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        _GEMMA_SPM,
    ),
    "gpt2": Variant(
        "gpt2",
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        ("bpe", "gpt-2"),
    ),
    "phi3": Variant("phi3", {**_PHI3, "sliding_window": 9}, _SPM),
    "phi3-partial": Variant("phi3", {**_PHI3, "partial_rotary_factor": 0.75}, _SPM),
    "phi3-longrope": Variant(
        "phi3", {**_PHI3, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 32}, _SPM
    ),
    "phi3-longrope-short": Variant(
        "phi3", {**_PHI3, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 64}, _SPM, n_ctx=64
    ),
    "bert-mean": Variant("bert", _BERT, ("wordpiece", ""), ("token_types.weight",)),
    "bert-cls": Variant("bert", {**_BERT, "pooling_type": 2}, ("wordpiece", ""), ("token_types.weight",)),
    "nomic-bert": Variant("nomic-bert", _NOMIC, ("wordpiece", ""), ("token_types.weight",)),
}
ALL = tuple(VARIANTS)
# The names that Hugging Face used before it agreed on those of COMMON.
_OLD_NAMES = {
    "gpt2": {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }
}


def hf_config(name: str, n_layers: int = 2, **overrides: Any) -> dict[str, Any]:
    """The config.json of a variant."""
    hf = {**COMMON, **VARIANTS[name].hf, **overrides, "num_hidden_layers": n_layers}
    if "layer_types" in hf:
        hf["layer_types"] = list(itertools.islice(itertools.cycle(hf["layer_types"]), n_layers))
    if VARIANTS[name].arch in ("gpt2", "bert", "nomic-bert"):
        hf["num_key_value_heads"] = hf["num_attention_heads"]
    if "rope_parameters" in hf:
        del hf["rope_theta"]
    return {_OLD_NAMES.get(hf["model_type"], {}).get(key, key): value for key, value in hf.items()}


def random_array(name: str, shape: tuple[int, ...], scale: float, mean: float = 0.0) -> NDArray[np.float32]:
    """The same numbers for the same name on every machine (RandomState's streams are frozen)."""
    return (mean + scale * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)).astype(np.float32)


def hf_array(spec: TensorSpec, config: Config) -> NDArray[np.float32]:
    """A tensor's random weights as a Hugging Face checkpoint has them."""
    shape = spec.shape_for(config)
    shape = shape[::-1] if spec.transpose else shape
    name = spec.hf or spec.gguf
    if spec.role is Role.MATMUL:
        return random_array(name, shape, spec.shape_for(config)[1] ** -0.5)
    if spec.role is Role.EMBED:
        return random_array(name, shape, 0.5)
    if spec.gguf.endswith(".bias"):
        return random_array(name, shape, 0.2)
    return random_array(name, shape, 0.2, 1.0 - spec.offset)


def hf_specs(name: str, config: Config, hf: dict[str, Any]) -> list[TensorSpec]:
    """The tensors that the Hugging Face model of a variant has."""
    optional = list(VARIANTS[name].optional)
    if not hf["tie_word_embeddings"]:
        optional.append("output.weight")
    return [
        spec
        for spec in tensors(config)
        if spec.hf and (spec.required or any(fnmatch.fnmatch(spec.gguf, pattern) for pattern in optional))
    ]


def arrays(name: str, config: Config, hf: dict[str, Any]) -> dict[str, tuple[Role, NDArray[np.float32]]]:
    """All tensors of a variant's GGUF file in float32: role and array by name."""
    out = {spec.gguf: (spec.role, spec.from_hf(hf_array(spec, config), config)) for spec in hf_specs(name, config, hf)}
    rope = {**hf, **(hf.get("rope_parameters") or {})}
    for factor, array in factors_from_hf(rope, config.rope_base, config.rope_dim).items():
        out[f"{factor}.weight"] = (Role.VECTOR, array)
    if VARIANTS[name].fused:
        for i in range(config.n_layers):
            parts = [out.pop(f"blk.{i}.attn_{letter}.weight")[1] for letter in "qkv"]
            out[f"blk.{i}.attn_qkv.weight"] = (Role.MATMUL, np.concatenate(parts))
    return out


def tiny(name: str, *, fmt: str = "F32", folder: Path, n_layers: int = 2, **overrides: Any) -> Path:
    """Write the variant `name` (one of ALL, or an architecture, meaning its first) with weights in format `fmt`.

    `overrides` change its config.json. Sizes grow to what the blocks of the format need; tables of positions and
    everything one-dimensional stay float32, as in any GGUF file.
    """
    name = name if name in VARIANTS else next(v for v in ALL if VARIANTS[v].arch == name)
    format = by_name(fmt)
    if format.block > 32:
        heads = {"num_attention_heads": 16}
        if VARIANTS[name].hf.get("num_key_value_heads") == COMMON["num_attention_heads"]:
            heads["num_key_value_heads"] = 16
        overrides = {"hidden_size": 256, "intermediate_size": 512, **heads, **overrides}
    hf = hf_config(name, n_layers, **overrides)
    config = Config.from_hf(hf)
    weights = {
        key: quantized(key, format if role is not Role.VECTOR and not key.startswith(_STAY_F32) else by_name("F32"), a)
        for key, (role, a) in arrays(name, config, hf).items()
    }
    path = folder / f"{name}-{fmt}-{n_layers}-{zlib.crc32(repr(overrides).encode()):08x}.gguf"
    write(path, {**metadata(name, config, hf), "general.name": "Tiny"}, weights)
    return path


_STAY_F32 = ("position_embd", "token_types", "rope_")


def metadata(name: str, config: Config, hf: dict[str, Any]) -> dict[str, Any]:
    """All keys of the file but general.name: hyperparameters and vocabulary."""
    return {**config.to_gguf(), **tiny_vocabulary.metadata(*VARIANTS[name].vocabulary, config.vocab_size)}


def quantized(name: str, format: type[Format], array: NDArray[np.float32]) -> QTensor:
    """`array` in a format; where nothing can quantize to it, random blocks of the same size and spread."""
    if format.quantize is not Format.quantize:
        return QTensor.from_array(name, array, format)
    return random_weights(name, format, array.shape, float(array.std()))


def random_weights(name: str, format: type[Format], shape: tuple[int, ...], std: float) -> QTensor:
    """Random bytes as a weight: every code occurs, scales are such that the weights have about the spread `std`."""
    rng = np.random.default_rng(zlib.crc32(f"{name} {format.name}".encode()))
    n_blocks = math.prod(shape) // format.block
    blocks = random_blocks(format, n_blocks, rng)
    if format.name == "MXFP4":
        blocks["e"] = rng.integers(120, 124, n_blocks)  # scales that are powers of two
    elif format.name == "NVFP4":
        blocks["d"] = rng.integers(0x0C, 0x18, blocks["d"].shape)  # scales that are floats of eight bits
    elif format.name == "IQ1_M":
        blocks["scales"][:, 3] = (blocks["scales"][:, 3] & 0xFFF) | 0x1000  # upper bits of a float16
    tensor = _tensor(name, format, shape, blocks)
    scales = [field for field in format.layout.names or () if format.layout[field].kind == "f"]
    if scales:
        factor = std / float(tensor.dequantize().std())
        for field in scales:
            blocks[field] *= factor
        tensor = _tensor(name, format, shape, blocks)
    return tensor


def _tensor(name: str, format: type[Format], shape: tuple[int, ...], blocks: NDArray[Any]) -> QTensor:
    data = blocks.view(np.uint8).reshape(math.prod(shape[:-1]), -1).copy()
    data.flags.writeable = False
    return QTensor(name, format, shape, data)


def write(path: Path, keys: dict[str, Any], weights: dict[str, QTensor]) -> None:
    """Write a GGUF file with the `gguf` package: a second opinion on what our reader makes of it."""
    import gguf

    writer = gguf.GGUFWriter(path, keys["general.architecture"])
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            if key != "general.architecture":  # which the writer writes itself
                writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in weights.items():
        if len(tensor.shape) == 1 and tensor.format.name == "F32":
            writer.add_tensor(name, tensor.dequantize())
            continue
        data = tensor.data.reshape(*tensor.shape[:-1], -1)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(tensor.format.id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
