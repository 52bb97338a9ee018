"""Keyword arguments of a generation, and stop strings in text that comes in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.errors import UsageError
from edgelm.request import ALIASES, Request, StopStrings
from edgelm.sampling import GREEDY, Sampling


def test_names_and_aliases() -> None:
    request = Request.of({"temp": 0.5, "top_k": 3, "n_predict": 7, "stop": "x", "logprobs": True, "seed": None})
    assert request == Request(sampling=Sampling(temperature=0.5, top_k=3), max_tokens=7, stop=("x",), logprobs=0)
    assert Request.of({"logprobs": False}).logprobs is None
    assert Request.of({"stop": ["a", "b"]}).stop == ("a", "b")
    names = set(Request.__dataclass_fields__) | set(Sampling.__dataclass_fields__)
    assert set(ALIASES.values()) <= names and not set(ALIASES) & names


def test_a_whole_sampling_and_defaults() -> None:
    base = Request.of({"temperature": 0.1, "max_tokens": 5})
    request = Request.of({"top_p": 0.5}, base)
    assert request.sampling == Sampling(temperature=0.1, top_p=0.5) and request.max_tokens == 5
    request = Request.of({"sampling": GREEDY, "seed": 1}, base)
    assert request.sampling == Sampling(temperature=0, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temprature": 1}, "no parameter 'temprature'; do you mean temperature"),
        ({"qwertz": 1}, "no parameter 'qwertz'; there are .*top_k"),
        ({"temp": 1, "temperature": 1}, "temperature is given twice"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"overflow": "explode"}, "overflow is 'explode'; it must be one of error, truncate-middle, shift"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"stop": [""]}, "stop takes texts that are not empty"),
        ({"stop": [3]}, "stop takes texts"),
        ({"stop": 3}, "stop takes texts, not 3"),
        ({"samplers": 3}, "samplers takes texts, not 3"),
        ({"samplers": [3]}, "samplers takes texts"),
        ({"dry_sequence_breakers": 3}, "dry_sequence_breakers takes texts"),
        ({"logit_bias": 3}, "logit_bias is 3; it must be {token id: number}"),
        ({"logit_bias": [3]}, "logit_bias is"),
        ({"logit_bias": [(3, 4, 5)]}, "logit_bias is"),
        ({"presence_penalty": -1e308}, "presence_penalty is -1e"),
        ({"keep": -1}, "keep is -1"),
        ({"sampling": {"top_k": 1}}, "sampling is a dict"),
    ],
)
def test_what_cannot_be_meant(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Request.of(settings)


def read(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool, list[str]]:
    """The whole answer, whether it was stopped, and what had been given after each piece."""
    filter, out, given = StopStrings(stops), "", []
    for piece in pieces:
        text, stopped = filter.push(piece)
        out += text
        given.append(out)
        if stopped:
            return out, True, given
    return out + filter.flush(), False, given


def test_a_stop_string_over_several_pieces() -> None:
    assert read(("</s>",), ["Hello <", "/", "s", "> more"]) == ("Hello ", True, ["Hello "] * 4)
    assert read(("</s>",), ["Hello <", "/", "x"]) == ("Hello </x", False, ["Hello ", "Hello ", "Hello </x"])
    assert read(("aab",), ["a", "a", "a", "b"])[:2] == ("a", True)
    assert read(("bc", "abcd"), ["xab", "c"])[:2] == ("xa", True)
    assert read((), ["a", "b"]) == ("ab", False, ["a", "ab"])
    assert read(("ab",), ["xa"])[:2] == ("xa", False)


@given(
    st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("ab<", max_size=4), max_size=8),
)
def test_pieces_make_no_difference(stops: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    ends = [at for stop in stops if (at := whole.find(stop)) >= 0]
    out, stopped, given = read(tuple(stops), pieces)
    if ends:
        # A short stop string may be complete before a longer one that began earlier.
        assert stopped and out in {whole[:at] for at in ends}
        assert not any(stop in out for stop in stops)
    else:
        assert (out, stopped) == (whole, False)
    for text, n in zip(given, range(1, len(pieces) + 1), strict=False):
        so_far = "".join(pieces[:n])
        assert so_far.startswith(text)
        withheld = so_far[len(text) :]
        if not stopped and withheld:  # only what may still become a stop string
            assert any(stop.startswith(withheld) for stop in stops)
