"""Packing: one kernel for each format, from one body. `packing` calls them with a job in place of an operation.

A job is int64: address of the first row in the file, bytes from row to row, rows, columns, address of the packed
groups, bytes from one group to the next.
"""

from __future__ import annotations

from numba import njit

from edgelm.kernels.functions import call_function
from edgelm.kernels.int16_tiles import int16_pack_code
from edgelm.kernels.simd import load_i16, load_i32, load_i64, prefetch, store
from edgelm.kernels.tiles import pack_code


@njit
def groups(code, block, job, begin, end):
    """Groups `begin` to `end` of a job. The code counts columns in blocks of `block`.

    It reads 16 rows side by side, which memory gives slowly, so they are asked for first, in the order of the file.
    """
    source, row_bytes, n_rows, n_cols = load_i64(job), load_i64(job + 8), load_i64(job + 16), load_i64(job + 24)
    target, stride = load_i64(job + 32), load_i64(job + 40)
    for group in range(begin, end):
        rows = min(16, n_rows - group * 16)
        first = source + group * 16 * row_bytes
        for line in range(first, first + rows * row_bytes, 64):
            prefetch(line)
        call_function(code, first, row_bytes, rows, n_cols // block, target + group * stride)


@njit
def floats(n_bytes, job, begin, end):
    """The same for a matrix of numbers of `n_bytes` bytes: 16 rows side by side, column after column."""
    source, row_bytes, n_rows, n_cols = load_i64(job), load_i64(job + 8), load_i64(job + 16), load_i64(job + 24)
    target, stride = load_i64(job + 32), load_i64(job + 40)
    for group in range(begin, end):
        rows = min(16, n_rows - group * 16)
        for start in range(0, n_cols, 64):
            for lane in range(rows):
                row = source + (group * 16 + lane) * row_bytes
                column = target + group * stride + lane * n_bytes
                for i in range(start, min(start + 64, n_cols)):
                    if n_bytes == 2:
                        store(column + i * 32, load_i16(row + i * 2))
                    else:
                        store(column + i * 64, load_i32(row + i * 4))


def pack_f32(job, unused, begin, end):
    floats(4, job, begin, end)


def pack_f16(job, unused, begin, end):
    floats(2, job, begin, end)


def pack_bf16(job, unused, begin, end):
    floats(2, job, begin, end)


def pack_int12_f16(job, unused, begin, end):
    groups(int16_pack_code("F16"), 1, job, begin, end)


def pack_int12_bf16(job, unused, begin, end):
    groups(int16_pack_code("BF16"), 1, job, begin, end)


def pack_q4_0(job, unused, begin, end):
    groups(pack_code("Q4_0"), 32, job, begin, end)


def pack_q4_1(job, unused, begin, end):
    groups(pack_code("Q4_1"), 32, job, begin, end)


def pack_q5_0(job, unused, begin, end):
    groups(pack_code("Q5_0"), 32, job, begin, end)


def pack_q5_1(job, unused, begin, end):
    groups(pack_code("Q5_1"), 32, job, begin, end)


def pack_q8_0(job, unused, begin, end):
    groups(pack_code("Q8_0"), 32, job, begin, end)


def pack_q2_k(job, unused, begin, end):
    groups(pack_code("Q2_K"), 32, job, begin, end)


def pack_q3_k(job, unused, begin, end):
    groups(pack_code("Q3_K"), 32, job, begin, end)


def pack_q4_k(job, unused, begin, end):
    groups(pack_code("Q4_K"), 32, job, begin, end)


def pack_q5_k(job, unused, begin, end):
    groups(pack_code("Q5_K"), 32, job, begin, end)


def pack_q6_k(job, unused, begin, end):
    groups(pack_code("Q6_K"), 32, job, begin, end)


def pack_iq4_nl(job, unused, begin, end):
    groups(pack_code("IQ4_NL"), 32, job, begin, end)


def pack_iq4_xs(job, unused, begin, end):
    groups(pack_code("IQ4_XS"), 32, job, begin, end)


def pack_mxfp4(job, unused, begin, end):
    groups(pack_code("MXFP4"), 32, job, begin, end)


def pack_int8(job, unused, begin, end):
    groups(pack_code("INT8"), 32, job, begin, end)
