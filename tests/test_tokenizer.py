"""Tokenizers as GGUF files describe them: real vocabularies, special tokens, streaming, damaged metadata."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vocabulary
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from references import gemma_tokenizer_json, llama_cpp_models

from edgelm import gguf
from edgelm.errors import EdgelmError, FormatError, UnsupportedError, UsageError
from edgelm.tokenizer import Tokenizer
from edgelm.vocabulary import Kind

P = "tokenizer.ggml."
N_RANDOM = 10_000


def tiny(kind: str = "bpe", pre: str = "llama-bpe", **changes: Any) -> dict[str, Any]:
    """The metadata of a small vocabulary as `gguf.read` gives it; a change to None takes the key away."""
    found = tiny_vocabulary.metadata(kind, pre, 480) | {P + key: value for key, value in changes.items()}
    dtypes = {P + "token_type": np.int32, P + "scores": np.float32}
    return {
        key: np.array(value, dtypes[key]) if key in dtypes and isinstance(value, list) else value
        for key, value in found.items()
        if value is not None
    }


# ---------------------------------------------------------------------------------------------------- real vocabularies

VECTORS = (
    "bert-bge command-r deepseek-coder deepseek-llm falcon gemma-4 gpt-2 llama-bpe llama-spm mpt phi-3 qwen2 qwen35 "
    "refact starcoder"
)


@pytest.mark.model
@pytest.mark.parametrize("name", VECTORS.split())
def test_vectors_of_llama_cpp(name: str) -> None:
    file = llama_cpp_models() / f"ggml-vocab-{name}.gguf"
    texts = file.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in file.with_suffix(".gguf.out").read_text().splitlines()]
    assert len(texts) >= len(expected) > 40
    tokenizer = Tokenizer.from_gguf(gguf.read(file).metadata)
    for text, ids in zip(texts, expected, strict=False):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, text
        if tokenizer.model != "bert":  # which loses case and spaces
            assert tokenizer.decode(ids) == text


def random_texts(words: list[str], specials: list[str]) -> list[str]:
    """Words, white space, special tokens and characters of all planes of Unicode, in any order."""
    rng = random.Random(1)
    ranges = [(0x20, 0x7F), (0, 0x300), (0x300, 0x370), (0x370, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000)]
    ranges += [(plane << 16, (plane + 1) << 16) for plane in range(1, 17)]
    odd = [" ", "  ", "\n", "\t", "\r\n", "\u2581", "a\u2581the", "'s", "123", "a" * 30, "##ing", "\u00e9"]

    def part() -> str:
        kind = rng.random()
        if kind < 0.15:
            return rng.choice(specials)
        if kind < 0.55:
            return " " * rng.randint(0, 1) + rng.choice(words)
        if kind < 0.7:
            return rng.choice(odd) * rng.randint(1, 5)
        low, high = rng.choice(ranges)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 6)))

    texts = ["".join(part() for _ in range(rng.randint(0, 12))) for _ in range(N_RANDOM)]
    planes = {ord(char) >> 16 for text in texts for char in text}
    assert planes == set(range(17))
    assert sum(any(special in text for special in specials) for text in texts) > N_RANDOM // 2
    return texts


WORDS = Path(__file__).read_text().split() + tiny_vocabulary.TEXT.split()


def assert_same(tokenizer: Tokenizer, other: tokenizers.Tokenizer, texts: list[str], add_special: bool) -> None:
    expected = other.encode_batch(texts, add_special_tokens=add_special)
    for text, encoding in zip(texts, expected, strict=True):
        assert tokenizer.encode(text, add_special=add_special) == encoding.ids, text


@pytest.mark.model
def test_random_strings_agree_with_gemmas_tokenizer_json(gemma3_path: Path) -> None:
    source = gemma_tokenizer_json()
    tokenizer = Tokenizer.from_gguf(gguf.read(gemma3_path).metadata)
    added = [token["content"] for token in json.loads(source)["added_tokens"] if token["id"] < tokenizer.vocab_size]
    assert len(added) > 6000
    texts = random_texts(WORDS, added)
    assert_same(tokenizer, tokenizers.Tokenizer.from_str(source), texts, add_special=False)


@pytest.mark.model
def test_random_strings_agree_with_minilms_tokenizer_json(minilm_path: Path) -> None:
    source = json.loads((minilm_path / "tokenizer.json").read_text())
    other = tokenizers.Tokenizer.from_str(json.dumps(source))
    other.no_truncation()
    other.no_padding()
    pieces = [""] * len(source["model"]["vocab"])
    for piece, token in source["model"]["vocab"].items():
        bare = piece.startswith("[") and piece.endswith("]")
        pieces[token] = piece if bare else piece[2:] if piece.startswith("##") else "\u2581" + piece
    kinds = np.full(len(pieces), Kind.NORMAL, np.int32)
    kinds[[token["id"] for token in source["added_tokens"]]] = Kind.CONTROL
    tokenizer = Tokenizer.from_gguf({P + "model": "bert", P + "tokens": pieces, P + "token_type": kinds})
    texts = random_texts(WORDS, [token["content"] for token in source["added_tokens"]])
    assert_same(tokenizer, other, texts, add_special=True)


@pytest.mark.model
def test_random_strings_agree_with_the_library_on_smollm2(smollm2_path: Path) -> None:
    """The library's own byte-pair encoding, given the vocabulary of the file, as its tokenizer.json would give it."""
    metadata = gguf.read(smollm2_path).metadata
    pieces = metadata[P + "tokens"]
    pairs = [tuple(merge.split(" ")) for merge in metadata[P + "merges"]]
    other = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, pairs))
    pre = tokenizers.pre_tokenizers
    other.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    specials = [piece for piece, kind in zip(pieces, metadata[P + "token_type"], strict=True) if kind == Kind.CONTROL]
    other.add_special_tokens(specials)
    tokenizer = Tokenizer.from_gguf(metadata)
    assert_same(tokenizer, other, random_texts(WORDS, specials), add_special=False)


