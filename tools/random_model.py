"""Write a GGUF file of random weights in the shape of a known model, to time engines on: speed asks for no sense.

    python tools/random_model.py llama-3.2-1b q4_k_m OUT.gguf
    python tools/random_model.py qwen3-0.6b q8_0 OUT.gguf

Which tensor has which type is the converter's matter (`converters.mixes`: llama.cpp's rules); the blocks themselves are
random bits under scales that give weights of the usual size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from blocks import random_blocks  # noqa: E402

from converters import mixes  # noqa: E402
from converters.gguf_writer import Layout, Planned, write  # noqa: E402
from edgelm.arch import Config, tensors  # noqa: E402
from edgelm.formats import QTensor, by_name  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {  # as config.json has them
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_hidden_layers": 16, "hidden_size": 2048,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "num_hidden_layers": 28, "hidden_size": 1024,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "max_position_embeddings": 131072, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    },
}  # fmt: skip
PRE_TOKENIZERS = {"llama": "llama-bpe", "qwen3": "qwen2"}
SEED, CHUNK, SPREAD = 1, 1 << 20, 0.02  # SPREAD: standard deviation of a weight


def random_matrix(type_name: str, n_rows: int, n_cols: int, rng: np.random.Generator) -> np.ndarray:
    """(n_rows, bytes of a row) blocks of a type."""
    format = by_name(type_name)
    n = n_rows * n_cols // format.block
    if type_name == "F16":
        some = (rng.standard_normal(min(n, CHUNK), np.float32) * SPREAD).astype(np.float16)
    elif type_name == "BF16":
        some = (rng.standard_normal(min(n, CHUNK), np.float32) * SPREAD).view(np.uint32) >> 16
        some = some.astype(np.uint16)
    else:
        some = random_blocks(format, min(n, CHUNK // format.block), rng)
        bytes_ = some.view(np.uint8).reshape(len(some), -1)
        size = QTensor("", format, (len(some), format.block), bytes_).dequantize().std()
        for name in some.dtype.names or ():
            if some.dtype[name].kind == "f":
                some[name] = some[name] * (SPREAD / size)
    return np.resize(some.view(np.uint8), n_rows * format.row_bytes(n_cols)).reshape(n_rows, -1)


def vocabulary(n: int, pre: str) -> dict[str, Any]:
    """All bytes, made-up words, and an end."""
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": alphabet + [f"t{i}" for i in range(n - len(alphabet) - 1)] + ["<|end|>"],
        "tokenizer.ggml.token_type": [1] * (n - 1) + [3],
        "tokenizer.ggml.merges": ["t 1"],
        "tokenizer.ggml.bos_token_id": n - 1,
        "tokenizer.ggml.eos_token_id": n - 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def save(config: Config, mix: mixes.Mix, path: Path) -> None:
    """Writes the file. Its type is named: some readers refuse a file that does not say it."""
    keys = config.to_gguf()
    keys |= {"general.name": "random weights", "general.quantization_version": 2, "general.file_type": mix.file_type}
    keys |= vocabulary(config.vocab_size, PRE_TOKENIZERS[config.arch])
    separate = [spec for spec in tensors(config) if spec.required and not spec.unless.endswith("attn_q.weight")]
    shapes = {spec.gguf: spec.shape_for(config) for spec in separate}  # queries, keys and values each on their own
    types = mixes.assign(mix, config, shapes, has_imatrix=False)
    planned = [Planned(name, shape, by_name(types.get(name, "F32"))) for name, shape in shapes.items()]
    rng = np.random.default_rng(SEED)

    def contents(tensor: Planned) -> list[np.ndarray]:
        if len(tensor.shape) == 1:
            return [np.ones(tensor.shape, np.float32).view(np.uint8)]
        return [random_matrix(tensor.format.name, *tensor.shape, rng)]

    write(path, Layout(keys, planned), contents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("mix", type=mixes.mix, help="q4_0, q4_k_m, q8_0, f16 …")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    save(Config.from_hf(SHAPES[args.shape]), args.mix, args.out)


if __name__ == "__main__":
    main()
