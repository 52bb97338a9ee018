"""What attention through Intel's matrix unit does with one block of positions: see `amx`, and `attention_prompts`.

A tile is some query heads that share a KV head, of some tokens in a row: its rows are (token, head), as many as there
are. Keys and values of a block, pairs of bfloat16, are copied to it, once for all rows. Then, GROUP_ROWS at a time,
there are scores, weights and weighted values. (To have the unit work on one group while weights are made of the scores
of another is no faster: beside it the processor multiplies vectors at half of its speed.)

Weights are 2 ** (score - m), with any m near the largest score so far: what is added up is rescaled only when a score
is larger than m by SLACK (Dao et al. 2022 rescale for each block). What they are divided by in the end is the sum of
the weights as they were rounded. Values of positions that a row does not see are multiplied with 0, so they must be
finite.

What is computed for a row depends on no other row. Knows nothing of how the work is divided.
"""

from __future__ import annotations

from edgelm.kernels import amx
from edgelm.kernels.attention import BLOCK
from edgelm.kernels.attention_blocks import combined, hide_row
from edgelm.kernels.attention_layout import DIM, HIGH, LOW, PAGE, V_DIM, k_stride, v_stride, whole
from edgelm.kernels.attention_tiles import LOWER, PAIRS, PAIRS_LINE, add_products, all_finite, load_pairs, rounded
from edgelm.kernels.emit import I16, I32x16, repeat
from edgelm.kernels.vector_math import emit_exp2_negative, emit_exp2_rougher
from edgelm.kernels.words import Value, function

GROUP_ROWS = 2 * amx.ROWS
COLUMNS = 2 * amx.ROWS  # of a product, and what is added up in it at a time: 32 positions, or dimensions
SCORES_LINE = 4 * BLOCK + 64  # bytes of a row of scores, then weights: rows of a group in different places of the cache
TWO_ONES = 0x3F803F80  # of bfloat16
SLACK = 8.0  # a power of two by which weights may exceed 1

# A tile: states of rows, scores of a group; then, by size of heads, keys, values, queries, and values weighted so far.
LARGEST = 1024  # rows
STATE = 128  # bytes of a row's state: what it sees as in `attention_layout`, and
M, FACTOR, SUMS = 16, 20, 64  # float32: m; what is to be rescaled by; 16 sums of weights
STATES = 0
SCORES = STATES + STATE * LARGEST
SIZED = SCORES + GROUP_ROWS * SCORES_LINE
TILE_BYTES = 1 << 20  # half of a second-level cache


