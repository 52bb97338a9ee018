"""A Hugging Face config.json, with what its authors moved around over the years in one place.

`edgelm.arch` names the keys that come out; this only knows where older and newer files keep them, which keys say
nothing about the mathematics, and which may say only one thing. Any other key is an error: it may be a feature that
edgelm does not have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import UnsupportedError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys without a bearing on what an inference computes from given tensors (whether a bias is there, the tensors say).
_IGNORED = _words(
    """
    architectures model_type torch_dtype dtype transformers_version auto_map name_or_path tie_word_embeddings
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id use_cache cache_implementation use_flash_attn attn_implementation use_bfloat16
    torchscript gradient_checkpointing initializer_range initializer_factor init_device attention_dropout
    attention_probs_dropout_prob classifier_dropout hidden_dropout hidden_dropout_prob embd_dropout embd_pdrop
    attn_pdrop resid_pdrop resid_dropout ffn_dropout attention_bias mlp_bias qkv_bias qkv_proj_bias mlp_fc1_bias
    mlp_fc2_bias pretraining_tp unsloth_fixed use_pad_tokenizer_in_ollama unsloth_version max_window_layers
    use_sliding_window task_specific_params problem_type id2label label2id num_labels finetuning_task
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    reorder_and_upcast_attn vocab_file tokenizer_class prefix return_dict output_attentions output_hidden_states
    chunk_size_feed_forward tf_legacy_loss directionality pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type dense_seq_output fused_bias_fc fused_dropout_add_ln
    last_layer_subset pad_vocab_size_multiple max_trained_positions use_xentropy n_special predict_special_tokens
    afn emb_pdrop attn_output_bias quantization_config text_config vision_config boi_token_index eoi_token_index
    image_token_index image_token_id boi_token_id eoi_token_id mm_tokens_per_image max_length min_length do_sample
    early_stopping num_beams num_beam_groups num_return_sequences diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size suppress_tokens encoder_no_repeat_ngram_size
    bad_words_ids begin_suppress_tokens exponential_decay_length_penalty remove_invalid_values output_scores
    forced_bos_token_id forced_eos_token_id return_dict_in_generate pooling_type rope_parameters rope_scaling
    rope_theta rotary_emb_base partial_rotary_factor rope_local_base_freq original_max_position_embeddings rope
    condition_on_chain condition_on_species
    """
)
# Keys of features that edgelm does not have, with the values at which they do nothing; None always does nothing.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False,), "is_encoder_decoder": (False,), "add_cross_attention": (False,), "causal": (False,),
    "cross_attention_hidden_size": (), "tie_encoder_decoder": (False,), "pruned_heads": ({},), "alibi": (False,),
    "position_embedding_type": ("absolute",), "scale_attn_weights": (True,), "rope_interleaved": (False,),
    "scale_attn_by_inverse_layer_idx": (False,), "clip_qkv": (), "logit_scale": (1,), "residual_multiplier": (1,),
    "embedding_multiplier": (1,), "attention_multiplier": (), "parallel_block": (False,), "prenorm": (False,),
    "parallel_block_tied_norm": (False,), "rotary_emb_fraction": (1,), "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (), "rotary_scaling_factor": (), "use_rms_norm": (False,), "mup_scale": (1,),
    "expert_choice_router": (False,), "moe_every_n_layers": (0,), "num_experts": (0, 1), "num_local_experts": (0, 1),
    "no_rope_layers": (), "use_qk_norm": (False,), "use_bidirectional_attention": (False,),
}  # fmt: skip
_ROPE_KEYS = _words(
    """
    rope_theta rope_type type factor low_freq_factor high_freq_factor original_max_position_embeddings short_factor
    long_factor attention_factor attn_factor beta_fast beta_slow extrapolation_factor partial_rotary_factor finetuned
    dim magnitude
    """
)


def refuse_unknown(config: Mapping[str, Any], known: Iterable[str]) -> None:
    """UnsupportedError for a key of a normalised file that may change the mathematics in a way nobody here knows."""
    known = set(known)
    for key, value in config.items():
        if key in known or key in _IGNORED or key.startswith("_") or value is None:
            continue
        if not any(value == harmless for harmless in _HARMLESS.get(key, ())):
            raise UnsupportedError(f"config.json says {key} = {value!r:.60}, which this version does not know")
    for key in config["rope"]:
        if key not in _ROPE_KEYS:
            raise UnsupportedError(f"config.json scales RoPE by {key!r:.60}, which this version does not know")


def normalised(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The parsed file, flat: a text model's own part on top, everything about RoPE under "rope", no unused window.

    defaults: what transformers assumes for this architecture where a file is silent.
    """
    config = {**defaults, **config, **(config.get("text_config") or {})}
    if not config.get("use_sliding_window", True):
        config["sliding_window"] = None
    elif config.get("max_window_layers") and config.get("layer_types") is None:  # Qwen2: the first layers see all
        n_full, n_layers = config["max_window_layers"], config["num_hidden_layers"]
        config["layer_types"] = ["full_attention" if i < n_full else "sliding_attention" for i in range(n_layers)]
    if trained := config.get("max_trained_positions"):  # Nomic's longer context needs a scaling that nobody writes down
        config["n_positions"] = min(config["n_positions"], trained)
    if scalar := config.get("query_pre_attn_scalar"):
        config["query_pre_attn_scalar"] = scalar**-0.5
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "full_attention" in rope:
        if local := rope.get("sliding_attention", {}).get("rope_theta"):
            config["rope_local_base_freq"] = local
        rope = dict(rope["full_attention"])
    rope.setdefault("rope_theta", config.get("rope_theta", config.get("rotary_emb_base")))
    rope.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if partial := rope.get("partial_rotary_factor") or config.get("partial_rotary_factor"):
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        rope["dim"] = int(head_dim * partial)
    kind = rope.setdefault("rope_type", rope.get("type"))
    if kind == "llama3":  # its numbers become the tensor rope_freqs: see rope.factors_from_hf
        rope["rope_type"] = rope["factor"] = None
        rope["original_max_position_embeddings"] = None
    elif kind in ("longrope", "su"):  # its lists become tensors, its factor is implied by the context lengths
        rope["magnitude"], rope["factor"] = rope.get("attention_factor") or _longrope_magnitude(config, rope), None
    config["rope"] = rope
    return config


def _longrope_magnitude(config: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    """What Phi-3's authors chose: sqrt(1 + ln(stretch) / ln(original context))."""
    original = rope["original_max_position_embeddings"]
    stretch = config["max_position_embeddings"] / original
    return math.sqrt(1.0 + math.log(stretch) / math.log(original)) if stretch > 1.0 else 1.0
