"""ARCHS: every architecture edgelm can run, its tensors by name and the switches of its mathematics.

The one table that a converter (Hugging Face -> GGUF) and the runtime (GGUF -> attributes of `Weights`) both read.
A tensor's name appears nowhere else. Numbers of a single model are `edgelm.arch.Config`.
A new architecture is a new row; where its mathematics is new, also a branch in `edgelm.models`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from .errors import UnsupportedError
from .tensors import Role, TensorSpec, ffn, linear, norm, qkv


class Pairing(Enum):
    """Which two dimensions of a head rotate together."""

    INTERLEAVED = "interleaved"  # (0,1)(2,3)…      llama in GGUF, whose query and key rows are permuted for it
    HALVES = "halves"  # (0,d/2)(1,d/2+1)…  everything else, and all of Hugging Face


@dataclass(frozen=True, kw_only=True)
class Arch:
    """What an architecture is, beside the numbers of one model.

    Attributes:
        hf: the `architectures` of config.json that it stands for.
        tensors: every tensor a file may have; "{i}" stands for each layer.
        family: which function of `edgelm.models` computes it.
        norm: "rms" or "layer".
        pairing: how RoPE pairs dimensions; None = no RoPE.
        scaled_embedding: token embeddings are multiplied by sqrt(dim).
        local_scaling: layers with a window stretch RoPE as the others do.
        defaults: values of Config fields, or functions of the fields above them, where no key says otherwise.
        hf_ignored: patterns of tensors in Hugging Face checkpoints that nothing needs, by their renamed names.
        hf_renamed: (regular expression, replacement): what turns the names of older and of larger checkpoints, one
            after the other, into those of the table.
        hf_defaults: what transformers assumes where config.json is silent, and `Config` would not.
        hf_types: config.json's `model_type` of a class of `hf`, where it is not the architecture's own name.
        hf_keys: the key of config.json that a Config field is written to, where it is not the first one.
    """

    hf: tuple[str, ...]
    tensors: tuple[TensorSpec, ...]
    family: str = "decoder"
    norm: str = "rms"
    pairing: Pairing | None = Pairing.HALVES
    scaled_embedding: bool = False
    local_scaling: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    hf_ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    hf_renamed: tuple[tuple[str, str], ...] = ()
    hf_defaults: Mapping[str, Any] = field(default_factory=dict)
    hf_types: Mapping[str, str] = field(default_factory=dict)
    hf_keys: Mapping[str, str] = field(default_factory=lambda: {"activation": "hidden_act"})


L = "model.layers.{i}."
ATTN, MLP = L + "self_attn.", L + "mlp."


def _ends(offset: float = 0.0, *, output: bool = True) -> tuple[TensorSpec, ...]:
    """Embedding, last norm, and the output layer that a file may lack when it is the embedding again."""
    head = TensorSpec("output.weight", "lm_head.weight", ("vocab_size", "dim"), required=False)
    return (
        TensorSpec("token_embd.weight", "model.embed_tokens.weight", ("vocab_size", "dim"), Role.EMBED),
        *norm("output_norm", "model.norm", offset=offset),
        *((head,) if output else ()),
    )


def _attention(
    *, bias: bool | None = False, out_bias: bool | None = False, permute: bool = False, offset: float = 0.0
) -> tuple[TensorSpec, ...]:
    """Norm, projections and output of Llama's attention."""
    return (
        *norm("blk.{i}.attn_norm", L + "input_layernorm", offset=offset),
        *qkv(ATTN + "q_proj", ATTN + "k_proj", ATTN + "v_proj", bias=bias, permute=permute),
        *linear("blk.{i}.attn_output", ATTN + "o_proj", "dim", "attn_dim", bias=out_bias),
    )


def _qk_norm(offset: float = 0.0) -> tuple[TensorSpec, ...]:
    return (
        *norm("blk.{i}.attn_q_norm", ATTN + "q_norm", "head_dim", offset=offset),
        *norm("blk.{i}.attn_k_norm", ATTN + "k_norm", "head_dim", offset=offset),
    )


def _factors(*names: str) -> tuple[TensorSpec, ...]:
    """Divisors of the RoPE frequencies; Hugging Face computes them from config.json (`edgelm.rope.factors_from_hf`)."""
    return tuple(TensorSpec(f"{name}.weight", "", ("n_rope_pairs",), Role.VECTOR, required=False) for name in names)


FFN = ffn(MLP + "gate_proj", MLP + "up_proj", MLP + "down_proj")
LLAMA_FFN = (*norm("blk.{i}.ffn_norm", L + "post_attention_layernorm"), *FFN)
GEMMA_POST_NORMS = (
    *norm("blk.{i}.post_attention_norm", L + "post_attention_layernorm", offset=1.0),
    *norm("blk.{i}.ffn_norm", L + "pre_feedforward_layernorm", offset=1.0),
    *norm("blk.{i}.post_ffw_norm", L + "post_feedforward_layernorm", offset=1.0),
    *FFN,
)

