"""Activations as the matrix unit wants them: bfloat16, in the place of the records of `quantize`.

They lie in tiles: the first 32 inputs of 16 tokens, one token after the other, then the next 32. Behind the last input
there are zeros up to a multiple of 64. Knows nothing of weights.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from edgelm.kernels import amx
from edgelm.kernels.abi import WORD, Env, Row
from edgelm.kernels.amx import DEPTH, ROWS, TILE
from edgelm.kernels.emit import I64, F32x16, load_at, store_at, to_bfloat16
from edgelm.kernels.functions import scratch, statement
from edgelm.kernels.simd import load_f32, load_i64, splat_f32, store

Value = ir.Value
REST = 2 * 4 * DEPTH  # bytes of the last inputs
_TILES, _COUNT = WORD * Env.TILES, WORD * Row.COUNT


def _write_line(context: Any, b: ir.IRBuilder, x: Value, place: Value) -> None:
    if amx.has_tiles(context):
        low, high = (load_at(b, b.add(x, I64(64 * i)), F32x16) for i in range(2))
        store_at(b, to_bfloat16(b, low, high), place, 64)


write_line = statement(_write_line, 2)  # (x, place): 32 float32 as bfloat16


@intrinsic
def has_unit(typingctx):
    """Whether there is a matrix unit in the processor that is compiled for."""

    def codegen(context, b, sig, args):
        return ir.Constant(ir.IntType(1), int(amx.has_tiles(context)))

    return types.boolean(), codegen


@njit
def in_tiles(op, env):
    """Whether the activations of a row's tokens or outputs are in tiles."""
    least = load_i64(env + _TILES)
    return has_unit() and least != 0 and load_i64(env + load_i64(op + _COUNT) * WORD) >= least


@njit
def write_tiles(x, n_cols, first, stride, token):
    """Writes a token's activations, float32 at `x`, as bfloat16. first, stride: of where records would be."""
    own = first + token // ROWS * (ROWS * stride) + token % ROWS * 64
    whole = n_cols // DEPTH
    for i in range(whole):
        write_line(x + 4 * DEPTH * i, own + TILE * i)
    if n_cols % (2 * DEPTH) != 0:
        rest = scratch(REST)
        for i in range(0, REST, 64):
            store(rest + i, splat_f32(0.0))
        for i in range(whole * DEPTH, n_cols):
            store(rest + 4 * (i - whole * DEPTH), load_f32(x + 4 * i))
        for i in range(whole, (n_cols + 2 * DEPTH - 1) // (2 * DEPTH) * 2):
            write_line(rest + 4 * DEPTH * (i - whole), own + TILE * i)
