"""The tokenizer's files of a Hugging Face folder: the source's, without the tokens that were cut; or made from GGUF.

    files(checkpoint)      {"tokenizer.json": b"…", …}

tokenizer.json is the one that counts; older forms of it (vocab.json, merges.txt, tokenizer.model) are copied only where
nothing has changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgelm.errors import UnsupportedError
from edgelm.pretokenizers import PRE_TOKENIZERS
from edgelm.subwords import SPACE
from edgelm.vocabulary import Kind, Vocabulary
from edgelm.vocabulary import read as read_vocabulary

from . import calibrate, vocab_prune
from .checkpoint import Checkpoint

_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json", "modules.json",
)  # fmt: skip
_OLDER = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "cls": "cls", "sep": "seperator",
            "mask": "mask"}  # fmt: skip
_SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temp": "temperature",
             "penalty_repeat": "repetition_penalty"}  # fmt: skip


def files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Name and content of every file but config.json and the weights.

    Raises UnsupportedError for a tokenizer that cannot be written so.
    """
    if checkpoint.is_gguf:
        return _made(checkpoint)
    names = _COPIED if checkpoint.kept_tokens is not None else (*_COPIED, *_OLDER)
    names = (*names, *(f"{folder.name}/config.json" for folder in checkpoint.path.glob("*_Pooling")))
    found = {name: (checkpoint.path / name).read_bytes() for name in names if (checkpoint.path / name).is_file()}
    if checkpoint.kept_tokens is None:
        return found
    if "tokenizer.json" not in found:
        raise UnsupportedError(f"{checkpoint.path}: tokens can only be cut from a tokenizer.json, which is not there")
    new_ids = vocab_prune.renumbered(checkpoint.kept_tokens)
    parsed = {name: json.loads(data) for name, data in found.items() if name.endswith(".json")}
    parsed["tokenizer.json"] = vocab_prune.cut_tokenizer_json(parsed["tokenizer.json"], checkpoint.kept_tokens)
    settings = parsed.get("tokenizer_config.json", {})
    if "added_tokens_decoder" in settings:
        added = settings["added_tokens_decoder"].items()
        settings["added_tokens_decoder"] = {str(new_ids[int(i)]): e for i, e in added if int(i) in new_ids}
    if "generation_config.json" in parsed:
        parsed["generation_config.json"] = _renumbered(parsed["generation_config.json"], new_ids)
    return {**found, **{name: _json(value) for name, value in parsed.items()}}