# ------------------------------------------------------------------------------------------------------ special tokens


@pytest.mark.parametrize("kind", ["bpe", "spm", "gemma"])
def test_control_tokens_are_found_only_when_asked_for(kind: str) -> None:
    tokenizer = Tokenizer.from_gguf(tiny(kind))
    mark = tiny(kind)[P + "tokens"].index("<|im_end|>")
    text = "the fox<|im_end|>the hen"
    assert mark in tokenizer.encode(text, add_special=False)
    plain = tokenizer.encode(text, add_special=False, parse_special=False)
    assert not any(tokenizer.is_special(token) for token in plain if token != tokenizer.unk_id)
    assert mark not in plain


def test_user_defined_tokens_are_always_found() -> None:
    metadata = tiny()
    token = metadata[P + "tokens"].index("<|im_start|>")
    metadata[P + "token_type"][token] = Kind.USER_DEFINED
    tokenizer = Tokenizer.from_gguf(metadata)
    assert token in tokenizer.encode("a<|im_start|>b", parse_special=False)
    assert not tokenizer.is_special(token)
    assert tokenizer.decode([token], skip_special=True) == "<|im_start|>"


def test_of_overlapping_special_tokens_the_leftmost_and_of_those_the_longest_is_taken() -> None:
    metadata = tiny()
    names = ["<a>", "<a><b>", "<b><c>"]
    metadata[P + "tokens"] = [*metadata[P + "tokens"][:-3], *names]
    metadata[P + "token_type"] = np.append(metadata[P + "token_type"][:-3], [Kind.CONTROL] * 3)
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = tokenizer.encode("<a><b><c>", add_special=False)
    assert ids[0] == metadata[P + "tokens"].index("<a><b>")
    assert tokenizer.decode(ids) == "<a><b><c>"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "<|begin_of_text|>the"),
        ({"add_bos_token": False}, "the"),
        ({"add_eos_token": True}, "<|begin_of_text|>the<|end_of_text|>"),
        ({"pre": "gpt-2", "add_bos_token": None}, "the"),
        ({"pre": "llama-bpe", "add_bos_token": None}, "<|begin_of_text|>the"),  # this family expects one
    ],
)
def test_what_is_added_around_a_text(changes: dict[str, Any], expected: str) -> None:
    tokenizer = Tokenizer.from_gguf(tiny(**changes))
    assert tokenizer.decode(tokenizer.encode("the")) == expected
    assert tokenizer.decode(tokenizer.encode("the", add_special=False)) == "the"
    assert tokenizer.decode(tokenizer.encode("")) == expected.replace("the", "")


