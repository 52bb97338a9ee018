"""A Hugging Face config.json, with what its authors moved around over the years in one place.

`edgelm.arch` names the keys that come out; this only knows where older and newer files keep them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def normalised(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parsed file, flat: a text model's own part on top, everything about RoPE under "rope", no unused window."""
    config = {**config, **(config.get("text_config") or {})}
    if not config.get("use_sliding_window", True):
        config["sliding_window"] = None
    if scalar := config.get("query_pre_attn_scalar"):
        config["query_pre_attn_scalar"] = scalar**-0.5
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "full_attention" in rope:
        config.setdefault("rope_local_base_freq", rope.get("sliding_attention", {}).get("rope_theta"))
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
