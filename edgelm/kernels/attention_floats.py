"""Attention with keys and values that are floats: q·k and p·v of a tile with a page.

Few rows multiply float16 where they lie; for many they are first made ready in the tile. Pairs of bfloat16 lie ready.
Knows nothing of softmax.
"""

from __future__ import annotations

from contextlib import contextmanager

from edgelm.kernels.abi import WORD
from edgelm.kernels.attention import BLOCK, KINDS
from edgelm.kernels.attention_layout import (
    AHEAD_OF,
    CONVERT_ROWS,
    CONVERTED,
    DIM,
    HIGH,
    LOW,
    PAGE,
    QUERIES,
    STATE,
    STATES,
    WEIGHTS,
    k_stride,
    key_kind,
    v_stride,
    value_kind,
)
from edgelm.kernels.attention_tiles import (
    F16_FLOATS,
    F32_FLOATS,
    FIRST_OF_PAIR,
    NARROW_ROWS,
    PAIRS,
    PAIRS_LINE,
    ROWS,
    SECOND_OF_PAIR,
    Form,
    all_finite,
    convert,
    multiply,
)
from edgelm.kernels.words import function

PIECE = 24  # rows that are multiplied with as much of a page as one of them sees
DIMS_AT_ONCE = 2 * PAGE  # of keys in pairs, whose lines stay in the nearest cache


def keys_in_pairs(e, op):
    """Whether q·k adds up pairs of bfloat16, for which queries are rounded."""
    return key_kind(e, op).is_(KINDS["bf16"])


def values_in_pairs(e, op):
    return value_kind(e, op).is_(KINDS["bf16"])


@contextmanager
def each_rows(e, n_rows, at_a_time):
    """(first, number) of rows, at_a_time of them or what is left."""
    row = e.variable(0)
    with e.repeat(lambda: row.get() < n_rows):
        r = row.get()
        rows = e.min(n_rows - r, at_a_time)
        yield r, rows
        row.set(r + rows)


@contextmanager
def each_columns(e, n_columns, most):
    """(first, number) of columns: `most` at a time, 64 or 32, or 32 or 16, a few more than there are."""
    column = e.variable(0)
    with e.repeat(lambda: column.get() < n_columns):
        c = column.get()
        left = n_columns - c
        width = e.select(left > most - 16, e.word(most), e.select(left > 16, e.word(32), 16))
        yield c, width
        column.set(c + width)


def all_see(e, base, n_rows, begin, end):
    """Whether all rows see all positions [begin, end)."""
    first, last = base + STATES, base + STATES + STATE * (n_rows - 1)
    return (e.load_word(last + LOW) <= begin) & (e.load_word(first + HIGH) >= end)


def seen_of_page(e, base, first_row, last_row, page_start):
    """(first, last + 1) of a page's positions that some of the rows [first_row, last_row] see."""
    first, last = (base + STATES + STATE * row for row in (first_row, last_row))
    low = e.max(e.load_word(first + LOW) - page_start, 0)
    return low, e.max(e.min(e.load_word(last + HIGH) - page_start, PAGE), 0)


# --- scores


def score_seen(e, form, base, n_rows, page_start, n, queries, stride, keys, scores, d, behind):
    """Products of n steps of each row's query, from dimension d on, with those of 64 columns that it may see."""
    at_a_time = e.select(e.load_word(base + STATES + HIGH) >= page_start + PAGE, n_rows, PIECE)
    fresh = e.select(d.is_(0), e.word(1), 0)
    with each_rows(e, n_rows, at_a_time) as (r, rows):
        seen = e.load_word(base + STATES + STATE * (r + rows - 1) + HIGH) - page_start
        with each_columns(e, e.min(seen, PAGE), PAGE) as (c, columns):
            multiply(e, columns, form, rows, n, queries + stride * r, stride, keys + 4 * c, 4 * PAGE,
                     scores + 4 * BLOCK * r + 4 * c, 4 * BLOCK, fresh, base + AHEAD_OF, behind)