def test_a_sentence_for_bert() -> None:
    tokenizer = Tokenizer.from_gguf(tiny("wordpiece"))
    assert tokenizer.decode(tokenizer.encode("The FOX, over\nthe d\u00f3gs")) == "[CLS] the fox , over the dogs[SEP]"
    assert tokenizer.encode("\u4e2d") == [tokenizer.bos_id, tokenizer.unk_id, tokenizer.sep_id]


def test_a_rendered_template_gets_no_second_bos() -> None:
    tokenizer = Tokenizer.from_gguf(tiny())
    with_bos = tokenizer.encode_chat("<|begin_of_text|>the")
    assert with_bos == tokenizer.encode_chat("the") == tokenizer.encode("the")
    without = Tokenizer.from_gguf(tiny(add_bos_token=False))
    assert without.encode_chat("the") == without.encode("the")


def test_spaces_in_front_come_and_go() -> None:
    tokenizer = Tokenizer.from_gguf(tiny("spm"))
    ids = tokenizer.encode("the fox", add_special=False)
    assert tokenizer.token_bytes(ids[0]).startswith(b" ")
    assert tokenizer.decode(ids) == "the fox"
    assert tokenizer.decode(tokenizer.encode("the fox"), skip_special=True) == "the fox"
    stream = tokenizer.stream()  # the continuation of a text keeps it
    assert "".join(map(stream.push, ids)) + stream.flush() == " the fox"


@pytest.mark.parametrize("kind", ["bpe", "spm", "gemma"])
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_decoding_gives_the_text_back(kind: str, text: str) -> None:
    tokenizer = TINY[kind]
    assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == as_decoded(kind, text)


def as_decoded(kind: str, text: str) -> str:
    return text if kind == "bpe" else text.replace("\u2581", " ")  # SentencePiece cannot tell them apart


def test_lone_surrogates_are_replaced() -> None:
    tokenizer = TINY["bpe"]
    assert tokenizer.decode(tokenizer.encode("a\udc80b\ud83d\ude42", add_special=False)) == "a\ufffdb\U0001f642"


# ------------------------------------------------------------------------------------------------- the end of an answer


def with_tokens(*texts: str, kinds: int | list[int] = Kind.CONTROL, **changes: Any) -> dict[str, Any]:
    """A vocabulary whose last tokens have these texts."""
    metadata = tiny(**changes)
    n = len(texts)
    metadata[P + "tokens"] = [*metadata[P + "tokens"][:-n], *texts]
    metadata[P + "token_type"] = np.append(metadata[P + "token_type"][:-n], np.broadcast_to(kinds, n))
    return metadata


def ends(metadata: dict[str, Any]) -> set[str]:
    return {metadata[P + "tokens"][token] for token in Tokenizer.from_gguf(metadata).eog_ids}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (tiny(), {"<|end_of_text|>", "<|im_end|>"}),
        (with_tokens("<|eom_id|>", "<|eot_id|>"), {"<|end_of_text|>", "<|im_end|>", "<|eom_id|>", "<|eot_id|>"}),
        (with_tokens("<end_of_turn>", kinds=Kind.NORMAL), {"<|end_of_text|>", "<|im_end|>", "<end_of_turn>"}),
        (with_tokens("stop", eom_token_id=479), {"<|end_of_text|>", "<|im_end|>", "stop"}),
        (with_tokens("<|fim_pad|>", "<|file_sep|>"), {"<|end_of_text|>", "<|im_end|>", "<|fim_pad|>", "<|file_sep|>"}),
        (with_tokens("<|fim_prefix|>"), {"<|end_of_text|>", "<|im_end|>"}),
        (with_tokens("</s>"), {"<|end_of_text|>", "<|im_end|>", "</s>"}),
        (with_tokens("</s>", kinds=Kind.USER_DEFINED), {"<|end_of_text|>", "<|im_end|>"}),
        (
            with_tokens("<|return|>", "<|call|>", "<|end|>"),
            {"<|end_of_text|>", "<|im_end|>", "<|return|>", "<|call|>"},
        ),
        (with_tokens("<|end|>"), {"<|end_of_text|>", "<|im_end|>", "<|end|>"}),
    ],
)
def test_tokens_that_end_an_answer(metadata: dict[str, Any], expected: set[str]) -> None:
    assert ends(metadata) == expected


