"""Hugging Face folders of the tiny random models of `tests/tiny.py`: config.json, weights, tokenizer.

    path = write(tmp_path, "qwen3", dtype="BF16", shards=2)

The tokenizers are those of `tiny_vocabulary`, written back as the files that a GGUF vocabulary is made from.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import tiny_vocabulary
from numpy.typing import NDArray

from edgelm.arch import Config
from edgelm.pretokenizers import PRE_TOKENIZERS

CONTROL, UNKNOWN, UNUSED, BYTE = 3, 2, 5, 6


def write(
    folder: Path,
    name: str,
    *,
    dtype: str = "F32",
    shards: int = 1,
    weights: str = "safetensors",
    sentencepiece: bool = False,
    **overrides: Any,
) -> Path:
    """The folder of a variant of `tiny.VARIANTS`. weights: "safetensors", "torch" or "none".

    sentencepiece: with tokenizer.model, too, where the vocabulary is of its kind.
    """
    path = folder / name
    path.mkdir(parents=True)
    hf = tiny.hf_config(name, **overrides)
    pooling = hf.pop("pooling_type", None)
    (path / "config.json").write_text(json.dumps(hf))
    if pooling is not None:
        kinds = {1: "mean_tokens", 2: "cls_token"}
        (path / "1_Pooling").mkdir()
        (path / "modules.json").write_text(
            json.dumps([{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}])
        )
        (path / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{kinds[pooling]}": True}))
    arrays = state(name, hf)
    if weights == "safetensors":
        _safetensors(path, arrays, dtype, shards)
    elif weights == "torch":
        _torch(path, arrays, shards)
    tokenizer(path, *tiny.VARIANTS[name].vocabulary, hf["vocab_size"], sentencepiece)
    return path


def state(name: str, hf: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """The weights of a variant under their Hugging Face names."""
    config = Config.from_hf(hf)
    return {spec.hf: tiny.hf_array(spec, config) for spec in tiny.hf_specs(name, config, hf)}


def brain(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 bits, cut off (not rounded)."""
    return (array.view(np.uint32) >> 16).astype(np.uint16)


def _parts(arrays: dict[str, Any], shards: int) -> list[dict[str, Any]]:
    names = sorted(arrays)
    return [{name: arrays[name] for name in names[i::shards]} for i in range(shards)]


