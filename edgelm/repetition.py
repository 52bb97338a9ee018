"""DRY ("don't repeat yourself"): which tokens would continue a sequence that was said before.

The method is p-e-w's (text-generation-webui, pull request 5677), the details are llama.cpp's. Knows nothing of
logits: it says how long the repetition would be, the caller turns that into a penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Tails = tuple[tuple[int, ...], ...]
Find = Callable[[IntArray, int, int], tuple[list[int], list[int]] | None]

_MAX_CHARACTERS = 40  # of a sequence breaker
_MAX_TAIL = 20  # tokens of a sequence breaker after its first one


class Breakers:
    """Texts over which no repetition is followed, such as a line break, found among tokens.

    Args:
        texts: the sequence breakers; empty ones are ignored.
        token_text: the text of a token; None if texts of tokens are not known, then nothing breaks a sequence.
        encode: the tokens of a text; without it only breakers that lie within one token are found.
    """

    def __init__(
        self,
        texts: Iterable[str],
        token_text: Callable[[int], str] | None = None,
        encode: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        self._texts = [text[:_MAX_CHARACTERS] for text in texts if text]
        self._token_text, self._encode = token_text, encode
        self._known: dict[int, Tails] = {}

    def tails(self, token: int) -> Tails:
        """For each breaker that begins in `token`, the tokens that must follow; () if it ends there as well."""
        if token not in self._known:
            self._known[token] = self._find(token) if self._token_text else ()
        return self._known[token]

    def ends_with(self, token: int) -> bool:
        """Whether the token holds a whole breaker."""
        return () in self.tails(token)

    def _find(self, token: int) -> Tails:
        assert self._token_text is not None
        word = self._token_text(token)
        found: list[tuple[int, ...]] = []
        for text in self._texts:
            if text in word:
                found.append(())
                continue
            for n in range(1, min(len(text), len(word) + 1)):
                if self._encode and word.endswith(text[:n]):
                    found.append(tuple(self._encode(text[n:]))[:_MAX_TAIL])
        return tuple(dict.fromkeys(found))


def unbroken(history: IntArray, breakers: Breakers, limit: int) -> int:
    """How many tokens at the end of `history` no sequence breaker interrupts, if less than `limit`; else `limit`."""
    recent = history[-(limit + _MAX_TAIL + 1) :].tolist()
    n = len(recent)
    for i in range(n):
        tails = breakers.tails(recent[n - 1 - i])
        if tails:
            fits = [len(t) for t in tails if len(t) <= i and tuple(recent[n - i : n - i + len(t)]) == t]
            if fits:
                return min(i - max(fits), limit)
    return min(n, limit)


def repeated(history: IntArray, shortest: int, longest: int) -> tuple[list[int], list[int]]:
    """Tokens that followed earlier sequences which equal the last tokens of `history`, and how long these are.

    A length is at least `shortest` and at most `longest`; a token may come several times.
    """
    n = len(history)
    ends = np.arange(n - 1) if shortest <= 0 else np.flatnonzero(history[:-1] == history[-1])
    lengths = np.zeros(n - 1, np.int64)
    reached = ends
    for length in range(longest):
        reached = reached[reached >= length]
        reached = reached[history[reached - length] == history[n - 1 - length]]
        if not len(reached):
            break
        lengths[reached] = length + 1
    ends = ends[lengths[ends] >= shortest]
    return history[ends + 1].tolist(), lengths[ends].tolist()


def continuations(
    history: IntArray, breakers: Breakers, shortest: int, longest: int, find: Find | None = None
) -> dict[int, int]:
    """Tokens that would continue a repetition, each with the length of the sequence it repeats so far.

    Args:
        history: (n,) the tokens said, oldest first.
        breakers: what interrupts a sequence.
        shortest: sequences shorter than this do not count.
        longest: longer ones count as this long.
        find: what does as `repeated` for a positive `shortest`, or gives None where it cannot.
    """
    if len(history) <= max(shortest, 1):
        return {}
    tokens, lengths = (find(history, shortest, longest) if find and shortest > 0 else None) or repeated(
        history, shortest, longest
    )
    limit = unbroken(history, breakers, longest) if tokens else 0
    if limit < shortest:
        return {}
    found: dict[int, int] = {}
    for token, length in zip(tokens, lengths, strict=True):
        found[token] = max(found.get(token, 0), min(length, limit))
    return {token: length for token, length in found.items() if not breakers.ends_with(token)}
