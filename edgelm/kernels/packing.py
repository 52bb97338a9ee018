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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from edgelm.formats import QTensor
from edgelm.kernels import (
    block_formats,  # noqa: F401  (defines them)
    compiler,
    int16,
)
from edgelm.kernels.blocks import BLOCKS, ROWS

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a weight
LAYOUT = 4  # of packed weights; to be raised when they change: a test compares
ALIGN = 64
HUGE = 1 << 21  # bytes of a huge page
_PIECE = 1 << 20  # bytes of packed weights that a thread makes at a time

Lend = Callable[[np.ndarray], AbstractContextManager[np.ndarray]]
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
        return self.group_bytes // _unit(self.format)[1]

    def within(self, memory: np.ndarray) -> Packed:
        """The same in `memory`, where the address has counted from its beginning."""
        return replace(self, address=memory.ctypes.data + self.address, keep=memory)


Weight = tuple[QTensor, Packed]


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


def _unit(format: str) -> tuple[int, int]:
    """(columns, bytes) of the smallest piece of 16 rows."""
    if format in FLOATS:
        return 1, ROWS * FLOATS[format]
    if format == "INT12":
        return int16.BLOCK, int16.UNIT
    return 32 * BLOCKS[format].blocks, BLOCKS[format].unit_bytes


def packed_bytes(format: str, n_rows: int, n_cols: int) -> int:
    """Bytes that a matrix takes in packed form."""
    columns, n_bytes = _unit(format)
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
    """The packed forms of weights in one piece of memory; parameters as for `pack_into` and `arrange`."""
    forms, n_bytes = arrange(tensors, pairs)
    memory = Memory(n_bytes)
    pack_into(memory, tensors, forms, n_threads, progress, lend)
    return [form.within(memory.bytes) for form in forms]


def pack_into(
    target: Target,
    tensors: Sequence[QTensor],
    forms: Sequence[Packed],
    n_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    lend: Lend = nullcontext,
) -> None:
    """Packs weights piece by piece to where `forms` of `arrange` say, by several threads at once.

    `progress(bytes done, bytes in all)`, of packed weights, is called from one thread at a time. `lend(rows)` is where
    rows of a weight can be read, for as long as that takes: see `GGUF.lend`.
    """
    compiler.compile_all(dict.fromkeys(map(_kernel, tensors, forms)))
    total, done, lock, failures = sum(form.n_bytes for form in forms), 0, threading.Lock(), []
    pieces = (
        (weights, first, min(first + step, form.n_groups))
        for weights in _alternating(tensors, forms)
        for _, form in weights[:1]
        for step in [max(1, _PIECE // form.stride)]
        for first in range(0, form.n_groups, step)
    )

    def work() -> None:
        nonlocal done
        try:
            while not failures:
                with lock:
                    piece = next(pieces, None)
                if piece is None:
                    return
                n_bytes = _pack_piece(target, *piece, lend)
                with lock:
                    done += n_bytes
                    if progress is not None:
                        progress(done, total)
        except BaseException as failure:  # an interrupt, too: the other threads have to end
            failures.append(failure)

    others = [threading.Thread(target=work) for _ in range((n_threads or os.cpu_count() or 1) - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()
    if failures:
        raise failures[0]


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


def _pack_piece(target: Target, weights: list[Weight], first: int, last: int, lend: Lend) -> int:
    """Packs groups `first` to `last`, not included, of weights whose groups alternate; how many bytes these are."""
    base, stride = weights[0][1].address, weights[0][1].stride
    room = target.room(base + first * stride, (last - first) * stride)
    for tensor, form in weights:
        with lend(tensor.data[first * ROWS : min(last * ROWS, form.n_rows)]) as data:
            if form.transcoded_from is not None and form.format != "INT12":
                data = _transcoded(tensor, data, form.format)
            if data.strides[-1] != 1:
                data = np.ascontiguousarray(data)
            place = room.ctypes.data + form.address - base
            job = np.array([data.ctypes.data, data.strides[0], len(data), form.n_cols, place, stride], np.int64)
            _Native(compiler.address(_kernel(tensor, form)))(job.ctypes.data, 0, 0, last - first)
    target.done(base + first * stride, room)
    return len(room)


# --- transcoding

# Largest integers that 16 weights may be multiples of: the usual ones of codebooks first, then all that int8 holds.
_LARGEST = tuple(dict.fromkeys([1, 43, 25, 9, 7, 15, 13, 11, 5, 3, 62, 52, 44, 36, 28, 12, 8, 6, 4, *range(1, 129)]))


def _transcoded(tensor: QTensor, data: np.ndarray, format: str) -> np.ndarray:
    """Some rows of a weight in the file form of another format: bytes (rows, bytes per row)."""
    weights = QTensor(tensor.name, tensor.format, (len(data), tensor.shape[-1]), data)
    values = weights.dequantize()
    if format == "F32":
        return values.view(np.uint8)
    scales, quants = integers(values.reshape(-1, 16))
    blocks = np.empty(len(scales) // 2, np.dtype([("d", "<f4", 2), ("q", "i1", 32)]))
    blocks["d"], blocks["q"] = scales.reshape(-1, 2), quants.reshape(-1, 32)
    return blocks.view(np.uint8).reshape(len(values), -1)


def integers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 16) float32 that are int8 times one scale for each row, as (scales (n,), int8 (n, 16)).

    Finds the largest integer by trial: different fractions of integers up to 128 are further apart than rounding takes
    them. A scale may be negative, as only -128 fits. Rows that are no such multiples are rounded to 127 steps.
    """
    with np.errstate(all="ignore"):
        peaks = np.abs(values).max(axis=1)
        scales, quants = np.zeros_like(peaks), np.zeros(values.shape, np.int8)
        todo = np.flatnonzero(peaks > 0)
        for largest in _LARGEST:
            if len(todo) == 0:
                break
            steps = values[todo] / peaks[todo, None] * np.float32(largest)
            whole = np.rint(steps)
            fits = (np.abs(steps - whole) < 2e-3).all(axis=1)
            found, whole = todo[fits], whole[fits]
            sign = np.where(whole.max(axis=1) > 127, np.float32(-1), np.float32(1))
            scales[found], quants[found] = sign * peaks[found] / np.float32(largest), sign[:, None] * whole
            todo = todo[~fits]
        scales[todo] = peaks[todo] / np.float32(127)
        quants[todo] = np.nan_to_num(np.rint(values[todo] / scales[todo, None]), posinf=127, neginf=-127)
    return scales, quants
