"""Adapters as peft saves them, for the tiny models: what `tools/make_lora.py` trains not, and the tests read.

CASES say which model, which settings of `peft.LoraConfig`, and how the base differs. The factors are random, seeded by
their names, so that the data beside them need not hold them.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hf_folder
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Case:
    """An adapter: the variant of `tiny.VARIANTS` that it changes, and what LoraConfig is told."""

    variant: str
    settings: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)


_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, Case] = {
    "permuted": Case("llama-gqa", {"r": 4, "lora_alpha": 8, "target_modules": _LLAMA}),
    "rslora": Case("llama-gqa", {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": _LLAMA}),
    "patterns": Case(
        "qwen3",
        {
            "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"v_proj": 3, "layers.1.mlp.down_proj": 16},
        },
    ),
    "head": Case("llama-gqa", {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "tied head": Case("llama-mqa", {"r": 3, "lora_alpha": 3, "target_modules": ["lm_head", "v_proj"]}),
    "tied embedding": Case("llama-mqa", {"r": 3, "lora_alpha": 3, "target_modules": ["embed_tokens", "v_proj"]}),
    "conv1d": Case(
        "gpt2", {"r": 4, "lora_alpha": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}
    ),
    "fused": Case("phi3", {"r": 4, "lora_alpha": 4, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "gemma3": Case("gemma3", {"r": 4, "lora_alpha": 4, "target_modules": _LLAMA}),
    "in full": Case("qwen2", {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "biases": Case("qwen2", {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
}  # fmt: skip


def factor(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The values of a tensor of an adapter."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return (rng.standard_normal(shape) * 0.15).astype(np.float32)


def write(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> Path:
    """An adapter folder: adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    arrays = {name: factor(name, tuple(shape)) for name, shape in shapes.items()}
    write_arrays(folder, arrays)
    return folder


def write_arrays(folder: Path, arrays: dict[str, NDArray[np.float32]]) -> None:
    raw = hf_folder.safetensors_bytes({name: ("F32", a.shape, a.tobytes()) for name, a in arrays.items()})
    (folder / "adapter_model.safetensors").write_bytes(raw)