def test_well_known_ends_are_control_tokens_whatever_the_file_says() -> None:
    tokenizer = Tokenizer.from_gguf(with_tokens("<end_of_turn>", kinds=Kind.NORMAL))
    assert tokenizer.is_special(479)
    assert tokenizer.encode("a<end_of_turn>")[-1] == 479


# ------------------------------------------------------------------------------------------------------------ streaming

TINY = {kind: Tokenizer.from_gguf(tiny(kind)) for kind in ("bpe", "spm", "gemma", "wordpiece")}


@pytest.mark.parametrize("kind", TINY)
@given(data=st.data())
def test_a_stream_is_the_decoded_text_in_whole_characters(kind: str, data: st.DataObject) -> None:
    tokenizer = TINY[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    skip = data.draw(st.booleans())
    stream = tokenizer.stream(skip_special=skip, at_start=True)
    pushed = [stream.push(token) for token in ids]
    assert "".join(pushed) + stream.flush() == tokenizer.decode(ids, skip_special=skip)
    raw = b"".join(tokenizer.token_bytes(token) for token in ids if not (skip and tokenizer.is_special(token)))
    expected = raw.decode("utf-8", "replace")
    rest = tokenizer.stream(skip_special=skip)
    assert "".join(map(rest.push, ids)) + rest.flush() == expected


@pytest.mark.parametrize("kind", ["bpe", "spm"])
@given(text=st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), min_size=1, max_size=8))
def test_no_half_characters(kind: str, text: str) -> None:
    tokenizer = TINY[kind]
    stream = tokenizer.stream(at_start=True)
    done = ""
    for token in tokenizer.encode(text, add_special=False, parse_special=False):
        done += stream.push(token)
        assert as_decoded(kind, text).startswith(done)
    assert stream.flush() == ""


