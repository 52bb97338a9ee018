"""The tokenizer's files of a Hugging Face folder -> the keys `tokenizer.*` of a GGUF file.

    keys = read(Folder.read(path, config_json), vocab_size)

tokenizer.json, tokenizer.model (SentencePiece) and vocab.txt (WordPiece) are understood; `tokenizer_check` compares
the result with the original afterwards. Which token is which follows gguf's `SpecialVocab`, so that files are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.errors import FormatError, SourceError, UnsupportedError
from edgelm.json_tokenizer import prefixes
from edgelm.vocabulary import Kind

from . import pretokenizer_names, sentencepiece_model
from .safetensors_file import open_map, read_json
from .special_tokens import Folder, special_keys

_P = "tokenizer.ggml."
_NO_SCORE, _ADDED_SCORE, _HOLE_SCORE = -1e9, -1000.0, -10000.0
SPACE = "▁"


@dataclass
class _Tokens:
    """Tokens by id, while they are collected."""

    size: int
    texts: list[str] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.texts = [f"[PAD{i}]" for i in range(self.size)]
        self.kinds = [int(Kind.UNUSED)] * self.size
        self.scores = [_HOLE_SCORE] * self.size

    def set(self, token: Any, text: Any, kind: int, score: float = 0.0) -> None:
        if type(token) is not int or not isinstance(text, str) or token < 0:
            raise FormatError(f"the tokenizer has the token {text!r:.60} with the id {token!r:.20}")
        if token >= self.size:
            raise FormatError(
                f"the tokenizer has the token {text!r:.60} with the id {token}; the model has {self.size} tokens"
            )
        self.texts[token], self.kinds[token], self.scores[token] = text, int(kind), score

    def keys(self, model: str, pre: str, with_scores: bool) -> dict[str, Any]:
        keys: dict[str, Any] = {_P + "model": model, _P + "pre": pre, _P + "tokens": self.texts}
        if with_scores:
            keys[_P + "scores"] = np.array(self.scores, np.float32)
        return {**keys, _P + "token_type": np.array(self.kinds, np.int32)}


def read(folder: Folder, vocab_size: int, pre: str = "") -> dict[str, Any]:
    """All keys `tokenizer.*` for the model in a folder; what a user should know goes to its notes.

    Args:
        vocab_size: tokens of the model; ids without a token become unused ones.
        pre: name of the pre-tokenizer to write, instead of what tokenizer.json defines.

    Raises SourceError when there is no tokenizer, FormatError when it is broken, UnsupportedError when GGUF or edgelm
    has none of its kind.
    """
    try:
        return _keys(folder, vocab_size, pre)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # JSON of another shape
        raise FormatError(f"{folder.path}: the files of the tokenizer are garbled: {error!r:.100}") from error


def _keys(folder: Folder, vocab_size: int, pre: str) -> dict[str, Any]:
    path = folder.path
    model = folder.tokenizer.get("model") or {}
    tokens = _Tokens(vocab_size)
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    is_byte_level = kind == "BPE" and not model.get("byte_fallback")
    if not is_byte_level and kind != "WordPiece" and (path / "tokenizer.model").exists():
        keys = _sentencepiece(path / "tokenizer.model", folder, tokens)
    elif is_byte_level:
        keys = _byte_pairs(folder, tokens, pre)
    elif kind == "BPE":
        keys = _byte_fallback(folder, tokens)
    elif kind == "WordPiece":
        keys = _wordpiece(folder, tokens, model.get("vocab"))
    elif kind == "Unigram":
        keys = _unigram(folder, tokens)
    elif kind is None and (path / "vocab.txt").exists():
        keys = _wordpiece(folder, tokens, _lines(path / "vocab.txt"))
    elif kind is None:
        raise SourceError(f"{path}: no tokenizer.json, tokenizer.model or vocab.txt")
    else:
        raise UnsupportedError(f"{path}: a tokenizer of the kind {kind!r:.40}")
    return {**keys, **special_keys(folder, tokens.texts, keys[_P + "model"])}


def _added(folder: Folder, tokens: _Tokens, score: float = 0.0) -> None:
    """The tokens that were added to a vocabulary: markup, found before anything else is cut."""
    settled = (Kind.CONTROL, Kind.UNKNOWN) if not folder.settings.get("added_tokens_decoder") else ()
    for token, entry in folder.added().items():
        text = entry.get("content")
        if token >= tokens.size:  # such as an image's mark in the tokenizer of a model of text alone
            folder.notes.append(f"the added token {text!r:.60} has no row in the embedding, and is left out")
            continue
        if tokens.texts[token] == text and tokens.kinds[token] in settled:
            continue  # the SentencePiece model says so itself
        if isinstance(text, str) and (entry.get("special") or _looks_special(text)):
            tokens.set(token, text, Kind.CONTROL, score)
        else:
            tokens.set(token, text.replace(SPACE, " ") if isinstance(text, str) else text, Kind.USER_DEFINED, score)


def _looks_special(text: str) -> bool:
    """Markup that some tokenizers forget to call special."""
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or bool(
        re.fullmatch(r"<\|.*\|>|<｜.*｜>|<unused.*>", text, re.DOTALL)
    )


def _vocabulary(folder: Folder) -> dict[str, int]:
    vocab = folder.tokenizer["model"].get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise FormatError(f"{folder.path}: tokenizer.json has no vocabulary")
    return vocab


# ------------------------------------------------------------------------------------------------- byte-pair encoding


def _byte_pairs(folder: Folder, tokens: _Tokens, pre: str) -> dict[str, Any]:
    """GPT-2's kind: pieces spelled in stand-ins for bytes, and a list of merges."""
    normalizer = folder.tokenizer.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise UnsupportedError(f"a tokenizer of byte pairs with the normalizer {normalizer.get('type')!r:.40}")
    if normalizer is not None:
        folder.notes.append("the source brings text into Unicode's normal form C first; GGUF runtimes do not")
    for text, token in _vocabulary(folder).items():
        tokens.set(token, text, Kind.NORMAL)
    _added(folder, tokens)
    keys = tokens.keys("gpt2", pre or pretokenizer_names.name_of(folder.tokenizer), False)
    return {**keys, _P + "merges": _merges(folder)}


