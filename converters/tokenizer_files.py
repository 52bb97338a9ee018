"""The keys `tokenizer.*` of a GGUF file -> the tokenizer's files of a Hugging Face folder: the way back from `vocab`.

    write(folder, keys, source)

tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja. Where the source is a folder, its
own files are taken as they are.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgelm import vocabulary
from edgelm.errors import UnsupportedError
from edgelm.vocabulary import Kind, Vocabulary

from .vocab import SPACE

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.txt", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "1_Pooling/config.json",
)  # fmt: skip
_TEMPLATE = "tokenizer.chat_template"


def write(folder: Path, keys: Mapping[str, Any], source: Path | None = None) -> None:
    """Write the files into `folder`.

    source: the Hugging Face folder that the keys were made from, if there is one.
    Raises UnsupportedError for a kind of tokenizer that tokenizer.json has none of.
    """
    if source is not None and (source / "tokenizer.json").exists():
        for name in _FILES:
            if (source / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, folder / name)
        return
    for name, value in made(keys).items():
        (folder / name).write_bytes(content(value))


def made(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The files that say what a vocabulary says, by name: values of JSON, and the text of the template.

    Raises UnsupportedError for a kind of tokenizer that tokenizer.json has none of.
    """
    v = vocabulary.read(keys)
    build = {"gpt2": _byte_pairs, "llama": _sentencepiece, "t5": _unigram, "bert": _wordpiece}.get(v.model)
    if build is None:
        raise UnsupportedError(f"tokenizer.json has no kind of tokenizer for {v.model!r}")
    special = {name: v.pieces[token] for name, token in _special(v, keys).items()}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # which is tokenizer.json, and nothing beside it
        "add_bos_token": v.add_bos,
        "add_eos_token": v.add_eos,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    template = keys.get(_TEMPLATE)
    templates = {"chat_template.jinja": template} if isinstance(template, str) else {}
    if templates:
        settings["chat_template"] = template
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(v),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _around(v),
        **build(v),
    }
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
        "special_tokens_map.json": special,
        **templates,
    }


def content(value: Any) -> bytes:
    """What a file of `made` holds; indenting would be slow."""
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) + "\n").encode()


def _special(v: Vocabulary, keys: Mapping[str, Any]) -> dict[str, int]:
    """The special tokens by the names that transformers has for them."""
    found = {"bos": v.bos_id, "eos": v.eos_id, "unk": v.unk_id, "sep": v.sep_id, "pad": v.pad_id}
    if v.model == "bert":
        found = {"cls": v.bos_id, "sep": v.sep_id, "unk": v.unk_id, "pad": v.pad_id}
    mask = keys.get("tokenizer.ggml.mask_token_id")
    if mask is not None and 0 <= int(mask) < len(v.pieces):
        found["mask"] = int(mask)
    return {f"{name}_token": token for name, token in found.items() if token is not None}


def _added(v: Vocabulary) -> list[dict[str, Any]]:
    """The tokens that are found before anything else is cut, with what they do to spaces beside them."""
    found = []
    for token in np.flatnonzero(np.isin(v.kinds, (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED))).tolist():
        text = v.pieces[token]
        found.append(
            {
                "id": token,
                "content": text,
                "single_word": False,
                "lstrip": token in v.strip_left,
                "rstrip": token in v.strip_right,
                "normalized": False,
                "special": bool(v.kinds[token] != Kind.USER_DEFINED),
            }
        )
    return found


def _around(v: Vocabulary) -> dict[str, Any] | None:
    """What is put before and after a text."""
    first = v.bos_id if v.add_bos else None
    last = v.sep_id if v.model == "bert" else v.eos_id if v.add_eos else None
    ids = {v.pieces[token]: token for token in (first, last) if token is not None}

    if not ids:
        return None

    def special(token: int | None, kind: int) -> list[dict[str, Any]]:
        return [] if token is None else [{"SpecialToken": {"id": v.pieces[token], "type_id": kind}}]

    def parts(letter: str, kind: int, begins: bool) -> list[dict[str, Any]]:
        before = special(first, kind) if begins else []
        return [*before, {"Sequence": {"id": letter, "type_id": kind}}, *special(last, kind)]

    return {
        "type": "TemplateProcessing",
        "single": parts("A", 0, True),
        "pair": [*parts("A", 0, True), *parts("B", 1, v.model != "bert")],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in ids.items()},
    }


def _used(v: Vocabulary) -> dict[str, int]:
    return {v.pieces[token]: token for token in np.flatnonzero(v.kinds != Kind.UNUSED).tolist()}


def _byte_pairs(v: Vocabulary) -> dict[str, Any]:
    if not v.pre.byte_level or v.pre.escape_spaces or v.pre.drop_space:
        raise UnsupportedError(f"tokenizer.json cannot say how the pre-tokenizer {v.pre_name!r} treats spaces")
    each = {"type": "Split", "behavior": "Isolated", "invert": False}
    splits = [{**each, "pattern": {"Regex": regex}} for regex in v.pre.splits]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    around, used = _around(v), _used(v)
    pairs = (merge.split(" ", 1) for merge in v.merges)  # some vocabularies have merges that make no token
    after = {**level, "trim_offsets": False}
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "post_processor": {"type": "Sequence", "processors": [after, around]} if around else after,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": v.pre.ignore_merges,
            "vocab": used,
            "merges": [[left, right] for left, right in pairs if {left, right, left + right} <= used.keys()],
        },
    }


def _sentencepiece(v: Vocabulary) -> dict[str, Any]:
    """SentencePiece as byte pairs with byte fallback: a merge for each way to make a piece of two, best first."""
    used = _used(v)
    merges = []
    for token in np.flatnonzero(v.kinds == Kind.NORMAL).tolist():
        piece, rank = v.pieces[token], -float(v.scores[token])
        for cut in range(1, len(piece)):
            left, right = used.get(piece[:cut]), used.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((rank, left, right))
    merges.sort()
    prepend = [{"type": "Prepend", "prepend": SPACE}] if v.add_space_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if v.add_space_prefix else []
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prepend, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "decoder": {"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if v.unk_id is None else v.pieces[v.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": used,
            "merges": [[v.pieces[left], v.pieces[right]] for _, left, right in merges],
        },
    }


def _unigram(v: Vocabulary) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if v.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(v.charsmap).decode()})
    if v.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    scheme = "always" if v.add_space_prefix else "never"
    spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": spaces,
        "decoder": spaces,
        "model": {
            "type": "Unigram",
            "unk_id": v.unk_id,
            "vocab": [[piece, float(score)] for piece, score in zip(v.pieces, v.scores, strict=True)],
            "byte_fallback": False,
        },
    }


def _wordpiece(v: Vocabulary) -> dict[str, Any]:
    """GGUF marks the beginning of a word, WordPiece its continuation."""

    def own(token: int) -> str:
        piece = v.pieces[token]
        if v.kinds[token] != Kind.NORMAL:
            return piece
        return piece[1:] if piece.startswith(SPACE) else f"##{piece}"

    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": v.strip_accents,
            "lowercase": v.lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": None if v.unk_id is None else v.pieces[v.unk_id],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {own(token): token for token in _used(v).values()},
        },
    }