@function
def pair_scores(e, op, base, n_rows, page_start, keys, scores):
    """`float_scores` for keys of bfloat16."""
    dim, factor = k_stride(e, op), PAIRS.factor(e)
    with e.loop(0, dim, DIMS_AT_ONCE) as d:
        at = PAIRS_LINE // 2 * d
        score_seen(e, PAIRS, base, n_rows, page_start, e.min(dim - d, DIMS_AT_ONCE) // 2,
                   base + QUERIES + factor // 2 * d, 4 * dim, keys + at, scores, d, at)


@function
def float_scores(e, op, base, n_rows, page_start, n_seen, keys, scores):
    """`block_scores` for keys that are floats."""
    dim, kind = e.load_i32(op + DIM), key_kind(e, op)
    queries, stride = base + QUERIES, 4 * dim

    def direct(form):
        narrow = e.select(n_seen > 16, e.word(32), 16)
        width = e.select((n_seen > 32) | (n_rows < NARROW_ROWS[0]), PAGE, narrow)
        multiply(e, width, form, n_rows, dim, queries, stride, keys, form.size * PAGE, scores, 4 * BLOCK, 1,
                 base + AHEAD_OF, 0)

    def converted():
        with e.loop(0, dim, PAGE) as d:  # as many dimensions as stay in the nearest cache
            n = e.min(dim - d, PAGE)
            convert(e, keys + 2 * PAGE * d, 2 * PAGE, base + CONVERTED, n, PAGE)
            score_seen(e, F32_FLOATS, base, n_rows, page_start, n, queries + 4 * d, stride, base + CONVERTED, scores, d,
                       0)

    with e.when(kind.is_(KINDS["bf16"])):
        pair_scores(e, op, base, n_rows, page_start, keys, scores)
    with e.when(kind.is_(KINDS["f32"])):
        direct(F32_FLOATS)
    with e.when(kind.is_(KINDS["f16"])), e.choose(n_rows < CONVERT_ROWS) as (few, many):
        with few:
            direct(F16_FLOATS)
        with many:
            converted()


# --- weighted values


def _weigh(form: Form):
    def write(e, base, first_row, n_rows, width, weights, page_start, m, m_stride, sums, stride, behind):
        """Adds the values `m` of a page to the sums of some rows. `weights` is where the page's of row first_row are.

        Rows are tokens in order: what all of them see lies between where the last begins and where the first ends. In
        pairs, a position whose neighbour a row does not see is taken by itself.
        """
        n, factor, ahead = form.numbers, form.factor(e), base + AHEAD_OF

        def seen_by(r):
            return seen_of_page(e, base, first_row + r, first_row + r, page_start)

        def steps(low, high):
            return (low, high) if n == 1 else ((low + 1) // n, high // n)

        def add(r, rows, low, high, form=form):
            with e.when(low < high):
                multiply(e, width, form, rows, high - low, weights + 4 * BLOCK * r + factor * low, 4 * BLOCK,
                         m + m_stride * low, m_stride, sums + stride * r, stride, 0, ahead, behind)

        def add_single(r, position, form, condition):
            with e.when(condition):
                add(r, 1, position // n, position // n + 1, form)

        low, high = steps(seen_by(n_rows - 1)[0], seen_by(e.word(0))[1])
        nothing = low >= high
        with e.loop(0, n_rows) as r:
            begin, end = seen_by(r)
            if n == 2:
                add_single(r, begin, SECOND_OF_PAIR, (begin < end) & (begin % 2).is_(1))
            begin, end = steps(begin, end)
            add(r, 1, begin, e.select(nothing, end, low))
        add(e.word(0), n_rows, low, high)
        with e.loop(0, n_rows) as r:
            begin, end = seen_by(r)
            with e.when(low < high):
                add(r, 1, high, steps(begin, end)[1])
            if n == 2:
                add_single(r, end - 1, FIRST_OF_PAIR, (begin < end) & (end % 2).is_(1))

    write.__qualname__ = f"weigh_{form.name}"
    return function(write)


weigh = {form: _weigh(form) for form in (F32_FLOATS, F16_FLOATS, PAIRS)}


def weights_of(e, form, base, page, r):
    """Where the weights are that a row has for the block's first or second page."""
    return base + WEIGHTS + 4 * BLOCK * r + form.factor(e) // form.numbers * PAGE * page


@function
def pair_values(e, base, n_rows, n_columns, page, page_start, values, to_sums):
    """`float_values` for values of bfloat16.

    Weights of positions that a row does not see are 0, and 0 times a finite value changes nothing. So some rows at a
    time are multiplied with all that one of them sees. If there is infinity or NaN, each with what it sees itself.
    """
    stride, even = 4 * n_columns, all_see(e, base, n_rows, page_start, page_start + PAGE)

    def seen(first_row, last_row):
        low, high = seen_of_page(e, base, first_row, last_row, page_start)
        return low // 2, (high + 1) // 2

    with each_columns(e, n_columns, PAGE) as (c, width):
        chunk, sums = c // PAGE * PAGE, to_sums + 4 * c  # 64 columns, or what is left, lie in the same lines
        line, behind = 4 * e.min(n_columns - chunk, PAGE), 2 * PAGE * chunk
        m, finite = values + behind + 4 * (c - chunk), e.variable(1)
        with e.when(even.is_(0)):
            first, stop = seen(e.word(0), n_rows - 1)
            finite.set(all_finite[PAIRS](e, m + line * first, line, stop - first, width))
        with e.choose(finite.get().is_not(0)) as (together, apart):
            with together, each_rows(e, n_rows, e.select(even, n_rows, ROWS[0])) as (r, rows):
                first, stop = seen(r, r + rows - 1)
                with e.when(first < stop):
                    multiply(e, width, PAIRS, rows, stop - first,
                             weights_of(e, PAIRS, base, page, r) + PAIRS.factor(e) * first, 4 * BLOCK,
                             m + line * first, line, sums + stride * r, stride, 0, base + AHEAD_OF, behind)
            with apart, each_rows(e, n_rows, ROWS[0]) as (r, rows):
                weigh[PAIRS](e, base, r, rows, width, weights_of(e, PAIRS, base, page, r), page_start, m, line,
                             sums + stride * r, stride, behind)


@function
def float_values(e, op, base, n_rows, page, page_start, values, to_sums):
    """`page_values` for values that are floats; those of float16 for few rows."""
    n_columns, kind = v_stride(e, op), value_kind(e, op)
    stride, at_a_time = 4 * n_columns, e.select(all_see(e, base, n_rows, page_start, page_start + PAGE), n_rows, 6)

    def add(form):
        with each_columns(e, n_columns, PAGE) as (c, width), each_rows(e, n_rows, at_a_time) as (r, rows):
            weigh[form](e, base, r, rows, width, weights_of(e, form, base, page, r), page_start,
                        values + form.size * c, form.size * n_columns, to_sums + stride * r + 4 * c, stride,
                        PAGE * form.size * c)

    with e.when(kind.is_(KINDS["bf16"])):
        pair_values(e, base, n_rows, n_columns, page, page_start, values, to_sums)
    with e.when(kind.is_(KINDS["f32"])):
        add(F32_FLOATS)
    with e.when(kind.is_(KINDS["f16"])):
        add(F16_FLOATS)


@function
def half_values(e, op, base, n_rows, start, begin, end, pages, values, to_sums):
    """`block_values` for values that are float16 and many rows: they are made ready for all of them.

    As in `pair_values`, some rows at a time are multiplied with all that one of them sees, if all of it is finite.
    """
    n_columns, states, ahead = v_stride(e, op), base + STATES, base + AHEAD_OF
    line, stride, made_line = 2 * n_columns, 4 * n_columns, 4 * PAGE
    low = e.max(e.load_word(states + LOW), begin)
    high = e.min(e.load_word(states + STATE * (n_rows - 1) + HIGH), end)
    even = all_see(e, base, n_rows, start, start + BLOCK)
    with each_columns(e, n_columns, PAGE // 2) as (c, width):
        finite, sums = e.variable(1), to_sums + 4 * c
        with e.loop(begin, end, PAGE) as at:
            first, stop = e.max(low - at, 0), e.min(high - at, PAGE)
            to = base + CONVERTED + made_line * (at - start + first)
            page = e.load_word(pages + WORD * (at // PAGE)) + values + 2 * c
            convert(e, page + line * first, line, to, stop - first, width)
            with e.when(even.is_(0)):
                finite.set(e.min(finite.get(), all_finite[F32_FLOATS](e, to, made_line, stop - first, width)))
        with e.choose(finite.get().is_not(0)) as (together, apart):
            with together, each_rows(e, n_rows, e.select(even, n_rows, ROWS[0])) as (r, rows):
                first = e.max(e.load_word(states + STATE * r + LOW) - start, 0)
                stop = e.max(e.min(e.load_word(states + STATE * (r + rows - 1) + HIGH) - start, BLOCK), 0)
                weights, m = base + WEIGHTS + 4 * BLOCK * r + 4 * first, base + CONVERTED + made_line * first
                multiply(e, width, F32_FLOATS, rows, stop - first, weights, 4 * BLOCK, m, made_line, sums + stride * r,
                         stride, 1, ahead, 0)
            with apart:
                with e.loop(0, n_rows) as r, e.loop(0, 4 * width, 64) as i:
                    e.store(sums + stride * r + i, e.vector(0.0))
                with e.loop(begin, end, PAGE) as at, each_rows(e, n_rows, ROWS[0]) as (r, rows):
                    weigh[F32_FLOATS](e, base, r, rows, width, base + WEIGHTS + 4 * BLOCK * r + 4 * (at - start), at,
                                      base + CONVERTED + made_line * (at - start), made_line, sums + stride * r, stride,
                                      0)