def _index(path: Path, stem: str, suffix: str, parts: list[dict[str, Any]]) -> list[str]:
    if len(parts) == 1:
        return [f"{stem}{suffix}"]
    files = [f"{stem}-{i + 1:05}-of-{len(parts):05}{suffix}" for i in range(len(parts))]
    places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (path / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return files


def _safetensors(path: Path, arrays: dict[str, NDArray[np.float32]], dtype: str, shards: int) -> None:
    parts = _parts(arrays, shards)
    for file, part in zip(_index(path, "model", ".safetensors", parts), parts, strict=True):
        (path / file).write_bytes(safetensors_bytes({n: (dtype, a.shape, _raw(a, dtype)) for n, a in part.items()}))


def _raw(array: NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "BF16":
        return brain(array).tobytes()
    return array.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()


def safetensors_bytes(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A safetensors file of (type, shape, data), written by hand so that types that NumPy lacks can be in it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + b"".join(data for _, _, data in tensors.values())


def _torch(path: Path, arrays: dict[str, NDArray[np.float32]], shards: int) -> None:
    from test_torch_zip import Storage, save, tensor

    parts = _parts(arrays, shards)
    for file, part in zip(_index(path, "pytorch_model", ".bin", parts), parts, strict=True):
        storages = {name: Storage("FloatStorage", str(i), array) for i, (name, array) in enumerate(part.items())}
        value = {
            name: tensor(storages[name], 0, array.shape, tuple(s // 4 for s in array.strides))
            for name, array in part.items()
        }
        save(path / file, value, list(storages.values()))


# ------------------------------------------------------------------------------------------------------- tokenizers


def tokenizer(path: Path, kind: str, pre: str, size: int, sentencepiece: bool = False) -> None:
    """The files of a tokenizer of `tiny_vocabulary`."""
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in tiny_vocabulary.metadata(kind, pre, size).items()}
    write_tokenizer(path, keys, "bert" if kind == "wordpiece" else "gpt2" if kind == "bpe" else "llama")
    if sentencepiece and "scores" in keys:
        (path / "tokenizer.model").write_bytes(sentencepiece_bytes(keys))


def write_tokenizer(path: Path, keys: dict[str, Any], model: str, size: int | None = None) -> None:
    """tokenizer.json, tokenizer_config.json and more from the keys `tokenizer.ggml.*` (without that prefix)."""
    tokens, types = list(keys["tokens"]), list(keys["token_type"])
    parsed = {"gpt2": _byte_pairs, "llama": _sentencepiece, "bert": _wordpiece}[model](keys, tokens, types)
    (path / "tokenizer.json").write_text(json.dumps({"version": "1.0", **parsed}, ensure_ascii=False), encoding="utf-8")
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    if model == "bert":
        names = {"cls": "cls_token_id", "sep": "seperator_token_id", "mask": "mask_token_id", **names}
        del names["bos"], names["eos"]
    settings = {f"{name}_token": tokens[keys[key]] for name, key in names.items() if key in keys}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "tokenizer.chat_template" in keys:
        settings["chat_template"] = keys["tokenizer.chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def _added(tokens: list[str], types: list[int], kinds: tuple[int, ...]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": text, **flags, "special": kind in (CONTROL, UNKNOWN)}
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in kinds
    ]


def _around(first: str | None, last: str | None, ids: dict[str, int]) -> dict[str, Any]:
    special = [text for text in (first, last) if text]
    parts: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    if first:
        parts.insert(0, {"SpecialToken": {"id": first, "type_id": 0}})
    if last:
        parts.append({"SpecialToken": {"id": last, "type_id": 0}})
    return {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in special},
    }


def _byte_pairs(keys: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    row = PRE_TOKENIZERS[keys["pre"]]
    splits = [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in row.splits]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    ids = {text: i for i, text in enumerate(tokens)}
    bos = tokens[keys["bos_token_id"]] if keys.get("add_bos_token") else None
    return {
        "added_tokens": _added(tokens, types, (CONTROL, UNKNOWN, 4)),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "post_processor": _around(bos, None, ids) if bos else {**level, "trim_offsets": False},
        "decoder": level,
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "ignore_merges": row.ignore_merges,
            "vocab": {text: i for text, i in ids.items() if types[i] != UNUSED},
            "merges": [merge.split(" ", 1) for merge in keys["merges"]],
        },
    }


def _sentencepiece(keys: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """SentencePiece as byte pairs with byte fallback: a merge for each way to make a piece of two others."""
    used = {text: i for i, text in enumerate(tokens) if types[i] != UNUSED}
    pairs = [
        (-keys["scores"][i], len(text[:cut]), [text[:cut], text[cut:]])
        for text, i in used.items()
        if types[i] == 1
        for cut in range(1, len(text))
        if text[:cut] in used and text[cut:] in used
    ]
    ids = {text: i for i, text in enumerate(tokens)}
    prefix = [{"type": "Prepend", "prepend": "▁"}] if keys.get("add_space_prefix") else []
    return {
        "added_tokens": _added(tokens, types, (CONTROL, UNKNOWN)),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "pre_tokenizer": None,
        "post_processor": _around(tokens[keys["bos_token_id"]], None, ids),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "unk_token": tokens[keys["unknown_token_id"]],
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": used,
            "merges": [pair for _, _, pair in sorted(pairs, key=lambda item: item[:2])],
        },
    }


def sentencepiece_bytes(keys: dict[str, Any], *, is_unigram: bool = False, charsmap: bytes = b"") -> bytes:
    """tokenizer.model of a vocabulary (keys as in `write_tokenizer`), in the encoding of protocol buffers."""
    kinds = {1: 1, UNKNOWN: 2, CONTROL: 3, 4: 4, UNUSED: 5, BYTE: 6}
    out = b""
    for text, score, kind in zip(keys["tokens"], keys["scores"], keys["token_type"], strict=True):
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kinds[kind])
        out += _field(1, piece)
    ids = {40: keys.get("unknown_token_id"), 41: keys.get("bos_token_id"), 42: keys.get("eos_token_id")}
    ids[43] = keys.get("padding_token_id")
    trainer = _field(3, 1 if is_unigram else 2) + _field(35, 1)
    trainer += b"".join(_field(number, value) for number, value in ids.items() if value is not None)
    normalizer = _field(1, b"identity") + _field(3, int(bool(keys.get("add_space_prefix")))) + _field(4, 0)
    return out + _field(2, trainer) + _field(3, normalizer + (_field(2, charsmap) if charsmap else b""))


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _wordpiece(keys: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    def own(i: int) -> str:
        text = tokens[i]
        return text if types[i] == CONTROL else text[1:] if text.startswith("▁") else "##" + text

    ids = {own(i): i for i in range(len(tokens)) if types[i] != UNUSED}
    return {
        "added_tokens": _added(tokens, types, (CONTROL,)),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _around("[CLS]", "[SEP]", ids),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }


def plain(value: Any) -> Any:
    """A value of metadata as JSON; arrays and long texts as their sha256."""
    if isinstance(value, np.ndarray):
        return {"n": value.size, "sha256": hashlib.sha256(value.tobytes()).hexdigest()}
    if isinstance(value, list):
        return {"n": len(value), "sha256": hashlib.sha256("\0".join(value).encode()).hexdigest()}
    return value
