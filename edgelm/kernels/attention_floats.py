"""Attention with keys and values that are float32 or float16: q·k and p·v of a tile with a page.

Few rows multiply float16 where they lie; for many they are first made ready in the tile. Knows nothing of softmax.
"""

from __future__ import annotations

from contextlib import contextmanager

from edgelm.kernels.abi import WORD
from edgelm.kernels.attention import BLOCK, KINDS
from edgelm.kernels.attention_layout import (
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
    key_kind,
    v_stride,
    value_kind,
)
from edgelm.kernels.attention_tiles import (
    BF16_PAIRS,
    F16_FLOATS,
    F16_IN_PAIRS,
    F32_FLOATS,
    FIRST_OF_PAIR,
    NARROW_ROWS,
    ONE_BY_ONE,
    PAIRWISE,
    ROWS,
    SECOND_OF_PAIR,
    Form,
    all_finite,
    has_pairs,
    multiply,
)
from edgelm.kernels.words import function

PIECE = 24  # rows that are multiplied with as much of a page as one of them sees


def keys_in_pairs(e, op):
    """Whether q·k adds up pairs of bfloat16, on a machine that can."""
    return key_kind(e, op).is_(KINDS["f16"]) & (e.load_i32(op + DIM) % 2).is_(0)


def values_in_pairs(e, op):
    return value_kind(e, op).is_(KINDS["f16"])


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


