"""The KV cache: keys and values of past tokens, in pages that sequences share.

A page holds `PAGE` consecutive positions of one sequence for every layer of a cache group (layers with equal shapes
and equal window). Pages are counted by reference: a fork copies nothing, and the first write into a shared page copies
that page alone. Layers with a sliding window give back the pages that no later token can see.

Knows nothing of models, tokens' meaning or kernels: it hands out addresses of pages, and NumPy access to what is in
them. The paging follows Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention" (2023); the layout is our own, see `GroupLayout`.
"""

from __future__ import annotations

import io
import weakref
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .forks import lock_of
from .kv_types import both, named
from .pages import PAGE, UNDO, GroupLayout, Pool

if TYPE_CHECKING:
    from .arch import CacheGroup

__all__ = [
    "PAGE", "Batch", "CachedSequence", "GroupLayout", "KVCache", "Sequence", "SequenceCache", "paged",
]  # fmt: skip


class CachedSequence(Protocol):
    """What sessions ask of the cached positions of one text, whoever computes and keeps them; see `Sequence`."""

    length: int

    @property
    def floor(self) -> int: ...

    def truncate(self, n: int) -> None: ...

    def fork(self) -> CachedSequence: ...

    def release(self) -> None: ...

    def save(self, file: BinaryIO) -> None: ...


class SequenceCache(Protocol):
    """What makes such sequences; see `KVCache`."""

    def new_sequence(self) -> CachedSequence: ...

    def load(self, file: BinaryIO, max_length: int | None = None) -> CachedSequence: ...


class KVCache:
    """The pages of any number of sequences of one model. Thread-safe; each sequence belongs to one thread at a time.

    Args:
        groups: the model's cache groups (`Config.cache_groups()`).
        kv_type: what keys and values are stored as: a name of `kv_types.KV_TYPES`, or two as "q8_0/f16".
        max_bytes: limit on the memory of all pages together; `CacheFull` instead of going beyond it.
        undo: positions by which a sequence can always be truncated without computing anything again. Layers with a
            sliding window keep their pages that much longer.
    """

    def __init__(
        self, groups: tuple[CacheGroup, ...], kv_type: str = "f16", max_bytes: int | None = None, undo: int = UNDO
    ) -> None:
        self.groups, self.kv_type, self.max_bytes, self.undo = tuple(groups), named(*both(kv_type)), max_bytes, undo
        self.layouts = tuple(GroupLayout(g, self.kv_type) for g in self.groups)
        together = sum(layout.page_bytes for layout in self.layouts)
        self._pools = tuple(Pool(layout, together) for layout in self.layouts)
        self._lock = lock_of(self)
        # Tables of sequences that were collected without release(). A finaliser may run inside any allocation, also
        # one made under the lock: so it only leaves its table here, and whoever takes pages next frees them.
        self._orphans: deque[_Tables] = deque()
        self._of_layer = {layer: (g, i) for g, group in enumerate(self.groups) for i, layer in enumerate(group.layers)}

    def new_sequence(self) -> Sequence:
        return Sequence(self)

    @property
    def n_bytes(self) -> int:
        """Bytes of memory set aside for pages, used and free."""
        with self._lock:
            return sum(pool.n_bytes for pool in self._pools)

    @property
    def n_pages(self) -> int:
        """Pages in use, of all groups."""
        with self._lock:
            self._bury()
            return sum(len(pool.counts) for pool in self._pools)

    def load(self, file: BinaryIO, max_length: int | None = None) -> Sequence:
        """Restores a sequence that `Sequence.save` wrote, also one of another `kv_type`.

        Raises:
            FormatError: the file is damaged, or was written for another model. Memory is only taken for pages that
                the file really holds.
        """
        from . import cache_file

        return cache_file.load(self, file, max_length)

    def from_bytes(self, data: bytes, max_length: int | None = None) -> Sequence:
        """`load` from memory."""
        return self.load(io.BytesIO(data), max_length)

    def _bury(self) -> None:
        while self._orphans:
            self._free(self._orphans.popleft())

    def _free(self, tables: _Tables) -> None:
        """Gives every page back. Under the lock."""
        n_pages, tables.n_pages = tables.n_pages, 0
        for pool, table in zip(self._pools, tables.pages, strict=True):
            tables.drop(pool, table, range(n_pages))

    def _limit(self) -> int | None:
        """Bytes that may still be allocated. Under the lock."""
        return None if self.max_bytes is None else self.max_bytes - sum(pool.n_bytes for pool in self._pools)


