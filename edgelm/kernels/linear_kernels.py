"""Matrix products of packed weights with activation records: one kernel for each format, from one body.

A unit of work is up to UNITS_PER tokens times two groups of 16 rows: neighbours of one matrix, or the same group of the
gate and the up projection, whose activation and product are then part of it. Few tokens are multiplied straight from
the packed weights. More: eight blocks at a time are unpacked to a slab on the stack, and all tokens go over it; then
those go over it again that have remainders there, listed once for all units with the same tokens.

`linear` builds the rows of the op table for these kernels.
"""

from __future__ import annotations

from numba import float32, int8, int64, njit

from edgelm.kernels.abi import WORD, Env, Row
from edgelm.kernels.block_tile import ROW
from edgelm.kernels.float_tiles import float_linear_code
from edgelm.kernels.functions import Code, call_function, scratch
from edgelm.kernels.int16_tiles import SLAB_BYTES, int16_linear_code
from edgelm.kernels.linear import Arg
from edgelm.kernels.records import ENTRY, FLAG, MAX_TOKENS, RECORD
from edgelm.kernels.simd import (
    add_f32,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    load_u8,
    mul_f32,
    prefetch_to_write,
    splat_f32,
    store,
)
from edgelm.kernels.slab_tiles import PAIR
from edgelm.kernels.tiles import MAX_SLAB_BYTES, SLAB, linear_code
from edgelm.kernels.vector_math import gelu_f32, silu_f32

