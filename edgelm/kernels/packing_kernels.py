"""Packing: one kernel for each format, from one body.

A unit is a group of 16 rows. Arguments: see `weight_layout.Arg`.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from edgelm.kernels.abi import WORD, Row
from edgelm.kernels.emit import I64
from edgelm.kernels.functions import call_function
from edgelm.kernels.int16_tiles import int16_pack_code
from edgelm.kernels.simd import load_i16, load_i32, load_i64, prefetch, store
from edgelm.kernels.tiles import pack_code
from edgelm.kernels.units import UNITS
from edgelm.kernels.walk import atomic_get, atomic_set
from edgelm.kernels.weight_layout import FLOATS, Arg

_SOURCE, _ROW_BYTES, _N_ROWS, _N_COLS, _TARGET, _STRIDE, _STOP, _READ, _FILE, _BUFFER, _ROOM = (
    WORD * (Row.ARGS + arg) for arg in Arg
)
TRIES = 16  # to read: a signal may come in between


@njit
def stopped(op):
    """Whether nobody wants the rest: asked at each group, so that a process does not wait for it at its end."""
    return atomic_get(load_i64(op + _STOP)) != 0


@intrinsic
def pread(typingctx, function, file, target, n_bytes, offset):
    """C's function of this name, by its address."""
    def codegen(context, b, sig, args):
        type_ = ir.FunctionType(I64, [I64] * 4)
        return b.call(b.inttoptr(args[0], type_.as_pointer()), args[1:])
    return types.int64(*[types.int64] * 5), codegen


@njit
def rows_of(op, group, n_bytes):
    """Address of the rows of a group: in memory, or in the buffer, where they are read from the file.

    Packing reads 16 rows side by side, which memory gives slowly, so they are asked for first, in the file's order.
    """
    start, read = group * 16 * load_i64(op + _ROW_BYTES), load_i64(op + _READ)
    if read == 0:
        first = load_i64(op + _SOURCE) + start
        for line in range(first, first + n_bytes, 64):
            prefetch(line)
        return first
    file, offset = load_i64(op + _FILE), load_i64(op + _SOURCE) + start
    target = load_i64(op + _BUFFER) + group * load_i64(op + _ROOM)
    done = tries = 0
    while done < n_bytes:
        n = pread(read, file, target + done, n_bytes - done, offset + done)
        tries = tries + 1 if n < 0 else 0
        if n == 0 or tries == TRIES:  # the file has become shorter, or its disk is gone
            atomic_set(load_i64(op + _STOP), 1)
            return target
        done += max(n, 0)
    return target


@njit
def groups(code, block, op, begin, end):
    """Groups `begin` to `end` of an operation. The code counts columns in blocks of `block`."""
    row_bytes, n_rows, n_cols = load_i64(op + _ROW_BYTES), load_i64(op + _N_ROWS), load_i64(op + _N_COLS)
    target, stride = load_i64(op + _TARGET), load_i64(op + _STRIDE)
    for group in range(begin, end):
        if stopped(op):
            return
        rows = min(16, n_rows - group * 16)
        first = rows_of(op, group, rows * row_bytes)
        call_function(code, first, row_bytes, rows, n_cols // block, target + group * stride)


@njit
def floats(n_bytes, op, begin, end):
    """The same for a matrix of numbers of `n_bytes` bytes: 16 rows side by side, column after column."""
    row_bytes, n_rows, n_cols = load_i64(op + _ROW_BYTES), load_i64(op + _N_ROWS), load_i64(op + _N_COLS)
    target, stride = load_i64(op + _TARGET), load_i64(op + _STRIDE)
    for group in range(begin, end):
        if stopped(op):
            return
        rows = min(16, n_rows - group * 16)
        first = rows_of(op, group, rows * row_bytes)
        for start in range(0, n_cols, 64):
            for lane in range(rows):
                row = first + lane * row_bytes
                column = target + group * stride + lane * n_bytes
                for i in range(start, min(start + 64, n_cols)):
                    if n_bytes == 2:
                        store(column + i * 32, load_i16(row + i * 2))
                    else:
                        store(column + i * 64, load_i32(row + i * 4))


def _of_floats(n_bytes):
    def kernel(op, env, begin, end):
        floats(n_bytes, op, begin, end)

    return kernel


def _of_blocks(code, name, columns):
    """code: an intrinsic that gives the address of what packs a group, by the format's name."""

    def kernel(op, env, begin, end):
        groups(code(name), columns, op, begin, end)

    return kernel


globals().update((f"pack_{name.lower()}", _of_floats(n_bytes)) for name, n_bytes in FLOATS.items())
globals().update((f"pack_int12_{name.lower()}", _of_blocks(int16_pack_code, name, 1)) for name in ("F16", "BF16"))
globals().update((f"pack_{name.lower()}", _of_blocks(pack_code, name, 32)) for name in UNITS)
