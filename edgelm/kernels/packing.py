"""Weights are packed: from the blocks of a file to the form that `weight_layout` describes.

The work is done by compiled kernels on several threads, at the speed of the memory. What they cannot pack as it is is
transcoded before. Imports no Numba. Knows nothing of activations.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import numpy as np

from edgelm.disk import Progress
from edgelm.formats import QTensor
from edgelm.kernels import compiler
from edgelm.kernels.abi import Row
from edgelm.kernels.executor import Native, read_address
from edgelm.kernels.transcode import transcoded
from edgelm.kernels.units import ROWS
from edgelm.kernels.weight_layout import Arg, Packed, Pairs, arrange, zeroed
from edgelm.mapped_file import unreadable

PIECE = 1 << 20  # bytes of packed weights that a thread makes at a time
LARGE_PIECE = 16 << 20  # the same where the interpreter is busy: after each piece a thread waits 5 ms for its lock


Lend = Callable[[np.ndarray], AbstractContextManager[np.ndarray]]
Find = Callable[[np.ndarray], tuple[int, int] | None]

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


def pack(tensor: QTensor) -> Packed:
    """The packed form of one weight. Many at once: `pack_all`."""
    return pack_all([tensor])[0]


def pack_all(
    tensors: Sequence[QTensor],
    n_threads: int | None = None,
    progress: Progress | None = None,
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

    It begins at once if its kernels are compiled; else whoever compiles them, together with others, starts it.
    find: see `GGUF.find`.
    """
    forms, n_bytes = arrange(tensors, pairs)
    memory = Memory(n_bytes)
    packing = Packing(memory, tensors, forms, n_threads, None, lend, find, LARGE_PIECE)
    if all(map(compiler.is_compiled, packing.kernels)):
        packing.start()
    return [form.within(memory.bytes) for form in forms], packing