# What normalises the output of a layer before it is added to the residual stream, in architectures that have it.
POST_NORMS = {
    "blk.{i}.attn_output.weight": "blk.{i}.post_attention_norm.weight",
    "blk.{i}.ffn_down.weight": "blk.{i}.post_ffw_norm.weight",
}

GEMMA_ACTIVATION = {"hidden_activation": "gelu_pytorch_tanh"}  # early files name the exact one, and do not mean it
# Architectures of which llama.cpp takes it that all heads together are as wide as the stream.
SQUARE_ATTENTION = frozenset({"qwen2", "gpt2", "phi3", "bert", "nomic-bert"})
BERT_RENAMED = ((r"^bert\.", ""), (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def _gemma_scale(n_layers_of_27b: int) -> Callable[[Mapping[str, Any]], float]:
    """The 27B Gemmas scale by the width per head, not by the head; their files do not say so, but their depth does."""
    return lambda c: (c["dim"] // c["n_heads"] if c["n_layers"] == n_layers_of_27b else c["head_dim"]) ** -0.5


def _gpt2_layers() -> tuple[TensorSpec, ...]:
    h = "transformer.h.{i}."
    return (
        *norm("blk.{i}.attn_norm", h + "ln_1", bias=True),
        *qkv(fused=h + "attn.c_attn", bias=True, transpose=True),
        *linear("blk.{i}.attn_output", h + "attn.c_proj", "dim", "attn_dim", bias=True, transpose=True),
        *norm("blk.{i}.ffn_norm", h + "ln_2", bias=True),
        *ffn("", h + "mlp.c_fc", h + "mlp.c_proj", bias=True, transpose=True),
    )


def _bert_embedding(layer_norm: str) -> tuple[TensorSpec, ...]:
    words, kinds = "embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"
    return (
        TensorSpec("token_embd.weight", words, ("vocab_size", "dim"), Role.EMBED),
        TensorSpec("token_types.weight", kinds, ("n_token_types", "dim"), Role.EMBED, required=False),
        *norm("token_embd_norm", layer_norm, bias=True),
    )


def _bert_layers() -> tuple[TensorSpec, ...]:
    h = "encoder.layer.{i}."
    a = h + "attention."
    return (
        *qkv(a + "self.query", a + "self.key", a + "self.value", bias=True),
        *linear("blk.{i}.attn_output", a + "output.dense", "dim", "attn_dim", bias=True),
        *norm("blk.{i}.attn_output_norm", a + "output.LayerNorm", bias=True),
        *ffn("", h + "intermediate.dense", h + "output.dense", bias=True),
        *norm("blk.{i}.layer_output_norm", h + "output.LayerNorm", bias=True),
    )


def _nomic_layers() -> tuple[TensorSpec, ...]:
    h = "encoder.layers.{i}."
    return (
        *qkv(fused=h + "attn.Wqkv"),
        *linear("blk.{i}.attn_output", h + "attn.out_proj", "dim", "attn_dim"),
        *norm("blk.{i}.attn_output_norm", h + "norm1", bias=True),
        *ffn(h + "mlp.fc12", h + "mlp.fc11", h + "mlp.fc2"),
        *norm("blk.{i}.layer_output_norm", h + "norm2", bias=True),
    )


ARCHS: dict[str, Arch] = {
    "llama": Arch(
        hf=("LlamaForCausalLM", "MistralForCausalLM"),
        hf_types={"MistralForCausalLM": "mistral"},
        tensors=(
            *_ends(),
            *_factors("rope_freqs", "rope_factors_long", "rope_factors_short"),
            *_attention(bias=None, out_bias=None, permute=True),
            *norm("blk.{i}.ffn_norm", L + "post_attention_layernorm"),
            *ffn(MLP + "gate_proj", MLP + "up_proj", MLP + "down_proj", bias=None),
        ),
        pairing=Pairing.INTERLEAVED,
    ),
    "qwen2": Arch(
        hf=("Qwen2ForCausalLM",),
        tensors=(
            *_ends(),
            TensorSpec("output.bias", "", ("vocab_size",), Role.VECTOR, required=False),
            *_attention(bias=True),
            *LLAMA_FFN,
        ),
    ),
    "qwen3": Arch(hf=("Qwen3ForCausalLM",), tensors=(*_ends(), *_attention(), *_qk_norm(), *LLAMA_FFN)),
    "gemma": Arch(
        hf=("GemmaForCausalLM",),
        tensors=(
            *_ends(1.0, output=False),
            *_attention(offset=1.0),
            *norm("blk.{i}.ffn_norm", L + "post_attention_layernorm", offset=1.0),
            *FFN,
        ),
        scaled_embedding=True,
        defaults={"activation": "gelu"},
        hf_ignored=("*.rotary_emb.inv_freq", "lm_head.weight"),
        hf_defaults=GEMMA_ACTIVATION,
        hf_keys={},
    ),
    "gemma2": Arch(
        hf=("Gemma2ForCausalLM",),
        tensors=(*_ends(1.0, output=False), *_attention(offset=1.0), *GEMMA_POST_NORMS),
        scaled_embedding=True,
        defaults={
            "activation": "gelu",
            "sliding_window": 4096,
            "windowed": 2,
            "attn_softcap": 50.0,
            "final_softcap": 30.0,
            "attention_scale": _gemma_scale(46),
        },
        hf_ignored=("*.rotary_emb.inv_freq", "lm_head.weight"),
        hf_defaults=GEMMA_ACTIVATION,
        hf_keys={},
    ),
    "gemma3": Arch(
        hf=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        hf_types={"Gemma3ForCausalLM": "gemma3_text"},
        hf_keys={},
        tensors=(*_ends(1.0), *_attention(offset=1.0), *_qk_norm(1.0), *GEMMA_POST_NORMS),
        scaled_embedding=True,
        local_scaling=False,
        defaults={
            "activation": "gelu",
            "windowed": 6,
            "rope_base_local": 10000.0,
            "attention_scale": _gemma_scale(62),
        },
        hf_ignored=("*.rotary_emb.inv_freq", "vision_tower.*", "multi_modal_projector.*"),
        hf_renamed=(
            (r"^language_model\.", ""),
            (r"^model\.language_model\.", "model."),
            (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        ),
        hf_defaults={
            **GEMMA_ACTIVATION,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "query_pre_attn_scalar": 256,
        },
    ),
    "gpt2": Arch(
        hf=("GPT2LMHeadModel",),
        tensors=(
            TensorSpec("token_embd.weight", "transformer.wte.weight", ("vocab_size", "dim"), Role.EMBED),
            TensorSpec("position_embd.weight", "transformer.wpe.weight", ("context_length", "dim"), Role.EMBED),
            *_gpt2_layers(),
            *norm("output_norm", "transformer.ln_f", bias=True),
            TensorSpec("output.weight", "lm_head.weight", ("vocab_size", "dim"), required=False),
        ),
        norm="layer",
        pairing=None,
        defaults={"activation": "gelu", "ffn_dim": lambda c: 4 * c["dim"]},
        hf_ignored=("*.attn.bias", "*.attn.masked_bias"),
        hf_renamed=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
        hf_keys={
            "n_layers": "n_layer",
            "dim": "n_embd",
            "context_length": "n_positions",
            "n_heads": "n_head",
            "ffn_dim": "n_inner",
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
        },
    ),
    "phi3": Arch(
        hf=("Phi3ForCausalLM",),
        tensors=(
            *_ends(),
            *_factors("rope_factors_long", "rope_factors_short"),
            *norm("blk.{i}.attn_norm", L + "input_layernorm"),
            *qkv(fused=ATTN + "qkv_proj"),
            *linear("blk.{i}.attn_output", ATTN + "o_proj", "dim", "attn_dim"),
            *norm("blk.{i}.ffn_norm", L + "post_attention_layernorm"),
            TensorSpec("blk.{i}.ffn_up.weight", MLP + "gate_up_proj.weight", ("gate_up_dim", "dim")),  # gate, then up
            *linear("blk.{i}.ffn_down", MLP + "down_proj", "dim", "ffn_dim"),
        ),
    ),
    "bert": Arch(
        hf=("BertModel", "BertForMaskedLM"),
        tensors=(
            *_bert_embedding("embeddings.LayerNorm"),
            TensorSpec(
                "position_embd.weight",
                "embeddings.position_embeddings.weight",
                ("context_length", "dim"),
                Role.EMBED,
            ),
            *_bert_layers(),
        ),
        family="encoder",
        norm="layer",
        pairing=None,
        defaults={"activation": "gelu_erf", "causal": False, "pooling": "mean"},
        hf_keys={"activation": "hidden_act", "norm_eps": "layer_norm_eps"},
        hf_ignored=("embeddings.position_ids", "pooler.*", "cls.*"),
        hf_renamed=BERT_RENAMED,
    ),
    "nomic-bert": Arch(
        hf=("NomicBertModel",),
        hf_types={"NomicBertModel": "nomic_bert"},
        hf_keys={"activation": "hidden_act", "norm_eps": "layer_norm_eps"},
        tensors=(*_bert_embedding("emb_ln"), *_nomic_layers()),
        family="encoder",
        norm="layer",
        defaults={"causal": False, "pooling": "mean"},
        hf_ignored=("*.rotary_emb.inv_freq", "embeddings.position_ids", "pooler.*", "cls.*"),
        hf_renamed=BERT_RENAMED,
    ),
}


def arch_of_hf(name: Any) -> str:
    """The key of ARCHS for a class name of config.json's `architectures`; raises UnsupportedError."""
    for arch, spec in ARCHS.items():
        if name in spec.hf:
            return arch
    known = ", ".join(sorted(hf for spec in ARCHS.values() for hf in spec.hf))
    raise UnsupportedError(f"{name} is not supported; edgelm knows {known}")
