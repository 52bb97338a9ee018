"""Many strings of a GGUF file at once: the vocabulary, which would be most of the time of opening a file.

A string is its length, 8 bytes of which the last six are zero in any vocabulary, and its text in UTF-8. So wherever six
zeros end a text may begin; if the lengths that stand there lead from each such place to the next, these are the
strings. What cannot be told that way (null characters, texts of 64 KB, a broken file) is left to who reads one by one.
"""

from __future__ import annotations

import mmap

import numpy as np

_AT_ONCE = 1 << 17  # bytes
_LENGTH = 8  # bytes of a length


def some_strings(data: mmap.mmap, start: int, most: int) -> tuple[list[str], int]:
    """Some of the strings that begin at `start`, `most` at most, perhaps none; and where the next one begins."""
    chunk = np.frombuffer(data, np.uint8, min(_AT_ONCE, len(data) - start), start)
    zero = chunk == 0
    two = zero[:-1] & zero[1:]
    six = two[:-4] & two[2:-2] & two[4:]
    texts = np.flatnonzero(six[:-1] & ~six[1:]) + 6
    if not len(texts) or texts[0] != _LENGTH:
        return [], start
    lengths = chunk[texts - 8] + 256 * chunk[texts - 7].astype(np.int64)
    led_to = texts[:-1] + lengths[:-1] + _LENGTH == texts[1:]
    n = min(most, len(led_to) if led_to.all() else int(led_to.argmin()))
    if not n:
        return [], start
    end = int(texts[n - 1] + lengths[n - 1])
    joined, seconds = chunk[_LENGTH:end].copy(), texts[1:n] - _LENGTH
    joined[seconds - 8] = joined[seconds - 7] = 0  # lengths become nothing but zeros
    kept = joined != 0
    if len(kept) - np.count_nonzero(kept) != _LENGTH * (n - 1):
        return [], start
    kept[seconds - 1] = True  # of each length one zero stays
    try:
        return joined[kept].tobytes().decode().split("\0"), start + end
    except UnicodeDecodeError:
        return [], start
