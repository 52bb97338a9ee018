"""Vocabularies from every kind of tokenizer file; the check against the source; damaged files."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import Any

import hf_folder
import numpy as np
import pytest
import tiny_vocabulary
from references import gemma_tokenizer_json, llama_cpp_models

from converters import pretokenizer_names, sentencepiece_model, tokenizer_check, vocab
from converters.special_tokens import Folder
from edgelm import gguf
from edgelm.errors import EdgelmError, FormatError, SourceError, UnsupportedError
from edgelm.pretokenizers import PRE_TOKENIZERS
from edgelm.tokenizer import Tokenizer
from edgelm.vocabulary import Kind

P = "tokenizer.ggml."
REAL = ("deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "qwen2", "refact", "starcoder")
DAMAGES = (
    "id too large", "negative id", "id that is no number", "no vocabulary", "no merges", "merges of numbers",
    "unknown kind", "merges of nothing", "normalizer", "added tokens",
)  # fmt: skip


def read(path: Path, size: int = 512, **hf: Any) -> tuple[dict[str, Any], Folder]:
    folder = Folder.read(path, hf)
    return vocab.read(folder, size), folder


def own_keys(kind: str, pre: str, size: int = 512) -> dict[str, Any]:
    return {k.removeprefix(P): v for k, v in tiny_vocabulary.metadata(kind, pre, size).items()}


# ------------------------------------------------------------------------------------------------ real vocabularies


@pytest.mark.model
@pytest.mark.parametrize("name", REAL)
def test_byte_pairs_of_real_models(name: str, tmp_path: Path) -> None:
    """The vocabularies of llama.cpp, made into tokenizer.json and back."""
    metadata = gguf.read(llama_cpp_models() / f"ggml-vocab-{name}.gguf").metadata
    keys = {k.removeprefix(P): v for k, v in metadata.items()}
    keys["token_type"] = np.asarray(keys["token_type"]).tolist()
    hf_folder.write_tokenizer(tmp_path, keys, "gpt2")
    made, folder = read(tmp_path, len(keys["tokens"]))
    assert PRE_TOKENIZERS[made[P + "pre"]].splits == PRE_TOKENIZERS[keys["pre"]].splits
    assert made[P + "merges"] == keys["merges"]
    normal = made[P + "token_type"] == Kind.NORMAL
    assert [t for t, n in zip(made[P + "tokens"], normal, strict=True) if n] == [
        t for t, kind in zip(keys["tokens"], keys["token_type"], strict=True) if kind == 1
    ]
    assert tokenizer_check.compare(made, folder)[0] > 50


@pytest.mark.model
def test_gemma_from_its_merges_alone(tmp_path: Path) -> None:
    """262,144 pieces whose scores are not in tokenizer.json: they come from the order of the merges."""
    (tmp_path / "tokenizer.json").write_text(gemma_tokenizer_json(), encoding="utf-8")
    made, folder = read(tmp_path, 262144)
    assert made[P + "model"] == "llama"
    assert not made[P + "add_space_prefix"]
    assert tokenizer_check.compare(made, folder)[0] > 50


# ------------------------------------------------------------------------------------------------- SentencePiece


@pytest.mark.parametrize("kind", ["spm", "gemma"])
def test_sentencepiece_files(kind: str, tmp_path: Path) -> None:
    keys = own_keys(kind, "")
    (tmp_path / "tokenizer.model").write_bytes(hf_folder.sentencepiece_bytes(keys))
    made, folder = read(tmp_path)
    assert made[P + "tokens"] == keys["tokens"]
    assert np.allclose(made[P + "scores"], keys["scores"])
    assert made[P + "token_type"].tolist() == keys["token_type"]
    for key in ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id", "add_space_prefix"):
        assert made[P + key] == keys[key]
    assert tokenizer_check.compare(made, folder) == (0, ["not compared with its source: there is no tokenizer.json"])


def test_scores_from_merges_are_as_good_as_the_real_ones(tmp_path: Path) -> None:
    keys = own_keys("spm", "")
    hf_folder.write_tokenizer(tmp_path, keys, "llama")
    made, folder = read(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(hf_folder.sentencepiece_bytes(keys))
    exact, _ = read(tmp_path)
    assert not np.array_equal(made[P + "scores"], exact[P + "scores"])
    a, b = Tokenizer.from_gguf(made), Tokenizer.from_gguf(exact)
    for text in (*tokenizer_check.TEXTS, tiny_vocabulary.TEXT):
        assert a.encode(text) == b.encode(text)
    assert tokenizer_check.compare(made, folder)[0] > 50


def test_unigram_models_become_t5(tmp_path: Path) -> None:
    keys = own_keys("spm", "")
    (tmp_path / "tokenizer.model").write_bytes(
        hf_folder.sentencepiece_bytes(keys, is_unigram=True, charsmap=b"\x01\x02")
    )
    made, _ = read(tmp_path)
    assert (made[P + "model"], made[P + "precompiled_charsmap"]) == ("t5", b"\x01\x02")
    assert made[P + "remove_extra_whitespaces"] is False


def test_broken_sentencepiece_files_are_survived(tmp_path: Path) -> None:
    whole = hf_folder.sentencepiece_bytes(own_keys("spm", ""))
    path, rng = tmp_path / "tokenizer.model", np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        path.write_bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.5 else data)
        try:
            model = sentencepiece_model.read(path)
        except EdgelmError:
            continue
        assert model.pieces
    for bad in (b"", b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"<html>no model</html>"):
        path.write_bytes(bad)
        with pytest.raises(FormatError):
            sentencepiece_model.read(path)


# ------------------------------------------------------------------------------------------------ other vocabularies


def test_word_pieces_from_vocab_txt(tmp_path: Path) -> None:
    keys = own_keys("wordpiece", "")
    hf_folder.write_tokenizer(tmp_path, keys, "bert")
    parsed, _ = read(tmp_path)
    pieces = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(pieces, key=pieces.get)) + "\n")
    (tmp_path / "tokenizer.json").unlink()
    listed, _ = read(tmp_path)
    n = len(pieces)
    assert listed[P + "tokens"][:n] == parsed[P + "tokens"][:n] == keys["tokens"][:n]
    assert listed[P + "token_type"][:n].tolist() == keys["token_type"][:n]


def test_unigram_from_tokenizer_json(tmp_path: Path) -> None:
    steps = [
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\x05\x06").decode()},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    parsed = {
        "added_tokens": [{"id": 0, "content": "<pad>", "special": True}, {"id": 1, "content": "</s>", "special": True}],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "post_processor": None,
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁a", -1.5]],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    made, _ = read(tmp_path, 5)
    assert made[P + "model"] == "t5"
    assert made[P + "tokens"] == ["<pad>", "</s>", "<unk>", "▁a", "[PAD4]"]
    assert made[P + "token_type"].tolist() == [Kind.CONTROL, Kind.CONTROL, Kind.UNKNOWN, Kind.NORMAL, Kind.UNUSED]
    assert made[P + "scores"][3] == -1.5
    assert made[P + "precompiled_charsmap"] == b"\x05\x06"
    assert made[P + "remove_extra_whitespaces"] is made[P + "add_space_prefix"] is True


def test_chat_templates(tmp_path: Path) -> None:
    hf_folder.write_tokenizer(tmp_path, own_keys("bpe", "llama-bpe"), "gpt2")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    both = [{"name": "default", "template": "A"}, {"name": "tool-use", "template": "B"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": both}))
    made, _ = read(tmp_path)
    assert made["tokenizer.chat_template"] == "A"
    assert made["tokenizer.chat_template.tool_use"] == "B"
    assert made["tokenizer.chat_templates"] == ["tool_use"]
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text("C")
    assert read(tmp_path)[0]["tokenizer.chat_template"] == "C"


# ------------------------------------------------------------------------------------------------- pre-tokenizers


def steps(*parts: Any, ignore_merges: bool = False) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}, "model": {"ignore_merges": ignore_merges}}


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("name", "definition"),
    [
        ("gpt-2", {"pre_tokenizer": GPT2, "model": {}}),
        ("smollm", steps({"type": "Digits", "individual_digits": True}, GPT2)),
        *(
            (name, steps({"type": "Split", "pattern": {"Regex": PRE_TOKENIZERS[name].splits[0]}, "behavior": b,
                          "invert": invert}, LEVEL, ignore_merges=PRE_TOKENIZERS[name].ignore_merges))
            for name in ("llama-bpe", "qwen2", "gpt-4o", "tekken")
            for b, invert in (("Isolated", False), ("Removed", True))
        ),
    ],
)  # fmt: skip
def test_names_of_definitions(name: str, definition: dict[str, Any]) -> None:
    assert pretokenizer_names.name_of(definition) == name


@pytest.mark.parametrize(
    "definition",
    [
        {"pre_tokenizer": None, "model": {}},
        {"pre_tokenizer": {"type": "Whitespace"}, "model": {}},
        {"pre_tokenizer": {**GPT2, "add_prefix_space": True}, "model": {}},
        steps({"type": "Split", "pattern": {"Regex": "my own"}, "behavior": "Isolated", "invert": False}, LEVEL),
        steps({"type": "Split", "pattern": {"Regex": "x"}, "behavior": "MergedWithNext", "invert": False}, LEVEL),
    ],
)
def test_definitions_without_a_name_are_refused(definition: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        pretokenizer_names.name_of(definition)


# -------------------------------------------------------------------------------------------------- what is wrong


def test_a_tokenizer_that_differs_is_found(tmp_path: Path) -> None:
    hf_folder.write_tokenizer(tmp_path, own_keys("bpe", "llama-bpe"), "gpt2")
    made, folder = read(tmp_path)
    assert tokenizer_check.compare(made, folder)[0] > 50
    with pytest.raises(FormatError, match="--no-tokenizer-check"):
        tokenizer_check.compare({**made, P + "merges": made[P + "merges"][5:]}, folder)
    assert "source has" in " ".join(tokenizer_check.compare({**made, P + "add_bos_token": False}, folder)[1])


def damaged(parsed: dict[str, Any], how: str) -> dict[str, Any]:
    model = parsed["model"]
    match how:
        case "id too large":
            model["vocab"]["x" * 9] = 512
        case "negative id":
            model["vocab"]["x" * 9] = -1
        case "id that is no number":
            model["vocab"]["x" * 9] = "7"
        case "no vocabulary":
            model["vocab"] = []
        case "no merges":
            model["merges"] = []
        case "merges of numbers":
            model["merges"] = [[1, 2]]
        case "unknown kind":
            model["type"] = "Mystery"
        case "merges of nothing":
            model["merges"] = [["no", "such pieces"]]
        case "normalizer":
            parsed["normalizer"] = {"type": "Lowercase"}
        case "added tokens":
            parsed["added_tokens"] = [{"id": "x", "content": "y"}]
    return parsed


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_tokenizer_json(how: str, tmp_path: Path) -> None:
    hf_folder.write_tokenizer(tmp_path, own_keys("bpe", "llama-bpe"), "gpt2")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(damaged(json.loads(path.read_text()), how)))
    with pytest.raises((FormatError, UnsupportedError)):
        tokenizer_check.compare(*read(tmp_path))


PLACES = (
    ("added_tokens",), ("added_tokens", 0), ("normalizer",), ("normalizer", "normalizers"), ("pre_tokenizer",),
    ("pre_tokenizer", "pretokenizers"), ("post_processor",), ("post_processor", "pair"), ("post_processor", "pair", 0),
    ("post_processor", "pair", 0, "SpecialToken"), ("model",), ("model", "merges"), ("model", "merges", 3),
    ("model", "vocab"), ("decoder",),
)  # fmt: skip


@pytest.mark.parametrize("kind", ["bpe", "spm", "wordpiece"])
def test_whatever_stands_in_tokenizer_json_is_survived(kind: str, tmp_path: Path) -> None:
    models = {"bpe": ("llama-bpe", "gpt2"), "spm": ("default", "llama"), "wordpiece": ("default", "bert")}
    hf_folder.write_tokenizer(tmp_path, own_keys(kind, models[kind][0]), models[kind][1])
    path = tmp_path / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for place in PLACES:
        for strange in (7, True, 1e30, "x", [1], [None], {"a": 1}, {}):
            parsed = inside = json.loads(text)
            try:
                for step in place[:-1]:
                    inside = inside[step]
                inside[place[-1]] = strange
            except (LookupError, TypeError):  # this kind has no such place
                break
            path.write_text(json.dumps(parsed))
            with contextlib.suppress(EdgelmError):
                read(tmp_path)


def test_what_the_library_panics_over_is_an_error_like_others(tmp_path: Path) -> None:
    hf_folder.write_tokenizer(tmp_path, own_keys("spm", "default"), "llama")
    path = tmp_path / "tokenizer.json"
    parsed = json.loads(path.read_text(encoding="utf-8"))
    parsed["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(parsed))
    with pytest.raises(FormatError, match="the tokenizers library cannot read it"):
        tokenizer_check.compare(*read(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"a": 1, "a": 2}', "\xff"])
def test_files_that_are_no_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(FormatError):
        read(tmp_path)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        read(tmp_path)
