"""The vocabulary of a GGUF file, proven: pieces, kinds, scores, special tokens and switches. Cuts no text.

`read` checks every key it uses: types, lengths, ranges. What other runtimes agree on by convention rather than by a
key (default ids, end-of-generation tokens known by their text) is here as tables, after llama.cpp's behaviour.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from .errors import FormatError, UnsupportedError
from .pretokenizers import PRE_TOKENIZERS, PreTokenizer

_P = "tokenizer.ggml."
MAX_PIECE_CHARS = 1 << 16


class Kind(IntEnum):
    """What a token is for; the numbers are GGUF's."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class _Family:
    """Defaults of one `tokenizer.ggml.model`, used where the file has no key."""

    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    sep: int | None = None
    pad: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_sep: bool = False
    add_space_prefix: bool = False


_FAMILIES = {
    "gpt2": _Family(),
    "gemma4": _Family(),
    "whitespace": _Family(),
    "llama": _Family(bos=1, eos=2, unk=0, add_bos=True, add_space_prefix=True),
    "t5": _Family(eos=1, unk=2, pad=0, add_eos=True),
    "bert": _Family(bos=101, unk=100, sep=102, pad=0, add_bos=True, add_sep=True),
}
_KNOWN_ELSEWHERE = frozenset({"rwkv", "plamo2", "hybriddna", "test", "none", "no_vocab"})


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Tokens that end an answer, known by their text because most files do not say so.
_END_TEXTS = _words(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> "
    "<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~["
)
# Fill-in-the-middle marks: control tokens whatever their type says. A model that writes one of the last three is done.
_FIM_TEXTS = {
    "fim_pre": _words(
        "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>"
    ),
    "fim_suf": _words(
        "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>"
    ),
    "fim_mid": _words("<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>"),
    "fim_pad": _words("<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]"),
    "fim_rep": _words("<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>"),
    "fim_sep": _words("<|file_sep|>"),
}
_SPECIAL_KEYS = {  # names, and how GGUF spells them
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "eot": "eot", "eom": "eom",
    **{name: name for name in _FIM_TEXTS},
}  # fmt: skip
_FIM_ENDS = ("fim_pad", "fim_rep", "fim_sep")
_OLD_FIM_KEYS = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
# Tokens of the harmony format: part of the answer's text, never control.
_VISIBLE_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Everything about tokens that a GGUF file says, checked.

    Attributes:
        pieces: text of each token as stored: byte-level spelling, U+2581 for spaces, `<0x0A>` for bytes.
        kinds: one `Kind` value per token.
        scores: one per token; empty where the model needs none.
        merges: "left right", best first; only for byte-pair encoding.
        strip_right, strip_left: special tokens that swallow white space after or before them.
    """

    model: str
    pre_name: str
    pre: PreTokenizer
    pieces: Sequence[str]
    kinds: np.ndarray[Any, np.dtype[np.uint8]]
    scores: np.ndarray[Any, np.dtype[np.float32]]
    merges: Sequence[str]
    charsmap: bytes
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    sep_id: int | None
    pad_id: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_sep: bool
    add_space_prefix: bool
    remove_extra_whitespaces: bool
    lowercase: bool
    strip_accents: bool
    strip_right: frozenset[int] = frozenset()
    strip_left: frozenset[int] = frozenset()
    ids: Mapping[str, int] = field(default_factory=dict, repr=False)


class _Reader:
    """Typed look-ups in the metadata, each of which fails with the key's name."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata

    def text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(key, default)
        if value is None:
            raise FormatError(f"the file has no {key}; convert the model again, with its vocabulary")
        if not isinstance(value, str):
            raise FormatError(f"{key} is not a string but {type(value).__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(_P + key, default)
        if not isinstance(value, bool | np.bool_):
            raise FormatError(f"{_P}{key} is not a bool but {type(value).__name__}")
        return bool(value)

    def strings(self, key: str) -> list[str]:
        value = self.metadata.get(_P + key)
        if value is None:
            raise FormatError(f"the file has no {_P}{key}; convert the model again")
        if isinstance(value, np.ndarray) and value.size == 0:
            value = []  # an empty array may have been written with any item type
        if not isinstance(value, list | tuple) or not set(map(type, value)) <= {str}:
            raise FormatError(f"{_P}{key} is not an array of strings")
        return list(value)

    def numbers(self, key: str, n: int, kinds: str) -> np.ndarray[Any, Any] | None:
        value = self.metadata.get(_P + key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in kinds:
            raise FormatError(f"{_P}{key} is not an array of numbers of the right type")
        if len(value) < n:
            raise FormatError(f"{_P}{key} has {len(value)} items for {n} tokens")
        return value[:n]

    def id(self, key: str, default: int | None, n: int) -> int | None:
        """A token id; -1 in any width means none."""
        value = self.metadata.get(f"{_P}{key}_token_id")
        if value is None:
            return default if default is not None and default < n else None
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise FormatError(f"{_P}{key}_token_id is not an integer but {type(value).__name__}")
        if value == -1 or (value >= n and value in (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)):
            return None
        if not 0 <= value < n:
            raise FormatError(f"{_P}{key}_token_id is {value}, but there are only {n} tokens")
        return int(value)


def read(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a GGUF file.

    Raises:
        FormatError: a key is missing, of the wrong type or length, or names a token that does not exist.
        UnsupportedError: the tokenizer is of a kind that edgelm does not have.
    """
    reader = _Reader(metadata)
    model = reader.text("tokenizer.ggml.model")
    family = _family(model)
    pre_name = _pre_name(reader, model)
    pre = PRE_TOKENIZERS[pre_name] if pre_name else PreTokenizer(())
    pieces, ids = _pieces(reader)
    kinds = _kinds(reader, len(pieces))
    special = _special(reader, family, len(pieces))
    eog = end_of_generation(pieces, ids, kinds, special)
    strip_left, strip_right = _strippers(reader, pre_name, ids, kinds)
    lowercase = reader.flag("normalizer.lowercase", True)
    return Vocabulary(
        model=model,
        pre_name=pre_name or "default",
        pre=pre,
        pieces=pieces,
        kinds=kinds,
        scores=_scores(reader, model, len(pieces)),
        merges=reader.strings("merges") if model in ("gpt2", "gemma4", "whitespace") else [],
        charsmap=_charsmap(reader) if model == "t5" else b"",
        bos_id=special["bos"],
        eos_id=special["eos"],
        unk_id=special["unk"],
        sep_id=special["sep"],
        pad_id=special["pad"],
        eog_ids=eog,
        add_bos=_adds(reader, "bos", family.add_bos or pre.add_bos, special["bos"], pre_name == "gemma4"),
        add_eos=_adds(reader, "eos", family.add_eos, special["eos"]),
        add_sep=_adds(reader, "sep", family.add_sep, special["sep"]),
        add_space_prefix=reader.flag("add_space_prefix", family.add_space_prefix),
        remove_extra_whitespaces=reader.flag("remove_extra_whitespaces", False),
        lowercase=lowercase,
        strip_accents=reader.flag("normalizer.strip_accents", lowercase),
        strip_right=strip_right,
        strip_left=strip_left,
        ids=ids,
    )


def _family(model: str) -> _Family:
    if model in _FAMILIES:
        return _FAMILIES[model]
    supported = f"supported: {', '.join(_FAMILIES)}"
    if model in _KNOWN_ELSEWHERE:
        raise UnsupportedError(f"tokenizer model {model!r} is not supported; {supported}")
    raise UnsupportedError(f"unknown tokenizer model {model!r}; {supported}")


def _special(reader: _Reader, family: _Family, n: int) -> dict[str, int | None]:
    """Ids of the tokens that GGUF has keys for, by short names: of the text's beginning and end, of its holes."""
    special = {name: reader.id(key, getattr(family, name, None), n) for name, key in _SPECIAL_KEYS.items()}
    for name, old in _OLD_FIM_KEYS.items():
        if special[name] is None:
            special[name] = reader.id(old, None, n)
    return special


def _pre_name(reader: _Reader, model: str) -> str:
    """The row of PRE_TOKENIZERS, or "" for models that are not cut into words first."""
    if model == "gemma4":
        return "gemma4"
    if model not in ("gpt2", "whitespace"):
        return ""
    name = reader.text("tokenizer.ggml.pre", "whitespace" if model == "whitespace" else "default") or "default"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(f"unknown pre-tokenizer {name!r} (tokenizer.ggml.pre); a newer edgelm may know it")
    return name


def _pieces(reader: _Reader) -> tuple[list[str], dict[str, int]]:
    pieces = reader.strings("tokens")
    if not pieces:
        raise FormatError(f"{_P}tokens is empty")
    if "" in pieces:  # holes left by converters; named so that no text can mean them
        pieces = [piece or f"[EMPTY_{i}]" for i, piece in enumerate(pieces)]
    ids = dict(zip(pieces, range(len(pieces)), strict=True))
    if len(ids) != len(pieces):
        first = next(i for i, piece in enumerate(pieces) if ids[piece] != i)
        raise FormatError(f"{_P}tokens holds {pieces[first][:50]!r} twice: as {first} and as {ids[pieces[first]]}")
    longest = max(map(len, pieces))
    if longest > MAX_PIECE_CHARS:
        raise FormatError(f"{_P}tokens holds a token of {longest} characters; {MAX_PIECE_CHARS} are allowed")
    return pieces, ids


def _kinds(reader: _Reader, n: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    stored = reader.numbers("token_type", n, "iu")
    if stored is None:
        return np.full(n, Kind.NORMAL, np.uint8)
    known = (stored >= 0) & (stored <= max(Kind))
    return np.where(known, stored, Kind.UNDEFINED).astype(np.uint8)


def _scores(reader: _Reader, model: str, n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    stored = reader.numbers("scores", n, "iuf")
    if model not in ("llama", "t5"):
        return np.zeros(0, np.float32)
    if stored is None:
        raise FormatError(f"the file has no {_P}scores, which a {model!r} tokenizer needs; convert the model again")
    scores = stored.astype(np.float32)
    if np.isnan(scores).any():
        raise FormatError(f"{_P}scores holds NaN")
    return scores


def _charsmap(reader: _Reader) -> bytes:
    value = reader.metadata.get(f"{_P}precompiled_charsmap")
    if value is None:
        return b""
    if not isinstance(value, np.ndarray) or value.dtype.itemsize != 1 or value.dtype.kind not in "iu":
        raise FormatError(f"{_P}precompiled_charsmap is not an array of bytes")
    return value.tobytes()


def _adds(reader: _Reader, name: str, default: bool, token: int | None, always: bool = False) -> bool:
    """Whether encoding adds this token; a file that asks for a token it does not name is broken."""
    asked = always or reader.flag(f"add_{name}_token", default)
    if asked and token is None:
        if f"{_P}add_{name}_token" in reader.metadata and name != "sep":
            raise FormatError(f"{_P}add_{name}_token is true, but the file names no {name.upper()} token")
        return False
    return asked


def end_of_generation(
    pieces: Sequence[str], ids: Mapping[str, int], kinds: np.ndarray[Any, Any], special: Mapping[str, int | None]
) -> frozenset[int]:
    """Tokens that end an answer, by their texts and by names in `special`.

    Corrects `kinds` of well-known tokens whose type in the file is wrong.
    """
    eog: set[int] = {ids[text] for text in _END_TEXTS if text in ids}
    if "</s>" in ids and kinds[ids["</s>"]] == Kind.USER_DEFINED:
        eog.discard(ids["</s>"])  # the end of an HTML element, not of the answer (Gemma)
    kinds[sorted(eog)] = Kind.CONTROL
    for name, texts in _FIM_TEXTS.items():
        token = special.get(name)
        if token is None:
            token = next((ids[text] for text in texts if text in ids), None)
            if token is not None:
                kinds[token] = Kind.CONTROL
        if token is not None and name in _FIM_ENDS:
            eog.add(token)
    visible = [ids[text] for text in _VISIBLE_TEXTS if text in ids]
    kinds[visible] = Kind.USER_DEFINED
    eog.update(token for name in ("eos", "eot", "eom") if (token := special.get(name)) is not None)

    texts_of_ends = {pieces[token] for token in eog}
    harmony = {"<|return|>", "<|call|>"} <= texts_of_ends or {"<|calls|>", "<|flush|>"} <= texts_of_ends
    if harmony and "<|end|>" in texts_of_ends:  # there it ends a message, not the answer
        eog.discard(ids["<|end|>"])
        kinds[ids["<|end|>"]] = Kind.USER_DEFINED
    if {"</s>", "<|tool_response>"} <= texts_of_ends:  # HTML again (Gemma 4)
        eog.discard(ids["</s>"])
        kinds[ids["</s>"]] = Kind.NORMAL
    return frozenset(eog)


def _strippers(
    reader: _Reader, pre_name: str, ids: Mapping[str, int], kinds: np.ndarray[Any, Any]
) -> tuple[frozenset[int], frozenset[int]]:
    """Special tokens that swallow the white space to their left or right: GGUF has no key for it, so by model."""
    name = reader.text("general.name", "").lower()
    arch = reader.text("general.architecture", "")
    if re.search(r"jina-v2-(de|es|code)", pre_name) or arch in ("nomic-bert-moe", "jina-bert-v3"):
        return frozenset(ids[text] for text in ("<mask>",) if text in ids), frozenset()
    if "phi-3" in name or "phi3" in name:
        special = set(np.flatnonzero(np.isin(kinds, (Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN))).tolist())
        special -= {ids.get("<unk>"), ids.get("<s>"), ids.get("<|endoftext|>")}
        return frozenset(), frozenset(special | ({ids["</s>"]} if "</s>" in ids else set()))
    if "modern-bert" in name:
        return frozenset(ids[text] for text in ("[MASK]",) if text in ids), frozenset()
    return frozenset(), frozenset()
