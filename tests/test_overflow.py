"""What is left out of a text that does not fit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm import overflow
from edgelm.errors import ContextFull
from edgelm.request import Request


@given(n=st.integers(1, 300), n_ctx=st.integers(2, 100), fixed=st.integers(0, 120), max_tokens=st.integers(-1, 200))
@pytest.mark.parametrize("policy", ["truncate-middle", "shift"])
def test_tokens(policy: str, n: int, n_ctx: int, fixed: int, max_tokens: int) -> None:
    request = Request(overflow=policy, max_tokens=max_tokens, keep=fixed)
    tokens = list(range(n))
    kept, dropped = overflow.fit_tokens(tokens, request, n_ctx, fixed)
    assert len(kept) + dropped == n and len(kept) <= n_ctx
    if n <= n_ctx:
        assert kept == tokens
        return
    assert n_ctx - len(kept) == overflow.room(request, n_ctx)
    assert kept == sorted(set(kept)) and kept[-1] == n - 1
    head = next((i for i, token in enumerate(kept) if token != i), len(kept))
    assert head >= min(fixed, len(kept) - 1)
    assert kept[head:] == tokens[n - (len(kept) - head) :]
    if policy == "truncate-middle" and fixed <= len(kept) // 2:
        assert abs(head - len(kept) / 2) <= 1


def test_an_error_unless_somebody_chose() -> None:
    with pytest.raises(ContextFull) as caught:
        overflow.fit_tokens([1] * 11, Request(), 10, 0)
    assert (caught.value.n_tokens, caught.value.n_ctx) == (11, 10)
    assert overflow.fit_tokens([1] * 10, Request(), 10, 0) == ([1] * 10, 0)


@given(n=st.integers(1, 100), fixed=st.integers(0, 120))
def test_a_shift_makes_room(n: int, fixed: int) -> None:
    kept, dropped = overflow.shift(list(range(n)), fixed)
    assert dropped >= 1 and len(kept) == n - dropped
    fixed = min(fixed, max(0, n - 2))
    assert kept[:fixed] == list(range(fixed))
    assert kept[fixed:] == list(range(n))[n - (len(kept) - fixed) :]


def conversation(n_turns: int, system: bool = True) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": "S" * 5}] if system else []
    for i in range(n_turns):
        turns += [{"role": "user", "content": f"u{i}"}, {"role": "assistant", "content": f"a{i}" * 4}]
    return [*turns, {"role": "user", "content": "last"}]


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("policy", ["truncate-middle", "shift"])
@pytest.mark.parametrize("n_turns", [0, 1, 2, 5, 20])
@pytest.mark.parametrize("n_ctx", [20, 60])
def test_messages(policy: str, system: bool, n_turns: int, n_ctx: int) -> None:
    seen: list[list[dict[str, Any]]] = []

    def render(messages: Sequence[Any]) -> list[int]:
        seen.append(list(messages))
        return [ord(c) for m in messages for c in m["content"]]

    messages = conversation(n_turns, system)
    tokens, dropped = overflow.fit_messages(list(messages), render, Request(overflow=policy, max_tokens=10), n_ctx)
    kept = seen[-1]
    assert len(tokens) + dropped == sum(len(m["content"]) for m in messages)
    if dropped:
        assert len(tokens) <= n_ctx - 10 or len(kept) == 1 + int(system)
    assert kept[-1] == messages[-1]
    assert [m for m in kept if m["role"] == "system"] == messages[: int(system)]
    if policy == "truncate-middle" and len(kept) > 1 + int(system):
        assert kept[int(system)] == messages[int(system)]
    roles = [m["role"] for m in kept if m["role"] != "system"]
    assert all(a != b for a, b in itertools.pairwise(roles)) and roles[0] == "user"


def test_a_single_long_message_is_left_to_the_tokens() -> None:
    tokens, dropped = overflow.fit_messages(conversation(0), lambda m: [7] * 99, Request(overflow="shift"), 60)
    assert (len(tokens), dropped) == (99, 0)
