"""Answers that end before their end: keys, other answers, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from answers import GREEDY, PROMPT, read, says
from in_threads import in_threads

from edgelm.cache import Batch
from edgelm.errors import UsageError
from edgelm.model import Model


def test_an_answer_that_is_not_read_to_its_end(model: Model) -> None:
    session = model.session()
    for n in (1, 3):
        answer = session.stream(PROMPT, max_tokens=8, **GREEDY)
        for _ in range(n):
            next(answer)
        answer.close()
    assert (
        read(session.stream(PROMPT, max_tokens=8, **GREEDY))[:2]
        == read(model.session().stream(PROMPT, max_tokens=8, **GREEDY))[:2]
    )


def test_a_keyboard_interrupt_while_computing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = says(model, monkeypatch, [9] * 99)
    runner: Any = model.runner
    runner.error_at = 40  # in the middle of the prompt
    with pytest.raises(KeyboardInterrupt):
        list(session.stream([5] * 100))
    assert len(session.tokens) == session._sequence.length == 48
    runner.error_at = 103  # in the middle of the answer
    with pytest.raises(KeyboardInterrupt):
        list(session.stream([5] * 100))
    assert len(session.tokens) == session._sequence.length == 103
    runner.error_at = None
    assert read(session.stream([5] * 100, max_tokens=3))[2].cached_tokens == 99


def test_an_interrupt_between_the_cache_and_the_tokens(model: Model) -> None:
    session = model.session()
    list(session.stream(PROMPT, max_tokens=3, **GREEDY))
    session._tokens.pop()
    assert (
        read(session.stream(PROMPT, max_tokens=8, **GREEDY))[:2]
        == read(model.session().stream(PROMPT, max_tokens=8, **GREEDY))[:2]
    )


def test_an_interrupt_while_a_saved_session_is_taken_over(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved, session = model.session(), model.session()
    list(saved.stream(PROMPT, max_tokens=3, **GREEDY))
    saved.save(tmp_path / "x")
    list(session.stream("the dog", max_tokens=3, **GREEDY))
    release = session._sequence.release

    def interrupted() -> None:
        release()
        raise KeyboardInterrupt

    monkeypatch.setattr(session._sequence, "release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.load(tmp_path / "x")
    again, fresh = (read(s.stream(PROMPT, max_tokens=8, **GREEDY)) for s in (session, model.session()))
    assert again[:2] == fresh[:2]


def test_a_later_answer_ends_an_earlier_one(model: Model) -> None:
    session = model.session()
    first = session.stream(PROMPT, max_tokens=8, **GREEDY)
    next(first)
    second = session.stream("the dog", max_tokens=4, **GREEDY)
    with pytest.raises(UsageError, match="this answer is over"):
        next(first)
    assert read(second)[0] == model.generate("the dog", max_tokens=4, **GREEDY)


def test_one_session_in_two_threads_is_refused(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the answer that the other thread reads does not notice."""
    session, inside, go_on = model.session(), threading.Event(), threading.Event()
    forward, expected = model.runner.forward, model.generate(PROMPT, max_tokens=3, **GREEDY)
    model.session().save(tmp_path / "x")

    def slow(batch: Batch) -> Any:
        inside.set()
        assert go_on.wait(600)
        return forward(batch)

    monkeypatch.setattr(model.runner, "forward", slow)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: read(session.stream(PROMPT, max_tokens=3, **GREEDY))[0])
        assert inside.wait(600)
        refused: list[Callable[[], object]] = [
            lambda: session.save("nowhere"), lambda: session.load(tmp_path / "x"), lambda: session.truncate(0),
            session.reset, session.fork, session.close, lambda: session.stream(PROMPT),
        ]  # fmt: skip
        try:
            for use in refused:
                with pytest.raises(UsageError, match="two threads at once"):
                    use()
        finally:
            go_on.set()
        assert answer.result() == expected


def test_sessions_in_several_threads(model: Model) -> None:
    prompts = [PROMPT, "the fox", "once upon a time there was a small model", "hello"]
    expected = [model.generate(p, max_tokens=20, **GREEDY) for p in prompts]

    def work(i: int) -> None:
        session = model.session()
        for _ in range(3):
            assert read(session.stream(prompts[i], max_tokens=20, **GREEDY))[0] == expected[i]

    in_threads(work, len(prompts))
