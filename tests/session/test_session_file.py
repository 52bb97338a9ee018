"""Saved sessions: what goes on where it was saved, and what no damaged file can do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import GREEDY, PROMPT, read

from edgelm.errors import FormatError, SourceError
from edgelm.model import Model


def test_save_and_load(model: Model, tmp_path: Path, computed: list[int]) -> None:
    session, path = model.session(), tmp_path / "x.session"
    list(session.stream(PROMPT, max_tokens=70, **GREEDY))
    session.save(path)
    other = model.session()
    list(other.stream("the dog", max_tokens=3, **GREEDY))
    other.load(path)
    assert other.tokens == session.tokens
    computed.clear()
    one = read(session.stream([*session.tokens, 9], max_tokens=5, **GREEDY))
    two = read(other.stream([*other.tokens, 9], max_tokens=5, **GREEDY))
    assert one[:2] == two[:2] and two[2].cached_tokens == len(other.tokens) - 5
    assert list(tmp_path.iterdir()) == [path]


def test_saved_sessions_that_are_damaged(model: Model, tmp_path: Path) -> None:
    session, path = model.session(), tmp_path / "x.session"
    list(session.stream(PROMPT, max_tokens=3, **GREEDY))
    session.save(path)
    data, before = path.read_bytes(), model.new_cache().n_pages
    other = model.session()
    rng = np.random.default_rng(0)
    cut = [*range(0, 200, 3), *rng.integers(0, len(data), 20).tolist()]
    damaged = [data[:n] for n in cut]
    for at in [*range(0, 200, 3), *rng.integers(0, len(data), 40).tolist()]:
        damaged.append(data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :])
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(FormatError):
            other.load(path)
    assert other.tokens == () and model.new_cache().n_pages == before
    with pytest.raises(SourceError):
        other.load(tmp_path / "missing")
    with pytest.raises(SourceError):
        session.save(tmp_path / "no such folder" / "x")


def test_saved_sessions_of_other_models(load: Callable[..., Model], tmp_path: Path) -> None:
    session = load().session()
    list(session.stream(PROMPT, max_tokens=1, **GREEDY))
    session.save(tmp_path / "x")
    for other in (load("llama-mqa"), load("llama-mha")):
        with pytest.raises(FormatError, match="saved with another model"):
            other.session().load(tmp_path / "x")
    with pytest.raises(FormatError, match="context window has 4"):
        load(ctx_size=4).session().load(tmp_path / "x")


def test_saved_sessions_of_other_rope_factors(load: Callable[..., Model], tmp_path: Path) -> None:
    """LongRoPE turns keys by one list of factors or the other, as the context window says."""
    short, still_short, long = (load("phi3-longrope", ctx_size=n) for n in (32, 30, 33))
    session = short.session()
    list(session.stream(PROMPT, max_tokens=1, **GREEDY))
    session.save(tmp_path / "x")
    still_short.session().load(tmp_path / "x")
    with pytest.raises(FormatError, match="other RoPE factors"):
        long.session().load(tmp_path / "x")


def test_saved_sessions_of_a_type_with_two_names(load: Callable[..., Model], tmp_path: Path, interpreter: str) -> None:
    one, other = (load(kv_type=name) for name in ("q8_0", "q8_0/q8_0"))
    session = one.session()
    list(session.stream(PROMPT, max_tokens=1, **GREEDY))
    session.save(tmp_path / "x")
    other.session().load(tmp_path / "x")
    assert other.kv_type == "q8_0"
    if interpreter == "program":
        runner: Any = other.runner
        list(other.session().stream(PROMPT, max_tokens=1, **GREEDY))
        assert list(runner._plans) == ["q8_0"]
