"""Packed weights as a whole: in which form each is kept, how many bytes that takes, where they lie side by side.

`units` describes a unit of a format, this module matrices of them. Plain numbers of other kinds become float32. Where
integers are multiplied faster than floats, float16 and bfloat16 become integers of 12 bits (`int16`).

Imports no Numba. Knows nothing of files and threads: see `packing`.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np

from edgelm.formats import QTensor
from edgelm.kernels import int16
from edgelm.kernels.units import ROWS, UNITS

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a weight
LAYOUT = 5  # of packed weights; to be raised when they change: a test compares
ALIGN = 64
HUGE = 1 << 21  # bytes of a huge page

Pairs = Sequence[tuple[int, int]]


class Arg(IntEnum):
    """Arguments of a kernel that packs, from `Row.ARGS` on."""

    SOURCE = 0  # address of the first row; where it lies in the file, if it is to be read
    ROW_BYTES = 1  # from row to row
    N_ROWS = 2
    N_COLS = 3
    TARGET = 4  # address of the packed groups
    STRIDE = 5  # bytes from one group to the next
    STOP = 6  # address of a word: while it is zero, groups are packed; set if rows cannot be read
    READ = 7  # address of C's function `pread`, or 0: rows are in memory
    FILE = 8  # the descriptor of their file
    BUFFER = 9  # address of room for the file's bytes of the first group
    ROOM = 10  # bytes from there to that of the next group, 0 where one thread packs them one after the other


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

    @property
    def transcoded(self) -> bool:
        """Whether the file's blocks become others before kernels pack them."""
        if self.format in UNITS:
            return UNITS[self.format].source is not None
        return self.format == "F32" and self.transcoded_from is not None

    def within(self, memory: np.ndarray) -> Packed:
        """The same in `memory`, where the address has counted from its beginning."""
        return replace(self, address=memory.ctypes.data + self.address, keep=memory)


def is_float(format: str) -> bool:
    """Whether kernels of `format` take float32 activations instead of records."""
    return format in FLOATS


def unit(format: str) -> tuple[int, int]:
    """(columns, bytes) of the smallest piece of 16 rows."""
    if format in FLOATS:
        return 1, ROWS * FLOATS[format]
    if format == "INT12":
        return int16.BLOCK, int16.UNIT
    return 32 * UNITS[format].blocks, UNITS[format].unit_bytes


def packed_bytes(format: str, n_rows: int, n_cols: int) -> int:
    """Bytes that a matrix takes in packed form."""
    columns, n_bytes = unit(format)
    return -(-n_rows // ROWS) * -(-n_cols // columns) * n_bytes


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
    (n_rows, n_cols), format = _shape(tensor), format_for(tensor)
    original = tensor.format.name if tensor.format.name != format else None
    return Packed(format, n_rows, n_cols, 0, packed_bytes(format, n_rows, n_cols), 0, original)


def alike(one: Packed, other: Packed) -> bool:
    """Whether two matrices have the same format and shape."""
    return (one.format, one.n_rows, one.n_cols) == (other.format, other.n_rows, other.n_cols)


def _shape(tensor: QTensor) -> tuple[int, int]:
    return len(tensor.data), tensor.shape[-1]


def format_for(tensor: QTensor) -> str:
    name = tensor.format.name
    if name in ("F16", "BF16") and int16.preferred():
        return "INT12"
    if name in FLOATS or name in UNITS:
        return name
    return "F32"


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
