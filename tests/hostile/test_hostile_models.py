"""Well-formed files whose content makes no model are refused while the model is built, before anything of it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelm import gguf
from edgelm.arch import Config
from edgelm.describe import describe
from edgelm.errors import FormatError, UnsupportedError
from edgelm.tokenizer import Tokenizer
from edgelm.weights import Weights

from .build import llama
from .cases import MODEL

# Odd, but a model may be like this, or it is refused later: here it is enough that nothing breaks.
MAY_WORK = {
    "vocab_size_wrong", "matrix_of_integers", "weights_nan", "weights_inf", "embedding_nan", "norm_huge",
    "tokens_all_empty", "tokens_all_equal", "token_of_a_megabyte", "byte_tokens_missing", "scores_too_many",
    "scores_nan", "token_types_unknown", "merge_without_space", "merge_empty", "merge_of_unknown_tokens",
    "rope_freqs_nan", "rope_freqs_zero", "rope_scaling_factor_0", "context_length_2^32", "sliding_window_2^63",
}  # fmt: skip
TEMPLATES = {name for name in MODEL if name.startswith("template_")}  # a chat template matters only in a chat


def build(path: Path, data: bytes) -> Tokenizer:
    path.write_bytes(data)
    model = gguf.read(path)
    Weights.from_gguf(Config.from_gguf(model.metadata), model.tensors)
    return Tokenizer.from_gguf(model.metadata)


def test_the_model_that_they_are_made_of_is_valid(tmp_path: Path) -> None:
    tokenizer = build(tmp_path / "model.gguf", llama())
    assert tokenizer.decode(tokenizer.encode("the tea on a toe 🦙"), skip_special=True) == "the tea on a toe 🦙"


@pytest.mark.parametrize("name", sorted(MODEL.keys() - MAY_WORK - TEMPLATES))
def test_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises((FormatError, UnsupportedError)) as caught:
        build(tmp_path / "model.gguf", MODEL[name]())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", sorted(MAY_WORK))
def test_refused_or_works(name: str, tmp_path: Path) -> None:
    try:
        tokenizer = build(tmp_path / "model.gguf", MODEL[name]())
    except (FormatError, UnsupportedError):
        return
    for text in ("the tea on a toe", "", "🦙\0", "<s>" * 9):
        assert isinstance(tokenizer.decode(tokenizer.encode(text)), str)


@pytest.mark.parametrize("name", sorted(MODEL))
def test_files_that_make_no_model_are_described(name: str, tmp_path: Path) -> None:
    """`edgelm info` says what is wrong with them; it does not stop at it."""
    path = tmp_path / "model.gguf"
    path.write_bytes(MODEL[name]())
    facts = describe(path, metadata=True, tensors=True)
    assert "memory" in facts or facts["not_supported"]
