"""Matrix products of packed weights with activation records: one kernel for each format, from one body.

A unit of work is up to UNITS_PER tokens times two groups of 16 rows: neighbours of one matrix, or the same group of the
gate and the up projection, whose activation and product are then part of it. Few tokens are multiplied straight from
the packed weights. More: some blocks at a time are unpacked to a slab on the stack, unless they are floats; those
tokens go over it first that have remainders there, listed once for all units with the same tokens, and then all.
Many, where there is a matrix unit, go through that: `linear_amx`.

`linear` builds the rows of the op table for these kernels.
"""

from __future__ import annotations

from numba import float32, int8, int32, njit

from edgelm.kernels.abi import WORD, Env
from edgelm.kernels.block_tile import ROW
from edgelm.kernels.float_tiles import float_linear_code
from edgelm.kernels.functions import Code, call_function, scratch
from edgelm.kernels.int16_tiles import SLAB_BYTES, int16_linear_code
from edgelm.kernels.linear_amx import through_unit
from edgelm.kernels.linear_unit import (
    GROUP_UNITS,
    RESULTS,
    X_STRIDE,
    X,
    aim,
    ask_for,
    finish,
    groups_of,
    tokens_of,
)
from edgelm.kernels.records import ENTRY, FLAG, MAX_BLOCKS, MAX_TOKENS, RECORD
from edgelm.kernels.simd import load_f32, load_i32, load_i64, load_u8, splat_f32, store
from edgelm.kernels.slab_tiles import PAIR
from edgelm.kernels.tiles import MAX_SLAB_BYTES, SLAB, linear_code
from edgelm.kernels.units import UNITS
from edgelm.kernels.weight_layout import FLOATS

SLAB_SCRATCH, OUT_SCRATCH = 2 * max(MAX_SLAB_BYTES, SLAB_BYTES), MAX_TOKENS * PAIR
POWERS_SCRATCH = 4 * MAX_TOKENS
LISTED = 256  # blocks of which lists are kept: more are listed again for each unit
ENTRIES = WORD * (LISTED + 1)  # where in the lists, after the addresses at which those of each slab begin
OWN = WORD + MAX_TOKENS  # the tokens of one block
LISTS_SCRATCH = max(ENTRIES + ENTRY * LISTED * (MAX_TOKENS // 2) + SLAB * OWN, WORD + 4 * (MAX_BLOCKS + 1))
_WORKSPACE = WORD * Env.WORKSPACE
(
    _DIRECT, _DIRECT_TOKENS, _DIRECT_MOST, _TILES, _TILE_TOKENS, _UNPACK, _BLOCKS, _UNIT_BYTES, _RECORD_BYTES,
    _SLAB_BLOCKS, _SLAB_BYTES, _FACTOR, _REST, _DIRECT_LISTS,
) = (
    WORD * field
    for field in (
        Code.DIRECT, Code.DIRECT_TOKENS, Code.DIRECT_MOST, Code.TILES, Code.TILE_TOKENS, Code.UNPACK, Code.BLOCKS,
        Code.UNIT_BYTES, Code.RECORD_BYTES, Code.SLAB_BLOCKS, Code.SLAB_BYTES, Code.FACTOR, Code.REST,
        Code.DIRECT_LISTS,
    )
)  # fmt: skip


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
def list_blocks(records, stride, n_tokens, n_blocks, blocks):
    """Which blocks have a remainder in any of a few records: how many, int64, and then each, int32."""
    n = 0
    for i in range(n_blocks):
        flag = int32(0)
        for t in range(n_tokens):
            flag |= load_i32(records + t * stride + i * RECORD + FLAG)
        store(blocks + WORD + 4 * n, int32(i))
        n += flag != 0
    store(blocks, n)


@njit
def direct(code, first, second, n_units, records, stride, n_tokens, out, lists, known, step):
    """`products` of few tokens, straight from the packed weights."""
    if load_i64(code + _DIRECT_LISTS) != 0 and not known:
        list_blocks(records, stride, n_tokens, n_units * load_i64(code + _BLOCKS), lists)
    t = 0
    for size in range(0, 32, 8):
        function, tokens = load_i64(code + _DIRECT + size), load_i64(code + _DIRECT_TOKENS + size)
        while t + tokens <= n_tokens:
            record, place = records + t * stride, out + t * PAIR
            call_function(function, first, second, n_units, record, stride, place, lists, first + step, second + step)
            t += tokens


@njit
def products(code, first, second, n_units, records, stride, n_tokens, slab, out, rests, lists, known, step, results):
    """Sums of two groups at `first` and `second` with `n_tokens` records, as (token, 2, 16) float32 at `out`.

    rests: room for as many; lists: of remainders, if `known` they are there; step: from these groups to the next;
    results: where they go, as `finish` makes them of the sums after each tile of the last slab. What it stores to is
    asked for before that tile: it is in no near cache, and each line would be waited for.
    """
    if n_tokens <= load_i64(code + _DIRECT_MOST):
        direct(code, first, second, n_units, records, stride, n_tokens, out, lists, known, step)
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
def units(code, op, env, begin, end):
    """The body of a kernel: units `begin` to `end` of the operation `op`. code: address of a `Code`."""
    if through_unit(code, op, env, begin, end):
        return
    n_units, x_stride = load_i64(op + GROUP_UNITS), load_i64(op + X_STRIDE)
    x = load_i64(env + _WORKSPACE) + load_i64(op + X)
    slab, out, rests, lists = scratch(SLAB_SCRATCH), scratch(OUT_SCRATCH), scratch(OUT_SCRATCH), scratch(LISTS_SCRATCH)
    listed_chunk = -1  # of tokens: that `lists` are of
    results, powers = scratch(RESULTS), scratch(POWERS_SCRATCH)
    power, in_units = load_f32(code + _FACTOR), load_i64(code + _REST) != 0
    for unit in range(begin, end):
        chunk, first_token, n_tokens = tokens_of(op, env, unit)
        first, second, step = groups_of(op, unit)
        if unit + 1 == end:
            step = 0
        record = x + first_token * x_stride
        known, listed_chunk = listed_chunk == chunk, chunk
        if not known:
            for t in range(n_tokens):
                own_unit = load_f32(record + (t + 1) * x_stride - RECORD) if in_units else float32(1.0)
                store(powers + 4 * t, power * own_unit)
        aim(results, op, env, unit, first_token, powers)
        products(
            code, first, second, n_units, record, x_stride, n_tokens, slab, out, rests, lists, known, step, results
        )


def linear_int12(op, env, begin, end):
    units(int16_linear_code(), op, env, begin, end)


def _kernel(code, name):
    """The kernel of a format; code: an intrinsic that gives the address of its `Code`, by its name."""

    def kernel(op, env, begin, end):
        units(code(name), op, env, begin, end)

    return kernel


_CODES = {**dict.fromkeys(FLOATS, float_linear_code), **dict.fromkeys(UNITS, linear_code)}
globals().update((f"linear_{name.lower()}", _kernel(code, name)) for name, code in _CODES.items())
