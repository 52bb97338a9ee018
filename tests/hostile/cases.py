"""Hostile and broken model files by name. Each must soon give a FormatError, an UnsupportedError or a correct answer.

CONTAINER   the GGUF reader itself must refuse them
MODEL       well-formed GGUF files whose content makes no model: refused when the model is built
CASES       both; each value is a function that makes the bytes of the file
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .build import (
    ARRAY,
    BOOL,
    DIM,
    F32,
    F32_TYPE,
    FFN,
    HEADS,
    I32,
    I32_TYPE,
    LLAMA_KEYS,
    Q8_0_TYPE,
    STRING,
    TOKENS,
    U8,
    U16,
    U32,
    U64,
    Tensor,
    gguf_file,
    key,
    llama,
    llama_tensors,
    number,
    string,
    value,
)

Case = Callable[[], bytes]

HUGE = (1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
GOOD_KEYS = [key("general.architecture", STRING, "llama"), key("general.name", STRING, "x")]
GOOD = Tensor("good.weight", (4, 2), F32_TYPE, np.arange(8, dtype="<f4").tobytes())


def with_key(*keys: bytes, **options: Any) -> bytes:
    return gguf_file([*GOOD_KEYS, *keys], [GOOD], **options)


def with_tensor(*tensors: Tensor, **options: Any) -> bytes:
    return gguf_file(GOOD_KEYS, [GOOD, *tensors], **options)


def odd(dims: tuple[int, ...], type: int = F32_TYPE, data: bytes = bytes(64), **options: Any) -> bytes:
    return with_tensor(Tensor("odd.weight", dims, type, data, **options))


CONTAINER: dict[str, Case] = {
    # ------------------------------------------------------------------------------------------- the first 24 bytes
    "empty_file": lambda: b"",
    "one_byte": lambda: b"G",
    "magic_only": lambda: b"GGUF",
    "header_cut": lambda: with_key()[:23],
    "bad_magic": lambda: gguf_file(GOOD_KEYS, [GOOD], magic=b"GGML"),
    "zip_archive": lambda: b"PK\x03\x04" + bytes(60),
    "git_lfs_pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 98\n",
    "html_page": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
    "version_0": lambda: with_key(version=0),
    "version_1": lambda: with_key(version=1),
    "version_future": lambda: with_key(version=4),
    "version_byte_swapped": lambda: with_key(version=3 << 24),
    "no_keys_but_declared": lambda: gguf_file(n_keys=1),
    "no_tensors_but_declared": lambda: gguf_file(n_tensors=1),
    **{f"n_tensors_2^{n.bit_length()}": lambda n=n: with_key(n_tensors=n) for n in HUGE},
    **{f"n_keys_2^{n.bit_length()}": lambda n=n: with_key(n_keys=n) for n in HUGE},
    # ----------------------------------------------------------------------------------------------------- the keys
    **{
        f"key_length_2^{n.bit_length()}": lambda n=n: with_key(string("general.x", n) + number(U32, U8) + b"\1")
        for n in HUGE
    },
    "key_empty": lambda: with_key(key("", U8, 1)),
    "key_too_long": lambda: with_key(key("k" * 65536, U8, 1)),
    "key_not_utf8": lambda: with_key(key(b"general.\xff\xfe", U8, 1)),
    "key_with_escape_codes": lambda: with_key(key("general.\x1b[2J", U8, 1)),
    "key_with_null": lambda: with_key(key("general.\0x", U8, 1)),
    "key_twice": lambda: with_key(key("general.name", STRING, "y")),
    "value_type_13": lambda: with_key(key("general.x", 13, raw=bytes(8))),
    "value_type_2^32": lambda: with_key(key("general.x", (1 << 32) - 1, raw=bytes(8))),
    "value_missing": lambda: gguf_file([string("general.x") + number(U32, U64)])[:45],
    "bool_2": lambda: with_key(key("general.x", BOOL, 2)),
    "bool_array_255": lambda: with_key(key("general.x", ARRAY, (BOOL, [0, 1, 255]))),
    "string_not_utf8": lambda: with_key(key("general.x", STRING, b"caf\xe9")),
    "string_surrogate": lambda: with_key(key("general.x", STRING, b"\xed\xa0\x80")),
    "string_array_not_utf8": lambda: with_key(key("general.x", ARRAY, (STRING, [b"a", b"\xc3"]))),
    **{f"string_length_2^{n.bit_length()}": lambda n=n: with_key(key("x", STRING, raw=string("abc", n))) for n in HUGE},
    "string_past_end": lambda: with_key(key("x", STRING, raw=string("abc", 400))),
    **{f"array_length_2^{n.bit_length()}": lambda n=n: with_key(key("x", ARRAY, (U8, [1], n))) for n in HUGE},
    **{
        f"array_of_words_wrapping_2^{n.bit_length()}": lambda n=n: with_key(key("x", ARRAY, (U64, [1], n // 8 + 1)))
        for n in HUGE
    },
    **{
        f"string_array_length_2^{n.bit_length()}": lambda n=n: with_key(key("x", ARRAY, (STRING, ["a"], n)))
        for n in HUGE
    },
    "string_array_item_huge": lambda: with_key(
        key("x", ARRAY, raw=number(U32, STRING) + number(U64, 2) + string("a") + string("b", 1 << 62))
    ),
    "string_array_item_past_end": lambda: with_key(
        key("x", ARRAY, raw=number(U32, STRING) + number(U64, 2) + string("a") + string("b", 300))
    ),
    "string_array_cut": lambda: gguf_file([key("x", ARRAY, (STRING, ["abc"] * 9))])[:-20],
    "array_type_13": lambda: with_key(key("x", ARRAY, raw=number(U32, 13) + number(U64, 1) + bytes(8))),
    "array_type_2^32": lambda: with_key(key("x", ARRAY, raw=number(U32, (1 << 32) - 1) + number(U64, 1) + bytes(8))),
    "array_of_arrays": lambda: with_key(key("x", ARRAY, (ARRAY, [(U8, [1, 2])]))),
    "array_nested_2000_deep": lambda: with_key(
        key("x", ARRAY, raw=(number(U32, ARRAY) + number(U64, 1)) * 2000 + value(ARRAY, (U8, [1])))
    ),
    **{f"alignment_{n}": lambda n=n: with_key(key("general.alignment", U32, n)) for n in (0, 1, 3, 4, 24, 33, 1 << 31)},
    "alignment_u64": lambda: with_key(key("general.alignment", U64, 32)),
    "alignment_string": lambda: with_key(key("general.alignment", STRING, "32")),
    "alignment_array": lambda: with_key(key("general.alignment", ARRAY, (U32, [32]))),
    # -------------------------------------------------------------------------------------------------- the tensors
    "tensor_name_empty": lambda: with_tensor(Tensor("", (4,), F32_TYPE, bytes(16))),
    "tensor_name_too_long": lambda: with_tensor(Tensor("n" * 65, (4,), F32_TYPE, bytes(16))),
    "tensor_name_2^63": lambda: gguf_file([*GOOD_KEYS, string("t", 1 << 63)], n_keys=2, n_tensors=1),
    "tensor_name_not_utf8": lambda: with_tensor(Tensor(b"\xff.weight", (4,), F32_TYPE, bytes(16))),
    "tensor_name_with_newline": lambda: with_tensor(Tensor("a\nb", (4,), F32_TYPE, bytes(16))),
    "tensor_twice": lambda: with_tensor(GOOD),
    "dims_5": lambda: odd((1, 1, 1, 1, 4)),
    "dims_2^32": lambda: odd((4,), n_dims=(1 << 32) - 1),
    "dim_0": lambda: odd((4, 0)),
    "dim_inner_0": lambda: odd((0, 4)),
    "dim_negative": lambda: odd((4, (1 << 64) - 1)),
    "dims_product_2^64": lambda: odd((1 << 32, 1 << 32)),
    "dims_product_wraps_to_4": lambda: odd((4194305, 4194305, 211106198978564), data=bytes(16)),
    "dims_product_wraps_to_0": lambda: odd((1 << 62, 4, 1, 1)),
    "bytes_wrap_2^64": lambda: odd((1 << 62,)),
    "type_removed": lambda: odd((32,), 4),
    "type_43": lambda: odd((32,), 43),
    "type_2^32": lambda: odd((32,), (1 << 32) - 1),
    "row_not_whole_blocks": lambda: odd((33,), Q8_0_TYPE),
    "row_smaller_than_block": lambda: odd((1, 32), Q8_0_TYPE),
    "offset_misaligned": lambda: odd((4,), offset=33),
    "offset_past_end": lambda: odd((4,), offset=1 << 20),
    **{f"offset_2^{n.bit_length()}": lambda n=n: odd((4,), offset=n - n % 32) for n in HUGE},
    "offset_into_another": lambda: odd((16,), offset=0),
    "offset_the_same": lambda: odd((8,), offset=0),
    "data_one_byte_short": lambda: with_tensor(cut=1),
    "data_missing": lambda: with_tensor(cut=32),
    "description_cut": lambda: with_tensor(cut=60),
    "padding_cut": lambda: gguf_file(GOOD_KEYS, [Tensor("t", (4,), F32_TYPE, b"")], cut=1),
    "split_but_alone": lambda: with_key(key("split.count", U16, 3), key("split.no", U16, 0)),
    "split_count_string": lambda: with_key(key("split.count", STRING, "3")),
    "split_count_array": lambda: with_key(key("split.count", ARRAY, (U16, [3, 3]))),
}


def changed(name: str, kind: int, content: Any) -> Case:
    return lambda: llama({name: (kind, content)})


def without(name: str) -> Case:
    return lambda: llama({name: None}) if name in LLAMA_KEYS else llama(tensors={name: None})


def reshaped(name: str, *dims: int, type: int = F32_TYPE) -> Case:
    n = math.prod(dims)
    return lambda: llama(tensors={name: Tensor(name, dims, type, bytes(n // 32 * 34 if type == Q8_0_TYPE else 4 * n))})


def filled(name: str, number: float) -> Case:
    def make() -> bytes:
        tensor = llama_tensors()[name]
        data = np.full(len(tensor.data) // 4, number, "<f4").tobytes()
        return llama(tensors={name: Tensor(name, tensor.dims, F32_TYPE, data)})

    return make


NUMBERS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "rope.dimension_count",
)  # fmt: skip
REALS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
BPE = {
    "tokenizer.ggml.model": (STRING, "gpt2"),
    "tokenizer.ggml.pre": (STRING, "gpt-2"),
    "tokenizer.ggml.scores": None,
    "tokenizer.ggml.tokens": (ARRAY, (STRING, TOKENS)),
}


def bpe(*merges: str, kind: int = STRING) -> Case:
    return lambda: llama({**BPE, "tokenizer.ggml.merges": (ARRAY, (kind, list(merges)))})


MODEL: dict[str, Case] = {
    # ------------------------------------------------------------------------------------------------ configuration
    **{f"{name}_0": changed(f"llama.{name}", U32, 0) for name in NUMBERS},
    **{f"{name}_2^32": changed(f"llama.{name}", U32, (1 << 32) - 1) for name in NUMBERS},
    **{f"{name}_2^63": changed(f"llama.{name}", U64, 1 << 63) for name in NUMBERS},
    **{f"{name}_negative": changed(f"llama.{name}", I32, -1) for name in NUMBERS},
    **{f"{name}_string": changed(f"llama.{name}", STRING, "2") for name in NUMBERS},
    **{f"{name}_array": changed(f"llama.{name}", ARRAY, (U32, [])) for name in NUMBERS},
    **{
        f"{name}_missing": without(f"llama.{name}")
        for name in NUMBERS
        if not name.startswith(("rope", "attention.head_count_"))
    },
    **{f"{name}_{x}": changed(f"llama.{name}", F32, x) for name in REALS for x in (math.nan, math.inf, -1.0)},
    "rope.freq_base_0": changed("llama.rope.freq_base", F32, 0.0),
    "block_count_512": changed("llama.block_count", U32, 512),
    "block_count_one_more": changed("llama.block_count", U32, 2),
    "embedding_length_wrong": changed("llama.embedding_length", U32, 2 * DIM),
    "feed_forward_length_wrong": changed("llama.feed_forward_length", U32, FFN - 1),
    "heads_do_not_divide": changed("llama.attention.head_count", U32, 3),
    "kv_heads_do_not_divide": changed("llama.attention.head_count_kv", U32, 3),
    "kv_heads_more_than_heads": changed("llama.attention.head_count_kv", U32, 4),
    "kv_heads_per_layer_too_few": changed("llama.attention.head_count_kv", ARRAY, (I32, [])),
    "rope_dimension_odd": changed("llama.rope.dimension_count", U32, 7),
    "rope_dimension_over_head": changed("llama.rope.dimension_count", U32, 64),
    "rope_scaling_unknown": changed("llama.rope.scaling.type", STRING, "sideways"),
    "rope_scaling_factor_0": lambda: llama(
        {"llama.rope.scaling.type": (STRING, "linear"), "llama.rope.scaling.factor": (F32, 0.0)}
    ),
    "sliding_window_negative": changed("llama.attention.sliding_window", I32, -4),
    "sliding_window_2^63": changed("llama.attention.sliding_window", U64, 1 << 63),
    "key_length_wrong": changed("llama.attention.key_length", U32, 7),
    "vocab_size_wrong": changed("llama.vocab_size", U32, 5),
    "experts": changed("llama.expert_count", U32, 8),
    "architecture_missing": without("general.architecture"),
    "architecture_unknown": changed("general.architecture", STRING, "perceptron"),
    "architecture_number": changed("general.architecture", U32, 7),
    "architecture_array": changed("general.architecture", ARRAY, (STRING, ["llama"])),
    # ------------------------------------------------------------------------------------------------------ weights
    "tensor_missing": without("blk.0.attn_k.weight"),
    "embedding_missing": without("token_embd.weight"),
    "tensor_unknown": lambda: llama(tensors={"blk.0.surprise.weight": Tensor("", (DIM,), F32_TYPE, bytes(4 * DIM))}),
    "tensor_of_layer_7": lambda: llama(
        tensors={"blk.7.attn_norm.weight": Tensor("", (DIM,), F32_TYPE, bytes(4 * DIM))}
    ),
    "tensor_transposed": reshaped("blk.0.ffn_down.weight", DIM, FFN),
    "tensor_flat": reshaped("blk.0.attn_q.weight", DIM * DIM),
    "tensor_3d": reshaped("blk.0.attn_q.weight", DIM, DIM, 2),
    "norm_too_short": reshaped("output_norm.weight", DIM // 2),
    "norm_matrix": reshaped("blk.0.ffn_norm.weight", DIM, DIM),
    "norm_quantized": reshaped("blk.0.ffn_norm.weight", DIM, type=Q8_0_TYPE),
    "matrix_of_integers": reshaped("blk.0.attn_q.weight", DIM, DIM, type=I32_TYPE),
    "embedding_too_few_rows": reshaped("token_embd.weight", DIM, 5),
    "output_too_many_rows": reshaped("output.weight", DIM, 999),
    "rope_freqs_wrong": reshaped("rope_freqs.weight", 3),
    "rope_freqs_zero": reshaped("rope_freqs.weight", DIM // HEADS // 2),
    "rope_freqs_nan": lambda: llama(
        tensors={"rope_freqs.weight": Tensor("", (8,), F32_TYPE, np.full(8, math.nan, "<f4").tobytes())}
    ),
    "weights_nan": filled("blk.0.ffn_up.weight", math.nan),
    "weights_inf": filled("blk.0.attn_q.weight", math.inf),
    "embedding_nan": filled("token_embd.weight", math.nan),
    "norm_huge": filled("output_norm.weight", 3e38),
    # ---------------------------------------------------------------------------------------------------- tokenizer
    "tokenizer_missing": without("tokenizer.ggml.model"),
    "tokenizer_unknown": changed("tokenizer.ggml.model", STRING, "telepathy"),
    "tokenizer_number": changed("tokenizer.ggml.model", U32, 1),
    "tokens_missing": without("tokenizer.ggml.tokens"),
    "tokens_empty": changed("tokenizer.ggml.tokens", ARRAY, (STRING, [])),
    "tokens_string": changed("tokenizer.ggml.tokens", STRING, "abc"),
    "tokens_numbers": changed("tokenizer.ggml.tokens", ARRAY, (U32, list(range(len(TOKENS))))),
    "tokens_too_few": changed("tokenizer.ggml.tokens", ARRAY, (STRING, TOKENS[:9])),
    "tokens_too_many": changed("tokenizer.ggml.tokens", ARRAY, (STRING, [*TOKENS, "more"])),
    "tokens_all_equal": changed("tokenizer.ggml.tokens", ARRAY, (STRING, ["a"] * len(TOKENS))),
    "tokens_all_empty": changed("tokenizer.ggml.tokens", ARRAY, (STRING, [""] * len(TOKENS))),
    "token_of_a_megabyte": changed("tokenizer.ggml.tokens", ARRAY, (STRING, [*TOKENS[:-1], "x" * (1 << 20)])),
    "byte_tokens_missing": changed("tokenizer.ggml.tokens", ARRAY, (STRING, [f"word{i}" for i in range(len(TOKENS))])),
    "scores_too_few": changed("tokenizer.ggml.scores", ARRAY, (F32, [0.0] * 9)),
    "scores_too_many": changed("tokenizer.ggml.scores", ARRAY, (F32, [0.0] * 999)),
    "scores_nan": changed("tokenizer.ggml.scores", ARRAY, (F32, [math.nan] * len(TOKENS))),
    "scores_strings": changed("tokenizer.ggml.scores", ARRAY, (STRING, ["0"] * len(TOKENS))),
    "token_types_too_few": changed("tokenizer.ggml.token_type", ARRAY, (I32, [1] * 9)),
    "token_types_unknown": changed("tokenizer.ggml.token_type", ARRAY, (I32, [99] * len(TOKENS))),
    "token_types_number": changed("tokenizer.ggml.token_type", U32, 1),
    **{
        f"{which}_id_{n}": changed(f"tokenizer.ggml.{which}_token_id", U32, n)
        for which in ("bos", "eos", "unknown")
        for n in (len(TOKENS), (1 << 32) - 2)
    },
    "bos_id_negative": changed("tokenizer.ggml.bos_token_id", I32, -5),
    "eos_id_string": changed("tokenizer.ggml.eos_token_id", STRING, "</s>"),
    "eot_id_2^63": changed("tokenizer.ggml.eot_token_id", U64, 1 << 63),
    "add_bos_string": changed("tokenizer.ggml.add_bos_token", STRING, "yes"),
    "merges_missing": lambda: llama(BPE),
    "merge_without_space": bpe("nospace"),
    "merge_empty": bpe(""),
    "merge_of_unknown_tokens": bpe("qq zz"),
    "merges_numbers": lambda: llama({**BPE, "tokenizer.ggml.merges": (ARRAY, (U32, [1, 2]))}),
    "pre_tokenizer_unknown": lambda: llama(
        {**BPE, "tokenizer.ggml.merges": (ARRAY, (STRING, ["t h"])), "tokenizer.ggml.pre": (STRING, "sideways")}
    ),
    # ------------------------------------------------------------------------------------------------ chat template
    "template_number": changed("tokenizer.chat_template", U32, 1),
    "template_no_numbers": changed("tokenizer.chat_template", ARRAY, (U32, [])),
    "template_two_numbers": changed("tokenizer.chat_template", ARRAY, (U32, [1, 2])),
    "template_syntax": changed("tokenizer.chat_template", STRING, "{% for %}{{"),
    "template_attack": changed(
        "tokenizer.chat_template", STRING, "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ lipsum.__globals__ }}"
    ),
    "template_endless": changed(
        "tokenizer.chat_template",
        STRING,
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    ),
    "template_explodes": changed("tokenizer.chat_template", STRING, "{{ 'x' * 10 ** 10 }}"),
    "template_deep": changed("tokenizer.chat_template", STRING, "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"),
}

CASES: dict[str, Case] = {**CONTAINER, **MODEL}
