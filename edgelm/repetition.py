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


def continuations(history: IntArray, breakers: Breakers, shortest: int, longest: int) -> dict[int, int]:
    """Tokens that would continue a repetition, each with the length of the sequence it repeats so far.

    Args:
        history: (n,) the tokens said, oldest first.
        breakers: what interrupts a sequence.
        shortest: sequences shorter than this do not count.
        longest: longer ones count as this long.
    """
    n = len(history)
    if n <= shortest:
        return {}
    limit = unbroken(history, breakers, longest)
    if limit < shortest:
        return {}
    ends = np.arange(n - 1)  # of earlier sequences that equal the last `length` tokens
    lengths = np.zeros(n - 1, np.int64)
    for length in range(limit):
        ends = ends[ends >= length]
        ends = ends[history[ends - length] == history[n - 1 - length]]
        if not len(ends):
            break
        lengths[ends] = length + 1
    ends = np.flatnonzero(lengths >= shortest)
    ends = ends[np.argsort(lengths[ends], kind="stable")]  # the longest of each token comes last, and stays
    found = dict(zip(history[ends + 1].tolist(), lengths[ends].tolist(), strict=True))
    return {token: length for token, length in found.items() if not breakers.ends_with(token)}
