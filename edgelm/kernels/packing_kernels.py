"""Packing: one kernel for each format, from one body. `packing` calls them with a job in place of an operation.

A job is int64: address of the first row in the file, bytes from row to row, rows, columns, address of the packed
groups, bytes of a group.
"""

from __future__ import annotations

from numba import njit

from edgelm.kernels.simd import load_i64
from edgelm.kernels.tiles import call_function, pack_code


@njit
def groups(code, job, begin, end):
    """Groups `begin` to `end` of a job."""
    source, row_bytes, n_rows, n_cols = load_i64(job), load_i64(job + 8), load_i64(job + 16), load_i64(job + 24)
    target, group_bytes = load_i64(job + 32), load_i64(job + 40)
    for group in range(begin, end):
        rows = min(16, n_rows - group * 16)
        first = source + group * 16 * row_bytes
        call_function(code, first, row_bytes, rows, n_cols // 32, target + group * group_bytes)


def pack_q4_1(job, unused, begin, end):
    groups(pack_code("Q4_1"), job, begin, end)


def pack_q8_0(job, unused, begin, end):
    groups(pack_code("Q8_0"), job, begin, end)
