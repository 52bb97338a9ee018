"""Looking up rows of packed matrices: one kernel for each format, from one body. `linear.row_embed` builds the rows."""

from __future__ import annotations

from numba import njit

from edgelm.kernels.abi import WORD, Env, Row
from edgelm.kernels.float_tiles import float_embed_code
from edgelm.kernels.functions import call_function
from edgelm.kernels.int16_tiles import int16_embed_code
from edgelm.kernels.simd import load_i32, load_i64
from edgelm.kernels.tiles import embed_code

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


def embed_f32(op, env, begin, end):
    rows(float_embed_code("F32"), op, env, begin, end)


def embed_f16(op, env, begin, end):
    rows(float_embed_code("F16"), op, env, begin, end)


def embed_bf16(op, env, begin, end):
    rows(float_embed_code("BF16"), op, env, begin, end)


def embed_int12(op, env, begin, end):
    rows(int16_embed_code("F16"), op, env, begin, end)


def embed_q4_0(op, env, begin, end):
    rows(embed_code("Q4_0"), op, env, begin, end)


def embed_q4_1(op, env, begin, end):
    rows(embed_code("Q4_1"), op, env, begin, end)


def embed_q5_0(op, env, begin, end):
    rows(embed_code("Q5_0"), op, env, begin, end)


def embed_q5_1(op, env, begin, end):
    rows(embed_code("Q5_1"), op, env, begin, end)


def embed_q8_0(op, env, begin, end):
    rows(embed_code("Q8_0"), op, env, begin, end)


def embed_q2_k(op, env, begin, end):
    rows(embed_code("Q2_K"), op, env, begin, end)


def embed_q3_k(op, env, begin, end):
    rows(embed_code("Q3_K"), op, env, begin, end)


def embed_q4_k(op, env, begin, end):
    rows(embed_code("Q4_K"), op, env, begin, end)


def embed_q5_k(op, env, begin, end):
    rows(embed_code("Q5_K"), op, env, begin, end)


def embed_q6_k(op, env, begin, end):
    rows(embed_code("Q6_K"), op, env, begin, end)


def embed_iq4_nl(op, env, begin, end):
    rows(embed_code("IQ4_NL"), op, env, begin, end)


def embed_iq4_xs(op, env, begin, end):
    rows(embed_code("IQ4_XS"), op, env, begin, end)


def embed_mxfp4(op, env, begin, end):
    rows(embed_code("MXFP4"), op, env, begin, end)


def embed_int8(op, env, begin, end):
    rows(embed_code("INT8"), op, env, begin, end)