class _Tables:
    """Page tables of a sequence: per group an int64 array of addresses, 0 where a page was dropped.

    A KeyboardInterrupt may come anywhere but within a statement that calls nothing. So what is forgotten is forgotten
    first and given back then: a page may be lost, but two sequences never write to the same one.
    """

    def __init__(self, n_groups: int) -> None:
        self.pages = [np.zeros(8, np.int64) for _ in range(n_groups)]
        self.n_pages = 0

    def make_room(self, n_pages: int) -> None:
        for g, table in enumerate(self.pages):
            if n_pages > len(table):
                larger = np.zeros(max(n_pages, 2 * len(table)), np.int64)  # costs memory where something is written
                larger[: len(table)] = table
                self.pages[g] = larger

    @staticmethod
    def drop(pool: Pool, table: NDArray[np.int64], which: range) -> None:
        """Gives back those pages of a table that it still has. Under the lock."""
        for i in which:
            address = int(table[i])
            if address:
                table[i] = 0
                pool.drop(address)


class Sequence:
    """The cached positions of one text. Made by `KVCache.new_sequence`, `fork` or `KVCache.load`.

    To append n tokens: `reserve(n)`, write their keys and values at positions length … length + n - 1, `advance(n)`.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.length = 0  # tokens stored
        self._tables = _Tables(len(cache.groups))
        self._first = [0] * len(cache.groups)  # per group: first page that was not dropped
        self._finaliser = weakref.finalize(self, cache._orphans.append, self._tables)
        self._finaliser.atexit = False

    def _own(self, length: int, first: list[int], addresses: list[list[int]]) -> None:
        """Makes an empty sequence, whose tables have room, the owner of pages that were taken for it: per group those
        from page `first` on."""
        n_pages = -(-length // PAGE)
        for table, start, pages in zip(self._tables.pages, first, addresses, strict=True):
            table[start:n_pages] = pages
        self._tables.n_pages, self.length, self._first = n_pages, length, list(first)

    @property
    def floor(self) -> int:
        """The smallest length, other than 0, to which this sequence can be truncated."""
        groups = zip(self._first, self.cache.groups, strict=True)
        return max((first * PAGE + group.window - 1 for first, group in groups if first), default=0)

    @property
    def capacity(self) -> int:
        """Positions for which there are pages."""
        return self._tables.n_pages * PAGE

    def table(self, group: int) -> NDArray[np.int64]:
        """Addresses of the pages of a group, in order of positions; 0 for those dropped. Valid until the next
        reserve, truncate or release."""
        return self._tables.pages[group][: self._tables.n_pages]

    def reserve(self, n_more: int) -> None:
        """Makes positions length … length + n_more - 1 writable; copies the page they begin in if it is shared.

        Raises:
            CacheFull: there is no memory for them; nothing has changed then.
        """
        if n_more < 0:
            raise UsageError(f"cannot reserve {n_more} positions")
        tables, cache = self._tables, self.cache
        begin, end = tables.n_pages, -(-(self.length + n_more) // PAGE)
        tables.make_room(end)
        taken: list[tuple[Pool, int]] = []
        with cache._lock:
            cache._bury()
            if not self._finaliser.alive:
                raise UsageError("this sequence was released")
            shared = self.length // PAGE  # the one page that holds both old and new positions
            must_copy = n_more > 0 and shared < begin
            try:
                copies = [
                    (g, self._take(pool, taken))
                    for g, pool in enumerate(cache._pools)
                    if must_copy and pool.counts[int(tables.pages[g][shared])] > 1
                ]
                # In turns, so that under a limit no group takes what the others need.
                new = [[self._take(pool, taken) for pool in cache._pools] for _ in range(begin, end)]
                for g, address in copies:
                    pages = cache._pools[g].pages
                    pages[address][:] = pages[int(tables.pages[g][shared])]
            except BaseException:  # also an interrupt
                for pool, address in taken:
                    pool.drop(address)
                raise
            for g, address in copies:
                old = int(tables.pages[g][shared])
                tables.pages[g][shared] = address
                cache._pools[g].drop(old)
            if new:
                for table, addresses in zip(tables.pages, zip(*new, strict=True), strict=True):
                    table[begin:end] = addresses
                tables.n_pages = end

    def _take(self, pool: Pool, taken: list[tuple[Pool, int]]) -> int:
        address = pool.take(self.cache._limit())
        taken.append((pool, address))
        return address

    def advance(self, n: int) -> None:
        """Counts n written positions as stored, and gives back pages that have left every window."""
        if n < 0 or self.length + n > self.capacity:
            raise UsageError(f"cannot advance by {n}: {self.capacity - self.length} positions are reserved")
        self.length += n
        for g, group in enumerate(self.cache.groups):
            if group.window:
                keep = (self.length - self.cache.undo - group.window + 1) // PAGE
                if keep > self._first[g]:
                    self._drop_before(g, keep)

    def _drop_before(self, g: int, page: int) -> None:
        with self.cache._lock:
            first, self._first[g] = self._first[g], page
            self._tables.drop(self.cache._pools[g], self._tables.pages[g], range(first, page))

    def truncate(self, n: int) -> None:
        """Forgets all positions from n on.

        Raises:
            UsageError: n is above `length`, or between 1 and `floor`: the windowed layers no longer have what the
                tokens after n would look at. Truncate to 0 and compute the text again.
        """
        if not 0 <= n <= self.length:
            raise UsageError(f"cannot truncate a sequence of {self.length} tokens to {n}")
        if 0 < n < self.floor:
            raise UsageError(f"cannot truncate to {n} tokens: positions before {self.floor} are no longer complete")
        tables, first = self._tables, self._first if n else [0] * len(self._first)
        with self.cache._lock:
            n_pages = tables.n_pages
            keep = min(-(-n // PAGE), n_pages)
            self.length, self._first, tables.n_pages = n, first, keep
            for pool, table in zip(self.cache._pools, tables.pages, strict=True):
                tables.drop(pool, table, range(keep, n_pages))

    def fork(self) -> Sequence:
        """Another sequence with the same contents, which shares all pages with this one until either writes."""
        twin = Sequence(self.cache)
        n_pages = -(-self.length // PAGE)
        twin._tables.make_room(n_pages)
        with self.cache._lock:
            for pool, ours, theirs in zip(self.cache._pools, self._tables.pages, twin._tables.pages, strict=True):
                theirs[:n_pages] = ours[:n_pages]
                for address in ours[:n_pages]:
                    if address:
                        pool.share(int(address))
            twin._tables.n_pages = n_pages
        twin.length, twin._first = self.length, list(self._first)
        return twin

    def release(self) -> None:
        """Gives all pages back. The sequence is unusable afterwards; releasing it again does nothing."""
        if self._finaliser.detach():
            with self.cache._lock:
                self.cache._free(self._tables)
            self.length = 0
            self._first = [0] * len(self._first)

    def write(self, layer: int, start: int, k: NDArray[np.float32], v: NDArray[np.float32]) -> None:
        """Stores keys (n, n_kv_heads, head_dim) and values (n, n_kv_heads, v_head_dim) of positions start … start+n-1.

        The positions must have been reserved.
        """
        g, index = self.cache._of_layer[layer]
        layout, pool = self.cache.layouts[g], self.cache._pools[g]
        if not 0 <= start <= start + len(k) <= self.capacity:
            raise UsageError(f"positions {start} to {start + len(k)} were not reserved ({self.capacity} are)")
        at = 0
        while at < len(k):
            page, row = divmod(start + at, PAGE)
            n = min(PAGE - row, len(k) - at)
            address = int(self._tables.pages[g][page])
            if pool.counts.get(address) != 1:
                raise UsageError(f"position {start + at} lies in a page that is shared or dropped; reserve it first")
            keys, values = layout.views(pool.pages[address], index)
            layout.keys.write(keys, row, k[at : at + n])
            layout.values.write(values, row, v[at : at + n])
            at += n

    def read(self, layer: int, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys (n, n_kv_heads, head_dim) and values (n, n_kv_heads, v_head_dim) of the first n positions.

        n may reach beyond `length` into what was reserved and written. Positions of dropped pages read as zero.
        """
        g, index = self.cache._of_layer[layer]
        layout, pool, group = self.cache.layouts[g], self.cache._pools[g], self.cache.groups[g]
        if not 0 <= n <= self.capacity:
            raise UsageError(f"cannot read {n} positions of {self.capacity}")
        k = np.zeros((n, group.n_kv_heads, group.head_dim), np.float32)
        v = np.zeros((n, group.n_kv_heads, group.v_head_dim), np.float32)
        for page, address in enumerate(self._tables.pages[g][: -(-n // PAGE)]):
            if address:
                at = slice(page * PAGE, min(n, (page + 1) * PAGE))
                keys, values = layout.views(pool.pages[int(address)], index)
                k[at] = layout.keys.read(keys)[: at.stop - at.start]
                v[at] = layout.values.read(values)[: at.stop - at.start]
        return k, v

    def save(self, file: BinaryIO) -> None:
        """Writes the contents, for `KVCache.load` of a cache with the same groups."""
        from . import cache_file

        cache_file.save(self, file)

    def to_bytes(self) -> bytes:
        """`save` into memory."""
        file = io.BytesIO()
        self.save(file)
        return file.getvalue()


_WANTED = ("last", "all", "none")


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens of one call of a runner, from any number of sequences.

    Attributes:
        tokens: int32 (T,), token ids.
        positions: int32 (T,), positions in their sequences.
        rows: int32 (T,), indices into `sequences`. Tokens of a sequence lie together, in order of positions.
        sequences: each appears once.
        outputs: int32 (R,), ascending indices of the tokens whose output is wanted.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    rows: NDArray[np.int32]
    sequences: tuple[CachedSequence, ...]
    outputs: NDArray[np.int32]

    @classmethod
    def of(cls, parts: Iterable[tuple[CachedSequence, Tokens[int] | NDArray[np.integer], str]]) -> Batch:
        """A batch that appends tokens to sequences; of each part "last", "all" or "none" of the outputs are wanted."""
        columns: list[tuple[NDArray[np.int32], ...]] = []  # tokens, positions, rows, outputs
        sequences: list[CachedSequence] = []
        n_tokens = 0
        for sequence, part, wanted in parts:
            if wanted not in _WANTED:
                raise UsageError(f"outputs of a batch are 'last', 'all' or 'none', not {wanted!r}")
            if any(sequence is other for other in sequences):
                raise UsageError("a sequence can appear only once in a batch")
            n, start = len(part), sequence.length
            if not n:
                raise UsageError("a part of a batch has no tokens")
            first = n_tokens + (n - 1 if wanted == "last" else 0)
            rows = np.zeros(n, np.int32)
            if sequences:
                rows += len(sequences)
            try:
                tokens = np.asarray(part, np.int32).reshape(n)
            except (TypeError, ValueError, OverflowError):
                raise UsageError("tokens are a list of whole numbers below 2**31") from None
            columns.append((
                tokens, np.arange(start, start + n, dtype=np.int32), rows,
                np.arange(first, first if wanted == "none" else n_tokens + n, dtype=np.int32),
            ))
            sequences.append(sequence)
            n_tokens += n
        if not sequences:
            raise UsageError("a batch has no tokens")
        if len(columns) > 1:
            columns = [tuple(np.concatenate(column) for column in zip(*columns, strict=True))]
        tokens, positions, rows, outputs = columns[0]
        return cls(tokens, positions, rows, tuple(sequences), outputs)


def paged(sequences: tuple[CachedSequence, ...]) -> tuple[Sequence, ...]:
    """The sequences of a batch, for an interpreter that keeps keys and values in pages.

    Raises:
        UsageError: one of them is kept by something else.
    """
    for sequence in sequences:
        if not isinstance(sequence, Sequence):
            raise UsageError("the cache of a sequence was made for another interpreter; use this model's new_cache()")
    return cast("tuple[Sequence, ...]", sequences)