SLAB_SCRATCH, OUT_SCRATCH = 2 * max(MAX_SLAB_BYTES, SLAB_BYTES), MAX_TOKENS * PAIR
POWERS_SCRATCH = 4 * MAX_TOKENS
LISTED = 256  # blocks of which lists are kept: more are listed again for each unit
ENTRIES = WORD * (LISTED + 1)  # where in the lists, after the addresses at which those of each slab begin
OWN = WORD + MAX_TOKENS  # the tokens of one block
LISTS_SCRATCH = ENTRIES + ENTRY * LISTED * (MAX_TOKENS // 2) + SLAB * OWN
(
    _WEIGHTS, _SECOND, _GROUP_STRIDE, _N_GROUPS, _N_UNITS, _X, _X_STRIDE, _Y, _Y_STRIDE, _N_ROWS, _BIAS, _RESIDUAL,
    _RESIDUAL_STRIDE, _ACTIVATION,
) = (WORD * (Row.ARGS + arg) for arg in Arg)  # fmt: skip
_WORKSPACE, _LOGITS, _COUNT, _UNITS, _UNITS_PER = (
    WORD * field for field in (Env.WORKSPACE, Env.LOGITS, Row.COUNT, Row.UNITS, Row.UNITS_PER)
)
(
    _DIRECT, _DIRECT_TOKENS, _DIRECT_MOST, _TILES, _TILE_TOKENS, _UNPACK, _BLOCKS, _UNIT_BYTES, _RECORD_BYTES,
    _SLAB_BLOCKS, _SLAB_BYTES, _FACTOR, _REST,
) = (
    WORD * field
    for field in (
        Code.DIRECT, Code.DIRECT_TOKENS, Code.DIRECT_MOST, Code.TILES, Code.TILE_TOKENS, Code.UNPACK, Code.BLOCKS,
        Code.UNIT_BYTES, Code.RECORD_BYTES, Code.SLAB_BLOCKS, Code.SLAB_BYTES, Code.FACTOR, Code.REST,
    )
)  # fmt: skip


# Where results go, int64 each: address of the first token's, bytes from one token's to the next, rows that are left,
# bias and residual of these (0: none), bytes from one token's residual to the next, factors of sums, activation or 0.
_Y_STEP, _LEFT, _BIASES, _RESIDUALS, _RESIDUAL_STEP, _POWERS, _GATED = (WORD * i for i in range(1, 8))
_RESULTS = WORD * 8


@njit
def list_remainders(records, stride, n_tokens, n_blocks, lists):
    """For each slab of records which blocks of which tokens have a remainder, as `records.ENTRY` says, in order.

    lists: addresses, int64, of where the entries of each slab begin and the last ones end; then the entries.
    """
    entry, tokens = lists + ENTRIES, lists + LISTS_SCRATCH - SLAB * OWN
    store(lists, entry)
    for slab in range((n_blocks + SLAB - 1) // SLAB):
        n = min(SLAB, n_blocks - slab * SLAB)
        for i in range(n):
            store(tokens + i * OWN, 0)
        for t in range(n_tokens):
            for i in range(n):
                if load_i32(records + t * stride + (slab * SLAB + i) * RECORD + FLAG) != 0:
                    own = tokens + i * OWN
                    count = load_i64(own)
                    store(own, count + 1)
                    store(own + WORD + count, int8(t))
        for i in range(n):
            own = tokens + i * OWN
            count = load_i64(own)
            for k in range(0, count, 2):
                store(entry, int8(i))
                store(entry + 1, int8(load_u8(own + WORD + k)))
                store(entry + 2, int8(load_u8(own + WORD + min(k + 1, count - 1))))
                entry += ENTRY
        store(lists + (slab + 1) * WORD, entry)


@njit
def products(code, first, second, n_units, records, stride, n_tokens, slab, out, rests, lists, known, step, results):
    """Sums of two groups at `first` and `second` with `n_tokens` records, as (token, 2, 16) float32 at `out`.

    rests: room for as many; lists: of remainders, if `known` they are there; step: from these groups to the next;
    results: where they go, as `finish` makes them of the sums after each tile of the last slab. What it stores to is
    asked for before that tile: it is in no near cache, and each line would be waited for.
    """
    if n_tokens <= load_i64(code + _DIRECT_MOST):
        t = 0
        for size in range(0, 32, 8):
            direct, tokens = load_i64(code + _DIRECT + size), load_i64(code + _DIRECT_TOKENS + size)
            while t + tokens <= n_tokens:
                record, place = records + t * stride, out + t * PAIR
                call_function(direct, first, second, n_units, record, stride, place, first + step, second + step)
                t += tokens
        finish(results, out, 0, 0, n_tokens)
        return
    zero = splat_f32(0.0)
    for i in range(0, n_tokens * PAIR, ROW):
        store(out + i, zero)
    unit_blocks, unit_bytes = load_i64(code + _BLOCKS), load_i64(code + _UNIT_BYTES)
    unpack, slab_blocks = load_i64(code + _UNPACK), load_i64(code + _SLAB_BLOCKS)
    slab_bytes, record_bytes = load_i64(code + _SLAB_BYTES), load_i64(code + _RECORD_BYTES)
    n_blocks, group_bytes, rest = n_units * unit_blocks, n_units * unit_bytes, load_i64(code + _REST)
    if rest != 0 and n_blocks <= LISTED:
        if not known:
            list_remainders(records, stride, n_tokens, n_blocks, lists)
        if load_i64(lists) == load_i64(lists + (n_blocks + SLAB - 1) // SLAB * WORD):
            rest = 0
    if rest != 0:
        for i in range(0, n_tokens * PAIR, ROW):
            store(rests + i, zero)
    if unpack == 0:  # equal pieces: while one is worked on, as much of the next is fetched
        n_slabs = (n_blocks + slab_blocks - 1) // slab_blocks
        slab_blocks = (n_blocks + n_slabs - 1) // n_slabs
    block = 0
    while block < n_blocks:
        n = min(slab_blocks, n_blocks - block)
        offset = block // unit_blocks * unit_bytes
        low, high = first + offset, second + offset
        ahead = n * unit_bytes if block + n < n_blocks else step - offset
        next_low, next_high = low + ahead, high + ahead
        if unpack != 0:
            call_function(unpack, low, n, slab, first + group_bytes, first + step)
            call_function(unpack, high, n, slab + slab_bytes, second + group_bytes, second + step)
            low, high = slab, slab + slab_bytes
        if rest != 0:
            listed = block % LISTED
            if listed == 0 and n_blocks > LISTED:
                some = min(LISTED, n_blocks - block)
                list_remainders(records + block * record_bytes, stride, n_tokens, some, lists)
            own, record = lists + listed // SLAB * WORD, records + stride // 2 + block * record_bytes
            call_function(rest, low, high, load_i64(own), load_i64(own + WORD), record, stride, rests)
        t = 0
        for size in range(0, 32, 8):
            tile, tokens = load_i64(code + _TILES + size), load_i64(code + _TILE_TOKENS + size)
            while t + tokens <= n_tokens:
                if block + n == n_blocks:
                    ask_for(results, t, tokens)
                record = records + t * stride + block * record_bytes
                call_function(tile, low, high, n, record, stride, out + t * PAIR, next_low, next_high)
                if block + n == n_blocks:
                    finish(results, out, rests if rest != 0 else 0, t, tokens)
                t += tokens
        block += n


@njit
def ask_for(results, first, n_tokens):
    """Asks for what `finish` will store to."""
    y, y_stride = load_i64(results), load_i64(results + _Y_STEP)
    both = load_i64(results + _GATED) == 0 and load_i64(results + _LEFT) > 16
    for t in range(first, first + n_tokens):
        prefetch_to_write(y + t * y_stride)
        if both:
            prefetch_to_write(y + t * y_stride + ROW)


@njit
def finish(results, out, rests, first, n_tokens):
    """Stores what becomes of the sums at `out`, plus those at `rests` (0: none), of some tokens.

    results: where to, `_RESULTS`. What most tokens need has a loop of its own: tiles wait for it.
    """
    y_stride, left = load_i64(results + _Y_STEP), load_i64(results + _LEFT)
    bias, residual_stride = load_i64(results + _BIASES), load_i64(results + _RESIDUAL_STEP)
    y, residual = load_i64(results) + first * y_stride, load_i64(results + _RESIDUALS)
    powers, activation = load_i64(results + _POWERS), load_i64(results + _GATED)
    if activation != 0:
        for t in range(first, first + n_tokens):
            gate, up = both_sums(out, rests, powers, t)
            put(mul_f32(silu_f32(gate) if activation == 1 else gelu_f32(gate), up), left, y, 0, 0)
            y += y_stride
    elif left >= 32:
        for t in range(first, first + n_tokens):
            low, high = both_sums(out, rests, powers, t)
            if bias != 0:
                low, high = add_f32(low, load_f32x16(bias)), add_f32(high, load_f32x16(bias + ROW))
            if residual != 0:
                r = residual + t * residual_stride
                low, high = add_f32(low, load_f32x16(r)), add_f32(high, load_f32x16(r + ROW))
            store(y, low)
            store(y + ROW, high)
            y += y_stride
    else:
        for t in range(first, first + n_tokens):
            low, high = both_sums(out, rests, powers, t)
            r = residual + t * residual_stride if residual != 0 else 0
            put(low, left, y, bias, r)
            if left > 16:
                put(high, left - 16, y + ROW, bias + ROW if bias != 0 else 0, r + ROW if r != 0 else 0)
            y += y_stride


@njit
def both_sums(out, rests, powers, t):
    """Sums of a token with both groups of rows, in full."""
    low, high = load_f32x16(out + t * PAIR), load_f32x16(out + t * PAIR + ROW)
    if rests != 0:
        low = add_f32(low, load_f32x16(rests + t * PAIR))
        high = add_f32(high, load_f32x16(rests + t * PAIR + ROW))
    factor = splat_f32(load_f32(powers + 4 * t))
    return mul_f32(low, factor), mul_f32(high, factor)


@njit
def put(value, n, y, bias, residual):
    """Stores the first `n` of 16 results, plus 16 float32 at `bias` and at `residual` (0: none), to `y`."""
    if n >= 16:
        if bias != 0:
            value = add_f32(value, load_f32x16(bias))
        if residual != 0:
            value = add_f32(value, load_f32x16(residual))
        store(y, value)
        return
    rest = scratch(64)
    store(rest, value)
    for i in range(0, 4 * n, 4):
        single = load_f32(rest + i)
        if bias != 0:
            single += load_f32(bias + i)
        if residual != 0:
            single += load_f32(residual + i)
        store(y + i, single)


@njit
def units(code, op, env, begin, end):
    """The body of a kernel: units `begin` to `end` of the operation `op`. code: address of a `tiles.Code`."""
    workspace, n_all = load_i64(env + _WORKSPACE), load_i64(env + load_i64(op + _COUNT) * WORD)
    units_per_chunk, chunk_tokens = load_i64(op + _UNITS), load_i64(op + _UNITS_PER)
    weights, up = load_i64(op + _WEIGHTS), load_i64(op + _SECOND)
    stride, n_groups, n_units = load_i64(op + _GROUP_STRIDE), load_i64(op + _N_GROUPS), load_i64(op + _N_UNITS)
    n_rows, bias, activation = load_i64(op + _N_ROWS), load_i64(op + _BIAS), load_i64(op + _ACTIVATION)
    x_stride, y_stride = load_i64(op + _X_STRIDE), load_i64(op + _Y_STRIDE)
    x, y = workspace + load_i64(op + _X), load_i64(op + _Y)
    y = load_i64(env + _LOGITS) - 1 - y if y < 0 else workspace + y
    residual, residual_stride = load_i64(op + _RESIDUAL), load_i64(op + _RESIDUAL_STRIDE)
    residual = residual + workspace if residual >= 0 else 0
    slab, out, rests, lists = scratch(SLAB_SCRATCH), scratch(OUT_SCRATCH), scratch(OUT_SCRATCH), scratch(LISTS_SCRATCH)
    listed = -1  # chunk of tokens that `lists` are of
    results = scratch(_RESULTS)
    store(results + _Y_STEP, y_stride)
    store(results + _RESIDUAL_STEP, residual_stride)
    store(results + _GATED, activation if up != 0 else 0)
    powers, power, in_units = scratch(POWERS_SCRATCH), load_f32(code + _FACTOR), load_i64(code + _REST) != 0
    store(results + _POWERS, powers)
    for unit in range(begin, end):
        chunk = unit // units_per_chunk
        group = unit - chunk * units_per_chunk
        first_token = chunk * chunk_tokens
        n_tokens = min(chunk_tokens, n_all - first_token)
        if up != 0:
            first, second = weights + group * stride, up + group * stride
        else:
            group *= 2
            first = weights + group * stride
            second = first + stride if group + 1 < n_groups else first
        record = x + first_token * x_stride
        step = 0 if unit + 1 == end else second - first + stride if up == 0 else stride
        known, listed = listed == chunk, chunk
        if not known:
            for t in range(n_tokens):
                own_unit = load_f32(record + (t + 1) * x_stride - RECORD) if in_units else float32(1.0)
                store(powers + 4 * t, power * own_unit)
        column = group * ROW
        store(results, int64(y + first_token * y_stride + column))
        store(results + _LEFT, int64(n_rows - group * 16))
        store(results + _BIASES, int64(bias + column if bias != 0 else 0))
        store(results + _RESIDUALS, int64(residual + first_token * residual_stride + column if residual != 0 else 0))
        products(
            code, first, second, n_units, record, x_stride, n_tokens, slab, out, rests, lists, known, step, results
        )


def linear_f32(op, env, begin, end):
    units(float_linear_code("F32"), op, env, begin, end)


def linear_f16(op, env, begin, end):
    units(float_linear_code("F16"), op, env, begin, end)


def linear_bf16(op, env, begin, end):
    units(float_linear_code("BF16"), op, env, begin, end)


def linear_int12(op, env, begin, end):
    units(int16_linear_code(), op, env, begin, end)


def linear_q4_0(op, env, begin, end):
    units(linear_code("Q4_0"), op, env, begin, end)


def linear_q4_1(op, env, begin, end):
    units(linear_code("Q4_1"), op, env, begin, end)


def linear_q5_0(op, env, begin, end):
    units(linear_code("Q5_0"), op, env, begin, end)


def linear_q5_1(op, env, begin, end):
    units(linear_code("Q5_1"), op, env, begin, end)


def linear_q8_0(op, env, begin, end):
    units(linear_code("Q8_0"), op, env, begin, end)


def linear_q2_k(op, env, begin, end):
    units(linear_code("Q2_K"), op, env, begin, end)


def linear_q3_k(op, env, begin, end):
    units(linear_code("Q3_K"), op, env, begin, end)


def linear_q4_k(op, env, begin, end):
    units(linear_code("Q4_K"), op, env, begin, end)


def linear_q5_k(op, env, begin, end):
    units(linear_code("Q5_K"), op, env, begin, end)


def linear_q6_k(op, env, begin, end):
    units(linear_code("Q6_K"), op, env, begin, end)


def linear_iq4_nl(op, env, begin, end):
    units(linear_code("IQ4_NL"), op, env, begin, end)


def linear_iq4_xs(op, env, begin, end):
    units(linear_code("IQ4_XS"), op, env, begin, end)


def linear_mxfp4(op, env, begin, end):
    units(linear_code("MXFP4"), op, env, begin, end)


def linear_int8(op, env, begin, end):
    units(linear_code("INT8"), op, env, begin, end)
