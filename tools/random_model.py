"""Write a GGUF file of random weights in the shape of a known model, to time engines on: speed asks for no sense.

    python tools/random_model.py llama-3.2-1b q4_k_m OUT.gguf
    python tools/random_model.py qwen3-0.6b q8_0 OUT.gguf

Needs the packages gguf and NumPy. Which tensor has which type follows llama.cpp's rules for a mix; the blocks
themselves are random bits under scales that give weights of the usual size.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from blocks import random_blocks  # noqa: E402

from edgelm.formats import QTensor, by_name  # noqa: E402


@dataclass(frozen=True)
class Shape:
    arch: str
    n_vocab: int
    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn: int
    rope_base: float
    pre: str
    qk_norm: bool = False


SHAPES = {
    "llama-3.2-1b": Shape("llama", 128256, 16, 2048, 32, 8, 64, 8192, 500000.0, "llama-bpe"),
    "qwen3-0.6b": Shape("qwen3", 151936, 28, 1024, 16, 8, 128, 3072, 1000000.0, "qwen2", True),
}
# name of a mix: the type of most matrices, that of the (tied) embedding, that of attn_v and ffn_down in some layers
MIXES = {
    "f16": ("F16", "F16", "F16"),
    "bf16": ("BF16", "BF16", "BF16"),
    "q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    "q4_0": ("Q4_0", "Q6_K", "Q4_0"),
    "q4_k_m": ("Q4_K", "Q6_K", "Q6_K"),
    "q5_k_m": ("Q5_K", "Q6_K", "Q6_K"),
    "q6_k": ("Q6_K", "Q6_K", "Q6_K"),
}
FILE_TYPES = {
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
    "q4_k_m": "MOSTLY_Q4_K_M",
    "q5_k_m": "MOSTLY_Q5_K_M",
    "q6_k": "MOSTLY_Q6_K",
}  # some readers refuse a file that does not name its mix
SEED, CHUNK, SPREAD = 1, 1 << 20, 0.02  # SPREAD: standard deviation of a weight


def more_bits(layer: int, n_layers: int) -> bool:
    """llama.cpp's choice of layers that a mix favours: the first and last eighth and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2


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


def write(shape: Shape, mix: str, path: str) -> None:
    main, embedding, favoured = MIXES[mix]
    rng = np.random.default_rng(SEED)
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_name("random weights")
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[mix]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(131072)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(shape.pre)
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = alphabet + [f"t{i}" for i in range(shape.n_vocab - len(alphabet) - 1)] + ["<|end|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (shape.n_vocab - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(shape.n_vocab - 1)
    writer.add_eos_token_id(shape.n_vocab - 1)
    writer.add_add_bos_token(False)

    def matrix(name: str, type_name: str, n_rows: int, n_cols: int) -> None:
        kind = gguf.GGMLQuantizationType[type_name]
        data = random_matrix(type_name, n_rows, n_cols, rng)
        writer.add_tensor(f"{name}.weight", data.view(np.float16) if type_name == "F16" else data, raw_dtype=kind)

    def ones(name: str, n: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(n, np.float32))

    matrix("token_embd", embedding, shape.n_vocab, shape.dim)
    for i in range(shape.n_layers):
        better = favoured if more_bits(i, shape.n_layers) else main
        q, kv, block = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim, f"blk.{i}"
        ones(f"{block}.attn_norm", shape.dim)
        matrix(f"{block}.attn_q", main, q, shape.dim)
        matrix(f"{block}.attn_k", main, kv, shape.dim)
        matrix(f"{block}.attn_v", better, kv, shape.dim)
        matrix(f"{block}.attn_output", main, shape.dim, q)
        if shape.qk_norm:
            ones(f"{block}.attn_q_norm", shape.head_dim)
            ones(f"{block}.attn_k_norm", shape.head_dim)
        ones(f"{block}.ffn_norm", shape.dim)
        matrix(f"{block}.ffn_gate", main, shape.ffn, shape.dim)
        matrix(f"{block}.ffn_up", main, shape.ffn, shape.dim)
        matrix(f"{block}.ffn_down", better, shape.dim, shape.ffn)
    ones("output_norm", shape.dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("mix", choices=MIXES)
    parser.add_argument("out")
    args = parser.parse_args()
    write(SHAPES[args.shape], args.mix, args.out)


if __name__ == "__main__":
    main()
