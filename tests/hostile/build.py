"""GGUF files byte by byte, with every field open to lies. Independent of the reader and of the `gguf` package.

gguf_file(keys=[key("general.name", STRING, "x")], tensors=[Tensor("t", (2, 3), F32_TYPE, bytes(24))])
llama(keys={"llama.block_count": (U32, 2**31)})           a tiny valid llama model but for that
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
F32_TYPE, F16_TYPE, Q8_0_TYPE, I32_TYPE = 0, 1, 8, 26
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


def number(kind: int, value: Any) -> bytes:
    return struct.pack("<" + _CODES[kind], value)


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return number(U64, len(raw) if length is None else length) + raw


def value(kind: int, content: Any) -> bytes:
    """The bytes of a value; an array's content is (kind of its items, items) or (kind, items, declared length)."""
    if kind == STRING:
        return string(content)
    if kind != ARRAY:
        return number(kind, content)
    item_kind, items, *length = content
    return number(U32, item_kind) + number(U64, *length or [len(items)]) + b"".join(value(item_kind, i) for i in items)


def key(name: str | bytes, kind: int, content: Any = b"", *, raw: bytes | None = None) -> bytes:
    return string(name) + number(U32, kind) + (value(kind, content) if raw is None else raw)


@dataclass(frozen=True)
class Tensor:
    """dims innermost first, as in the file; offset None: right behind the tensor before."""

    name: str | bytes
    dims: tuple[int, ...]
    type: int
    data: bytes
    offset: int | None = None
    n_dims: int | None = None


def gguf_file(
    keys: Sequence[bytes] = (),
    tensors: Sequence[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
    cut: int | None = None,
) -> bytes:
    """A GGUF file that says what it is told to say. `cut`: bytes to drop at the end (to add, when negative)."""
    out = magic + number(U32, version)
    out += number(U64, len(tensors) if n_tensors is None else n_tensors)
    out += number(U64, len(keys) if n_keys is None else n_keys) + b"".join(keys)
    body = b""
    for tensor in tensors:
        body += bytes(-len(body) % alignment)
        offset = len(body) if tensor.offset is None else tensor.offset
        n_dims = len(tensor.dims) if tensor.n_dims is None else tensor.n_dims
        out += string(tensor.name) + number(U32, n_dims)
        out += b"".join(number(U64, n) for n in tensor.dims) + number(U32, tensor.type) + number(U64, offset)
        body += tensor.data
    out += bytes(-len(out) % alignment) + body
    return out if not cut else out[:-cut] if cut > 0 else out + bytes(-cut)


# ------------------------------------------------------------------------------------------- a tiny valid llama model

N_LAYERS, DIM, FFN, HEADS, KV_HEADS, CONTEXT = 1, 32, 64, 2, 1, 64
PIECES = ["▁", "e", "t", "a", "o", "▁t", "he", "▁the", "▁a", "on"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
LLAMA_KEYS: dict[str, tuple[int, Any]] = {
    "general.architecture": (STRING, "llama"),
    "general.name": (STRING, "tiny"),
    "llama.block_count": (U32, N_LAYERS),
    "llama.context_length": (U32, CONTEXT),
    "llama.embedding_length": (U32, DIM),
    "llama.feed_forward_length": (U32, FFN),
    "llama.attention.head_count": (U32, HEADS),
    "llama.attention.head_count_kv": (U32, KV_HEADS),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "llama.rope.dimension_count": (U32, DIM // HEADS),
    "llama.rope.freq_base": (F32, 10000.0),
    "llama.vocab_size": (U32, len(TOKENS)),
    "tokenizer.ggml.model": (STRING, "llama"),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, TOKENS)),
    "tokenizer.ggml.scores": (ARRAY, (F32, [0.0] * 259 + [-float(i) for i in range(len(PIECES))])),
    "tokenizer.ggml.token_type": (ARRAY, (I32, [2, 3, 3] + [6] * 256 + [1] * len(PIECES))),
    "tokenizer.ggml.bos_token_id": (U32, 1),
    "tokenizer.ggml.eos_token_id": (U32, 2),
    "tokenizer.ggml.unknown_token_id": (U32, 0),
}


def llama_tensors() -> dict[str, Tensor]:
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (DIM, len(TOKENS)), "output_norm.weight": (DIM,)}
    for i in range(N_LAYERS):
        n_kv = DIM // HEADS * KV_HEADS
        for name, dims in {
            "attn_norm": (DIM,), "attn_q": (DIM, DIM), "attn_k": (DIM, n_kv), "attn_v": (DIM, n_kv),
            "attn_output": (DIM, DIM), "ffn_norm": (DIM,), "ffn_gate": (DIM, FFN), "ffn_up": (DIM, FFN),
            "ffn_down": (FFN, DIM),
        }.items():  # fmt: skip
            shapes[f"blk.{i}.{name}.weight"] = dims
    return {
        name: Tensor(name, dims, F32_TYPE, (rng.normal(size=dims) * 0.1 + (len(dims) == 1)).astype("<f4").tobytes())
        for name, dims in shapes.items()
    }


def llama(
    keys: Mapping[str, tuple[int, Any] | None] | None = None, tensors: Mapping[str, Tensor | None] | None = None
) -> bytes:
    """The tiny model with some keys and tensors replaced, added, or (None) left out."""
    all_keys, all_tensors = {**LLAMA_KEYS, **(keys or {})}, {**llama_tensors(), **(tensors or {})}
    return gguf_file(
        [key(name, *content) for name, content in all_keys.items() if content is not None],
        [replace(tensor, name=name) for name, tensor in all_tensors.items() if tensor is not None],
    )
