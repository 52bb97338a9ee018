"""Pages of the KV cache: how keys and values lie in one, and the pool they are taken from.

Knows nothing of sequences: see `cache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import CacheFull
from .kv_types import KV_TYPES, PAGE, KVArray, both

if TYPE_CHECKING:
    from .arch import CacheGroup

__all__ = ["ALIGN", "KV_TYPES", "PAGE", "UNDO", "GroupLayout", "Pool"]

ALIGN = 64  # bytes: pages begin on cache lines

UNDO = 512  # positions that layers with a window keep for going back, see `KVCache`
_FIRST_SLAB, _LARGEST_SLAB = 4 << 20, 256 << 20  # bytes


@dataclass(frozen=True)
class GroupLayout:
    """Where keys and values lie in a page of a cache group: for each layer in order its keys, then its values.

    `kv_type` names the types of both, see `kv_types.both`.
    """

    group: CacheGroup
    kv_type: str

    def __post_init__(self) -> None:
        both(self.kv_type)

    @cached_property
    def keys(self) -> KVArray:
        return KV_TYPES[both(self.kv_type)[0]](True, self.group.n_kv_heads, self.group.head_dim)

    @cached_property
    def values(self) -> KVArray:
        return KV_TYPES[both(self.kv_type)[1]](False, self.group.n_kv_heads, self.group.v_head_dim)

    @property
    def page_bytes(self) -> int:
        return len(self.group.layers) * (self.keys.n_bytes + self.values.n_bytes)

    def k_offset(self, layer_in_group: int) -> int:
        """Byte offset of a layer's keys from the start of the page; a multiple of 64."""
        return layer_in_group * (self.keys.n_bytes + self.values.n_bytes)

    def v_offset(self, layer_in_group: int) -> int:
        return self.k_offset(layer_in_group) + self.keys.n_bytes

    def views(self, page: NDArray[np.uint8], layer_in_group: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The bytes of the keys and of the values of a layer in a page."""
        k_at, v_at = self.k_offset(layer_in_group), self.v_offset(layer_in_group)
        return page[k_at : k_at + self.keys.n_bytes], page[v_at : v_at + self.values.n_bytes]


class Pool:
    """Pages of one group, for all sequences: slabs that never move, reference counts, a free list.

    Callers hold the lock of the cache.
    """

    def __init__(self, layout: GroupLayout, together: int) -> None:
        self.layout = layout
        self.together = together  # bytes of a page of every group of the cache
        self.slabs: list[NDArray[np.uint8]] = []
        self.pages: dict[int, NDArray[np.uint8]] = {}  # address -> the page's bytes
        self.counts: dict[int, int] = {}  # address -> references, of pages in use
        self.free: list[int] = []

    @property
    def n_bytes(self) -> int:
        return len(self.pages) * self.layout.page_bytes

    def grow(self, limit: int | None) -> None:
        """Allocates another slab: as large as all before it together, within bounds; smaller where `limit` asks."""
        size = self.layout.page_bytes
        n_pages = max(1, min(max(self.n_bytes, _FIRST_SLAB), _LARGEST_SLAB) // size)
        if limit is not None:  # what is left is for all groups
            n_pages = min(n_pages, max(1, limit // self.together))
        if limit is not None and size > limit:
            raise CacheFull(
                f"the KV cache has reached its limit: a page of {PAGE} tokens needs {size} bytes, {max(0, limit)} are "
                "left; release sessions, shorten the context, or raise the limit"
            )
        try:
            slab = np.zeros(n_pages * size + ALIGN, np.uint8)  # mapped, but not touched until used
        except MemoryError:
            raise CacheFull(
                f"no memory for {n_pages * size >> 20} MiB more of KV cache; lower --ctx-size or use kv type q8_0"
            ) from None
        at = -slab.ctypes.data % ALIGN
        self.slabs.append(slab)
        for i in range(n_pages):
            page = slab[at + i * size : at + (i + 1) * size]
            self.pages[page.ctypes.data] = page
            self.free.append(page.ctypes.data)

    def take(self, limit: int | None) -> int:
        if not self.free:
            self.grow(limit)
        address = self.free.pop()
        self.counts[address] = 1
        return address

    def share(self, address: int) -> None:
        self.counts[address] += 1

    def drop(self, address: int) -> None:
        self.counts[address] -= 1
        if not self.counts[address]:
            del self.counts[address]
            self.free.append(address)


