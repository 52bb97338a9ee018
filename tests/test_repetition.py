"""DRY: which tokens would continue a repetition, against llama.cpp's examples and against the plain definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm import repetition
from edgelm.kernels.sampling import repetitions
from edgelm.repetition import Breakers


def continuations(history, *rest):
    return repetition.continuations(np.array(history, np.int64), *rest)


def unbroken(history, *rest):
    return repetition.unbroken(np.array(history, np.int64), *rest)


def letters(texts):
    """Token i is the letter i of the alphabet, a text is its letters."""
    return Breakers(texts, lambda i: chr(97 + i), lambda text: [ord(c) - 97 for c in text])


NONE = letters(())


# The histories and breakers of llama.cpp's tests/test-sampling.cpp; it penalises by base ** (length - allowed).
@pytest.mark.parametrize(
    ("history", "allowed", "breakers", "expected"),
    [
        ([0, 1], 2, (), {}),
        ([0, 1, 2, 0, 1], 2, (), {2: 2}),
        ([0, 1, 3, 4, 0, 1], 2, ("d",), {3: 2}),
        ([0, 1, 2, 3, 4, 0, 1], 4, (), {}),
        ([0, 1, 2, 2, 1, 2, 24, 0, 1, 2], 1, (), {2: 3, 1: 1, 24: 2}),
    ],
)
def test_known_histories(history, allowed, breakers, expected):
    if breakers:
        expected = {token: n for token, n in expected.items() if chr(97 + token) not in breakers}
    assert continuations(history, letters(breakers), allowed, 99) == expected


def plain(history, limit, shortest):
    """For each earlier position, how far back it equals the end of the history."""
    found = {}
    for end in range(len(history) - 1):
        length = 0
        while length < limit and length <= end and history[end - length] == history[-1 - length]:
            length += 1
        if length >= shortest:
            token = history[end + 1]
            found[token] = max(found.get(token, 0), length)
    return found


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 5), st.integers(5, 12))
def test_is_its_definition(history, shortest, longest):
    expected = plain(history, longest, shortest) if len(history) > shortest else {}
    assert continuations(history, NONE, shortest, longest) == expected
    assert continuations(history, NONE, shortest, longest, repetitions) == expected


def test_a_very_long_repetition():
    """More places than machine code keeps track of."""
    history = np.zeros(5000, np.int64)
    assert repetitions(history, 2, 5) is None and repetitions(history[:4000], 2, 5) is not None
    assert continuations(history, NONE, 2, 5, repetitions) == {0: 5}


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 4))
def test_no_repetition_reaches_over_a_breaker(history, shortest):
    """Token 4 is a breaker: only what comes after the last one is compared, and itself it is never penalised."""
    tail = 0
    while tail < len(history) and history[-1 - tail] != 4:
        tail += 1
    expected = plain(history, tail, shortest) if len(history) > shortest and tail >= shortest else {}
    expected.pop(4, None)
    assert continuations(history, letters(("e",)), shortest, 99) == expected


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ("xyabc", 0),  # the breaker "abc" has just ended
        ("abcx", 1),
        ("abcxxab", 4),  # only the beginning of another one
        ("xxab", 4),
        ("", 0),
    ],
)
def test_a_breaker_of_several_tokens(history, expected):
    assert unbroken([ord(c) - 97 for c in history], letters(("abc",)), 99) == expected


def test_a_token_can_hold_a_breaker_or_begin_one():
    words = {0: "hello", 1: ".\n", 2: "\n\n", 3: "the end", 4: "d o", 5: " of"}
    breakers = Breakers(["\n", "end of", ""], words.__getitem__, lambda text: [len(text)])
    assert [breakers.ends_with(i) for i in range(6)] == [False, True, True, False, False, False]
    assert breakers.tails(0) == breakers.tails(5) == ()
    assert breakers.tails(3) == ((3,),)  # " of" must follow
    assert breakers.tails(4) == ()


def test_without_texts_nothing_breaks():
    assert continuations([0, 1, 4, 2, 0, 1, 4], Breakers(["e"]), 2, 99) == {2: 3}


def test_lengths_count_at_most_as_the_longest():
    assert continuations([7] * 500, NONE, 2, 10) == {7: 10}
