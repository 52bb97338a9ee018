"""genai_config.json: what onnxruntime-genai must know of a model beside the graph. After its builder's own files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgelm.arch import Config
from edgelm.errors import FormatError
from edgelm.tokenizer import Tokenizer

from .onnx_graph import MODEL

# Its names for families that it tells apart; any other decoder with this interface is a "decoder".
_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
          "gemma3": "gemma3_text", "phi3": "phi3"}  # fmt: skip
# The defaults of generation_config.json, as GGUF has them.
_SAMPLING = {"temperature": ("temp", 1.0), "top_k": ("top_k", 50), "top_p": ("top_p", 1.0),
             "repetition_penalty": ("penalty_repeat", 1.0)}  # fmt: skip


def genai_config(config: Config, keys: Mapping[str, Any], n_ctx: int, share_buffer: bool) -> dict[str, Any]:
    """The contents of the file for a decoder.

    keys: metadata as GGUF has it; share_buffer: past and present keys may lie in the same memory.
    Raises FormatError for a default of sampling that is no number.
    """
    tokenizer = Tokenizer.from_gguf(keys)
    ends = sorted(tokenizer.eog_ids, key=lambda token: (token != tokenizer.eos_id, token))
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else ends[0] if ends else 0
    chosen = {name: _number(keys, f"general.sampling.{key}", default) for name, (key, default) in _SAMPLING.items()}
    return {
        "model": {
            "bos_token_id": tokenizer.bos_id if tokenizer.bos_id is not None else pad,
            "context_length": n_ctx,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL,
                "head_size": config.head_dim,
                "hidden_size": config.dim,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.n_heads,
                "num_hidden_layers": config.n_layers,
                "num_key_value_heads": config.n_kv_heads,
            },
            "eos_token_id": ends if len(ends) != 1 else ends[0],
            "pad_token_id": pad,
            "type": _TYPES.get(config.arch, "decoder"),
            "vocab_size": config.vocab_size,
        },
        "search": {
            "diversity_penalty": 0.0,
            "do_sample": False,
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": n_ctx,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": share_buffer,
            **chosen,
        },
    }


def _number(keys: Mapping[str, Any], key: str, default: float) -> float:
    value = keys.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FormatError(f"{key} is {value!r:.60}, which is no number")
    return type(default)(value)
