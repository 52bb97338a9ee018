"""Attention with keys and values that are float32 or float16: q·k and p·v of a tile with a page.

Few rows multiply float16 where they lie; for many they are first made ready in the tile. Knows nothing of softmax.
"""

from __future__ import annotations

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
    SUMS,
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
    SECOND_OF_PAIR,
    Form,
    has_pairs,
    multiply,
)
from edgelm.kernels.words import function


def keys_in_pairs(e, op):
    """Whether q·k adds up pairs of bfloat16, on a machine that can."""
    return key_kind(e, op).is_(KINDS["f16"]) & (e.load_i32(op + DIM) % 2).is_(0)


def values_in_pairs(e, op):
    return value_kind(e, op).is_(KINDS["f16"])


@function
def float_scores(e, op, base, n_rows, n_seen, keys, scores, ahead):
    """`block_scores` for keys that are float32 or float16."""
    dim, half = e.load_i32(op + DIM), key_kind(e, op)
    line = e.select(half.is_(0), e.word(4 * PAGE), 2 * PAGE)
    queries, stride = base + QUERIES, 4 * dim
    narrow = e.select(n_seen > 16, e.word(32), 16)
    width = e.select((n_seen > 32) | (n_rows < NARROW_ROWS[0]), PAGE, narrow)

    def direct(form):
        multiply(e, width, form, n_rows, dim // form.numbers, queries, stride, keys, line, scores, 4 * BLOCK, 1, ahead)

    def from_halves(form, made, convert):
        with e.choose(n_rows < CONVERT_ROWS) as (few, many):
            with few:
                direct(form)
            with many, e.loop(0, dim, PAGE) as d:  # as many dimensions at a time as stay in the nearest cache
                n = e.min(dim - d, PAGE) // form.numbers
                convert(e, keys + line * d, line, base + CONVERTED, n, width)
                fresh = e.select(d.is_(0), e.word(1), 0)
                multiply(e, width, made, n_rows, n, queries + 4 // form.numbers * d, stride, base + CONVERTED,
                         4 * PAGE, scores, 4 * BLOCK, fresh, ahead)

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
def float_values(e, op, base, n_rows, page, page_start, values, ahead):
    """`block_values` for values that are float32 or float16."""
    n_columns, half = v_stride(e, op), value_kind(e, op)
    size = e.select(half.is_(KINDS["f32"]), e.word(4), 2)
    line, last = size * n_columns, base + STATES + STATE * (n_rows - 1)
    low = e.max(e.load_word(base + STATES + LOW) - page_start, 0)
    high = e.min(e.load_word(last + HIGH) - page_start, PAGE)
    even = (e.load_word(last + LOW) <= page_start) & (e.load_word(base + STATES + HIGH) >= page_start + PAGE)
    at_a_time, stride = e.select(even, n_rows, 6), 4 * n_columns
    direct, made, convert = PAIRWISE if has_pairs(e) else ONE_BY_ONE

    def add(form, c, width, m, m_stride):
        row, weights = e.variable(0), base + WEIGHTS + 4 // form.numbers * PAGE * page
        with e.repeat(lambda: row.get() < n_rows):
            r = row.get()
            weigh[form](e, base, r, e.min(n_rows - r, at_a_time), width, weights + 4 * BLOCK * r, page_start, m,
                        m_stride, values + size * c, line, base + SUMS + stride * r + 4 * c, stride,
                        ahead + PAGE * size * c)
            row.set(r + at_a_time)

    column = e.variable(0)
    with e.repeat(lambda: column.get() < n_columns):
        c = column.get()
        width = e.select(n_columns - c >= 64, e.word(64), e.select(n_columns - c >= 32, e.word(32), 16))
        with e.when(half.is_(KINDS["f32"])):
            add(F32_FLOATS, c, width, values + 4 * c, line)
        with e.when(half.is_(KINDS["f16"])), e.choose(n_rows < CONVERT_ROWS) as (few, many):
            with few:
                add(direct, c, width, values + 2 * c, line)
            with many:
                first = (low + (made.numbers - 1)) // made.numbers
                convert(e, values + 2 * c + line * made.numbers * first, line, base + CONVERTED + 4 * PAGE * first,
                        high // made.numbers - first, width)
                add(made, c, width, base + CONVERTED, 4 * PAGE)
        column.set(c + width)