def token_ids(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json that name tokens."""
    if checkpoint.is_gguf:
        v = read_vocabulary(calibrate.vocabulary(checkpoint))
        ids = {"bos_token_id": v.bos_id, "eos_token_id": v.eos_id, "pad_token_id": v.pad_id}
        return {name: value for name, value in ids.items() if value is not None}
    if checkpoint.kept_tokens is None:
        return {}
    changed = _renumbered(config, vocab_prune.renumbered(checkpoint.kept_tokens))
    return {name: value for name, value in changed.items() if value != config[name]}


def _renumbered(config: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """The values of keys that end in _token_id, by new numbers; tokens that are gone are left out."""

    def new(value: Any) -> Any:
        if isinstance(value, list):
            return [new_ids[i] for i in value if i in new_ids]
        return new_ids.get(value) if type(value) is int else value

    return {key: new(value) if key.endswith("_token_id") else value for key, value in config.items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------------------------------------------- from a GGUF file


def _made(checkpoint: Checkpoint) -> dict[str, bytes]:
    keys = calibrate.vocabulary(checkpoint)
    v = read_vocabulary(keys)
    kinds = {"gpt2": _byte_pairs, "llama": _sentencepiece, "bert": _wordpiece}
    if v.model not in kinds:
        raise UnsupportedError(f"a tokenizer of the kind {v.model!r} can be read, but not written as tokenizer.json")
    found = {"tokenizer.json": _json({"version": "1.0", "truncation": None, "padding": None, **kinds[v.model](v)})}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, ours in _SPECIAL.items():
        token = keys.get(f"tokenizer.ggml.{ours}_token_id")
        if token is not None and 0 <= int(token) < len(v.pieces):
            settings[f"{name}_token"] = _own_text(v, int(token))
    if template := keys.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    found["tokenizer_config.json"] = _json(settings)
    named = {new: keys.get(f"general.sampling.{old}") for old, new in _SAMPLING.items()}
    sampling = {new: value for new, value in named.items() if value is not None}
    ends = sorted(v.eog_ids)
    generation = {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    generation |= {"bos_token_id": v.bos_id} if v.bos_id is not None else {}
    if generation or sampling:
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in sampling.items()}
        found["generation_config.json"] = _json({**generation, **plain})
    return found


def _own_text(v: Vocabulary, token: int) -> str:
    """A token as tokenizer.json spells it: WordPiece marks continuations, GGUF beginnings."""
    text = v.pieces[token]
    if v.model != "bert" or v.kinds[token] != Kind.NORMAL:
        return text
    return text[1:] if text.startswith(SPACE) else "##" + text


def _added(v: Vocabulary) -> list[dict[str, Any]]:
    flags = {"single_word": False, "normalized": False}
    kinds = (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
    return [
        {"id": i, "content": piece, **flags, "lstrip": i in v.strip_left, "rstrip": i in v.strip_right,
         "special": kind in (Kind.CONTROL, Kind.UNKNOWN)}
        for i, (piece, kind) in enumerate(zip(v.pieces, v.kinds.tolist(), strict=True))
        if kind in kinds
    ]  # fmt: skip


def _ids(v: Vocabulary) -> dict[str, int]:
    return {_own_text(v, i): i for i, kind in enumerate(v.kinds.tolist()) if kind != Kind.UNUSED}


def _around(v: Vocabulary, first: int | None, last: int | None) -> dict[str, Any] | None:
    """What puts special tokens around a text."""
    texts = [None if token is None else v.pieces[token] for token in (first, last)]
    if texts == [None, None]:
        return None

    def template(letter: str, with_first: bool) -> list[dict[str, Any]]:
        number = 0 if letter == "A" else 1
        parts: list[dict[str, Any]] = [{"Sequence": {"id": letter, "type_id": number}}]
        if texts[0] and with_first:
            parts.insert(0, {"SpecialToken": {"id": texts[0], "type_id": number}})
        if texts[1]:
            parts.append({"SpecialToken": {"id": texts[1], "type_id": number}})
        return parts

    tokens = [(text, token) for text, token in zip(texts, (first, last), strict=True) if text is not None]
    single = template("A", True)
    return {
        "type": "TemplateProcessing", "single": single, "pair": [*single, *template("B", v.model != "bert")],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in tokens},
    }  # fmt: skip


def _byte_pairs(v: Vocabulary) -> dict[str, Any]:
    row = PRE_TOKENIZERS.get(v.pre_name, v.pre)
    splits = [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in row.splits]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if not row.byte_level:
        raise UnsupportedError(f"the pre-tokenizer {v.pre_name!r} can be read, but not written as tokenizer.json")
    return {
        "added_tokens": _added(v),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "post_processor": _around(v, v.bos_id if v.add_bos else None, v.eos_id if v.add_eos else None) or level,
        "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": row.ignore_merges,
            "vocab": _ids(v), "merges": [merge.split(" ", 1) for merge in v.merges],
        },
    }  # fmt: skip


def _sentencepiece(v: Vocabulary) -> dict[str, Any]:
    """SentencePiece as byte pairs with byte fallback: a merge for each way to make a piece of two others."""
    ids = _ids(v)
    pairs = [
        (-float(v.scores[i]), len(text[:cut]), [text[:cut], text[cut:]])
        for text, i in ids.items()
        if v.kinds[i] == Kind.NORMAL
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    prefix = [{"type": "Prepend", "prepend": SPACE}] if v.add_space_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if v.add_space_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "added_tokens": _added(v),
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "post_processor": _around(v, v.bos_id if v.add_bos else None, v.eos_id if v.add_eos else None),
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None if v.unk_id is None else v.pieces[v.unk_id],
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
            "ignore_merges": False, "vocab": ids,
            "merges": [pair for _, _, pair in sorted(pairs, key=lambda item: item[:2])],
        },
    }  # fmt: skip


def _wordpiece(v: Vocabulary) -> dict[str, Any]:
    return {
        "added_tokens": _added(v),
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
            "strip_accents": v.strip_accents, "lowercase": v.lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _around(v, v.bos_id, v.sep_id),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": None if v.unk_id is None else v.pieces[v.unk_id],
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": _ids(v),
        },
    }  # fmt: skip
