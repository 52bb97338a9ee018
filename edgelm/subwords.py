"""Text between special tokens -> token ids: the four ways to cut it. Knows a Vocabulary; no files, no special tokens.

The regular expressions and BERT's normalizer are those of the `tokenizers` library. The merging is done here, because
the library's models first translate the whole vocabulary (1.4 s for Gemma 4, 0.7 s for Llama 3), where these look up
only what the text asks for, and because SentencePiece's order of merging, by score and then from the left, cannot be
said as a list of merges.

Sources: Sennrich et al. 2016 (byte-pair encoding), Kudo 2018 (unigram), Devlin et al. 2018 (WordPiece).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from itertools import pairwise

from .errors import FormatError
from .vocabulary import Kind, Vocabulary

SPACE = "\u2581"  # how SentencePiece writes a space
CACHED_WORDS = 1 << 16
CACHED_WORD_CHARS = 64
LONGEST_WORD = 100  # WordPiece gives up on longer ones, as in training

Rank = Callable[[str, str], float | None]


def merge(symbols: list[str], rank: Rank) -> list[str]:
    """Join neighbours, the pair of lowest rank first and the leftmost of equals, until no pair has a rank.

    O(n log n) for n symbols. `symbols` is used up.
    """
    n = len(symbols)
    after = list(range(1, n + 1))
    before = list(range(-1, n - 1))
    heap = [
        (priority, i, left, right)
        for i, (left, right) in enumerate(pairwise(symbols))
        if (priority := rank(left, right)) is not None
    ]
    heapify(heap)
    while heap:
        _, i, left, right = heappop(heap)
        j = after[i]
        if symbols[i] != left or j == n or symbols[j] != right:
            continue  # one of the two has been merged in the meantime
        joined = symbols[i] = left + right
        symbols[j] = ""
        j = after[i] = after[j]
        if j < n:
            before[j] = i
            if (priority := rank(joined, symbols[j])) is not None:
                heappush(heap, (priority, i, joined, symbols[j]))
        j = before[i]
        if j >= 0 and (priority := rank(symbols[j], joined)) is not None:
            heappush(heap, (priority, j, symbols[j], joined))
    return [symbol for symbol in symbols if symbol]


class Words:
    """Cuts words that do not influence each other, and remembers the short ones."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, ...]] = {}

    def cut(self, word: str) -> list[int]:
        raise NotImplementedError

    def cut_all(self, words: Iterable[str]) -> list[int]:
        known, ids = self._known, list[int]()
        for word in words:
            tokens = known.get(word)
            if tokens is None:
                tokens = tuple(self.cut(word))
                if len(word) <= CACHED_WORD_CHARS:
                    if len(known) >= CACHED_WORDS:
                        known.clear()
                    known[word] = tokens
            ids += tokens
        return ids


def byte_ids(v: Vocabulary) -> list[int]:
    """The token `<0x00>` ... `<0xFF>` of each byte; empty if the vocabulary has not all of them."""
    tokens = [v.ids.get(f"<0x{byte:02X}>") for byte in range(256)]
    found = [token for token in tokens if token is not None]
    return found if len(found) == 256 else []


def is_spaces(piece: str) -> bool:
    """Whether a piece is a run of two or more spaces (user-defined pieces keep their spaces in GGUF)."""
    return len(piece) > 1 and not piece.strip(" ")


class BytePairs(Words):
    """Byte-pair encoding with a list of merges ("gpt2", "gemma4")."""

    def __init__(self, v: Vocabulary) -> None:
        from tokenizers import Regex, pre_tokenizers

        super().__init__()
        self._ids, self._pre = v.ids, v.pre
        best_last = reversed(v.merges)  # of a merge that is named twice the first counts
        self._ranks = dict(zip(best_last, range(len(v.merges) - 1, -1, -1), strict=True))
        self._bytes = byte_ids(v)
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in v.pre.splits
        ]
        if v.pre.drop_space:
            steps.insert(0, pre_tokenizers.WhitespaceSplit())
        if v.pre.byte_level:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        self._split = pre_tokenizers.Sequence(steps)
        self._lower = v.pre.drop_space and v.lowercase

    def __call__(self, text: str) -> list[int]:
        if self._pre.escape_spaces:
            text = text.replace(" ", SPACE)
        if self._lower:
            text = text.lower()
        return self.cut_all(word for word, _ in self._split.pre_tokenize_str(text))

    def _rank(self, left: str, right: str) -> int | None:
        return self._ranks.get(f"{left} {right}")

    def cut(self, word: str) -> list[int]:
        if self._pre.ignore_merges or (self._pre.whole_newlines and not word.strip("\n")):
            whole = self._ids.get(word)
            if whole is not None:
                return [whole]
        ids: list[int] = []
        # Some vocabularies lack a few bytes (SmolLM's has no 0xF1 and 20 others): they leave no trace.
        symbols = [char for char in word if char in self._ids] if self._pre.byte_level else list(word)
        for symbol in merge(symbols, self._rank):
            token = self._ids.get(symbol)
            if token is not None:
                ids.append(token)
            elif self._pre.byte_level:  # a merge made a piece that has no token: fall back to the bytes
                ids += (self._ids[char] for char in symbol)
            else:
                ids += (self._bytes[byte] for byte in symbol.encode() if self._bytes)
        return ids