class Packing:
    """Packs weights to where `forms` of `arrange` say, piece by piece in that order, by several threads at once.

    `progress("packing weights", bytes done, bytes in all)` is called from one thread at a time. `lend(rows)` is where
    rows of a weight can be read, for as long as that takes, and `find(rows)` where they lie in a file: see `GGUF`.
    n_threads: None for one on each core.
    """

    def __init__(
        self,
        target: Target,
        tensors: Sequence[QTensor],
        forms: Sequence[Packed],
        n_threads: int | None = None,
        progress: Progress | None = None,
        lend: Lend = nullcontext,
        find: Find = lambda rows: None,
        piece_bytes: int = PIECE,
    ) -> None:
        self.tensors, self.forms, self.find = tensors, forms, find
        self._target, self._progress, self._lend = target, progress, lend
        self._pieces = [
            (weights, first, min(first + step, form.n_groups))
            for weights in _alternating(tensors, forms)
            for _, form in weights[:1]
            for step in [max(1, piece_bytes // form.stride)]
            for first in range(0, form.n_groups, step)
        ]
        self.n_threads = n_threads or compiler.n_cores()
        self._stop = np.zeros(1, np.int64)
        self._begin()

    @property
    def kernels(self) -> list[str]:
        """Names, for `compiler`, of the kernels that pack."""
        return list(dict.fromkeys(map(_kernel, self.tensors, self.forms)))

    def _begin(self) -> None:
        self._total, self._done, self._next = sum(form.n_bytes for form in self.forms), 0, 0
        self._lock, self._failures, self._process = threading.Lock(), list[BaseException](), os.getpid()
        self._threads: list[threading.Thread] = []
        self._under_way = set[int]()  # pieces, by index, that a thread is at
        self._open = threading.Event()  # pieces may be begun
        self._open.set()
        self._ending = threading.Event()  # those of `_threads` are to end, each after its piece
        self._end = weakref.finalize(self, _end, self._failures, self._stop, self._threads)  # at exit, too

    def start(self, progress: Progress | None = None) -> None:
        """Begins on threads of its own, one fewer than there may be until somebody waits for the end; progress: of
        kernels that are compiled before."""
        compiler.compile_all(self.kernels, progress, lambda: self.n_threads)
        self._start_threads(self.n_threads - 1)

    def _start_threads(self, n: int) -> list[threading.Thread]:
        """The threads that there are, after as many were started as had been missing to `n`."""
        with self._lock:
            while len(self._threads) < n:
                thread = threading.Thread(
                    target=self._work, args=(self._ending,), name="edgelm-packing", daemon=True
                )
                thread.start()
                self._threads.append(thread)
            return self._threads.copy()

    def run(self) -> None:
        """From its start to its end; an interrupt or a failure ends the threads."""
        try:
            self.start(self._progress)
            self.finish()
        except BaseException:
            self._end()
            raise

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
        weights, failed = [(self.tensors[index], self.forms[index])], np.zeros(1, np.int64)
        for group in {row // ROWS for row in rows}:
            _pack_piece(self._target, weights, group, group + 1, self._lend, self.find, failed)
        if failed[0]:
            raise unreadable()

    def finish(self) -> None:
        """Returns when all is packed; raises what any of the threads could not do.

        An interrupt only ends the waiting, since it comes to none of them: the next call waits for what is left.
        """
        self._after_fork()
        while not self.finished and not self._failures:
            for thread in self._start_threads(self.n_threads):
                thread.join()
        if self._failures:
            raise self._failures[0]

    def stop(self) -> None:
        """Ends the threads, each after the piece that it is at; `finish` goes on with what is left."""
        self._after_fork()
        with self._lock:
            threads, ending = self._threads.copy(), self._ending
            self._threads.clear()
            self._ending = threading.Event()
        ending.set()
        for thread in threads:
            thread.join()

    def _work(self, ending: threading.Event) -> None:
        try:
            while not self._failures:
                self._open.wait()
                with self._lock:
                    if not self._open.is_set():
                        continue
                    if ending.is_set() or self._next == len(self._pieces):
                        return
                    at, self._next = self._next, self._next + 1
                    self._under_way.add(at)
                n_bytes = _pack_piece(self._target, *self._pieces[at], self._lend, self.find, self._stop)
                with self._lock:
                    if self._failures:
                        return  # the piece may not be whole
                    if self._stop[0]:
                        raise unreadable()
                    self._under_way.remove(at)
                    self._done += n_bytes
                    if self._progress is not None:
                        self._progress("packing weights", self._done, self._total)
        except BaseException as failure:  # the other threads have to end
            self._failures.append(failure)


def _end(failures: list[BaseException], stop: np.ndarray, threads: list[threading.Thread]) -> None:
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
            end = form.address + max(form.span, form.stride)  # of a single group the other one's is behind it
    return found


def _kernel(tensor: QTensor, form: Packed) -> str:
    """Name, for `compiler`, of the kernel that packs a weight."""
    name = form.format if form.format != "INT12" else f"int12_{tensor.format.name}"
    return f"packing_kernels:pack_{name.lower()}"


def in_file(rows: np.ndarray, find: Find) -> tuple[int, int] | None:
    """Where rows of a weight are to be read from, as `find` says it, if they are: where the system has a way, as to map
    pages one by one and to take them away again takes longer (docs/LOG.md)."""
    return find(rows) if read_address() else None


def row_pack(
    tensor: QTensor, form: Packed, data: np.ndarray, place: int, stride: int, stop: np.ndarray,
    found: tuple[int, int] | None,
) -> list[int]:
    """A row of the op table that packs rows of a weight, `data`, as groups at `place`, `stride` bytes apart.

    found: where they are to be read from, of `in_file`; room for that is to be added: `Arg.BUFFER`. stop: see
    `Arg.STOP`.
    """
    row = [0] * Row.SIZE
    row[Row.KERNEL], row[Row.UNITS], row[Row.GRAIN] = compiler.address(_kernel(tensor, form)), -(-len(data) // ROWS), 1
    args = data.ctypes.data, data.strides[0], len(data), form.n_cols, place, stride, stop.ctypes.data
    row[Row.ARGS : Row.ARGS + len(args)] = args
    if found is not None:
        row[Row.ARGS + Arg.READ] = read_address()
        row[Row.ARGS + Arg.FILE], row[Row.ARGS + Arg.SOURCE] = found
    return row


def _pack_piece(
    target: Target, weights: list[Weight], first: int, last: int, lend: Lend, find: Find, stop: np.ndarray
) -> int:
    """Packs groups `first` to `last`, not included, of weights whose groups alternate; how many bytes these are."""
    base, stride = weights[0][1].address, weights[0][1].stride
    room = target.room(base + first * stride, (last - first) * stride)
    for tensor, form in weights:
        rows = tensor.data[first * ROWS : min(last * ROWS, form.n_rows)]
        found = None if form.transcoded else in_file(rows, find)
        with lend(rows) if found is None else nullcontext(rows) as data:
            if form.transcoded:
                data = transcoded(tensor, data, form.format)
            if data.strides[-1] != 1:
                data = np.ascontiguousarray(data)
            place = room.ctypes.data + form.address - base
            row = np.array(row_pack(tensor, form, data, place, stride, stop, found), np.int64)
            buffer = np.empty(0 if found is None else ROWS * data.strides[0], np.uint8)
            row[Row.ARGS + Arg.BUFFER] = buffer.ctypes.data
            Native(int(row[Row.KERNEL]))(row.ctypes.data, 0, 0, last - first)
    target.done(base + first * stride, room)
    return len(room)