def test_a_stream_ends_in_the_middle_of_a_character() -> None:
    tokenizer = TINY["bpe"]
    ids = tokenizer.encode("x\U0001f642", add_special=False)
    assert len(ids) == 5
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids[:4]] == ["x", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(ids[0]) == "x"  # and may be used again


@pytest.mark.parametrize("token", [-1, 480, 1 << 40])
def test_tokens_that_do_not_exist(token: int) -> None:
    with pytest.raises(UsageError, match="480 tokens"):
        TINY["bpe"].decode([token])


# ------------------------------------------------------------------------------------------------------ broken metadata

BROKEN: dict[str, Callable[[], dict[str, Any]]] = {
    "no model": lambda: tiny(model=None),
    "model is a number": lambda: tiny(model=3),
    "no tokens": lambda: tiny(tokens=None),
    "tokens is a string": lambda: tiny(tokens="abc"),
    "tokens are numbers": lambda: tiny(tokens=np.arange(9)),
    "tokens are empty": lambda: tiny(tokens=[]),
    "a token twice": lambda: with_tokens("the", "the"),
    "a token of a megabyte": lambda: with_tokens("x" * (1 << 20)),
    "no merges": lambda: tiny(merges=None),
    "merges are numbers": lambda: tiny(merges=np.arange(9)),
    "types too short": lambda: tiny(token_type=np.ones(3, np.int32)),
    "types are text": lambda: tiny(token_type=("a",) * 480),
    "types are floats": lambda: tiny(token_type=np.ones(480, np.float32)),
    "types are a number": lambda: tiny(token_type=1),
    "no scores": lambda: tiny("spm", scores=None),
    "scores too short": lambda: tiny("spm", scores=np.ones(3, np.float32)),
    "a score is NaN": lambda: tiny("spm", scores=np.full(480, np.nan, np.float32)),
    "bos out of range": lambda: tiny(bos_token_id=480),
    "eos out of range": lambda: tiny(eos_token_id=1 << 31),
    "padding negative": lambda: tiny(padding_token_id=-7),
    "bos is text": lambda: tiny(bos_token_id="1"),
    "bos is a float": lambda: tiny(bos_token_id=1.0),
    "bos is a bool": lambda: tiny(bos_token_id=True),
    "add_bos is a number": lambda: tiny(add_bos_token=2),
    "bos asked for and not named": lambda: tiny(bos_token_id=None, add_bos_token=True),
    "pre is a number": lambda: tiny(pre=3),
    "charsmap is text": lambda: tiny("spm", model="t5", precompiled_charsmap="abc"),
    "charsmap of floats": lambda: tiny("spm", model="t5", precompiled_charsmap=np.ones(9, np.float32)),
    "name is a number": lambda: tiny() | {"general.name": 3},
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_metadata_is_refused(name: str) -> None:
    with pytest.raises(FormatError) as refused:
        Tokenizer.from_gguf(BROKEN[name]())
    assert len(str(refused.value)) < 300
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("model", ["rwkv", "plamo2", "hybriddna", "none", "telepathy"])
def test_other_kinds_of_tokenizers_are_refused(model: str) -> None:
    with pytest.raises(UnsupportedError, match=model):
        Tokenizer.from_gguf(tiny(model=model))
    with pytest.raises(UnsupportedError, match=model):
        Tokenizer.from_gguf(tiny(pre=model))


def test_ids_of_minus_one_mean_none() -> None:
    tokenizer = Tokenizer.from_gguf(tiny(padding_token_id=0xFFFFFFFF, unknown_token_id=-1))
    assert tokenizer.pad_id is None
    assert tokenizer.unk_id is None


@pytest.mark.parametrize(
    "merges",
    [
        [],
        ["", " ", "  ", "a", "a b c", "\u0120"],  # no pairs, or not two
        ["nothing known", "t nothing", "nothing t"],  # tokens that do not exist
        ["t h", "t h", "t h"],
        ["t \u20ac", "\u20ac t"],
    ],
)
def test_merges_that_cannot_be_used_leave_the_text_whole(merges: list[str]) -> None:
    tokenizer = Tokenizer.from_gguf(tiny(merges=merges))
    assert tokenizer.decode(tokenizer.encode("the \u20ac th", add_special=False)) == "the \u20ac th"


def test_a_merge_without_a_token_falls_back_to_bytes() -> None:
    metadata = tiny(merges=["t h", "th e"])  # "th" is a token here, "the" is none
    metadata[P + "tokens"] = [t if t != "the" else "[gone]" for t in metadata[P + "tokens"]]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert [tokenizer.token_bytes(t) for t in tokenizer.encode("the", add_special=False)] == [b"t", b"h", b"e"]


def test_a_vocabulary_without_bytes_loses_what_it_cannot_spell() -> None:
    metadata = tiny()
    metadata[P + "tokens"] = [f"[gone {i}]" if t == "x" else t for i, t in enumerate(metadata[P + "tokens"])]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.decode(tokenizer.encode("axb", add_special=False)) == "ab"


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 1 << 40),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.text(max_size=3), max_size=5),
    st.lists(st.integers(-9, 9), max_size=5).map(lambda items: np.array(items, np.int32)),
    st.lists(st.floats(width=32), max_size=5).map(lambda items: np.array(items, np.float32)),
    st.sampled_from(["gpt2", "llama", "t5", "bert", "gemma4", "whitespace", "kimi-k2", "gemma4", "viking"]),
)


@settings(max_examples=500, deadline=None)
@given(kind=st.sampled_from(list(TINY)), data=st.data())
def test_any_metadata_is_refused_or_works(kind: str, data: st.DataObject) -> None:
    metadata = tiny(kind)
    keys = [*metadata, P + "precompiled_charsmap", P + "padding_token_id", P + "fim_pad_token_id"]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        value = data.draw(VALUES)
        old = metadata.get(key)
        if isinstance(old, list | np.ndarray) and data.draw(st.booleans()):
            value = old[: data.draw(st.integers(0, len(old)))] if data.draw(st.booleans()) else old[::-1]
        metadata[key] = value
        if value is None:
            del metadata[key]
    try:
        tokenizer = Tokenizer.from_gguf(metadata)
        ids = tokenizer.encode("the fox <|im_end|> \u20ac\U0001f642\n\n  x")
        tokenizer.decode(ids)
        tokenizer.decode(range(tokenizer.vocab_size))
    except EdgelmError:
        return
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