class SentencePieces(Words):
    """SentencePiece's byte-pair encoding ("llama"): the pair that makes the piece of highest score first."""

    def __init__(self, v: Vocabulary) -> None:
        super().__init__()
        self._ids, self._unk = v.ids, v.unk_id
        self._bytes = byte_ids(v)
        usable = (v.kinds == Kind.NORMAL) | (v.kinds == Kind.USER_DEFINED) | (v.kinds == Kind.UNUSED)
        costs: list[float | None] = (-v.scores).tolist()
        for token in (~usable).nonzero()[0].tolist():  # no text becomes a control token by merging
            costs[token] = None
        self._costs = costs
        # User-defined runs of spaces are never merged with anything; they are taken from the left, the longest first.
        runs = [i for i in (v.kinds == Kind.USER_DEFINED).nonzero()[0].tolist() if is_spaces(v.pieces[i])]
        self._runs = {SPACE * len(v.pieces[i]): (i,) for i in runs}
        longest_first = sorted(self._runs, key=len, reverse=True)
        self._split_runs = re.compile(f"({'|'.join(longest_first)})").split if runs else None
        self._words = word_starts(v.pieces)

    def __call__(self, text: str) -> list[int]:
        text = text.replace(" ", SPACE)
        if self._split_runs is None:
            return self.cut_all(self._words(text))
        ids: list[int] = []
        for part in self._split_runs(text):
            ids += self._runs.get(part) or self.cut_all(self._words(part))
        return ids

    def _rank(self, left: str, right: str) -> float | None:
        token = self._ids.get(left + right)
        return None if token is None else self._costs[token]

    def cut(self, word: str) -> list[int]:
        ids: list[int] = []
        for symbol in merge(list(word), self._rank):
            token = self._ids.get(symbol)
            if token is not None and self._costs[token] is not None:
                ids.append(token)
            elif self._bytes:
                ids += (self._bytes[byte] for byte in symbol.encode())
            elif self._unk is not None and ids[-1:] != [self._unk]:
                ids.append(self._unk)
        return ids


def word_starts(pieces: Iterable[str]) -> Callable[[str], list[str]]:
    """A function that cuts text where no piece can reach across: before a space that no piece holds in that place.

    Cutting there changes nothing, as the result of each side does not depend on the other; it makes most of a text
    a repetition of words that are known already.
    """
    reached = set(re.findall(f"[^{SPACE}\0]{SPACE}", "\0".join(pieces)))
    letters = "".join(re.escape(pair[0]) for pair in sorted(reached))
    inside = f"(?:(?<=[{letters}]){SPACE}+[^{SPACE}]*)*" if letters else ""
    return re.compile(f"(?:{SPACE}+[^{SPACE}]*|[^{SPACE}]+){inside}").findall


class WordPieces(Words):
    """WordPiece ("bert"): the longest piece first; GGUF marks the beginning of a word with U+2581 instead of `##`."""

    def __init__(self, v: Vocabulary) -> None:
        from tokenizers import normalizers, pre_tokenizers

        super().__init__()
        if v.unk_id is None:
            raise FormatError("a WordPiece tokenizer needs tokenizer.ggml.unknown_token_id")
        self._ids, self._unk = v.ids, v.unk_id
        self._longest = max(map(len, v.pieces))
        self._normalize = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=v.strip_accents, lowercase=v.lowercase
        )
        self._split = pre_tokenizers.BertPreTokenizer()

    def __call__(self, text: str) -> list[int]:
        return self.cut_all(word for word, _ in self._split.pre_tokenize_str(self._normalize.normalize_str(text)))

    def cut(self, word: str) -> list[int]:
        if len(word) > LONGEST_WORD:
            return [self._unk]
        ids: list[int] = []
        word = SPACE + word
        start = 0
        while start < len(word):
            if start and word[start] == SPACE:  # a U+2581 of the text's own is no beginning of a word
                return [self._unk]
            for end in range(min(len(word), start + self._longest), start, -1):
                token = self._ids.get(word[start:end])
                if token is not None:
                    ids.append(token)
                    start = end
                    break
            else:
                return [self._unk]
        return ids