def _merges(folder: Folder) -> list[str]:
    """ "left right" for each merge; a space inside a part becomes its stand-in."""
    merges = folder.tokenizer["model"].get("merges")
    if not isinstance(merges, list) or not merges:
        raise FormatError(f"{folder.path}: tokenizer.json has no merges")
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
        raise FormatError(f"{folder.path}: the merges of tokenizer.json are no pairs of texts")
    return [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in pairs]


def _byte_fallback(folder: Folder, tokens: _Tokens) -> dict[str, Any]:
    """SentencePiece's kind, when only tokenizer.json is left of it: scores from the order of the merges.

    SentencePiece joins the neighbours whose union has the best score; the list of merges is in this very order, so the
    union's first place in it, negated, is a score that gives the same tokens.
    """
    _spaces_are_pieces(folder)
    rank: dict[str, int] = {}
    for i, merge in enumerate(folder.tokenizer["model"].get("merges") or ()):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank.setdefault("".join(pair), i)
    unknown = folder.tokenizer["model"].get("unk_token")
    for text, token in _vocabulary(folder).items():
        kind = Kind.BYTE if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text) else Kind.NORMAL
        score = -float(rank[text]) if text in rank else 0.0 if kind is Kind.BYTE or len(text) == 1 else _NO_SCORE
        tokens.set(token, text, kind, score)
    _added(folder, tokens, _ADDED_SCORE)
    if unknown in folder.tokenizer["model"]["vocab"]:
        folder.defaults["unk"] = folder.tokenizer["model"]["vocab"][unknown]
        tokens.set(folder.defaults["unk"], unknown, Kind.UNKNOWN, 0.0)
    keys = tokens.keys("llama", "default", True)
    return {**keys, _P + "add_space_prefix": _prefixes(folder)}


def _spaces_are_pieces(folder: Folder) -> None:
    """Proof that spaces become U+2581 and nothing else is normalized."""
    known = {"Prepend", "Replace", "Metaspace", "Split", None}
    steps = _steps(folder.tokenizer.get("normalizer")) + _steps(folder.tokenizer.get("pre_tokenizer"))
    for step in steps:
        kind, pattern = step.get("type"), (step.get("pattern") or {}).get("String")
        if kind not in known or (kind in ("Replace", "Split") and pattern != " "):
            raise UnsupportedError(f"a tokenizer with byte fallback and the step {str(step)[:80]}")


