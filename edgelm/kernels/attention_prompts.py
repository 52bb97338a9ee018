"""Attention of prompts through Intel's matrix unit: a tile over all its positions; `attention_amx` has what a tile is.

Only keys and values of bfloat16, where Env.TILES says that the unit is used. If values that some rows of a tile do not
see are not finite, nothing is computed, and the caller is told.

Knows nothing of how the work is divided; see `attention_kernels`.
"""

from __future__ import annotations

from edgelm.kernels import amx
from edgelm.kernels.abi import WORD
from edgelm.kernels.attention import BLOCK, SPLIT_TOKENS
from edgelm.kernels.attention_amx import (
    COLUMNS,
    GROUP_ROWS,
    SCORES,
    SCORES_LINE,
    STATE,
    SUMS,
    Layout,
    M,
    add_values,
    copy_keys,
    copy_values,
    hide,
    rescale,
    score,
    weigh,
)
from edgelm.kernels.attention_blocks import LOWEST, cap_scores, queries_of, write_result
from edgelm.kernels.attention_floats import keys_in_pairs, values_in_pairs
from edgelm.kernels.attention_layout import (
    CONVERT_ROWS,
    GROUP,
    HEADS,
    HIGH,
    K_OFFSET,
    LOW,
    N_TOKENS,
    PAGE,
    SEQUENCES,
    SOFTCAP,
    TILES,
    V_OFFSET,
    head_bytes,
    k_stride,
    key_kind,
    limits,
    pages_of,
    value_kind,
    whole,
)
from edgelm.kernels.attention_tiles import rounded
from edgelm.kernels.emit import I1
from edgelm.kernels.words import Value, function

# --- what goes through the unit


def through_unit(e, op, env):
    """Whether tokens of prompts go through the matrix unit: `attend_prompts`."""
    if not amx.has_tiles(e.context):
        return Value(e, I1(0))
    least = e.load_word(env + TILES)
    enough = e.load_word(env + N_TOKENS) >= e.max(least, SPLIT_TOKENS + 1)
    return (least > 0) & enough & keys_in_pairs(e, op) & values_in_pairs(e, op)


@function
def is_prompt(e, op, env, token):
    """Whether a token is one of so many of its sequence in this call that copying keys for them is worth while.

    The same for each of them, whichever are worked on at a time.
    """
    sequences, n_tokens = e.load_word(env + SEQUENCES), e.load_word(env + N_TOKENS)
    least = (e.word(CONVERT_ROWS - 1) + e.load_i32(op + HEADS)) // e.load_i32(op + HEADS)

    def same(i):
        return e.load_i32(sequences + 4 * i).is_(e.load_i32(sequences + 4 * token))

    begin, end = e.variable(token), e.variable(token + 1)
    with e.repeat(lambda: (begin.get() > 0) & (token - begin.get() < least) & same(e.max(begin.get() - 1, 0))):
        begin.set(begin.get() - 1)
    with e.repeat(lambda: (end.get() < n_tokens) & (end.get() - token < least) & same(e.min(end.get(), n_tokens - 1))):
        end.set(end.get() + 1)
    return e.select(end.get() - begin.get() >= least, e.word(1), 0)


@function
def rows_of_tile(e, op):
    return Layout(e, op, e.word(0)).rows


# --- before the first block


