"""A run of a model whose weights are not packed yet: they are packed for it alone, a piece at a time, into the cache.

Fresh memory is what packing at a start takes most of its time for. So the first run does without: each row of the op
table that multiplies becomes several, of as many groups as fit into one of two small buffers, and while one of them is
multiplied the next piece of the file is packed into the other one. Kernels and the order of their sums are those of
packed weights, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelm.kernels.abi import Row
from edgelm.kernels.linear import Arg
from edgelm.kernels.packing import Find, Weight, in_file, row_pack
from edgelm.kernels.units import ROWS
from edgelm.kernels.weight_layout import HUGE, Packed, unit, zeroed
from edgelm.kernels.weight_layout import Arg as Pack

BUFFER = HUGE  # bytes: two of them, and as much of the file, stay in the caches of two cores


def streamed(
    table: NDArray[np.int64], weights: Sequence[Weight], left: Mapping[int, int], find: Find
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]:
    """A table that computes the same as `table` while those of `weights`, by index, are packed only up to the group
    that `left` says; the buffers that it needs; and a word that is not zero afterwards if weights could not be read.

    While a piece is multiplied the next one is packed: neither waits for the other. find: see `GGUF.find`.
    """
    by_address = {form.address: (tensor, form) for tensor, form in weights}
    missing = {weights[i][1].address: first for i, first in left.items()}
    most = max(form.group_bytes for _, form in weights)
    size = max(4, BUFFER // most // 4 * 4) * most  # whole units of two groups, of one matrix or of two
    most_read = max(size // form.group_bytes * ROWS * tensor.data.strides[0] for tensor, form in weights)
    memory, failed = zeroed(2 * size + most_read), np.zeros(1, np.int64)
    buffers, room = (memory.ctypes.data, memory.ctypes.data + size), memory.ctypes.data + 2 * size
    rows = list[list[int]]()
    pieces = dict[int, list[list[int]]]()  # rows that pack what one of `rows`, by its index, multiplies
    for row in table.tolist():
        read = [address for address in (row[Row.READS], row[Row.ARGS + Arg.SECOND]) if address]
        if row[Row.READS] not in by_address or missing.keys().isdisjoint(read):
            rows.append(row)
            continue
        if rows:
            rows[-1][Row.BARRIER] = 1
        found = [by_address[address] for address in read]
        form, stride = found[0][1], len(found) * found[0][1].group_bytes
        step = size // stride // 2 * 2
        packs = [row_pack(t, form, t.data, 0, stride, failed, in_file(t.data, find)) for t, form in found]
        for k, pack in enumerate(packs):
            pack[Row.ARGS + Pack.ROOM] = ROWS * pack[Row.ARGS + Pack.ROW_BYTES]
            pack[Row.ARGS + Pack.BUFFER] = room + k * step * pack[Row.ARGS + Pack.ROOM]
        there = min(missing.get(address, form.n_groups) for address in read) // 2 * 2
        if there:
            rows.append(_product(row, form, 0, there, [form.address for _, form in found], form.stride))
        for first in range(there, form.n_groups, step):
            places = [buffers[len(pieces) % 2] + k * form.group_bytes for k in range(len(found))]
            pieces[len(rows)] = [_part(pack, first, step, place) for pack, place in zip(packs, places, strict=True)]
            rows.append(_product(row, form, first, step, places, stride))
    return np.array(_interleaved(rows, pieces), np.int64), memory, failed


def _interleaved(rows: list[list[int]], pieces: dict[int, list[list[int]]]) -> list[list[int]]:
    """A piece is packed before the row that multiplies the one before it: both are done at the same time."""
    packing = iter(pieces.values())
    result = next(packing, []).copy()
    if result:
        result[-1][Row.BARRIER] = 1
    for i, row in enumerate(rows):
        if i in pieces:
            result += next(packing, [])
        result.append(row)
    return result


def can_stream(forms: Iterable[Packed]) -> bool:
    """Whether kernels can pack all of these by themselves, into memory that is not zero."""
    return all(
        not form.transcoded and form.n_cols % unit(form.format)[0] == 0
        for form in forms
    )


def _part(pack: list[int], first: int, n: int, place: int) -> list[int]:
    """The row that packs `n` groups of a weight, from `first` on, to `place`: `pack`, which packs all, for a part."""
    row, args = pack.copy(), pack[Row.ARGS :]
    args[Pack.SOURCE] += first * ROWS * args[Pack.ROW_BYTES]
    args[Pack.N_ROWS], args[Pack.TARGET] = min(n * ROWS, args[Pack.N_ROWS] - first * ROWS), place
    row[Row.UNITS], row[Row.ARGS :] = min(n, row[Row.UNITS] - first), args
    return row


def _product(row: list[int], form: Packed, first: int, n: int, places: list[int], stride: int) -> list[int]:
    """The row that multiplies them where they lie: `row` for a part of its matrix."""
    n, column, args = min(n, form.n_groups - first), 4 * ROWS * first, row[Row.ARGS :]
    args[Arg.WEIGHTS : Arg.WEIGHTS + len(places)], args[Arg.GROUP_STRIDE] = places, stride
    args[Arg.N_GROUPS], args[Arg.N_ROWS] = n, min(n * ROWS, form.n_rows - first * ROWS)
    args[Arg.Y] += column if args[Arg.Y] >= 0 else -column
    if args[Arg.BIAS]:
        args[Arg.BIAS] += column
    if args[Arg.RESIDUAL] >= 0:
        args[Arg.RESIDUAL] += column
    head = row[: Row.ARGS]
    head[Row.UNITS] = n if args[Arg.SECOND] else -(-n // 2)
    head[Row.READS], head[Row.READ_BYTES], head[Row.BARRIER] = 0, 0, 1
    return head + args
