"""all-MiniLM-L6-v2 as a GGUF file, made from its Hugging Face folder by the tables of `edgelm.architectures`."""

from __future__ import annotations

import json
from pathlib import Path

import tiny

from edgelm.arch import Config, Role, tensors
from edgelm.formats import QTensor, by_name


def convert(folder: Path, path: Path, fmt: str = "F32") -> Path:
    """Writes `path` with the matrices in the format `fmt`."""
    from safetensors.numpy import load_file

    config = Config.from_hf({**json.loads((folder / "config.json").read_text()), "pooling_type": 1})
    arrays = load_file(folder / "model.safetensors")
    arrays = {name.removeprefix("bert."): array for name, array in arrays.items()}
    weights = {}
    for spec in tensors(config):
        if spec.hf in arrays:
            small = spec.role is Role.VECTOR or spec.gguf.startswith(("position_embd", "token_types"))
            array = spec.from_hf(arrays[spec.hf], config)
            weights[spec.gguf] = QTensor.from_array(spec.gguf, array, by_name("F32" if small else fmt))
    keys = {**config.to_gguf(), "general.name": "all-MiniLM-L6-v2", **_vocabulary(folder / "vocab.txt")}
    tiny.write(path, {"bert.pooling_type": 1, **keys}, weights)
    return path


def _vocabulary(path: Path) -> dict[str, object]:
    pieces = path.read_text(encoding="utf-8").splitlines()
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    tokens = [p if p in special else p[2:] if p.startswith("##") else "▁" + p for p in pieces]
    ids = {p: i for i, p in enumerate(pieces)}
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if p in special else 1 for p in pieces],
        "tokenizer.ggml.bos_token_id": ids["[CLS]"],
        "tokenizer.ggml.eos_token_id": ids["[SEP]"],
        "tokenizer.ggml.cls_token_id": ids["[CLS]"],
        "tokenizer.ggml.seperator_token_id": ids["[SEP]"],
        "tokenizer.ggml.unknown_token_id": ids["[UNK]"],
        "tokenizer.ggml.padding_token_id": ids["[PAD]"],
        "tokenizer.ggml.mask_token_id": ids["[MASK]"],
    }
