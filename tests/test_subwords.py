"""The four ways to cut text, against slow twins that are obviously right and against SentencePiece itself."""

from __future__ import annotations

import base64
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from edgelm.errors import FormatError
from edgelm.pretokenizers import PRE_TOKENIZERS
from edgelm.subwords import SPACE, merge, word_starts
from edgelm.tokenizer import Tokenizer
from edgelm.unigram import CharsMap

SENTENCEPIECE = json.loads((Path(__file__).parent / "data" / "sentencepiece.json").read_text())


def metadata(kind: dict[str, Any]) -> dict[str, Any]:
    """The keys of a GGUF file for an entry of sentencepiece.json."""
    out = {
        f"tokenizer.ggml.{key}": value for key, value in kind.items() if key not in ("cases", "precompiled_charsmap")
    }
    out["tokenizer.ggml.scores"] = np.array(kind["scores"], np.float32)
    out["tokenizer.ggml.token_type"] = np.array(kind["token_type"], np.int32)
    charsmap = base64.b64decode(kind["precompiled_charsmap"])
    if charsmap:
        out["tokenizer.ggml.precompiled_charsmap"] = np.frombuffer(charsmap, np.uint8)
    return out


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_same_tokens_as_sentencepiece(kind: str) -> None:
    tokenizer = Tokenizer.from_gguf(metadata(SENTENCEPIECE[kind]))
    cases = SENTENCEPIECE[kind]["cases"]
    assert len(cases) > 60
    assert [tokenizer.encode(text, add_special=False) for text, _ in cases] == [ids for _, ids in cases]


# --------------------------------------------------------------------------------------------------------------- merge


def merge_slowly(symbols: list[str], ranks: dict[tuple[str, str], float]) -> list[str]:
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]
        if not pairs:
            return symbols
        _, i = min(pairs)
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


letters = st.text("ab", min_size=1, max_size=4)


@given(
    st.text("abc", max_size=30),
    st.dictionaries(st.tuples(letters, letters), st.integers(0, 5), max_size=25),  # ranks with many ties
)
def test_merge_takes_the_lowest_rank_from_the_left(text: str, ranks: dict[tuple[str, str], float]) -> None:
    def rank(left: str, right: str) -> float | None:
        return ranks.get((left, right))

    assert merge(list(text), rank) == merge_slowly(list(text), ranks)


def test_merge_of_a_long_word_takes_no_quadratic_time() -> None:
    def seconds(n: int) -> float:
        start = time.thread_time()
        assert len(merge(["a"] * n, lambda left, right: len(left) if len(left) == len(right) < 64 else None)) == n // 64
        return time.thread_time() - start

    assert seconds(64_000) < 30 * max(seconds(8_000), 0.01)


@given(st.lists(st.text(f"ab{SPACE}", min_size=1, max_size=4), max_size=6), st.text(f"ab{SPACE}", max_size=20))
def test_words_are_cut_where_no_piece_reaches_across(pieces: list[str], text: str) -> None:
    words = word_starts(pieces)(text)
    assert "".join(words) == text
    at = 0
    for word in words[:-1]:
        at += len(word)
        assert text[at] == SPACE
        assert not any(text[at - 1 : at + 1] in piece for piece in pieces)


@given(st.lists(st.text(f"ab{SPACE}", min_size=2, max_size=4), max_size=8), st.text("ab ", max_size=20))
def test_cutting_into_words_does_not_change_the_tokens(pieces: list[str], text: str) -> None:
    vocabulary = list(dict.fromkeys([*"<ab", SPACE, *pieces]))
    costs = {piece: i % 3 for i, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": vocabulary,
            "tokenizer.ggml.scores": np.array([-costs[piece] for piece in vocabulary], np.float32),
            "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.ggml.add_bos_token": False,
        }
    )
    ranks = {
        (piece[:i], piece[i:]): float(cost) for piece, cost in costs.items() for i in range(1, len(piece)) if piece[i:]
    }
    expected = [vocabulary.index(symbol) for symbol in merge_slowly(list(text.replace(" ", SPACE)), ranks)]
    assert tokenizer.encode(text, parse_special=False) == expected


# ------------------------------------------------------------------------------------------------------------- unigram


def best_cut(text: str, scores: dict[str, float], unknown: float) -> float:
    """The score of the best way to cut `text`, by trying all of them."""
    if not text:
        return 0.0
    ways = [
        scores[text[:n]] + best_cut(text[n:], scores, unknown) for n in range(1, len(text) + 1) if text[:n] in scores
    ]
    if text[0] not in scores:
        ways.append(unknown + best_cut(text[1:], scores, unknown))
    return max(ways, default=-math.inf)


