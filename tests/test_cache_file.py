"""Saved caches: what comes back, and what no damaged or hostile file can do."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from test_cache import GROUPS, Group, append, rows

from edgelm.cache import KVCache, Sequence
from edgelm.errors import FormatError
from edgelm.kv_types import KV_TYPES, PAGE


def saved(kv_type: str = "f16", n: int = 300) -> tuple[KVCache, Sequence, bytes]:
    cache = KVCache(GROUPS, kv_type, undo=20)
    sequence, rng = cache.new_sequence(), np.random.default_rng(4)
    for _ in range(n // 10):
        append(sequence, rows(cache, 10, rng))
    return cache, sequence, sequence.to_bytes()


@pytest.mark.parametrize("kv_type", [*KV_TYPES, "q8_0/f16", "q4_0/q8_0"])
@pytest.mark.parametrize("n", [0, 10, 320, 640])
def test_save_and_load(kv_type, n):
    _, sequence, data = saved(kv_type, n)
    other = KVCache(GROUPS, kv_type, undo=20)
    loaded = other.load(io.BytesIO(data), max_length=n)
    assert (loaded.length, loaded.floor) == (n, sequence.floor)
    for layer in range(5):
        for a, b in zip(loaded.read(layer, n), sequence.read(layer, n), strict=True):
            np.testing.assert_array_equal(a, b)
    append(loaded, rows(other, 5, np.random.default_rng(5)))
    loaded.release()
    assert other.n_pages == 0


@pytest.mark.parametrize("kv_type", [*KV_TYPES])
@pytest.mark.parametrize("n", [10, PAGE, 100])
def test_saved_bytes_hold_nothing_of_other_texts(kv_type, n):
    """Neither behind the last position nor in the padding."""
    cache, other, _ = saved(kv_type, n=300)
    other.release()
    for pool in cache._pools:
        for page in pool.pages.values():
            page[:] = 0xAB
    sequence = cache.new_sequence()
    append(sequence, rows(cache, n, np.random.default_rng(6)))
    assert b"\xab\xab\xab" not in sequence.to_bytes()


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0/f16"])
@pytest.mark.parametrize("own", ["f32", "bf16", "f16/q4_0"])
def test_what_was_saved_as_another_type(kv_type, own):
    """It is what a cache makes that is given what was read from the first."""
    _, sequence, data = saved(kv_type)
    cache, want = KVCache(GROUPS, own, undo=20), KVCache(GROUPS, own, undo=20).new_sequence()
    loaded = cache.from_bytes(data)
    want.reserve(300)
    for layer in range(5):
        want.write(layer, 0, *sequence.read(layer, 300))
        first = PAGE * loaded._first[cache._of_layer[layer][0]]  # what came before has left the window
        for a, b in zip(loaded.read(layer, 300), want.read(layer, 300), strict=True):
            np.testing.assert_array_equal(a[first:], b[first:])
    assert (loaded.length, loaded.floor) == (300, sequence.floor)
    append(loaded, rows(cache, 5, np.random.default_rng(5)))


def test_files_of_other_caches_are_refused():
    _, _, data = saved()
    for groups in (GROUPS[:2], (*GROUPS[:2], Group((2, 4), window=91))):
        with pytest.raises(FormatError, match="another model"):
            KVCache(groups).from_bytes(data)
    for name in (b"q3_0", b"f16/", b"\xff16"):
        with pytest.raises(FormatError, match="this version does not have"):
            KVCache(GROUPS).from_bytes(data[:12] + name.ljust(16, b"\0") + data[28:])
    with pytest.raises(FormatError, match="not a saved KV cache"):
        KVCache(GROUPS).from_bytes(b"GGUF" + data)
    with pytest.raises(FormatError, match="at most 299 fit"):
        KVCache(GROUPS).from_bytes(data, max_length=299)


def test_two_names_of_a_type_are_one():
    _, _, data = saved("q8_0")
    cache = KVCache(GROUPS, "q8_0/q8_0", undo=20)
    assert cache.kv_type == "q8_0" and cache.from_bytes(data).length == 300


def test_truncated_files():
    cache, sequence, data = saved(n=100)
    sequence.release()
    for end in {*range(0, 300, 7), *range(0, len(data), max(1, len(data) // 40)), len(data) - 1}:
        with pytest.raises(FormatError, match="saved KV cache"):
            cache.from_bytes(data[:end])
        assert cache.n_pages == 0


@functools.cache
def whole_file() -> bytes:
    return saved(n=100)[2]


@settings(max_examples=300, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), near=st.integers(0, 250), bit=st.integers(0, 7), early=st.booleans())
def test_damaged_files(at, near, bit, early):
    data = bytearray(whole_file())
    data[near if early else int(at * len(data))] ^= 1 << bit
    cache = KVCache(GROUPS, undo=20, max_bytes=1 << 22)
    with pytest.raises(FormatError):
        cache.from_bytes(bytes(data))
    assert cache.n_pages == 0


def test_claims_of_a_file_are_not_believed():
    """A length of 2**60, or dropped pages inside the window, with everything else as it should be."""
    cache, sequence, data = saved(n=100)
    at = data.index((100).to_bytes(8, "little"))
    for position, value in ((at, 1 << 60), (at, -1), (at + 24, 1), (at + 24, -1), (at + 8, 1)):
        lie = bytearray(data)
        lie[position : position + 8] = value.to_bytes(8, "little", signed=True)
        with pytest.raises(FormatError):
            KVCache(GROUPS, undo=20).from_bytes(bytes(lie))
    sequence.release()
    assert cache.n_pages == 0


def test_lengths_that_windows_hide(monkeypatch):
    """Where all layers have windows, a few pages are all that a text of any length has."""
    groups = (Group((0,), window=90),)
    cache, rng = KVCache(groups, undo=20), np.random.default_rng(4)
    sequence = cache.new_sequence()
    for _ in range(30):
        append(sequence, rows(cache, 10, rng))
    data, n_kept = sequence.to_bytes(), -(-300 // PAGE) - sequence._first[0]
    at = data.index(struct.pack("<2q", 300, sequence._first[0]))
    sequence.release()

    def claiming(length: int) -> bytes:
        counts = struct.pack("<2q", length, -(-length // PAGE) - n_kept)
        body = data[:at] + counts + data[at + len(counts) : -4]
        return body + struct.pack("<I", zlib.crc32(body))

    assert cache.from_bytes(claiming(300)).length == 300
    assert cache.from_bytes(claiming(2**20)).length == 2**20
    for length in (2**31, 2**40, 2**62):
        with pytest.raises(FormatError, match="at most 2147483647 fit"):
            cache.from_bytes(claiming(length))

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr("edgelm.cache.np.zeros", no_memory)
    with pytest.raises(MemoryError):
        cache.from_bytes(claiming(2**20))
    assert cache.n_pages == 0
