"""Tensors and metadata against those of convert_hf_to_gguf.py, stored as data (tools/make_conversions.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_folder
import pytest
import tiny

from converters.pipeline import convert
from converters.recipe import Recipe
from edgelm import gguf
from edgelm.arch import Config

DATA: dict[str, Any] = json.loads((Path(__file__).parent / "conversions.json").read_text())
# Hyperparameters where the script writes nothing, or something else than transformers computes.
DIFFERENT = {
    "gpt2": {"ffn_dim"},  # it believes that this is always four times the width
    "gemma2": {"attention_scale"},  # it leaves query_pre_attn_scalar to the loader's guess
    "gemma3": {"windowed"},  # it knows only the pattern of six layers
    "mistral": {"sliding_window"},
    "phi3-longrope": {"rope_scaling"},  # there, the tensors with factors say it
    "phi3-longrope-short": {"rope_scaling"},
}
OURS = {"tokenizer.ggml.add_space_prefix"}  # written where it is the default


@pytest.mark.parametrize("name", DATA)
def test_tensors_and_metadata(name: str, tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, name, sentencepiece=True, **DATA[name]["config"])
    for type_ in ("f16", "q8_0"):
        report = convert(folder, tmp_path / "out.gguf", Recipe(type_, pure=True))
        assert {t["tensor"]: t["sha256"] for t in report.tensors} == DATA[name][type_]
    ours, theirs = gguf.read(tmp_path / "out.gguf").metadata, DATA[name]["metadata"]
    tokens = [""] * theirs["tokenizer.ggml.tokens"]["n"]
    read = vars(Config.from_gguf({**theirs, "tokenizer.ggml.tokens": tokens}))
    meant = vars(Config.from_gguf(ours))
    assert {key for key in meant if meant[key] != read[key]} <= DIFFERENT.get(name, set())
    words = {key for key in theirs if key.startswith("tokenizer.")} - SKIPPED.get(name, set())
    assert {key: hf_folder.plain(ours.get(key)) for key in words} == {key: theirs[key] for key in words}
    more = {key for key in ours if key.startswith("tokenizer.")} - words - OURS - SKIPPED.get(name, set())
    assert not more, "keys that it does not write"


# Keys that differ for a reason.
SKIPPED: dict[str, set[str]] = {
    "gemma": {f"tokenizer.ggml.{key}_token_id" for key in ("prefix", "suffix", "middle", "eot")},  # CodeGemma's alone
    **{
        # transformers' own class adds a token here that the folder does not have
        name: {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type"}
        for name in ("qwen2", "qwen3")
    },
    **{
        # scores of special tokens, which nobody reads, and UNKNOWN where it says CONTROL
        name: {"tokenizer.ggml.scores", "tokenizer.ggml.token_type"}
        for name in tiny.ALL
        if name.startswith("phi3")
    },
    **{name: {"tokenizer.ggml.cls_token_id"} for name in tiny.ALL if "bert" in name},
}
