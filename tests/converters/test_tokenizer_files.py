"""Vocabularies of GGUF files written as tokenizer.json: the same tokens, by the `tokenizers` library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vocabulary

from converters import tokenizer_check, tokenizer_files
from converters.special_tokens import Folder
from edgelm.tokenizer import Tokenizer

KINDS = [("bpe", "llama-bpe"), ("bpe", "qwen2"), ("bpe", "gpt-2"), ("spm", ""), ("gemma", ""), ("wordpiece", "")]


def vocabulary(kind: str, pre: str) -> dict[str, Any]:
    """A small vocabulary as a GGUF file gives it."""
    keys = tiny_vocabulary.metadata(kind, pre, 512)
    for name in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if name in keys:
            keys[name] = np.array(keys[name], np.float32 if name.endswith("scores") else np.int32)
    return keys


@pytest.mark.parametrize("kind,pre", KINDS)
def test_the_same_tokens(kind: str, pre: str, tmp_path: Path) -> None:
    keys = vocabulary(kind, pre)
    tokenizer_files.write(tmp_path, keys)
    n_texts, notes = tokenizer_check.compare(keys, Folder.read(tmp_path, {}))
    assert n_texts > 50 and not notes
    ours = Tokenizer.from_gguf(keys)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    if ours.bos_id is not None and kind != "wordpiece":
        assert settings["bos_token"] == keys["tokenizer.ggml.tokens"][ours.bos_id]
    assert settings.get("chat_template") == keys.get("tokenizer.chat_template")

    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("the quick brown fox", "what is the capital ?"):
        ids = ours.encode(text)
        assert theirs.encode(text).ids == ids
        if kind != "wordpiece":
            assert theirs.decode(ids).strip() == ours.decode(ids, skip_special=True).strip()


def test_merges_that_make_no_token_are_left_out(tmp_path: Path) -> None:
    """The library refuses them; a GGUF vocabulary may have them, and they change nothing."""
    import tokenizers

    keys = vocabulary("bpe", "llama-bpe")
    keys["tokenizer.ggml.merges"] = ["z q", "the zz", *keys["tokenizer.ggml.merges"]]
    tokenizer_files.write(tmp_path, keys)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox, zq"
    assert theirs.encode(text).ids == Tokenizer.from_gguf(keys).encode(text)
