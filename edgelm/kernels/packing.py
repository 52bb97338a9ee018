"""Weights made ready for the kernels: from the blocks of a file to the packed form that `blocks` describes.

The work is done by compiled kernels on several threads, at the speed of the memory. Formats that have no kernels are
transcoded: those made of integers times a scale to `INT8`, without loss, and plain numbers to float32. Where integers
are multiplied faster than floats, float16 and bfloat16 become `int16`.

Imports no Numba. Knows nothing of activations.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from edgelm.formats import QTensor
from edgelm.kernels import (
    block_formats,  # noqa: F401  (defines them)
    compiler,
    int16,
)
from edgelm.kernels.blocks import BLOCKS, ROWS

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a weight
_JOB = 8 << 20  # bytes of packed weights that a thread makes at a time
_ALIGN = 64
_HUGE = 2 << 20

_Native = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix (n_rows, n_cols) in packed form.

    format: name of the kernels' format; transcoded_from: name of the file's format where that is another one;
    address, n_bytes: where the packed weights lie; keep: what owns them.
    """

    format: str
    n_rows: int
    n_cols: int
    address: int
    n_bytes: int
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
    def n_units(self) -> int:
        """Units of a group; columns of a matrix of floats."""
        return self.group_bytes // _unit(self.format)[1]


def is_float(format: str) -> bool:
    """Whether kernels of `format` take float32 activations instead of records."""
    return format in FLOATS


def _unit(format: str) -> tuple[int, int]:
    """(columns, bytes) of the smallest piece of 16 rows."""
    if format in FLOATS:
        return 1, ROWS * FLOATS[format]
    if format == "INT16":
        return int16.BLOCK, int16.UNIT
    return 32 * BLOCKS[format].blocks, BLOCKS[format].unit_bytes


def packed_bytes(format: str, n_rows: int, n_cols: int) -> int:
    """Bytes that a matrix takes in packed form."""
    columns, n_bytes = _unit(format)
    return -(-n_rows // ROWS) * -(-n_cols // columns) * n_bytes


def pack(tensor: QTensor) -> Packed:
    """The packed form of one weight. Many at once: `pack_all`."""
    return pack_all([tensor])[0]


def pack_all(
    tensors: Sequence[QTensor],
    n_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Packed]:
    """The packed forms of weights, made by several threads at once in one piece of memory.

    A weight of more than two dimensions counts as a matrix of all its rows, one of one dimension as a single row.
    `progress(bytes done, bytes in all)`, of packed weights, is called from the calling thread.
    """
    sizes = [packed_bytes(_format_for(t), *_shape(t)) for t in tensors]
    starts = np.cumsum([0] + [-(-size // _ALIGN) * _ALIGN for size in sizes])
    memory = _zeros(int(starts[-1]))
    base = memory.ctypes.data
    results: list[Packed] = []
    with ThreadPoolExecutor(n_threads or os.cpu_count() or 1) as pool:
        jobs = []
        for tensor, start, size in zip(tensors, starts, sizes, strict=False):
            rows, cols = _shape(tensor)
            format = _format_for(tensor)
            original = tensor.format.name if tensor.format.name != format else None
            packed = Packed(format, rows, cols, base + int(start), size, original, memory)
            results.append(packed)
            step = max(1, _JOB // packed.group_bytes)
            for first in range(0, packed.n_groups, step):
                last = min(first + step, packed.n_groups)
                n_bytes = (last - first) * packed.group_bytes
                jobs.append((pool.submit(_pack_groups, tensor, packed, first, last), n_bytes))
        done = 0
        for job, n_bytes in jobs:
            job.result()
            done += n_bytes
            if progress is not None:
                progress(done, sum(sizes))
    return results


def _shape(tensor: QTensor) -> tuple[int, int]:
    return len(tensor.data), tensor.shape[-1]


def _format_for(tensor: QTensor) -> str:
    name = tensor.format.name
    if name in ("F16", "BF16") and int16.preferred():
        return "INT16"
    if name in FLOATS or name in BLOCKS:
        return name
    return "INT8" if tensor.format.block > 1 else "F32"


def _zeros(n_bytes: int) -> np.ndarray:
    """Zeroed bytes at a multiple of 64; in large pages, where there are any, as they are read from end to end."""
    if n_bytes < _HUGE:
        memory = np.zeros(n_bytes + _ALIGN, np.uint8)
        skip = -memory.ctypes.data % _ALIGN
        return memory[skip : skip + n_bytes]
    area = mmap.mmap(-1, n_bytes + _HUGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(area, np.uint8)
    skip = -memory.ctypes.data % _HUGE
    return memory[skip : skip + n_bytes]


def _pack_groups(tensor: QTensor, packed: Packed, first: int, last: int) -> None:
    """Packs groups `first` to `last`, not included."""
    rows = slice(first * ROWS, min(last * ROWS, packed.n_rows))
    data, kernel = tensor.data[rows], f"pack_{packed.format.lower()}"
    if packed.format == "INT16":
        kernel = f"pack_int16_{tensor.format.name.lower()}"
    elif packed.transcoded_from is not None:
        data = _transcoded(tensor, rows, packed.format)
    if data.strides[-1] != 1:
        data = np.ascontiguousarray(data)
    job = np.array(
        [data.ctypes.data, data.strides[0], len(data), packed.n_cols, packed.address + first * packed.group_bytes,
         packed.group_bytes], np.int64,
    )  # fmt: skip
    _Native(compiler.address(f"packing_kernels:{kernel}"))(job.ctypes.data, 0, 0, last - first)


# --- transcoding

# Largest integers that 16 weights may be multiples of: the usual ones of codebooks first, then all that int8 holds.
_LARGEST = tuple(dict.fromkeys([1, 43, 25, 9, 7, 15, 13, 11, 5, 3, 62, 52, 44, 36, 28, 12, 8, 6, 4, *range(1, 129)]))


def _transcoded(tensor: QTensor, rows: slice, format: str) -> np.ndarray:
    """Some rows in the file form of another format: bytes (rows, bytes per row)."""
    weights = QTensor(tensor.name, tensor.format, (rows.stop - rows.start, tensor.shape[-1]), tensor.data[rows])
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
