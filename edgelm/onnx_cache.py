"""Keys and values of ONNX graphs: plain arrays that go in as `past` and come out as `present`, never copied to run.

There are two ways, and the graph decides. *Shared*: past and present are one array (1, heads, capacity, dim), longer
than the text, into which the graph writes what is new; to go back to an earlier length costs nothing. *Exact*: past
has the positions of the text and no more, and present is another array with the new ones behind them; two arrays take
turns.
A fork shares arrays until either sequence writes. See `cache` for the other kind, in pages, of our own kernels.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from .errors import CacheFull, FormatError, UsageError
from .forks import lock_of
from .onnx_folder import CacheTensor

FIRST = 256  # positions that arrays have room for at first
_MAGIC = b"edgelm ONNX cache 1\n"

Array = NDArray[Any]


def bytes_per_position(tensors: tuple[CacheTensor, ...]) -> int:
    """Of keys and values, in all layers."""
    return sum(t.heads * t.dim * np.dtype(t.dtype).itemsize for t in tensors)


@dataclass
class _Store:
    """Arrays for keys and values, flat, with room for `capacity` positions; `users`: the sequences that read them."""

    arrays: list[Array]
    capacity: int
    users: WeakSet[OnnxSequence] = field(default_factory=WeakSet)


class OnnxCache:
    """The sequences of one graph. `shared`: past and present are one array. `keeps_tokens`: the graph keeps nothing, so
    that sequences keep their tokens, to be computed again. `n_ctx`: positions that a sequence can have."""

    def __init__(self, tensors: tuple[CacheTensor, ...], n_ctx: int, *, shared: bool) -> None:
        self.tensors, self.n_ctx, self.shared = tensors, n_ctx, shared
        self.keeps_tokens = not tensors
        self.lock = lock_of(self, "lock")  # of who uses which arrays

    def new_sequence(self) -> OnnxSequence:
        return OnnxSequence(self)

    def load(self, file: BinaryIO, max_length: int | None = None) -> OnnxSequence:
        """Restores what `OnnxSequence.save` wrote.

        Raises:
            FormatError: the file is damaged, or was written for another graph.
        """
        expected = self.layout()
        head = file.read(len(expected) + 8)
        if head[: len(expected)] != expected or len(head) != len(expected) + 8:
            raise FormatError("saved ONNX cache: made for another model or version; compute the text again")
        length = struct.unpack("<q", head[-8:])[0]
        if not 0 <= length <= min(self.n_ctx, max_length or self.n_ctx):
            raise FormatError(f"saved ONNX cache: it claims {length} tokens, at most {max_length or self.n_ctx} fit")
        check, sequence = zlib.crc32(head), OnnxSequence(self)
        for tensor, target in zip((None, *self.tensors), sequence.restored(length), strict=True):
            data = file.read(target.nbytes)
            if len(data) != target.nbytes:
                raise FormatError("saved ONNX cache: the file is truncated")
            check = zlib.crc32(data, check)
            target[...] = np.frombuffer(data, target.dtype).reshape(target.shape)
            if tensor is None and length and self.keeps_tokens and target.min() < 0:
                raise FormatError("saved ONNX cache: a token outside the vocabulary")
        if file.read(4) != struct.pack("<I", check):
            raise FormatError("saved ONNX cache: checksum mismatch; the file is damaged")
        return sequence

    def layout(self) -> bytes:
        """Everything that must agree between the cache that saves and the one that loads."""
        facts = [[t.past, t.heads, t.dim, t.dtype] for t in self.tensors]
        text = json.dumps(facts).encode()
        return _MAGIC + struct.pack("<I", len(text)) + text


@dataclass(eq=False)
class OnnxSequence:
    """The cached positions of one text; see `cache.CachedSequence`.

    To append n tokens: `reserve(n)`, run the graph with `past` and `present`, `advance(tokens)`.

    Attributes:
        length: positions stored.
        tokens: int64 (length,), only where the graph keeps nothing.
        floor: it can be truncated to any length.
        version: grows whenever the arrays are others than before: who has bound them binds them anew.
    """

    cache: OnnxCache
    length: int = 0
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    floor: int = 0
    version: int = 0
    binding: Any = None  # of the runner, kept for the next step
    _store: _Store | None = None
    _spare: _Store | None = None  # exact: where present goes next
    _rows: int = 0  # exact: positions that the arrays of `_store` hold, if more than `length`
    _released: bool = False

    def past(self) -> list[Array]:
        """What goes in, in the order of `cache.tensors`: (1, heads, positions, dim)."""
        rows = self._store.capacity if self.cache.shared and self._store else self.length
        return self._views(self._store, rows)

    def present(self, n_more: int) -> list[Array]:
        """Where that and n more positions come out."""
        return self.past() if self.cache.shared else self._views(self._spare, self.length + n_more)

    def reserve(self, n_more: int) -> None:
        """Makes room for n more positions, in arrays of this sequence alone.

        Raises:
            CacheFull: there is no memory.
        """
        if self._released:
            raise UsageError("this sequence was released")
        if not self.cache.tensors:
            return
        need = self.length + n_more
        if self.cache.shared:
            store = self._store
            if store is None or store.capacity < need or len(store.users) > 1:
                self._replace(self._new_store(max(need, store.capacity if store else 0)), self.length)
            return
        if self._rows != self.length:  # cut back since it was written: what is left moves together
            self._replace(self._new_store(self.length), self.length)
        if self._spare is None or self._spare.capacity < need:
            self._spare = self._new_store(need)

    def advance(self, tokens: NDArray[np.int32]) -> None:
        """Counts positions as stored, which the graph has written."""
        self.length += len(tokens)
        if self.cache.keeps_tokens:
            self.tokens = np.concatenate([self.tokens, tokens])
        elif not self.cache.shared:
            old = self._take(self._spare)
            self._rows, self._spare = self.length, old if old is not None and not old.users else None

    def truncate(self, n: int) -> None:
        """Forgets all positions from n on."""
        if not 0 <= n <= self.length:
            raise UsageError(f"cannot truncate a sequence of {self.length} tokens to {n}")
        self.length, self.tokens = n, self.tokens[:n]

    def fork(self) -> OnnxSequence:
        """Another sequence with the same contents, which shares all arrays with this one until either writes."""
        twin = OnnxSequence(self.cache, self.length, self.tokens, _rows=self._rows)
        twin._take(self._store)
        return twin

    def release(self) -> None:
        """Gives the memory back; the sequence is unusable afterwards."""
        self._take(None)
        self._spare = self.binding = None
        self.length, self._released = 0, True

    def save(self, file: BinaryIO) -> None:
        """Writes the contents, for `OnnxCache.load` of a cache of the same graph."""
        head = self.cache.layout() + struct.pack("<q", self.length)
        check = zlib.crc32(head)
        file.write(head)
        for array in (self.tokens, *(each[:, :, : self.length] for each in self._stored())):
            data = array.tobytes()
            check = zlib.crc32(data, check)
            file.write(data)
        file.write(struct.pack("<I", check))

    def restored(self, length: int) -> list[Array]:
        """Makes this new sequence `length` tokens long, and gives the arrays to be filled: tokens, then `past`."""
        self.tokens = np.zeros(length if self.cache.keeps_tokens else 0, np.int64)
        self.reserve(length)
        if self.cache.tensors and not self.cache.shared:
            self._take(self._spare)
            self._spare = None
        self.length = self._rows = length
        return [self.tokens, *(each[:, :, :length] for each in self.past())]

    # --- arrays ---

    def _stored(self) -> list[Array]:
        """All that the arrays hold, which may be more than `length` positions."""
        rows = self._store.capacity if self.cache.shared and self._store else self._rows
        return self._views(self._store, rows)

    def _views(self, store: _Store | None, rows: int) -> list[Array]:
        shapes = [(1, t.heads, rows, t.dim) for t in self.cache.tensors]
        if store is None:
            return [np.zeros(shape, t.dtype) for shape, t in zip(shapes, self.cache.tensors, strict=True)]
        return [
            array[: math.prod(shape)].reshape(shape) for array, shape in zip(store.arrays, shapes, strict=True)
        ]

    def _new_store(self, need: int) -> _Store:
        """Arrays with room for `need` positions, and for some that may come."""
        capacity = min(max(FIRST, 1 << (need - 1).bit_length()), max(self.cache.n_ctx, need)) if need else 0
        try:
            arrays = [np.zeros(t.heads * capacity * t.dim, t.dtype) for t in self.cache.tensors]
        except MemoryError:
            raise CacheFull(
                f"no memory for keys and values of {capacity} tokens; lower --ctx-size, or close other sessions"
            ) from None
        return _Store(arrays, capacity)

    def _replace(self, store: _Store, n: int) -> None:
        """Takes other arrays, with the first n positions of those before."""
        rows = store.capacity if self.cache.shared else n
        for target, old in zip(self._views(store, rows), self._stored(), strict=True):
            target[:, :, :n] = old[:, :, :n]
        self._take(store)
        self._rows, self.version = n, self.version + 1

    def _take(self, store: _Store | None) -> _Store | None:
        """Reads these arrays from now on; gives those before."""
        before, self._store = self._store, store
        with self.cache.lock:
            if before is not None:
                before.users.discard(self)
            if store is not None:
                store.users.add(self)
        return before
