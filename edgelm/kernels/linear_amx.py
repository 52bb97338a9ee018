"""Matrix products by the matrix unit: what `linear_kernels` does for many tokens where there is one.

All tokens of a unit of work, up to TOKENS, go over a slab of weights that were made bfloat16 for them. Activations are
more than stays in a near cache: so some units are done side by side, for a part of the inputs after the other.
"""

from __future__ import annotations

from numba import njit

from edgelm.kernels.abi import WORD, Env
from edgelm.kernels.amx import DEPTH, ROWS, TILE
from edgelm.kernels.amx_tiles import configure, has_unit, multiply_code, release, write_line
from edgelm.kernels.functions import Code, call_function, scratch
from edgelm.kernels.linear_unit import GROUP_UNITS, RESULTS, X_STRIDE, X, aim, finish, groups_of, n_items, tokens_of
from edgelm.kernels.matrix_unit import TOKENS
from edgelm.kernels.simd import load_f32, load_i64, splat_f32, store
from edgelm.kernels.slab_tiles import PAIR

BATCH = 8  # units side by side
SLAB = 16  # tiles of a group that are made bfloat16 at a time: those of two stay in the first-level cache
NEAR = 1 << 20  # bytes of activations that stay in the second-level cache
OUT_BYTES = TOKENS * PAIR
OUT_SCRATCH, SLAB_SCRATCH, POWERS_SCRATCH, REST_SCRATCH = BATCH * OUT_BYTES, 2 * SLAB * TILE, 4 * TOKENS, 2 * 4 * DEPTH
_WORKSPACE, _TILES = WORD * Env.WORKSPACE, WORD * Env.TILES
_PAIRS, _PAIR_TILES, _BLOCKS, _UNIT_BYTES = (
    WORD * field for field in (Code.PAIRS, Code.PAIR_TILES, Code.BLOCKS, Code.UNIT_BYTES)
)


@njit
def in_tiles(env, count):
    """Whether activations of `count` tokens are made bfloat16 for the matrix unit."""
    least = load_i64(env + _TILES)
    return has_unit() and least != 0 and count >= least


@njit
def write_tiles(x, n_cols, first, stride, token):
    """Writes a token's activations, float32 at `x`, as bfloat16. first, stride: of where records would be."""
    own = first + token // ROWS * (ROWS * stride) + token % ROWS * 64
    whole = n_cols // DEPTH
    for i in range(whole):
        write_line(x + 4 * DEPTH * i, own + TILE * i, 0)
    if n_cols % (2 * DEPTH) != 0:
        rest = scratch(REST_SCRATCH)
        for i in range(0, REST_SCRATCH, 64):
            store(rest + i, splat_f32(0.0))
        for i in range(whole * DEPTH, n_cols):
            store(rest + 4 * (i - whole * DEPTH), load_f32(x + 4 * i))
        for i in range(whole, (n_cols + 2 * DEPTH - 1) // (2 * DEPTH) * 2):
            write_line(rest + 4 * DEPTH * (i - whole), own + TILE * i, 0)


@njit
def goes_through_unit(code, op, env):
    """Whether the units of a row are done by the matrix unit: then its activations are `in_tiles`."""
    return load_i64(code + _PAIRS) != 0 and in_tiles(env, n_items(op, env))


@njit
def units_by_tiles(code, op, env, begin, end):
    """The body of a kernel, as `linear_kernels.units`."""
    x_stride, x = load_i64(op + X_STRIDE), load_i64(env + _WORKSPACE) + load_i64(op + X)
    powers, out = scratch(POWERS_SCRATCH), scratch(OUT_SCRATCH)
    for i in range(0, POWERS_SCRATCH, 64):
        store(powers + i, splat_f32(1.0))
    results = scratch(RESULTS)
    configure(0, 0, 0)
    unit = begin
    while unit < end:
        chunk, first_token, n_tokens = tokens_of(op, env, unit)
        n = 1
        while n < min(BATCH, end - unit) and tokens_of(op, env, unit + n)[0] == chunk:
            n += 1
        sums_of(code, op, unit, n, x + first_token * x_stride, x_stride, (n_tokens + ROWS - 1) // ROWS, out)
        for i in range(n):
            aim(results, op, env, unit + i, first_token, powers)
            finish(results, out + i * OUT_BYTES, 0, 0, n_tokens)
        unit += n
    release(0, 0, 0)


@njit
def sums_of(code, op, unit, n_units, x, x_stride, token_tiles, out):
    """Sums of `n_units` units from `unit` on with tiles of 16 tokens from `x` on, to `out`."""
    unpack, unit_bytes = load_i64(code + _PAIRS), load_i64(code + _UNIT_BYTES)
    block_tiles = load_i64(code + _PAIR_TILES)
    unit_tiles, slab = load_i64(code + _BLOCKS) * block_tiles, scratch(SLAB_SCRATCH)
    n_tiles = load_i64(op + GROUP_UNITS) * unit_tiles
    at_once = max(1, NEAR // (token_tiles * TILE * SLAB)) * SLAB
    for begin in range(0, n_tiles, at_once):
        for i in range(n_units):
            first, second, _ = groups_of(op, unit + i)
            for tile in range(begin, min(begin + at_once, n_tiles), SLAB):
                n = min(SLAB, n_tiles - tile)
                offset = tile // unit_tiles * unit_bytes
                call_function(unpack, first + offset, n // block_tiles, slab)
                call_function(unpack, second + offset, n // block_tiles, slab + SLAB * TILE)
                fresh = 1 if tile == 0 else 0
                call_function(
                    multiply_code(), slab, slab + SLAB * TILE, n, x + tile * TILE, ROWS * x_stride,
                    out + i * OUT_BYTES, token_tiles, fresh,
                )
