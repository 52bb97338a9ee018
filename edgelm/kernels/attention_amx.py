"""Attention of prompts through Intel's matrix unit: see `amx`.

A tile is some query heads that share a KV head, of some tokens in a row: its rows are (token, head), taken GROUP at a
time. For each block of positions keys and values are converted to pairs of bfloat16, once for all rows. Then for each
group there are scores, weights and weighted values: the unit works on the scores of the next group and the values of
the one before while the processor makes weights of scores.

Weights are 2 ** (score - m), with any m near the largest score so far: what is added up is rescaled only when a score
is larger than m by SLACK (Dao et al. 2022 rescale for each block). Values of positions that a row does not see are
multiplied with 0, so they must be finite; if they are not, nothing is computed, and the caller is told.

What is computed for a row depends on no other row. Knows nothing of how the work is divided.
"""

from __future__ import annotations

from edgelm.kernels import amx
from edgelm.kernels.abi import WORD
from edgelm.kernels.attention import BLOCK
from edgelm.kernels.attention_blocks import LOWEST, cap_scores, combined, queries_of
from edgelm.kernels.attention_layout import (
    DIM,
    GROUP,
    HEADS,
    HIGH,
    K_OFFSET,
    LOW,
    PAGE,
    SOFTCAP,
    V_DIM,
    V_OFFSET,
    head_bytes,
    k_stride,
    key_kind,
    limits,
    pages_of,
    v_stride,
    value_kind,
)
from edgelm.kernels.attention_tiles import BF16_PAIRS, all_finite, convert_pairs, rounded
from edgelm.kernels.emit import I16, I32x16, load_at, repeat
from edgelm.kernels.vector_math import emit_exp2_negative, emit_exp2_rougher
from edgelm.kernels.words import Value, function

ROWS_AT_ONCE = 2 * amx.ROWS  # a group
COLUMNS = 2 * amx.ROWS  # of a product, and what is added up in it at a time: 32 positions, or dimensions
PAIRS_LINE = 4 * PAGE  # bytes of a line of converted keys or values: pairs for 64 columns
SCORES_LINE = 4 * BLOCK + 64  # bytes of a row of scores, then weights: rows of a group in different places of the cache
SLACK = 8.0  # a power of two by which weights may exceed 1

# A tile: states of rows, scores of two groups, then by size of heads keys, values, queries, and values weighted so far.
LARGEST = 1024  # rows
STATE = 128  # bytes of a row's state: what it sees as in `attention_layout`, and
M, FACTOR, SUMS = 16, 20, 64  # float32: m; what is to be rescaled by; 16 sums of weights
STATES = 0
SCORES = STATES + STATE * LARGEST
SIZED = SCORES + ROWS_AT_ONCE * SCORES_LINE
TILE_BYTES = 1 << 20  # half of a second-level cache


def _whole(n, size):
    return (n + (size - 1)) // size * size