def _steps(step: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one after the other."""
    if not isinstance(step, dict):
        return []
    if step.get("type") == "Sequence":
        return [s for inner in step.get("normalizers") or step.get("pretokenizers") or () for s in _steps(inner)]
    return [step]


def _prefixes(folder: Folder) -> bool:
    """Whether a space is put before the text."""
    return prefixes(folder.tokenizer.get("normalizer"), folder.tokenizer.get("pre_tokenizer"))


# ---------------------------------------------------------------------------------------------------- SentencePiece


def _sentencepiece(path: Path, folder: Folder, tokens: _Tokens) -> dict[str, Any]:
    source = sentencepiece_model.read(path)
    if len(source.pieces) > tokens.size:
        folder.notes.append(f"{len(source.pieces) - tokens.size} pieces of {path.name} have no row in the embedding")
    for token, piece in enumerate(source.pieces[: tokens.size]):
        kind = piece.kind if piece.kind in (1, 2, 3, 4, 5, 6) else Kind.NORMAL
        tokens.set(token, piece.text, kind, piece.score)
    if (path.parent / "added_tokens.json").exists():
        for text, token in read_json(path.parent / "added_tokens.json").items():
            tokens.set(token, text, Kind.USER_DEFINED, _ADDED_SCORE)
    _added(folder, tokens, _ADDED_SCORE)
    folder.defaults.update(bos=source.bos_id, eos=source.eos_id, unk=source.unk_id, pad=source.pad_id)
    keys = tokens.keys("t5" if source.is_unigram else "llama", "default", True)
    prefix = folder.settings.get("add_prefix_space")
    keys[_P + "add_space_prefix"] = source.add_dummy_prefix if not isinstance(prefix, bool) else prefix
    if source.is_unigram:
        keys[_P + "remove_extra_whitespaces"] = source.remove_extra_whitespaces
        keys |= {_P + "precompiled_charsmap": source.charsmap} if source.charsmap else {}
    return keys


def _unigram(folder: Folder, tokens: _Tokens) -> dict[str, Any]:
    import base64

    model = folder.tokenizer["model"]
    vocab = model.get("vocab")
    if not isinstance(vocab, list) or not all(isinstance(e, list) and len(e) == 2 for e in vocab):
        raise FormatError(f"{folder.path}: tokenizer.json has no list of pieces and scores")
    for token, (text, score) in enumerate(vocab):
        if not isinstance(score, int | float):
            raise FormatError(f"{folder.path}: the score of the piece {text!r:.60} is no number")
        tokens.set(token, text, Kind.NORMAL, float(score))
    scores = list(tokens.scores)
    _added(folder, tokens)
    tokens.scores[: len(vocab)] = scores[: len(vocab)]
    if type(model.get("unk_id")) is int and 0 <= model["unk_id"] < tokens.size:
        tokens.kinds[model["unk_id"]] = int(Kind.UNKNOWN)
    keys = tokens.keys("t5", "default", True)
    keys[_P + "add_space_prefix"] = _prefixes(folder)
    steps = _steps(folder.tokenizer.get("normalizer"))
    keys[_P + "remove_extra_whitespaces"] = any("{2,}" in str(step.get("pattern")) for step in steps)
    for step in steps:
        if step.get("type") == "Precompiled":
            try:
                keys[_P + "precompiled_charsmap"] = base64.b64decode(step["precompiled_charsmap"], validate=True)
            except (KeyError, TypeError, ValueError):
                raise FormatError(f"{folder.path}: tokenizer.json garbles its precompiled_charsmap") from None
    return keys


# -------------------------------------------------------------------------------------------------------- WordPiece


def _wordpiece(folder: Folder, tokens: _Tokens, vocab: Any) -> dict[str, Any]:
    """BERT's kind: GGUF marks the beginning of a word, WordPiece its continuation."""
    if not isinstance(vocab, dict | list) or not vocab:
        raise FormatError(f"{folder.path}: there is no vocabulary of word pieces")
    named = vocab.items() if isinstance(vocab, dict) else ((text, i) for i, text in enumerate(vocab))
    for text, token in named:
        tokens.set(token, text, Kind.NORMAL)
    _added(folder, tokens)
    for text in () if folder.added() else ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
        if text in tokens.texts:
            tokens.kinds[tokens.texts.index(text)] = int(Kind.CONTROL)
    tokens.texts = [
        text if kind == Kind.CONTROL else text.removeprefix("##") if text.startswith("##") else SPACE + text
        for text, kind in zip(tokens.texts, tokens.kinds, strict=True)
    ]
    return tokens.keys("bert", "default", False)


def _lines(path: Path) -> Sequence[str]:
    try:
        return bytes(open_map(path)).decode().splitlines()
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not valid UTF-8") from None
