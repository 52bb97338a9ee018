"""Text <-> token ids, after the vocabulary of a GGUF file. Knows no model and no chat template.

Special tokens are found first (in Rust, by the `tokenizers` library: the leftmost, and of those the longest); what lies
between them goes to one of the classes of `subwords`. Streaming text never shows half a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from . import vocabulary
from .errors import UsageError
from .subwords import SPACE, BytePairs, SentencePieces, WordPieces, is_spaces
from .unigram import Unigram
from .vocabulary import Kind, Vocabulary

_SEGMENTERS: dict[str, Callable[[Vocabulary], Callable[[str], list[int]]]] = {
    "gpt2": BytePairs,
    "gemma4": BytePairs,
    "whitespace": BytePairs,
    "llama": SentencePieces,
    "t5": Unigram,
    "bert": WordPieces,
}


def _byte_of_char() -> dict[str, int]:
    """GPT-2's stand-ins for bytes (Radford et al. 2019): printable Latin-1 as itself, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """Text <-> ids.

    Attributes:
        model, pre: names as in the file ("gpt2", "llama", "t5", "bert"; "smollm", "default", ...).
        vocab_size: number of tokens.
        bos_id, eos_id, unk_id, pad_id, sep_id: ids, or None.
        eog_ids: every token that ends an answer.
        add_bos, add_eos, add_sep: what `encode` adds when `add_special` is true.
    """

    def __init__(self, v: Vocabulary) -> None:
        self._v = v
        self.model, self.pre = v.model, v.pre_name
        self.vocab_size = len(v.pieces)
        self.bos_id, self.eos_id, self.unk_id = v.bos_id, v.eos_id, v.unk_id
        self.pad_id, self.sep_id = v.pad_id, v.sep_id
        self.eog_ids = v.eog_ids
        self.add_bos, self.add_eos, self.add_sep = v.add_bos, v.add_eos, v.add_sep

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that `metadata` describes.

        Raises:
            FormatError: the metadata contradicts itself.
            UnsupportedError: a kind of tokenizer that edgelm does not have.
        """
        return cls(vocabulary.read(metadata))

    @cached_property
    def _segment(self) -> Callable[[str], list[int]]:
        return _SEGMENTERS[self.model](self._v)

    @cached_property
    def _all_specials(self) -> _Specials:
        return _Specials(self._v, (Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN))

    @cached_property
    def _text_specials(self) -> _Specials:
        return _Specials(self._v, (Kind.USER_DEFINED,))

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of `text`.

        Args:
            add_special: put the BOS, EOS or SEP tokens around it that the file asks for.
            parse_special: the text of a control token means that token; otherwise it is ordinary text. User-defined
                tokens are found in either case.
        """
        text = _well_formed(text)
        ids: list[int] = []
        v = self._v
        if add_special and self.add_bos and v.bos_id is not None:
            ids.append(v.bos_id)
        after_special = True  # the beginning counts as one
        for token, part in (self._all_specials if parse_special else self._text_specials).parts(text):
            if token is not None:
                ids.append(token)
            elif v.add_space_prefix and after_special and self.model == "llama":
                ids += self._segment(" " + part)
            else:
                ids += self._segment(part)
            after_special = token is not None
        if add_special:
            if self.model == "bert":
                ids += [v.sep_id] if v.sep_id is not None else []
            elif self.add_eos and v.eos_id is not None:
                ids.append(v.eos_id)
        return ids

    def encode_chat(self, text: str) -> list[int]:
        """The ids of a rendered chat template: with a BOS if the file asks for one and the template wrote none."""
        ids = self.encode(text, add_special=False)
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def is_special(self, token: int) -> bool:
        """Whether a token steers the model and is no part of the text (control or unknown)."""
        return self._v.kinds[self._checked(token)] in (Kind.CONTROL, Kind.UNKNOWN)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text, in UTF-8; may be a part of a character. Special tokens give their own name."""
        piece, kind = self._v.pieces[self._checked(token)], Kind(self._v.kinds[token])
        if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED):
            return piece.encode()
        if kind == Kind.BYTE or (kind == Kind.NORMAL and not self._byte_level and _is_byte(piece)):
            return bytes([int(piece[3:5], 16)]) if _is_byte(piece) else b""
        if kind in (Kind.UNDEFINED, Kind.UNUSED):
            return b""
        if self._byte_level:
            table = self._byte_table
            try:
                return bytes([table[char] for char in piece])
            except KeyError:  # a token that was added in plain spelling
                return piece.encode()
        return piece.replace(SPACE, " ").encode()

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of a whole sequence; bytes that are no UTF-8 become U+FFFD.

        The space that `encode` put in front, in vocabularies that have this, is taken away again.
        """
        stream = self.stream(skip_special=skip_special, at_start=True)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, *, skip_special: bool = False, at_start: bool = False) -> StreamDecoder:
        """A decoder for text that arrives token by token: the continuation of a text, or its start."""
        return StreamDecoder(self, skip_special=skip_special, at_start=at_start)

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise UsageError(f"token {token} does not exist: the vocabulary has {self.vocab_size} tokens")
        return token

    @cached_property
    def _byte_level(self) -> bool:
        return self.model == "gpt2" and self._v.pre.byte_level

    @cached_property
    def _byte_table(self) -> dict[str, int]:
        return _byte_of_char()


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") and piece[3:5].isalnum()


def _well_formed(text: str) -> str:
    """Text without lone surrogates, which are no characters: they become U+FFFD, pairs are joined."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class _Specials:
    """Finds special tokens in text."""

    def __init__(self, v: Vocabulary, kinds: tuple[Kind, ...]) -> None:
        from tokenizers import AddedToken, Tokenizer, models

        self._ids: list[int] = np.flatnonzero(np.isin(v.kinds, kinds)).tolist()
        plain = "text"
        while plain in v.ids:
            plain += "-"
        self._finder = Tokenizer(models.WordLevel({plain: 0}, plain))
        texts = [v.pieces[i] for i in self._ids]
        if v.model == "llama":  # runs of spaces are SentencePieces' matter; their spelling in U+2581 is found here
            texts = [text.replace(" ", SPACE) if is_spaces(text) else text for text in texts]
        self._finder.add_tokens(
            [
                AddedToken(text, normalized=False, lstrip=i in v.strip_left, rstrip=i in v.strip_right)
                for i, text in zip(self._ids, texts, strict=True)
            ]
        )

    def parts(self, text: str) -> list[tuple[int | None, str]]:
        """The text as special tokens (id, "") and what lies between them (None, text)."""
        if not text:
            return []
        if not self._ids:
            return [(None, text)]
        found = self._finder.encode(text)
        return [
            (self._ids[i - 1], "") if i else (None, text[start:end])
            for i, (start, end) in zip(found.ids, found.offsets, strict=True)
        ]


class StreamDecoder:
    """Tokens in, text out, whole characters only. Not thread-safe; one for each stream."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, at_start: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = at_start and tokenizer._v.add_space_prefix

    def push(self, token: int) -> str:
        """The characters that this token completes; may be empty."""
        special = self._tokenizer.is_special(token)
        if special and self._skip_special:
            return ""
        data = self._tokenizer.token_bytes(token)
        if self._strip_space and not special:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for the beginning of a character that never ended, or nothing."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
