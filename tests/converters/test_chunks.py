"""Parts of a text that go through a model in turns: always in the same order, and never past an error."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny

from converters import chunks
from converters.chunks import Opened, Turns, parts


@pytest.mark.parametrize("n", [1, 2, 5])
def test_everybody_meets_in_order(n: int) -> None:
    turns, seen = Turns(n), list[tuple[int, int]]()

    def work(number: int) -> None:
        for step in range(3):
            seen.append((step, number))
            assert turns.meet(number, lambda step=step: (step, len(seen))) == (step, (step + 1) * n)

    turns.run([partial(work, number) for number in range(n)])
    assert seen == [(step, number) for step in range(3) for number in range(n)]


@pytest.mark.parametrize("who", [0, 1, 2])
@pytest.mark.parametrize("where", ["work", "finish"])
def test_an_error_ends_them_all(who: int, where: str) -> None:
    turns, steps = Turns(3), []

    def fail() -> None:
        raise KeyboardInterrupt

    def work(number: int) -> None:
        turns.meet(number, lambda: None)
        if where == "work" and number == who:
            fail()
        turns.meet(number, fail if where == "finish" else lambda: None)
        steps.append(number)

    with pytest.raises(KeyboardInterrupt):
        turns.run([partial(work, number) for number in range(3)])
    assert not steps


def test_parts_are_as_large_as_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Opened.read(tiny("llama-gqa", folder=tmp_path))
    tokens = np.arange(10 * 32, dtype=np.int32).reshape(10, 32)
    assert [len(part) for part in parts(source, tokens)] == [10]
    monkeypatch.setattr(chunks, "PART_BYTES", 4 * 32 * 96 * 8)  # the feed-forward layers are 96 wide
    assert [len(part) for part in parts(source, tokens)] == [8, 2]
    assert [len(part) for part in parts(source, tokens, copies=2)] == [4, 4, 2]
    monkeypatch.setattr(chunks, "PART_BYTES", 1)
    np.testing.assert_array_equal(np.concatenate(parts(source, tokens)), tokens)