@function
def float_scores(e, op, base, n_rows, page_start, n_seen, keys, scores, ahead):
    """`block_scores` for keys that are float32 or float16."""
    dim, half = e.load_i32(op + DIM), key_kind(e, op)
    line = e.select(half.is_(0), e.word(4 * PAGE), 2 * PAGE)
    queries, stride = base + QUERIES, 4 * dim
    narrow = e.select(n_seen > 16, e.word(32), 16)
    width = e.select((n_seen > 32) | (n_rows < NARROW_ROWS[0]), PAGE, narrow)
    at_a_time = e.select(e.load_word(base + STATES + HIGH) >= page_start + PAGE, n_rows, PIECE)

    def direct(form):
        multiply(e, width, form, n_rows, dim // form.numbers, queries, stride, keys, line, scores, 4 * BLOCK, 1, ahead)

    def from_halves(form, made, convert):
        at_once = PAGE * made.numbers  # as many dimensions as stay in the nearest cache
        with e.choose(n_rows < CONVERT_ROWS) as (few, many):
            with few:
                direct(form)
            with many, e.loop(0, dim, at_once) as d:
                n = e.min(dim - d, at_once) // form.numbers
                convert(e, keys + line * d, line, base + CONVERTED, n, width)
                fresh = e.select(d.is_(0), e.word(1), 0)
                with each_rows(e, n_rows, at_a_time) as (r, rows):
                    seen = e.load_word(base + STATES + STATE * (r + rows - 1) + HIGH) - page_start
                    with each_columns(e, e.min(seen, PAGE), PAGE) as (c, columns):
                        multiply(e, columns, made, rows, n, queries + stride * r + 4 // form.numbers * d, stride,
                                 base + CONVERTED + 4 * c, 4 * PAGE, scores + 4 * BLOCK * r + 4 * c, 4 * BLOCK, fresh,
                                 ahead)

    if has_pairs(e):
        with e.when(keys_in_pairs(e, op)):
            from_halves(*PAIRWISE)
        half = e.select(keys_in_pairs(e, op), -1, half)
    with e.when(half.is_(KINDS["f32"])):
        direct(F32_FLOATS)
    with e.when(half.is_(KINDS["f16"])):
        from_halves(*ONE_BY_ONE)


def _weigh(form: Form):
    def write(e, base, first_row, n_rows, width, weights, page_start, m, m_stride, values, line, sums, stride, ahead):
        """Adds the values `m` of a page to the sums of some rows. `weights` is where the page's of row first_row are.

        Rows are tokens in order: what all of them see lies between where the last begins and where the first ends. In
        pairs, a position whose neighbour a row does not see is taken by itself, from the values as they lie in a page.
        """
        state, n = base + STATES + STATE * first_row, form.numbers

        def seen_by(r):
            low = e.max(e.load_word(state + STATE * r + LOW) - page_start, 0)
            return low, e.max(e.min(e.load_word(state + STATE * r + HIGH) - page_start, PAGE), 0)

        def steps(low, high):
            return (low, high) if n == 1 else ((low + 1) // n, high // n)

        def add(r, rows, low, high):
            with e.when(low < high):
                multiply(e, width, form, rows, high - low, weights + 4 * BLOCK * r + 4 * low, 4 * BLOCK,
                         m + m_stride * form.n_lines * low, m_stride, sums + stride * r, stride, 0, ahead)

        def add_single(r, position, form, condition):
            with e.when(condition):
                multiply(e, width, form, 1, 1, weights + 4 * BLOCK * r + 4 * (position // n), 4 * BLOCK,
                         values + line * position, line, sums + stride * r, stride, 0, ahead)

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


weigh = {form: _weigh(form) for form in (F32_FLOATS, F16_FLOATS, BF16_PAIRS, F16_IN_PAIRS)}


@function
def float_values(e, op, base, n_rows, page, page_start, values, ahead, to_sums):
    """`page_values` for values that are float32, or float16 and few rows."""
    n_columns, half = v_stride(e, op), value_kind(e, op)
    size = e.select(half.is_(KINDS["f32"]), e.word(4), 2)
    line, stride = size * n_columns, 4 * n_columns
    at_a_time = e.select(all_see(e, base, n_rows, page_start, page_start + PAGE), n_rows, 6)
    direct, _, _ = PAIRWISE if has_pairs(e) else ONE_BY_ONE

    def add(form, c, width):
        weights, m, sums = base + WEIGHTS + 4 // form.numbers * PAGE * page, values + size * c, to_sums + 4 * c
        with each_rows(e, n_rows, at_a_time) as (r, rows):
            weigh[form](e, base, r, rows, width, weights + 4 * BLOCK * r, page_start, m, line, m, line,
                        sums + stride * r, stride, ahead + PAGE * size * c)

    with each_columns(e, n_columns, PAGE) as (c, width):
        with e.when(half.is_(KINDS["f32"])):
            add(F32_FLOATS, c, width)
        with e.when(half.is_(KINDS["f16"])):
            add(direct, c, width)


@function
def half_values(e, op, base, n_rows, start, begin, end, pages, values, to_sums):
    """`block_values` for values that are float16 and many rows: they are made ready for all of them.

    Weights of positions that a row does not see are 0, and 0 times a finite value changes nothing. So some rows at a
    time are multiplied with all that one of them sees. If there is infinity or NaN, each with what it sees itself.
    """
    n_columns, states = v_stride(e, op), base + STATES
    _, made, convert = PAIRWISE if has_pairs(e) else ONE_BY_ONE
    n, line, stride, made_line = made.numbers, 2 * n_columns, 4 * n_columns, 4 * PAGE
    low = e.max(e.load_word(states + LOW), begin)
    high = e.min(e.load_word(states + STATE * (n_rows - 1) + HIGH), end)
    even = all_see(e, base, n_rows, start, start + BLOCK)
    with each_columns(e, n_columns, PAGE // 2 * n) as (c, width):
        finite, sums = e.variable(1), to_sums + 4 * c
        with e.loop(begin, end, PAGE) as at:
            first, stop = e.max(low - at, 0) // n, (e.min(high - at, PAGE) + (n - 1)) // n
            to = base + CONVERTED + made_line * ((at - start) // n + first)
            page = e.load_word(pages + WORD * (at // PAGE)) + values + 2 * c
            convert(e, page + line * n * first, line, to, stop - first, width)
            with e.when(even.is_(0)):
                finite.set(e.min(finite.get(), all_finite[made](e, to, stop - first, width)))
        with e.choose(finite.get().is_not(0)) as (together, apart):
            with together, each_rows(e, n_rows, e.select(even, n_rows, ROWS[0])) as (r, rows):
                first = e.max(e.load_word(states + STATE * r + LOW) - start, 0) // n
                seen = e.min(e.load_word(states + STATE * (r + rows - 1) + HIGH) - start, BLOCK)
                stop = (e.max(seen, 0) + (n - 1)) // n
                multiply(e, width, made, rows, stop - first, base + WEIGHTS + 4 * BLOCK * r + 4 * first, 4 * BLOCK,
                         base + CONVERTED + made_line * first, made_line, sums + stride * r, stride, 1, base)
            with apart:
                with e.loop(0, n_rows) as r, e.loop(0, 4 * width, 64) as i:
                    e.store(sums + stride * r + i, e.vector(0.0))
                with e.loop(begin, end, PAGE) as at, each_rows(e, n_rows, ROWS[0]) as (r, rows):
                    page = e.load_word(pages + WORD * (at // PAGE)) + values + 2 * c
                    weigh[made](e, base, r, rows, width, base + WEIGHTS + 4 * BLOCK * r + 4 // n * (at - start), at,
                                base + CONVERTED + made_line * ((at - start) // n), made_line, page, line,
                                sums + stride * r, stride, base)
