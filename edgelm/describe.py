"""What a model file holds and what it will need, from its header alone: no weight is read, nothing is packed.

A file that edgelm cannot run is described as far as it can be, with the reason.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import gguf, hub
from .arch import Config
from .errors import EdgelmError, UsageError
from .gguf import GGUF
from .memory import context_window, estimate, transcoded
from .vocabulary import read as read_vocabulary
from .weights import Weights

# general.file_type: what a converter calls the mixture of types in a file (llama.cpp, include/llama.h).
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip


def describe(
    path: str | os.PathLike[str],
    *,
    ctx_size: int = 0,
    kv_type: str = "f16",
    metadata: bool = False,
    tensors: bool = False,
) -> dict[str, Any]:
    """Facts about a model file, or a folder with an ONNX model, as plain values that JSON can hold.

    Args:
        ctx_size: context window that the memory is for; 0 for that of the model.
        kv_type: what keys and values would be stored as.
        metadata, tensors: list every key and every tensor as well.

    Raises:
        SourceError, FormatError: the file cannot be opened, or is broken.
    """
    if hub.is_onnx(Path(path)):
        from . import onnx_folder, onnx_model

        folder = onnx_folder.read(Path(path))
        return onnx_model.describe(folder, ctx_size, metadata=metadata, tensors=tensors)
    return describe_file(gguf.read(path), ctx_size=ctx_size, kv_type=kv_type, metadata=metadata, tensors=tensors)


def describe_file(
    file: GGUF, *, ctx_size: int = 0, kv_type: str = "f16", metadata: bool = False, tensors: bool = False
) -> dict[str, Any]:
    """`describe` for a file that is open."""
    keys = file.metadata
    n_parameters = sum(math.prod(t.shape) for t in file.tensors.values())
    n_weight_bytes = sum(t.n_bytes for t in file.tensors.values())
    types = Counter(t.format.name for t in file.tensors.values())
    declared = keys.get("general.file_type")
    facts: dict[str, Any] = {
        "name": str(keys.get("general.name", "")),
        "path": str(file.paths[0]),
        "files": len(file.paths),
        "architecture": str(keys.get("general.architecture", "")),
        "n_parameters": n_parameters,
        "n_bytes": file.n_bytes,
        "type": FILE_TYPES.get(declared, str(declared)) if isinstance(declared, int) else _most_weights(file),
        "types": dict(types.most_common()),
        "bits_per_weight": 8 * n_weight_bytes / n_parameters if n_parameters else 0.0,
        "license": str(keys.get("general.license", "")),
        "gguf_version": file.version,
    }
    try:
        config = Config.from_gguf(keys)
        weights = Weights.from_gguf(config, file.tensors)
        facts |= _shape(config)
        facts["transcoded"] = transcoded(weights)
        facts["memory"] = _memory(config, weights, ctx_size, kv_type)
        facts |= _packed(file)
        facts["tokenizer"] = _tokenizer(keys)
        template = keys.get("tokenizer.chat_template")
        facts["chat_template"] = "file" if isinstance(template, str) and template else "none"
    except UsageError:
        raise
    except EdgelmError as error:
        facts["not_supported"] = str(error)
    if metadata:
        facts["metadata"] = {key: _shown(value) for key, value in keys.items()}
    if tensors:
        facts["tensors"] = [
            {"name": t.name, "type": t.format.name, "shape": "x".join(map(str, t.shape)), "n_bytes": t.n_bytes}
            for t in file.tensors.values()
        ]
    return facts


def _most_weights(file: GGUF) -> str:
    """The type of most weights, for files that do not say what they are."""
    counts: Counter[str] = Counter()
    for tensor in file.tensors.values():
        counts[tensor.format.name] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0] if counts else ""


def _shape(config: Config) -> dict[str, Any]:
    windows = sorted({config.window(i) for i in range(config.n_layers)} - {0})
    shape: dict[str, Any] = {
        "context_length": config.context_length,
        "layers": config.n_layers,
        "embedding_length": config.dim,
        "feed_forward_length": config.ffn_dim,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
    }
    if windows:
        n_windowed = sum(config.window(i) > 0 for i in range(config.n_layers))
        shape["sliding_window"] = f"{windows[0]} in {n_windowed} of {config.n_layers} layers"
    rope = config.rope(config.n_layers - 1)
    if rope is not None and rope.scaling != "none":
        shape["rope_scaling"] = f"{rope.scaling}, factor {rope.factor:g} from {rope.orig_context}"
    if config.spec.family == "encoder":
        shape["pooling"] = config.pooling
    return shape


def _memory(config: Config, weights: Weights, ctx_size: int, kv_type: str) -> dict[str, Any]:
    n_ctx = context_window(config, ctx_size)
    need = estimate(config, weights, n_ctx, kv_type)
    return {
        "context": n_ctx,
        "kv_type": kv_type,
        "weights": need.weights,
        "kv_cache": need.kv_cache,
        "workspace": need.workspace,
        "total": need.total,
    }


def _packed(file: GGUF) -> dict[str, Any]:
    """The files of packed weights that a start would find."""
    try:
        from .packed import PackedFile

        there = PackedFile.of(file).there()
    except ImportError:  # machines without the kernels
        return {}
    return {"packed_files": {str(path): wrong or "will be used" for path, wrong in there.items()}} if there else {}


def _tokenizer(keys: Mapping[str, Any]) -> dict[str, Any]:
    v = read_vocabulary(keys)
    special = {"bos": v.bos_id, "eos": v.eos_id, "unk": v.unk_id, "pad": v.pad_id, "sep": v.sep_id}
    return {
        "model": v.model,
        "pre": v.pre_name,
        "tokens": len(v.pieces),
        "special": {name: f"{i} {v.pieces[i]}" for name, i in special.items() if i is not None},
        "end_of_generation": [f"{i} {v.pieces[i]}" for i in sorted(v.eog_ids)],
        "adds_bos": v.add_bos,
        "adds_eos": v.add_eos,
    }


def _shown(value: Any) -> Any:
    """A metadata value, with long arrays and texts cut short."""
    if isinstance(value, list | np.ndarray):
        items = value[:8].tolist() if isinstance(value, np.ndarray) else value[:8]
        return [*items, f"… {len(value)} in all"] if len(value) > 8 else items
    return value
