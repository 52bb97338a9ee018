"""Matrix products by the matrix unit: what `linear_kernels` does for many tokens where there is one.

All tokens of a unit of work go over a slab of weights that were made bfloat16 for them. Where activations are more than
stays in a near cache, some units are done side by side, for a part of the inputs after the other.
"""

from __future__ import annotations

from numba import njit
from numba.core.registry import cpu_target
from numba.extending import overload

from edgelm.kernels.abi import WORD, Env
from edgelm.kernels.activation_tiles import in_tiles
from edgelm.kernels.amx import ROWS, TILE, has_tiles
from edgelm.kernels.amx_tiles import configure, multiply_code, release
from edgelm.kernels.functions import Code, call_function, scratch
from edgelm.kernels.linear_unit import (
    GROUP_UNITS,
    RESULTS,
    X_STRIDE,
    X,
    aim,
    ask_for,
    finish,
    groups_of,
    left_in_chunk,
    tokens_of,
)
from edgelm.kernels.records import MAX_TOKENS
from edgelm.kernels.simd import load_i64, splat_f32, store
from edgelm.kernels.slab_tiles import PAIR

BATCH = 16  # units side by side
SLAB_TILES = 64  # tiles of a group that are made bfloat16 at a time, at most
STEP = 16  # of which there are whole ones: units of all formats
SOME = 128  # tokens whose sums stay in the first-level cache
NEAR = 1 << 20  # bytes of activations that stay in the second-level cache
OUT_BYTES = MAX_TOKENS * PAIR
OUT_SCRATCH, SLAB_SCRATCH = BATCH * OUT_BYTES, 2 * SLAB_TILES * TILE
POWERS_SCRATCH = 4 * MAX_TOKENS
_WORKSPACE = WORD * Env.WORKSPACE
_PAIRS, _PAIR_TILES, _BLOCKS, _UNIT_BYTES = (
    WORD * field for field in (Code.PAIRS, Code.PAIR_TILES, Code.BLOCKS, Code.UNIT_BYTES)
)


def through_unit(code, op, env, begin, end):
    """Does units of a row by the matrix unit, if its activations are `in_tiles`: whether it did."""
    raise NotImplementedError("for kernels only")


@overload(through_unit)
def _through_unit(code, op, env, begin, end):
    """Where there is no such unit, nothing is compiled for it."""
    if not has_tiles(cpu_target.target_context):
        return lambda code, op, env, begin, end: False

    def by_tiles(code, op, env, begin, end):
        found = load_i64(code + _PAIRS) != 0 and in_tiles(op, env)
        if found:
            units_by_tiles(code, op, env, begin, end)
        return found

    return by_tiles


@njit
def units_by_tiles(code, op, env, begin, end):
    """The body of a kernel, as `linear_kernels.units`, for activations `in_tiles`."""
    x_stride, x = load_i64(op + X_STRIDE), load_i64(env + _WORKSPACE) + load_i64(op + X)
    powers, out, slab, results = scratch(POWERS_SCRATCH), scratch(OUT_SCRATCH), scratch(SLAB_SCRATCH), scratch(RESULTS)
    for i in range(0, POWERS_SCRATCH, 64):
        store(powers + i, splat_f32(1.0))
    n_tiles = load_i64(op + GROUP_UNITS) * load_i64(code + _BLOCKS) * load_i64(code + _PAIR_TILES)
    configure()
    unit = begin
    while unit < end:
        _, first_token, n_tokens = tokens_of(op, env, unit)
        n = min(BATCH, end - unit, left_in_chunk(op, unit))
        near = NEAR // ((n_tokens + ROWS - 1) // ROWS * (TILE * STEP)) * STEP
        at_once = min(max(near, STEP), SLAB_TILES)
        for tile in range(0, n_tiles, at_once):
            some = min(at_once, n_tiles - tile)
            for i in range(n):
                unpack_groups(code, op, unit + i, tile, some, slab)
                aim(results, op, env, unit + i, first_token, powers)
                own = x + first_token * x_stride + tile * TILE
                add_products(slab, some, own, x_stride, n_tokens, out + i * OUT_BYTES, tile, n_tiles, results)
        unit += n
    release()


@njit
def unpack_groups(code, op, unit, tile, n, slab):
    """Makes `n` tiles of both groups of a unit bfloat16, from `tile` on."""
    first, second, _ = groups_of(op, unit)
    unpack, block_tiles = load_i64(code + _PAIRS), load_i64(code + _PAIR_TILES)
    offset = tile // (load_i64(code + _BLOCKS) * block_tiles) * load_i64(code + _UNIT_BYTES)
    call_function(unpack, first + offset, n // block_tiles, slab)
    call_function(unpack, second + offset, n // block_tiles, slab + SLAB_TILES * TILE)


@njit
def add_products(slab, n, x, x_stride, n_tokens, out, tile, n_tiles, results):
    """Adds products of `n` tiles of weights, the first of which is `tile`, to the sums at `out`; stores results of the
    last of `n_tiles`. Some tokens at a time: their sums stay in the nearest cache."""
    fresh = 1 if tile == 0 else 0
    for first in range(0, n_tokens, SOME):
        some, place = min(SOME, n_tokens - first), out + first * PAIR
        if tile + n == n_tiles:
            ask_for(results, first, some)
        call_function(
            multiply_code(), slab, slab + SLAB_TILES * TILE, n, x + first * x_stride, ROWS * x_stride, place,
            (some + ROWS - 1) // ROWS, fresh,
        )
        if tile + n == n_tiles:
            finish(results, out, 0, first, some)
