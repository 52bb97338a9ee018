"""Looking up rows of packed matrices: one kernel for each format, from one body. `linear.row_embed` builds the rows."""

from __future__ import annotations

from numba import njit

from edgelm.kernels.abi import WORD, Env, Row
from edgelm.kernels.float_tiles import float_embed_code
from edgelm.kernels.functions import call_function
from edgelm.kernels.int16_tiles import int16_embed_code
from edgelm.kernels.simd import load_i32, load_i64
from edgelm.kernels.tiles import embed_code
from edgelm.kernels.units import UNITS
from edgelm.kernels.weight_layout import FLOATS

_WEIGHTS, _GROUP_STRIDE, _N_COLS, _IDS, _OFFSET, _Y, _Y_STRIDE, _SCALE = (WORD * (Row.ARGS + i) for i in range(8))
_WORKSPACE = WORD * Env.WORKSPACE


@njit
def rows(code, op, env, begin, end):
    """The body of a kernel: tokens `begin` to `end` of the operation `op`."""
    ids, y = load_i64(env + WORD * load_i64(op + _IDS)), load_i64(env + _WORKSPACE) + load_i64(op + _Y)
    weights, stride, n_cols = load_i64(op + _WEIGHTS), load_i64(op + _GROUP_STRIDE), load_i64(op + _N_COLS)
    offset, y_stride, scale = load_i64(op + _OFFSET), load_i64(op + _Y_STRIDE), load_i64(op + _SCALE)
    for token in range(begin, end):
        row = load_i32(ids + 4 * token) + offset
        group = weights + (row >> 4) * stride
        call_function(code, group, n_cols, row & 15, y + token * y_stride, scale)


def embed_int12(op, env, begin, end):
    rows(int16_embed_code("F16"), op, env, begin, end)


def _kernel(code, name):
    """The kernel of a format; code: an intrinsic that gives the address of what looks up a row, by its name."""

    def kernel(op, env, begin, end):
        rows(code(name), op, env, begin, end)

    return kernel


_CODES = {**dict.fromkeys(FLOATS, float_embed_code), **dict.fromkeys(UNITS, embed_code)}
globals().update((f"embed_{name.lower()}", _kernel(code, name)) for name, code in _CODES.items())