@settings(max_examples=200)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(-20, -1), min_size=1),
    st.text("abcd", max_size=9),
)
def test_unigram_finds_the_best_cut(pieces: dict[str, int], text: str) -> None:
    vocabulary = ["<unk>", "</s>", *pieces]
    tokenizer = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "t5",
            "tokenizer.ggml.tokens": vocabulary,
            "tokenizer.ggml.scores": np.array([0, 0, *pieces.values()], np.float32),
            "tokenizer.ggml.token_type": np.array([2, 3] + [1] * len(pieces), np.int32),
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
        }
    )
    unknown = min(pieces.values()) - 10.0
    ids = tokenizer.encode(text, add_special=False)
    found = sum(pieces[vocabulary[i]] for i in ids if i)
    n_unknown = len(text) - sum(len(vocabulary[i]) for i in ids if i)
    assert found + unknown * n_unknown == best_cut(text, {k: float(v) for k, v in pieces.items()}, unknown)
    assert all((a, b) != (0, 0) for a, b in itertools.pairwise(ids)), "neighbouring unknowns are one token"


def charsmap() -> bytes:
    return base64.b64decode(SENTENCEPIECE["unigram"]["precompiled_charsmap"])


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("a\tb\u3000c", "a b c"),
        ("\ufb01sh\u200b", "fish"),
        ("cafe\u0301", "caf\u00e9"),  # e and accent are one rule
        ("\uff21\uff22\uff21", "ABA"),  # the longer rule first
        ("\u0301 ab \U0001f642", "\u0301 ab \U0001f642"),  # no rule
        ("", ""),
    ],
)
def test_rules_of_normalization(text: str, normal: str) -> None:
    assert CharsMap(charsmap())(text) == normal


@pytest.mark.parametrize("data", [b"", b"\1", b"\4\0\0\0", b"\xff\xff\xff\xff1234", b"\4\0\0\0abcd", charsmap()[:40]])
def test_broken_rules_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="precompiled_charsmap"):
        CharsMap(data)("abc \u3000")


@settings(max_examples=200)
@given(st.data())
def test_damaged_rules_are_refused_or_give_some_text(data: st.DataObject) -> None:
    damaged = bytearray(charsmap())
    for _ in range(data.draw(st.integers(1, 20))):
        damaged[data.draw(st.integers(4, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        result = CharsMap(bytes(damaged))("the caf\u00e9 e\u0301 \uff21\uff22 \ufb01\t\u3000 x" * 3)
    except FormatError:
        return
    result.encode()


# ------------------------------------------------------------------------------------------------------ pre-tokenizers


def cutter(name: str) -> pre_tokenizers.PreTokenizer:
    patterns = PRE_TOKENIZERS[name].splits
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns])


def words(name: str, text: str) -> list[str]:
    return [word for word, _ in cutter(name).pre_tokenize_str(text)]


ROWS = list({row.splits: name for name, row in PRE_TOKENIZERS.items()}.values())


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=30)
@given(st.text(st.one_of(st.sampled_from(" \t\r\naA1'.,_中\u0301\u00b2"), st.characters(exclude_categories=["Cs"]))))
def test_no_character_is_lost(name: str, text: str) -> None:
    assert "".join(words(name, text)) == text


@pytest.mark.parametrize("name", ROWS)
def test_no_text_takes_quadratic_time(name: str) -> None:
    cut = cutter(name)
    n = 20_000
    for char in ("1", " ", "a", "A", "\n", "'", "\u0301", "\r\n", " \n", "aA", "1a", "\u4e2d", "\u02b0"):
        for text in (char * n, " " * n + char, char * n + "x", "1" * n + char):
            start = time.thread_time()
            cut.pre_tokenize_str(text)
            assert time.thread_time() - start < 2, (name, text[:3], text[-1])  # milliseconds, unless it is quadratic


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "I'll go  to\n\n x1 ", ["I", "'ll", " go", " ", " to", "\n\n", " x", "1", " "]),
        ("smollm", "a 123", ["a", " ", "1", "2", "3"]),
        ("llama-bpe", "It'S 12345\n\n .x", ["It", "'S", " ", "123", "45", "\n\n", " .", "x"]),
        ("qwen2", "12 é", ["1", "2", " é"]),
        ("gpt-4o", "camelCase THEN's/\n", ["camel", "Case", " THEN's", "/\n"]),
        ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
        ("tiny_aya", "1234567 x12345 123a", ["1", "234", "567", " x", "12", "345", " ", "123", "a"]),
        ("superbpe", "a 1234567 b", ["a ", "1", "234", "567", " b"]),
        ("afmoe", "12345", ["12", "345"]),
        ("kimi-k2", "猫abc猫 猫", ["猫", "abc", "猫", " ", "猫"]),
        ("deepseek-v3", "1234 猫猫x!ab", ["123", "4", " ", "猫猫", "x", "!ab"]),
        ("gemma4", "a b\n\nc", ["a b", "\n\n", "c"]),
        ("falcon", "a12345!", ["a", "123", "45", "!"]),
        ("default", "a12345!", ["a", "123", "45", "!"]),
        ("bloom", "Hi, there.", ["Hi", ",", " there", "."]),
    ],
)
def test_where_words_end(name: str, text: str, pieces: list[str]) -> None:
    assert words(name, text) == pieces