@function
def begin_rows(e, op, env, base, token, n_tokens, first_head, n_heads):
    """Queries into the tile, rotated and scaled; what each row sees. Rows up to a whole group are like the last one."""
    at, query = Layout(e, op, base), queries_of(e, op, env)
    n, line = n_tokens * n_heads, base + SCORES
    with e.loop(0, 4 * at.depth, 64) as i:
        e.store(line + i, e.vector(0.0))
    with e.loop(0, whole(n, GROUP_ROWS)) as r:
        own = e.min(r, n - 1)
        of = token + own // n_heads
        low, high = limits(e, op, env, of)
        state = at.state(r)
        query(of, first_head + own % n_heads, line)
        to = at.query(r // amx.ROWS * amx.ROWS) + amx.LINE * (r % amx.ROWS)
        with e.loop(0, at.depth, amx.DEPTH) as d:
            two = (e.load(line + 4 * d + i) for i in (0, 64))
            e.store(to + amx.TILE // amx.DEPTH * d, rounded(e, *two))
        e.store(state + LOW, low)
        e.store(state + HIGH, high)
        e.store(state + M, e.lane(e.vector(LOWEST)))
        e.store(state + SUMS, e.vector(0.0))


# --- blocks


@function
def copy(e, op, base, pages, keys, values, start, low, high):
    """Of the block at `start`, the pages that positions [low, high) lie in. Returns whether values are finite."""
    finite = e.variable(1)
    with e.loop(low // PAGE * PAGE, high, PAGE) as p:
        page = e.load_word(pages + WORD * (p // PAGE))
        copy_keys(e, op, base, (p - start) // PAGE, page + keys)
        ok = copy_values(e, op, base, (p - start) // PAGE, page + values, e.min(high - p, PAGE))
        finite.set(e.min(finite.get(), ok))
    return finite.get()


@function
def attend_block(e, op, base, group, start):
    """The block at `start`, for a group that sees something of it."""
    at = Layout(e, op, base)
    first, last = at.state(GROUP_ROWS * group), at.state(GROUP_ROWS * group + (GROUP_ROWS - 1))
    begin = e.max(e.load_word(first + LOW) - start, 0) // COLUMNS * COLUMNS
    end = e.min(whole(e.load_word(last + HIGH) - start, COLUMNS), BLOCK)
    score(e, at, group, begin, end)
    with e.when(e.load_f32(op + SOFTCAP) > 0.0), e.loop(0, GROUP_ROWS) as r:
        cap_scores(e, at.scores + SCORES_LINE * r + 4 * begin, end - begin, op + SOFTCAP)
    all_see = (e.load_word(last + LOW) <= start + begin) & (e.load_word(first + HIGH) >= start + end)
    with e.when(all_see.is_(0)):
        hide(e, first, at.scores, begin, end, start)
    weigh(e, at, group, begin, end)
    fresh = e.select(e.load_word(first + LOW) >= start, e.word(1), 0)
    with e.when(fresh.is_(0)):
        rescale(e, op, base, group)
    add_values(e, at, group, begin, end, fresh)


@function
def attend(e, op, env, base, token, n_tokens, kv_head, head, n_heads):
    """Query heads [head, head + n_heads) of a KV head, of tokens of one sequence. Returns 0 if it cannot be done."""
    at, n_rows, n_head = Layout(e, op, base), n_tokens * n_heads, e.load_i32(op + HEADS)
    begin_rows(e, op, env, base, token, n_tokens, n_head * kv_head + head, n_heads)
    (low, all_high), (all_low, high) = (
        (e.load_word(at.state(row) + LOW), e.load_word(at.state(row) + HIGH)) for row in (e.word(0), n_rows - 1)
    )
    pages = pages_of(e, env, token, e.load_word(op + GROUP))
    keys = e.load_word(op + K_OFFSET) + head_bytes(e, key_kind(e, op), k_stride(e, op)) * kv_head
    values = e.load_word(op + V_OFFSET) + head_bytes(e, value_kind(e, op), at.width) * kv_head
    block, possible = e.variable(low // BLOCK * BLOCK), e.variable(1)
    with e.repeat(lambda: (block.get() < high) & possible.get().is_(1)):
        start, end = block.get(), e.min(block.get() + BLOCK, high)
        finite = copy(e, op, base, pages, keys, values, start, e.max(start, low), end)
        possible.set(e.select((all_low <= start) & (all_high >= end), 1, finite))
        with e.loop(0, (n_rows + (GROUP_ROWS - 1)) // GROUP_ROWS) as group:
            state = at.state(GROUP_ROWS * group)
            sees_more = e.load_word(state + STATE * (GROUP_ROWS - 1) + HIGH) > start
            with e.when(sees_more & (e.load_word(state + LOW) < end)):
                attend_block(e, op, base, group, start)
        block.set(start + BLOCK)
    return possible.get()


@function
def finish(e, op, base, row, y):
    """y = values / sum of weights."""
    at = Layout(e, op, base)
    write_result(e, op, at.sums + 4 * at.width * row, e.sum(e.load(at.state(row) + SUMS)), y)
