"""Unigram tokenization ("t5"): the most probable way to cut a text into pieces, after SentencePiece's normalization.

Knows a Vocabulary; no files, no special tokens. Sources: Kudo 2018 (https://arxiv.org/abs/1804.10959) for the model;
Kanda et al. 2018 for the double array with XOR that holds SentencePiece's normalization rules.
"""

from __future__ import annotations

import math

import numpy as np

from .errors import FormatError
from .subwords import SPACE, Words, byte_ids, word_starts
from .vocabulary import Kind, Vocabulary

UNKNOWN_PENALTY = 10.0  # an unknown character costs this much more than the least probable piece


class CharsMap:
    """SentencePiece's rules for rewriting characters: the longest rule that matches wins.

    The bytes: the size of the array; the array, of 32-bit units; the replacements, each with a NUL at its end.
    A unit holds a label in bits 0-7 and 31, whether a rule ends here in bit 8, an offset in bits 10-30, shifted by
    8 where bit 9 is set; where a rule ends, the unit it leads to holds where its replacement begins.
    """

    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:4], "little")
        if len(data) < 4 or size % 4 or not 0 < size < len(data) - 4:
            raise FormatError(
                f"tokenizer.ggml.precompiled_charsmap is cut short: {len(data)} bytes for {size} of rules"
            )
        self._units: list[int] = np.frombuffer(data, "<u4", size // 4, 4).tolist()
        self._replacements = data[4 + size :]
        self._known: dict[bytes, bytes] = {}

    def __call__(self, text: str) -> str:
        data, out, at = text.encode(), list[bytes](), 0
        try:
            while at < len(data):
                length, replacement = self._longest(data, at)
                if length:
                    out.append(replacement)
                else:  # no rule: the character stays
                    first = data[at]
                    length = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
                    out.append(data[at : at + length])
                at += length
        except (IndexError, ValueError):
            raise FormatError("tokenizer.ggml.precompiled_charsmap points outside of itself") from None
        return b"".join(out).decode(errors="replace")

    def _longest(self, data: bytes, start: int) -> tuple[int, bytes]:
        units = self._units
        length = value = 0
        node = _offset(units[0])
        for at in range(start, len(data)):
            byte = data[at]
            if byte == 0:
                break
            node ^= byte
            unit = units[node]
            if unit & 0x800000FF != byte:
                break
            node ^= _offset(unit)
            if unit & 0x100:
                length, value = at + 1 - start, units[node] & 0x7FFFFFFF
        if not length:
            return 0, b""
        return length, self._replacements[value : self._replacements.index(b"\0", value)]


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)


class Unigram(Words):
    """Cuts normalized text so that the sum of the pieces' log probabilities is the largest."""

    def __init__(self, v: Vocabulary) -> None:
        super().__init__()
        if v.unk_id is None:
            raise FormatError("a Unigram tokenizer needs tokenizer.ggml.unknown_token_id")
        self._unk = v.unk_id
        self._rewrite = CharsMap(v.charsmap) if v.charsmap else str
        self._prefix, self._merge_spaces = v.add_space_prefix, v.remove_extra_whitespaces
        self._bytes = byte_ids(v)

        normal = v.kinds == Kind.NORMAL
        scores = np.where(v.kinds == Kind.USER_DEFINED, 0.0, v.scores.astype(np.float64))
        usable = (normal | (v.kinds == Kind.USER_DEFINED) | (v.kinds == Kind.UNUSED)) & np.isfinite(scores)
        self._unknown_score = float(v.scores[normal & usable].min(initial=0.0)) - UNKNOWN_PENALTY
        self._pieces: dict[str, tuple[float, int]] = {}
        self._longest: dict[str, int] = {}  # piece that begins with this character
        for piece, score, token, ok in zip(
            v.pieces, scores.tolist(), range(len(v.pieces)), usable.tolist(), strict=True
        ):
            if ok:
                self._pieces[piece] = score, token
                if len(piece) > self._longest.get(piece[0], 0):
                    self._longest[piece[0]] = len(piece)
        self._words = word_starts(self._pieces)

    def __call__(self, text: str) -> list[int]:
        ids = self.cut_all(self._words(self._spaced(self._rewrite(text))))
        unk = self._unk  # neighbours without a piece are one unknown token
        return [token for i, token in enumerate(ids) if token != unk or i == 0 or ids[i - 1] != unk]

    def _spaced(self, text: str) -> str:
        if self._merge_spaces:
            words = [word for word in text.split(" ") if word]
            return "".join(SPACE + word for word in words)
        if self._prefix and (first := text.lstrip(" ")):
            text = text[: len(text) - len(first)] + " " + first
        return text.replace(" ", SPACE)

    def cut(self, word: str) -> list[int]:
        """The best cut, by dynamic programming over the positions (Viterbi)."""
        n = len(word)
        best = [-math.inf] * (n + 1)
        best[0] = 0.0
        came_from: list[tuple[int, int]] = [(0, self._unk)] * (n + 1)
        for start in range(n):
            score, known = best[start], False
            for end in range(start + 1, min(n, start + self._longest.get(word[start], 0)) + 1):
                found = self._pieces.get(word[start:end])
                if found is not None:
                    known |= end == start + 1
                    if score + found[0] > best[end]:
                        best[end] = score + found[0]
                        came_from[end] = start, found[1]
            if not known and score + self._unknown_score > best[start + 1]:
                best[start + 1] = score + self._unknown_score
                came_from[start + 1] = start, self._unk
        ids: list[int] = []
        end = n
        while end:
            start, token = came_from[end]
            if token == self._unk and self._bytes:
                ids += (self._bytes[byte] for byte in reversed(word[start:end].encode()))
            else:
                ids.append(token)
            end = start
        return ids[::-1]
