"""Weights made ready for the kernels: from the blocks of a file to the packed form that `blocks` describes.

The work is done by compiled kernels on several threads, at the speed of the memory. Formats that have no kernels are
transcoded: those made of integers times a scale to `INT8`, without loss, and plain numbers to float32. Where integers
are multiplied faster than floats, float16 and bfloat16 become integers of 12 bits (`int16`).

Imports no Numba. Knows nothing of activations.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Protocol

import numpy as np

from edgelm.formats import QTensor
from edgelm.kernels import (
    block_formats,  # noqa: F401  (defines them)
    compiler,
    int16,
)
from edgelm.kernels.abi import Row
from edgelm.kernels.blocks import BLOCKS, ROWS
from edgelm.kernels.transcode import transcoded

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a weight
LAYOUT = 4  # of packed weights; to be raised when they change: a test compares
ALIGN = 64
HUGE = 1 << 21  # bytes of a huge page
PIECE = 1 << 20  # bytes of packed weights that a thread makes at a time
LARGE_PIECE = 16 << 20  # the same where the interpreter is busy: after each piece a thread waits 5 ms for its lock


class Arg(IntEnum):
    """Arguments of a kernel that packs, from `Row.ARGS` on."""

    SOURCE = 0  # address of the first row; where it lies in the file, if it is to be read
    ROW_BYTES = 1  # from row to row
    N_ROWS = 2
    N_COLS = 3
    TARGET = 4  # address of the packed groups
    STRIDE = 5  # bytes from one group to the next
    STOP = 6  # address of a word: while it is zero, groups are packed; set if rows cannot be read; 0: none
    READ = 7  # address of C's function `pread`, or 0: rows are in memory
    FILE = 8  # the descriptor of their file
    BUFFER = 9  # address of room for the file's bytes of all these groups


Lend = Callable[[np.ndarray], AbstractContextManager[np.ndarray]]
Find = Callable[[np.ndarray], tuple[int, int] | None]
Pairs = Sequence[tuple[int, int]]
_Native = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix (n_rows, n_cols) in packed form.

    format: name of the kernels' format; transcoded_from: name of the file's format where that is another one;
    address, n_bytes: where the packed weights lie; stride: bytes from one group to the next, more than those of a group
    where the groups of two matrices alternate; keep: what owns them.
    """

    format: str
    n_rows: int
    n_cols: int
    address: int
    n_bytes: int
    stride: int
    transcoded_from: str | None = None
    keep: np.ndarray = field(repr=False, default_factory=lambda: np.empty(0, np.uint8))

    @property
    def n_groups(self) -> int:
        """Groups of 16 rows."""
        return -(-self.n_rows // ROWS)

    @property
    def group_bytes(self) -> int:
        return self.n_bytes // self.n_groups

    @property
    def span(self) -> int:
        """Bytes from the beginning of the first group to the end of the last."""
        return (self.n_groups - 1) * self.stride + self.group_bytes

    @property
    def n_units(self) -> int:
        """Units of a group; columns of a matrix of floats."""
        return self.group_bytes // unit(self.format)[1]

    def within(self, memory: np.ndarray) -> Packed:
        """The same in `memory`, where the address has counted from its beginning."""
        return replace(self, address=memory.ctypes.data + self.address, keep=memory)


Weight = tuple[QTensor, Packed]


class Stopped(Exception):
    """Packing ended before it was done, because the process does."""


class Target(Protocol):
    """Where packed weights go. Several threads ask at the same time."""

    def room(self, start: int, n_bytes: int) -> np.ndarray:
        """Zeroed bytes for a piece of weights."""

    def done(self, start: int, piece: np.ndarray) -> None:
        """The piece is packed."""


class Memory:
    """Memory of this process, as a target."""

    def __init__(self, n_bytes: int) -> None:
        self.bytes = zeroed(n_bytes)

    def room(self, start: int, n_bytes: int) -> np.ndarray:
        return self.bytes[start : start + n_bytes]

    def done(self, start: int, piece: np.ndarray) -> None:
        pass


def is_float(format: str) -> bool:
    """Whether kernels of `format` take float32 activations instead of records."""
    return format in FLOATS


def unit(format: str) -> tuple[int, int]:
    """(columns, bytes) of the smallest piece of 16 rows."""
    if format in FLOATS:
        return 1, ROWS * FLOATS[format]
    if format == "INT12":
        return int16.BLOCK, int16.UNIT
    return 32 * BLOCKS[format].blocks, BLOCKS[format].unit_bytes


def packed_bytes(format: str, n_rows: int, n_cols: int) -> int:
    """Bytes that a matrix takes in packed form."""
    columns, n_bytes = unit(format)
    return -(-n_rows // ROWS) * -(-n_cols // columns) * n_bytes


def pack(tensor: QTensor) -> Packed:
    """The packed form of one weight. Many at once: `pack_all`."""
    return pack_all([tensor])[0]


def arrange(tensors: Sequence[QTensor], pairs: Pairs = ()) -> tuple[list[Packed], int]:
    """The packed forms of weights before there is memory for them, side by side from address 0 on; bytes in all.

    A weight of more than two dimensions counts as a matrix of all its rows, one of one dimension as a single row.
    pairs: weights, by index, that one row of the op table reads in turns, in that order; where they are alike, their
    groups alternate.
    """
    forms, start = [_unplaced(tensor) for tensor in tensors], 0
    pair_of = {i: pair for pair in pairs for i in pair}
    placed: set[int] = set()
    for i, form in enumerate(forms):
        if i in placed:
            continue
        one, other = pair_of.get(i, (i, i))
        alternate = one != other and placed.isdisjoint((one, other)) and alike(forms[one], forms[other])
        together = (one, other) if alternate else (i,)
        for k, at in enumerate(together):
            stride, address = len(together) * form.group_bytes, start + k * form.group_bytes
            forms[at] = replace(forms[at], address=address, stride=stride)
        placed.update(together)
        start += -(-len(together) * form.n_bytes // ALIGN) * ALIGN
    return forms, start


def _unplaced(tensor: QTensor) -> Packed:
    (n_rows, n_cols), format = _shape(tensor), _format_for(tensor)
    original = tensor.format.name if tensor.format.name != format else None
    return Packed(format, n_rows, n_cols, 0, packed_bytes(format, n_rows, n_cols), 0, original)


def alike(one: Packed, other: Packed) -> bool:
    """Whether two matrices have the same format and shape."""
    return (one.format, one.n_rows, one.n_cols) == (other.format, other.n_rows, other.n_cols)


def pack_all(
    tensors: Sequence[QTensor],
    n_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    lend: Lend = nullcontext,
    pairs: Pairs = (),
) -> list[Packed]:
    """The packed forms of weights in one piece of memory; parameters as for `Packing` and `arrange`."""
    forms, n_bytes = arrange(tensors, pairs)
    memory = Memory(n_bytes)
    Packing(memory, tensors, forms, n_threads, progress, lend).run()
    return [form.within(memory.bytes) for form in forms]


def pack_behind(
    tensors: Sequence[QTensor], n_threads: int | None, lend: Lend, pairs: Pairs, find: Find
) -> tuple[list[Packed], Packing]:
    """As `pack_all`, but the weights are only there when the packing, which goes on behind the caller, is finished.

    find: see `GGUF.find`.
    """
    forms, n_bytes = arrange(tensors, pairs)
    memory = Memory(n_bytes)
    packing = Packing(memory, tensors, forms, n_threads, None, lend, LARGE_PIECE)
    packing.find = find
    packing.start()
    weakref.finalize(packing, _stop, packing._failures, packing._stop, packing._threads)  # at exit, before memory goes
    return [form.within(memory.bytes) for form in forms], packing


class Packing:
    """Packs weights to where `forms` of `arrange` say, piece by piece in that order, by several threads at once.

    `progress(bytes done, bytes in all)`, of packed weights, is called from one thread at a time. `lend(rows)` is where
    rows of a weight can be read, for as long as that takes: see `GGUF.lend`.
    """

    def __init__(
        self,
        target: Target,
        tensors: Sequence[QTensor],
        forms: Sequence[Packed],
        n_threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        lend: Lend = nullcontext,
        piece_bytes: int = PIECE,
    ) -> None:
        self.tensors, self.forms = tensors, forms
        self._target, self._progress, self._lend = target, progress, lend
        self._pieces = [
            (weights, first, min(first + step, form.n_groups))
            for weights in _alternating(tensors, forms)
            for _, form in weights[:1]
            for step in [max(1, piece_bytes // form.stride)]
            for first in range(0, form.n_groups, step)
        ]
        self.n_threads = n_threads or os.cpu_count() or 1
        self.find: Find = lambda rows: None
        self._stop = np.zeros(1, np.int64)
        self._begin()

    def _begin(self) -> None:
        self._total, self._done, self._next = sum(form.n_bytes for form in self.forms), 0, 0
        self._lock, self._failures, self._process = threading.Lock(), list[BaseException](), os.getpid()
        self._threads: list[threading.Thread] = []
        self._under_way = set[int]()  # pieces, by index, that a thread is at
        self._open = threading.Event()  # pieces may be begun
        self._open.set()

    def start(self) -> None:
        """Begins on threads of its own, one fewer than there may be: whoever waits for the end packs, too."""
        compiler.compile_all(dict.fromkeys(map(_kernel, self.tensors, self.forms)))
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.n_threads - 1)]
        for thread in self._threads:
            thread.start()

    def run(self) -> None:
        """From its start to its end."""
        self.start()
        self.finish()

    def _after_fork(self) -> None:
        """Begins again in a process that was forked: the threads have stayed behind, with what they were at."""
        if self._process != os.getpid() and not self.finished:
            self._begin()

    @property
    def finished(self) -> bool:
        """Whether all weights are packed."""
        return self._done == self._total

    @contextmanager
    def paused(self) -> Iterator[dict[int, int]]:
        """No piece is begun within it. Gives the weights, by index, that are not packed, each with the first of its
        groups that is not; what is packed at this moment counts as not packed."""
        self._after_fork()
        with self._lock:
            self._open.clear()
            at = min(self._under_way, default=self._next)
        try:
            yield self._left(at)
        finally:
            self._open.set()

    def _left(self, at: int) -> dict[int, int]:
        """What is left from a piece on, as `paused` gives it."""
        if at == len(self._pieces):
            return {}
        weights, first, _ = self._pieces[at]
        begun = {form.address: first for _, form in weights}
        start = weights[0][1].address
        return {i: begun.get(form.address, 0) for i, form in enumerate(self.forms) if form.address >= start}

    def pack_rows(self, index: int, rows: Iterable[int]) -> None:
        """Packs some rows of a weight, with the groups that they are in. For who has `paused` it."""
        for group in {row // ROWS for row in rows}:
            _pack_piece(self._target, [(self.tensors[index], self.forms[index])], group, group + 1, self._lend, 0)

    def finish(self) -> None:
        """Packs what is left; raises what any of the threads could not do."""
        self._after_fork()
        self._work()
        for thread in self._threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _work(self) -> None:
        try:
            while not self._failures:
                self._open.wait()
                with self._lock:
                    if not self._open.is_set():
                        continue
                    if self._next == len(self._pieces):
                        return
                    at, self._next = self._next, self._next + 1
                    self._under_way.add(at)
                n_bytes = _pack_piece(self._target, *self._pieces[at], self._lend, self._stop.ctypes.data)
                with self._lock:
                    if self._failures:
                        return  # the piece may not be whole
                    self._under_way.remove(at)
                    self._done += n_bytes
                    if self._progress is not None:
                        self._progress(self._done, self._total)
        except BaseException as failure:  # an interrupt, too: the other threads have to end
            self._failures.append(failure)


def _stop(failures: list[BaseException], stop: np.ndarray, threads: list[threading.Thread]) -> None:
    failures.append(Stopped())
    stop[0] = 1
    for thread in threads:
        if thread is not threading.current_thread():  # whose end may be what frees the packing
            thread.join()


def _alternating(tensors: Sequence[QTensor], forms: Sequence[Packed]) -> list[list[Weight]]:
    """Weights in the order of their places, those whose groups alternate together."""
    found: list[list[Weight]] = []
    end = 0
    for tensor, form in sorted(zip(tensors, forms, strict=True), key=lambda weight: weight[1].address):
        if form.address < end:
            found[-1].append((tensor, form))
        else:
            found.append([(tensor, form)])
            end = form.address + form.span
    return found


def _shape(tensor: QTensor) -> tuple[int, int]:
    return len(tensor.data), tensor.shape[-1]


def _format_for(tensor: QTensor) -> str:
    name = tensor.format.name
    if name in ("F16", "BF16") and int16.preferred():
        return "INT12"
    if name in FLOATS or name in BLOCKS:
        return name
    return "INT8" if tensor.format.block > 1 else "F32"


def zeroed(n_bytes: int) -> np.ndarray:
    """Zeroed bytes at a multiple of 64. Private memory where a system has the choice: its pages come faster.

    In huge pages, where Linux gives them to those who ask: the system makes them in a quarter of the time, and one
    thread reads them a fifth faster, as a processor prefetches no further than to the end of a page. The records of a
    prompt's tokens lie kilobytes apart: in small pages, tiles that read them are a tenth slower (docs/LOG.md).
    """
    size = max(1, -(-n_bytes // HUGE)) * HUGE  # Linux puts an area of whole huge pages where they fit
    if hasattr(mmap, "MAP_PRIVATE"):
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        area = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, np.uint8, n_bytes)


def _kernel(tensor: QTensor, form: Packed) -> str:
    """Name, for `compiler`, of the kernel that packs a weight."""
    name = form.format if form.format != "INT12" else f"int12_{tensor.format.name}"
    return f"packing_kernels:pack_{name.lower()}"


def row_pack(tensor: QTensor, form: Packed, data: np.ndarray, place: int, stride: int, stop: int) -> list[int]:
    """A row of the op table that packs rows of a weight, `data`, as groups at `place`, `stride` bytes apart.

    stop: see `Arg.STOP`.
    """
    row = [0] * Row.SIZE
    row[Row.KERNEL], row[Row.UNITS], row[Row.GRAIN] = compiler.address(_kernel(tensor, form)), -(-len(data) // ROWS), 1
    args = data.ctypes.data, data.strides[0], len(data), form.n_cols, place, stride, stop
    row[Row.ARGS : Row.ARGS + len(args)] = args
    return row


def _pack_piece(target: Target, weights: list[Weight], first: int, last: int, lend: Lend, stop: int) -> int:
    """Packs groups `first` to `last`, not included, of weights whose groups alternate; how many bytes these are."""
    base, stride = weights[0][1].address, weights[0][1].stride
    room = target.room(base + first * stride, (last - first) * stride)
    for tensor, form in weights:
        with lend(tensor.data[first * ROWS : min(last * ROWS, form.n_rows)]) as data:
            if form.transcoded_from is not None and form.format != "INT12":
                data = transcoded(tensor, data, form.format)
            if data.strides[-1] != 1:
                data = np.ascontiguousarray(data)
            place = room.ctypes.data + form.address - base
            row = np.array(row_pack(tensor, form, data, place, stride, stop), np.int64)
            _Native(int(row[Row.KERNEL]))(row.ctypes.data, 0, 0, last - first)
    target.done(base + first * stride, room)
    return len(room)