class _Layout:
    """Sizes and addresses of a tile, as values of the function that is being written."""

    def __init__(self, e, op, base) -> None:
        self.base, self.depth, self.width = base, _whole(e.load_i32(op + DIM), COLUMNS), v_stride(e, op)
        self.scores, self.keys = base + SCORES, base + SIZED
        self.page_keys = 2 * PAGE * self.depth  # bytes of a page's
        self.values = self.keys + BLOCK // PAGE * self.page_keys
        self.queries = self.values + 2 * BLOCK * _whole(self.width, PAGE)
        self.rows = e.min((base + TILE_BYTES - self.queries) // (2 * self.depth + 4 * self.width), LARGEST)
        self.rows = self.rows // ROWS_AT_ONCE * ROWS_AT_ONCE
        self.sums = self.queries + 2 * self.depth * self.rows

    def state(self, row):
        return self.base + STATES + STATE * row

    def query(self, row):
        """Of a multiple of amx.ROWS: rows lie in tiles of amx.DEPTH dimensions, as the unit reads them."""
        return self.queries + 2 * self.depth * row


@function
def rows_of_tile(e, op):
    return _Layout(e, op, e.word(0)).rows


# --- before the first block


@function
def begin_rows(e, op, env, base, token, n_tokens, first_head, n_heads):
    """Queries into the tile, rotated and scaled; what each row sees. Rows up to a whole group are like the last one."""
    at, query = _Layout(e, op, base), queries_of(e, op, env)
    n, line = n_tokens * n_heads, base + SCORES
    with e.loop(0, 4 * at.depth, 64) as i:
        e.store(line + i, e.vector(0.0))
    with e.loop(0, _whole(n, ROWS_AT_ONCE)) as r:
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


# --- keys and values


@function
def convert_keys(e, op, base, page, keys):
    """Those of a block's page, of a head whose keys are at `keys`."""
    at, n = _Layout(e, op, base), e.load_i32(op + DIM) // 2
    to = at.keys + at.page_keys * page
    convert_pairs(e, keys, 2 * PAGE, to, n, PAGE)
    with e.loop(PAIRS_LINE * n, 2 * PAGE * at.depth, 64) as i:
        e.store(to + i, e.vector(0.0))


@function
def clear_padding(e, m, n_lines, column, n):
    """Sets those of 16 columns to 0 that are not among the first n: what lies there may be infinite."""
    with e.when(n < column + 16), e.loop(0, n_lines) as i:
        at = m + PAIRS_LINE * i + 4 * column
        pairs = Value(e, load_at(e.b, at.llvm, I32x16))
        e.store(at, e.select(e.between(e.lanes_from(column), e.word(0), n), pairs, Value(e, repeat(I32x16, 0))))


@function
def convert_values(e, op, base, page, values, n_seen):
    """The first n_seen of a block's page. The others are 0. Returns whether all are finite."""
    at, n, finite = _Layout(e, op, base), (n_seen + 1) // 2, e.variable(1)
    with e.loop(0, at.width, PAGE) as c:
        to, width = at.values + 2 * BLOCK * c + PAGE // 2 * PAIRS_LINE * page, e.min(at.width - c, PAGE)
        convert_pairs(e, values + 2 * c, 2 * at.width, to, n, width)
        with e.when((n_seen % 2).is_(1)), e.loop(0, PAIRS_LINE, 64) as i:
            last = to + PAIRS_LINE * (n - 1) + i
            e.store(last, Value(e, load_at(e.b, last.llvm, I32x16)) & 0xFFFF)
        with e.loop(PAIRS_LINE * n, PAIRS_LINE * (PAGE // 2), 64) as i:
            e.store(to + i, e.vector(0.0))
        clear_padding(e, to, n, width - 16, e.load_i32(op + V_DIM) - c)
        finite.set(e.min(finite.get(), all_finite[BF16_PAIRS](e, to, n, width)))
    return finite.get()


# --- products


def _tile(e, n_vectors, x, x_rows, x_stride, x_step, m, steps, sums, stride, fresh):
    """32 rows and so many vectors of columns of `product`."""
    tiles = [(2 * r + c, sums + 16 * stride * r + 64 * c) for r in range(2) for c in range(n_vectors)]
    with e.choose(fresh.is_(0)) as (goes_on, begins):
        with goes_on:
            for tile, at in tiles:
                amx.load(e.b, tile, at.llvm, stride.llvm)
        with begins:
            for tile, _ in tiles:
                amx.zero(e.b, tile)
    with e.loop(0, steps) as i:
        for c in range(n_vectors):
            amx.load(e.b, 6 + c, (m + PAIRS_LINE * amx.ROWS * i + 64 * c).llvm, PAIRS_LINE)
        for r in range(2):
            amx.load(e.b, 4 + r, (x + x_rows * r + x_step * i).llvm, x_stride.llvm)
            for c in range(n_vectors):
                amx.multiply(e.b, 2 * r + c, 4 + r, 6 + c)
    for tile, at in tiles:
        amx.store(e.b, tile, at.llvm, stride.llvm)


@function
def product(e, x, x_rows, x_stride, x_step, m, m_page, steps, sums, stride, begin, end, fresh):
    """sums += x @ m for 32 rows and columns [begin, end), 32 numbers at a time; = if `fresh`.

    x: 16 rows, x_stride bytes apart, and x_rows bytes behind them 16 others; x_step bytes on the next numbers.
    m: lines of pairs for 64 columns, PAIRS_LINE bytes apart; m_page bytes on those for the next 64.
    """
    def tile(n_vectors, c):
        at = m + m_page * (c // PAGE) + 4 * (c % PAGE)
        _tile(e, n_vectors, x, x_rows, x_stride, x_step, at, steps, sums + 4 * c, stride, fresh)

    whole = begin + (end - begin) // COLUMNS * COLUMNS
    with e.loop(begin, whole, COLUMNS) as c:
        tile(2, c)
    with e.when(whole < end):
        tile(1, whole)


def columns_of(e, at, group, start):
    """[begin, end) of the columns of the block at `start` that a group sees, in whole steps."""
    low, high = (e.load_word(at.state(ROWS_AT_ONCE * group + row) + field) - start
                 for row, field in ((0, LOW), (ROWS_AT_ONCE - 1, HIGH)))
    return e.max(low, 0) // COLUMNS * COLUMNS, e.min(_whole(e.max(high, 0), COLUMNS), BLOCK)


def score(e, at, group, begin, end):
    """q·k of a group's rows with the columns [begin, end) of a block."""
    product(e, at.query(ROWS_AT_ONCE * group), amx.ROWS * 2 * at.depth, amx.LINE, amx.TILE, at.keys, at.page_keys,
            at.depth // amx.DEPTH, at.scores, SCORES_LINE, begin, end, 1)


def add_values(e, at, group, begin, end, fresh):
    """Adds p·v over the columns [begin, end) of a block; if it is the group's first, there is nothing to add to."""
    product(e, at.scores + 4 * begin, amx.ROWS * SCORES_LINE, SCORES_LINE, amx.LINE, at.values + PAIRS_LINE // 2 * begin,
            2 * BLOCK * PAGE, (end - begin) // amx.DEPTH, at.sums + 4 * at.width * ROWS_AT_ONCE * group, 4 * at.width, 0,
            at.width, fresh)


# --- weights


@function
def hide(e, base, group, first_state, scores, begin, end, start):
    """Scores of a group's columns [begin, end) to minus infinity where a row does not see them."""
    with e.loop(0, ROWS_AT_ONCE) as r:
        state, row = first_state + STATE * r, scores + SCORES_LINE * r
        low, high = e.load_word(state + LOW) - start, e.load_word(state + HIGH) - start
        for first, last in ((begin, e.min(low, end)), (e.max(e.max(high, 0) // 16 * 16, begin), end)):
            with e.loop(first, last, 16) as i:
                seen = e.between(e.lanes_from(i), low, high)
                e.store(row + 4 * i, e.select(seen, e.load(row + 4 * i), float("-inf")))


def grow(e, state, top, old):
    """The largest of a row's scores, the lanes of `top`, becomes its m. Returns m and the new sums of weights."""
    new = e.max(e.largest(top), old)
    factor = e.apply(emit_exp2_negative, e.vector(old - new))
    e.store(state + M, new)
    e.store(state + FACTOR, e.lane(factor))
    return e.vector(new), e.load(state + SUMS) * factor


def _any(e, lanes):
    return Value(e, e.b.icmp_unsigned("!=", e.b.bitcast(lanes.llvm, I16), I16(0)))


def _weigh(n: int):
    def write(e, scores, states, begin, end, column):
        """Scores of a group's rows [begin, end), of n columns from `column` on, to weights; adds up their sums."""
        with e.loop(begin, end) as r:
            row, state = scores + SCORES_LINE * r + 4 * column, states + STATE * r
            x = [e.load(row + 4 * i) for i in range(0, n, 16)]
            top = combined(e.max, x)
            e.store(state + FACTOR, e.lane(e.vector(1.0)))
            old = e.load_f32(state + M)
            m, total = e.variable(e.vector(old)), e.variable(e.load(state + SUMS))
            with e.when(_any(e, top > m.get() + SLACK)):
                for variable, value in zip((m, total), grow(e, state, top, old), strict=True):
                    variable.set(value)
            m, total = m.get(), total.get()
            weights = [e.apply(emit_exp2_rougher, score - m) for score in x]
            for i, pair in enumerate(zip(weights[::2], weights[1::2], strict=True)):
                e.store(row + 64 * i, rounded(e, *pair))
            e.store(state + SUMS, total + combined(lambda x, y: x + y, weights))

    write.__qualname__ = f"weigh_{n}"
    return function(write)


_WEIGH = {n: _weigh(n) for n in range(COLUMNS, BLOCK + 1, COLUMNS)}


@function
def weigh(e, op, base, group, begin, end, column, columns):
    at = _Layout(e, op, base)
    for n, write in _WEIGH.items():
        with e.when(columns.is_(n)):
            write(e, at.scores, at.state(ROWS_AT_ONCE * group), begin, end, column)


@function
def rescale(e, op, base, group):
    """What was added up for a group, where m has grown."""
    at = _Layout(e, op, base)
    with e.loop(ROWS_AT_ONCE * group, ROWS_AT_ONCE * (group + 1)) as r:
        factor = e.load_f32(at.state(r) + FACTOR)
        with e.when(factor.is_not(1.0)):
            sums, wide = at.sums + 4 * at.width * r, e.vector(factor)
            with e.loop(0, 4 * at.width, 64) as c:
                e.store(sums + c, e.load(sums + c) * wide)


# --- blocks


@function
def groups(e, op, base, first, last, start):
    """The block at `start` for groups [first, last), all of which see something of it."""
    at = _Layout(e, op, base)
    with e.loop(first, last) as group:
        begin, end = columns_of(e, at, group, start)
        score(e, at, group, begin, end)
        with e.when(e.load_f32(op + SOFTCAP) > 0.0), e.loop(0, ROWS_AT_ONCE) as r:
            cap_scores(e, at.scores + SCORES_LINE * r + 4 * begin, end - begin, op + SOFTCAP)
        state = at.state(ROWS_AT_ONCE * group)
        last_state = state + STATE * (ROWS_AT_ONCE - 1)
        sees = (e.load_word(last_state + LOW) <= start + begin) & (e.load_word(state + HIGH) >= start + end)
        with e.when(sees.is_(0)):
            hide(e, base, group, state, at.scores, begin, end, start)
        weigh(e, op, base, group, 0, ROWS_AT_ONCE, begin, end - begin)
        fresh = e.select(e.load_word(state + LOW) >= start, e.word(1), 0)
        with e.when(fresh.is_(0)):
            rescale(e, op, base, group)
        add_values(e, at, group, begin, end, fresh)


@function
def attend(e, op, env, base, token, n_tokens, kv_head, head, n_heads):
    """Query heads [head, head + n_heads) of a KV head, of tokens of one sequence. Returns 0 if it cannot be done."""
    at, n_rows, n_head = _Layout(e, op, base), n_tokens * n_heads, e.load_i32(op + HEADS)
    begin_rows(e, op, env, base, token, n_tokens, n_head * kv_head + head, n_heads)
    n_groups = (n_rows + (ROWS_AT_ONCE - 1)) // ROWS_AT_ONCE
    low, high = e.load_word(at.state(0) + LOW), e.load_word(at.state(n_rows - 1) + HIGH)
    all_low, all_high = e.load_word(at.state(n_rows - 1) + LOW), e.load_word(at.state(0) + HIGH)
    pages = pages_of(e, env, token, e.load_word(op + GROUP))
    k = e.load_word(op + K_OFFSET) + head_bytes(e, key_kind(e, op), k_stride(e, op)) * kv_head
    v = e.load_word(op + V_OFFSET) + head_bytes(e, value_kind(e, op), at.width) * kv_head
    start, done, first = e.variable(low // BLOCK * BLOCK), e.variable(1), e.variable(0)
    with e.repeat(lambda: (start.get() < high) & done.get().is_(1)):
        s = start.get()
        finite = e.variable(1)
        with e.loop(e.max(s, low // PAGE * PAGE), e.min(s + BLOCK, high), PAGE) as p:
            page = e.load_word(pages + WORD * (p // PAGE))
            convert_keys(e, op, base, (p - s) // PAGE, page + k)
            ok = convert_values(e, op, base, (p - s) // PAGE, page + v, e.min(high - p, PAGE))
            finite.set(e.min(finite.get(), ok))
        even = (all_low <= s) & (all_high >= e.min(s + BLOCK, high))
        done.set(e.select(even, 1, finite.get()))
        with e.repeat(lambda: e.load_word(at.state(ROWS_AT_ONCE * first.get() + ROWS_AT_ONCE - 1) + HIGH) <= s):
            first.set(first.get() + 1)
        last = e.variable(n_groups)
        with e.repeat(lambda: e.load_word(at.state(ROWS_AT_ONCE * (last.get() - 1)) + LOW) >= s + BLOCK):
            last.set(last.get() - 1)
        groups(e, op, base, first.get(), last.get(), s)
        start.set(s + BLOCK)
    return done.get()


@function
def finish(e, op, base, row, y):
    """y = values / sum of weights."""
    at, n = _Layout(e, op, base), e.load_i32(op + V_DIM)
    sums, whole = at.sums + 4 * at.width * row, n // 16 * 16
    factor = e.vector(1.0) / e.vector(e.sum(e.load(at.state(row) + SUMS)))
    with e.loop(0, whole, 16) as i:
        e.store(y + 4 * i, e.load(sums + 4 * i) * factor)
    with e.loop(whole, n) as i:
        e.store(y + 4 * i, e.lane(e.vector(e.load_f32(sums + 4 * i)) * factor))
