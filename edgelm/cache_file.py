"""A cached sequence as bytes: written and read back, page by page.

Little-endian: magic and layout (`_layout`, equal bytes for caches that can exchange sequences, but for the type of keys
and values); int64 length; int64 first page kept, per group; the kept pages of each group in order, with unused
positions and padding zeroed; uint32 CRC-32 of all of that. What was saved as one type is read as another, if that is
what the cache has: so a text goes from one processor to another whose usual type differs. Knows nothing of the text:
who saves a session saves its tokens, and which model they belong to, beside this.
"""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .cache import KVCache, Sequence
from .errors import FormatError, UsageError
from .pages import PAGE, GroupLayout

MOST_TOKENS = 2**31 - 1  # positions are int32

_MAGIC, _VERSION = b"edgelmKV", 2
_TYPE = slice(12, 28)  # of what `_layout` gives


def save(sequence: Sequence, file: BinaryIO) -> None:
    """Writes a sequence of a cache."""
    cache, n_pages = sequence.cache, -(-sequence.length // PAGE)
    counts = struct.pack(f"<{1 + len(sequence._first)}q", sequence.length, *sequence._first)
    head = _layout(cache, cache.kv_type.encode()) + counts
    check = zlib.crc32(head)
    file.write(head)
    for g, pool in enumerate(cache._pools):
        for i in range(sequence._first[g], n_pages):
            page, n = pool.pages[int(sequence.table(g)[i])], min(sequence.length - PAGE * i, PAGE)
            data = _only(pool.layout, page, n).tobytes()
            check = zlib.crc32(data, check)
            file.write(data)
    file.write(struct.pack("<I", check))


def load(cache: KVCache, file: BinaryIO, max_length: int | None) -> Sequence:
    """A new sequence of `cache` with what `save` wrote; see `KVCache.load`."""
    head = _need(file, len(_layout(cache, b"")), "its header")
    if head[: len(_MAGIC)] != _MAGIC:
        raise FormatError("saved KV cache: this is not a saved KV cache")
    if head != _layout(cache, head[_TYPE]):
        raise FormatError("saved KV cache: made for another model or version; compute the text again")
    layouts = _saved_layouts(cache, head[_TYPE])
    counts = _need(file, 8 * (1 + len(cache.groups)), "its header")
    length, *first = struct.unpack(f"<{1 + len(cache.groups)}q", counts)
    most = MOST_TOKENS if max_length is None else max_length
    if not 0 <= length <= most:
        raise FormatError(f"saved KV cache: it claims {length} tokens, at most {most} fit")
    for group, page in zip(cache.groups, first, strict=True):
        # A dropped page inside the window would be a null pointer for the kernels.
        if page < 0 or (page > 0 and (not group.window or page * PAGE + group.window - 1 > length)):
            raise FormatError(f"saved KV cache: it claims that pages before {page} are not needed")
    check = zlib.crc32(counts, zlib.crc32(head))
    # Addresses are collected as pages arrive: a lie about the length costs no memory.
    addresses: list[list[int]] = [[] for _ in first]
    n_pages, sequence = -(-length // PAGE), Sequence(cache)
    try:
        for pool, layout, start, taken in zip(cache._pools, layouts, first, addresses, strict=True):
            for i in range(start, n_pages):
                data = _need(file, layout.page_bytes, f"page {i}")
                check = zlib.crc32(data, check)
                with cache._lock:
                    cache._bury()
                    taken.append(pool.take(cache._limit()))
                _copy(np.frombuffer(data, np.uint8), layout, pool.pages[taken[-1]], pool.layout)
        if _need(file, 4, "its checksum") != struct.pack("<I", check):
            raise FormatError("saved KV cache: checksum mismatch; the file is damaged")
        sequence._tables.make_room(n_pages)
    except BaseException:
        with cache._lock:
            for pool, taken in zip(cache._pools, addresses, strict=True):
                for address in taken:
                    pool.drop(address)
        raise
    sequence._own(length, first, addresses)
    return sequence


def _need(file: BinaryIO, n: int, what: str) -> bytes:
    data = file.read(n)
    if len(data) != n:
        raise FormatError(f"saved KV cache: the file ends in the middle of {what}")
    return data


def _layout(cache: KVCache, kv_type: bytes) -> bytes:
    """Everything that must agree between the cache that saves and the one that loads; and the type that was saved."""
    fields = [PAGE, len(cache.groups)]
    for g in cache.groups:
        fields += [g.n_kv_heads, g.head_dim, g.v_head_dim, g.window, len(g.layers), *g.layers]
    head = _MAGIC + struct.pack("<I16s", _VERSION, kv_type)
    return head + struct.pack(f"<{1 + len(fields)}q", len(fields), *fields)


def _saved_layouts(cache: KVCache, kv_type: bytes) -> list[GroupLayout]:
    """How the pages of each group lie in the file."""
    try:
        return [GroupLayout(group, kv_type.rstrip(b"\0").decode("ascii")) for group in cache.groups]
    except (UsageError, UnicodeDecodeError):
        raise FormatError(
            f"saved KV cache: keys and values of type {kv_type!r}, which this version does not have; compute the text "
            "again"
        ) from None


def _copy(source: NDArray[np.uint8], layout: GroupLayout, page: NDArray[np.uint8], own: GroupLayout) -> None:
    """A page that lies as `layout` says to one of a cache."""
    if layout == own:
        page[:] = source
        return
    for i in range(len(own.group.layers)):
        for saved, bytes_, array, to in zip(
            (layout.keys, layout.values), layout.views(source, i), (own.keys, own.values), own.views(page, i),
            strict=True,
        ):  # fmt: skip
            array.write(to, 0, saved.read(bytes_))


def _only(layout: GroupLayout, page: NDArray[np.uint8], n: int) -> NDArray[np.uint8]:
    """A page with only its first n positions, and without padding: what lies there may be another sequence's text."""
    if n == PAGE and not any(array.stride > array.dim for array in (layout.keys, layout.values)):
        return page
    clean = page.copy()
    for i in range(len(layout.group.layers)):
        keys, values = layout.views(clean, i)
        layout.keys.keep(keys, n)
        layout.values.keep(values, n)
    return clean