class Layout:
    """Sizes and addresses of a tile, as values of the function that is being written."""

    def __init__(self, e, op, base) -> None:
        self.base, self.depth, self.width = base, whole(e.load_i32(op + DIM), COLUMNS), v_stride(e, op)
        self.scores, self.keys = base + SCORES, base + SIZED
        self.page_keys = 2 * PAGE * self.depth  # bytes of a page's
        self.values = self.keys + BLOCK // PAGE * self.page_keys
        self.queries = self.values + 2 * BLOCK * whole(self.width, PAGE)
        self.rows = e.min((base + TILE_BYTES - self.queries) // (2 * self.depth + 4 * self.width), LARGEST)
        self.rows = self.rows // GROUP_ROWS * GROUP_ROWS
        self.sums = self.queries + 2 * self.depth * self.rows

    def state(self, row):
        return self.base + STATES + STATE * row

    def query(self, row):
        """Of a multiple of amx.ROWS: rows lie in tiles of amx.DEPTH dimensions, as the unit reads them."""
        return self.queries + 2 * self.depth * row


# --- keys and values


@function
def copy(e, source, line, to, n_lines, width):
    """Lines of pairs for `width` columns, `line` bytes apart, to lines for 64."""
    with e.loop(0, n_lines) as i, e.loop(0, 4 * width, 64) as c:
        e.store(to + PAIRS_LINE * i + c, e.load(source + line * i + c))


@function
def copy_keys(e, op, base, page, keys):
    """Those of a block's page, of a head whose keys are at `keys`."""
    at, n = Layout(e, op, base), k_stride(e, op) // 2
    to = at.keys + at.page_keys * page
    copy(e, keys, e.word(PAIRS_LINE), to, n, PAGE)
    with e.loop(PAIRS_LINE * n, 2 * PAGE * at.depth, 64) as i:
        e.store(to + i, e.vector(0.0))


@function
def clear_padding(e, m, n_lines, column, n):
    """Sets those of 16 columns to 0 that are not among the first n: what lies there may be infinite."""
    with e.when(n < column + 16), e.loop(0, n_lines) as i:
        at = m + PAIRS_LINE * i + 4 * column
        own = e.between(e.lanes_from(column), e.word(0), n)
        e.store(at, e.select(own, load_pairs(e, at), Value(e, repeat(I32x16, 0))))


@function
def copy_values(e, op, base, page, values, n_seen):
    """The first n_seen of a block's page. The others are 0. Returns whether all are finite."""
    at, n, finite = Layout(e, op, base), (n_seen + 1) // 2, e.variable(1)
    with e.loop(0, at.width, PAGE) as c:
        to, width = at.values + 2 * BLOCK * c + PAGE // 2 * PAIRS_LINE * page, e.min(at.width - c, PAGE)
        copy(e, values + 2 * PAGE * c, 4 * width, to, n, width)
        with e.when((n_seen % 2).is_(1)), e.loop(0, PAIRS_LINE, 64) as i:
            last = to + PAIRS_LINE * (n - 1) + i
            e.store(last, load_pairs(e, last) & LOWER)
        with e.loop(PAIRS_LINE * n, PAIRS_LINE * (PAGE // 2), 64) as i:
            e.store(to + i, e.vector(0.0))
        clear_padding(e, to, n, width - 16, e.load_i32(op + V_DIM) - c)
        finite.set(e.min(finite.get(), all_finite[PAIRS](e, to, e.word(PAIRS_LINE), n, width)))
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

    rest = begin + (end - begin) // COLUMNS * COLUMNS
    with e.loop(begin, rest, COLUMNS) as c:
        tile(2, c)
    with e.when(rest < end):
        tile(1, rest)


def score(e, at, group, begin, end):
    """q·k of a group's rows with the columns [begin, end) of a block."""
    product(e, at.query(GROUP_ROWS * group), amx.ROWS * 2 * at.depth, amx.LINE, amx.TILE, at.keys, at.page_keys,
            at.depth // amx.DEPTH, at.scores, SCORES_LINE, begin, end, 1)


def add_values(e, at, group, begin, end, fresh):
    """Adds p·v over the columns [begin, end) of a block; if it is the group's first, there is nothing to add to."""
    product(e, at.scores + 4 * begin, amx.ROWS * SCORES_LINE, SCORES_LINE, amx.LINE,
            at.values + PAIRS_LINE // 2 * begin, 2 * BLOCK * PAGE, (end - begin) // amx.DEPTH,
            at.sums + 4 * at.width * GROUP_ROWS * group, 4 * at.width, 0, at.width, fresh)


# --- weights


@function
def hide(e, first_state, scores, begin, end, start):
    """Scores of a group's columns [begin, end) to minus infinity where a row does not see them."""
    with e.loop(0, GROUP_ROWS) as r:
        state, row = first_state + STATE * r, scores + SCORES_LINE * r
        hide_row(e, row, begin, end, e.load_word(state + LOW) - start, e.load_word(state + HIGH) - start)


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
    def write(e, scores, states):
        """Scores of a group's rows, n columns of each, to weights, whose sums are added up."""
        ones = Value(e, repeat(I32x16, TWO_ONES))
        with e.loop(0, GROUP_ROWS) as r:
            row, state = scores + SCORES_LINE * r, states + STATE * r
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
                both = rounded(e, *pair)
                e.store(row + 64 * i, both)
                total = add_products(e, both, ones, total)
            e.store(state + SUMS, total)

    write.__qualname__ = f"weigh_{n}"
    return function(write)


_WEIGH = {n: _weigh(n) for n in range(COLUMNS, BLOCK + 1, COLUMNS)}


def weigh(e, at, group, begin, end):
    """Scores of a group's columns [begin, end) to weights."""
    for n, write in _WEIGH.items():
        with e.when((end - begin).is_(n)):
            write(e, at.scores + 4 * begin, at.state(GROUP_ROWS * group))


@function
def rescale(e, op, base, group):
    """What was added up for a group, where m has grown."""
    at = Layout(e, op, base)
    with e.loop(GROUP_ROWS * group, GROUP_ROWS * (group + 1)) as r:
        factor = e.load_f32(at.state(r) + FACTOR)
        with e.when(factor.is_not(1.0)):
            sums, wide = at.sums + 4 * at.width * r, e.vector(factor)
            with e.loop(0, 4 * at.width, 64) as c:
                e.store(sums + c, e.load(sums + c) * wide)
