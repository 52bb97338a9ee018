"""What attention does with one block of positions: scores, softmax, weighted values; and the merging of blocks.

A tile is some query heads that share a KV head, of some tokens in a row: its rows are (token, head). It lives on the
stack of the thread that works on it. Values of positions that a query must not see are never read; keys are, and their
scores replaced: pages hold anything beyond the end.

Knows nothing of how the work is divided; see `attention_kernels`.
"""

from __future__ import annotations

from edgelm.kernels.abi import WORD, Env, Row
from edgelm.kernels.attention import BLOCK, CAUSAL, HALVES, KEY_KIND, KINDS, VALUE_KIND
from edgelm.kernels.attention_quants import BLOCK as DIMS
from edgelm.kernels.attention_quants import (
    SCALES,
    multiply_keys,
    multiply_values,
    quantize_query,
    quantize_weights,
)
from edgelm.kernels.attention_tiles import NARROW_ROWS, convert, multiply
from edgelm.kernels.emit import I1
from edgelm.kernels.hadamard import turn
from edgelm.kernels.rope import rotate
from edgelm.kernels.vector_math import LOG2_E, emit_exp2_negative, emit_tanh
from edgelm.kernels.words import Value, function

PAGE = 64
ROWS = 96  # of a tile, a multiple of six
TILE_FLOATS = 6144  # values of all its queries: 24 KiB
CONVERT_ROWS = 12  # from so many rows on, half floats are converted once for all of them

WORKSPACE, N_TOKENS, POSITIONS, SEQUENCES, TABLES, LENGTHS, N_GROUPS, COS, SIN = (
    WORD * field for field in (
        Env.WORKSPACE, Env.N_TOKENS, Env.POSITIONS, Env.ROWS, Env.TABLES, Env.LENGTHS, Env.N_GROUPS, Env.COS, Env.SIN
    )
)
ARGS = tuple(WORD * (Row.ARGS + i) for i in range(Row.SIZE - Row.ARGS))
Q, Q_STRIDE, Y, Y_STRIDE, KV_HEADS, DIM, K_OFFSET, V_OFFSET = ARGS[:8]
SCALE, GROUP, WINDOW, FLAGS, ROPE, PAIRS, SCRATCH, N_SCRATCH = ARGS[8:]
HEADS, V_DIM, SOFTCAP = KV_HEADS + 4, DIM + 4, SCALE + 4  # two in a field

# A tile: queries, scores then weights, sums of a block, merged sums, converted values, states of rows.
QUERIES = 0
WEIGHTS = QUERIES + 4 * TILE_FLOATS
SUMS = WEIGHTS + 4 * ROWS * BLOCK
MERGED = SUMS + 4 * TILE_FLOATS
CONVERTED = MERGED + 4 * TILE_FLOATS
STATES = CONVERTED + 4 * PAGE * PAGE
STATE = 64  # bytes of a row's state:
LOW, HIGH = 0, 8  # words: the first position that it sees, and the one after the last
TOTAL_MAX, TOTAL_SUM, MAX, SUM = 16, 20, 24, 28  # float32: of all blocks so far, and of the last
QUERY_SCALE = 32  # float32, of a quantized query
TILE_BYTES = STATES + STATE * ROWS
MINUS_INFINITY = float("-inf")
FLOATS = "keys and values are float32 or float16"  # a fact: half of the code need not be compiled


def key_kind(e, op, flags=FLAGS):
    """Of KINDS; the bits of a number if keys are quantized. `flags` is the field of the row."""
    return e.load_word(op + flags) // KEY_KIND % 256


def value_kind(e, op, flags=FLAGS):
    return e.load_word(op + flags) // VALUE_KIND % 256


def is_quantized(kind):
    if FLOATS in kind.e.facts:
        return Value(kind.e, I1(0))
    return kind >= KINDS["q4_0"]


def _whole(n, size):
    return (n + (size - 1)) // size * size


def key_stride(e, kind, dim):
    """Values of a key as they lie in pages and tiles, with padding."""
    return e.select(is_quantized(kind), _whole(dim, DIMS), dim)


def value_stride(e, kind, dim):
    """The same of a value: in whole vectors, or blocks."""
    return e.select(is_quantized(kind), _whole(dim, DIMS), _whole(dim, 16))


def k_stride(e, op):
    return key_stride(e, key_kind(e, op), e.load_i32(op + DIM))


def v_stride(e, op):
    return value_stride(e, value_kind(e, op), e.load_i32(op + V_DIM))


def head_bytes(e, kind, stride):
    """Bytes of a head's keys, or values, in a page."""
    floats = stride * e.select(kind.is_(KINDS["f32"]), e.word(4 * PAGE), 2 * PAGE)
    return e.select(is_quantized(kind), stride // DIMS * (SCALES + PAGE * DIMS // 8 * kind), floats)


def pages_of(e, env, token, group):
    """Address of the page table of a token's sequence."""
    sequence = e.load_i32(e.load_word(env + SEQUENCES) + 4 * token)
    return e.load_word(e.load_word(env + TABLES) + WORD * (sequence * e.load_word(env + N_GROUPS) + group))


def limits(e, op, env, token):
    """(first, last + 1) position that a token sees."""
    position = e.load_i32(e.load_word(env + POSITIONS) + 4 * token)
    sequence = e.load_i32(e.load_word(env + SEQUENCES) + 4 * token)
    length = e.load_i32(e.load_word(env + LENGTHS) + 4 * sequence)
    high = e.select((e.load_word(op + FLAGS) & CAUSAL).is_(0), length, position + 1)
    window = e.load_word(op + WINDOW)
    return e.select(window > 0, e.max(high - window, 0), 0), high


@function
def begin_tile(e, op, env, base, token, n_tokens, first_head, n_heads):
    """Queries into the tile, rotated and scaled; what each row sees; nothing merged."""
    dim, rope = e.load_i32(op + DIM), e.load_word(op + ROPE)
    width, kind = k_stride(e, op), key_kind(e, op)
    q, stride = e.load_word(env + WORKSPACE) + e.load_word(op + Q), e.load_word(op + Q_STRIDE)
    pairs, cos, sin = e.variable(0), e.variable(0), e.variable(0)
    with e.when(rope >= 0):
        pairs.set(e.load_word(op + PAIRS))
        cos.set(e.load_word(e.load_word(env + COS) + WORD * rope))
        sin.set(e.load_word(e.load_word(env + SIN) + WORD * rope))
    halves, scale = e.load_word(op + FLAGS) & HALVES, e.load_i32(op + SCALE)
    with e.loop(0, n_tokens) as i:
        low, high = limits(e, op, env, token + i)
        angle = 4 * pairs.get() * e.load_i32(e.load_word(env + POSITIONS) + 4 * (token + i))
        with e.loop(0, n_heads) as g:
            row = n_heads * i + g
            query, state = base + QUERIES + 4 * width * row, base + STATES + STATE * row
            rotate(e, q + stride * (token + i) + 4 * dim * (first_head + g), query, dim, pairs.get(), halves,
                   cos.get() + angle, sin.get() + angle, scale)
            if FLOATS not in e.facts:
                with e.when(is_quantized(kind)):
                    turn(e, query, dim, width)
                    quantize_query(e, query, width, kind, state + QUERY_SCALE)
            e.store(state + LOW, low)
            e.store(state + HIGH, high)
            begin_row(e, state, base + MERGED + 4 * v_stride(e, op) * row, v_stride(e, op))


@function
def begin_row(e, state, merged, width):
    """Nothing merged into a row yet."""
    e.store(state + TOTAL_MAX, e.lane(e.vector(MINUS_INFINITY)))
    e.store(state + TOTAL_SUM, e.lane(e.vector(0.0)))
    with e.loop(0, 4 * width, 64) as i:
        e.store(merged + i, e.vector(0.0))


@function
def block_scores(e, op, base, n_rows, page, n_seen, keys, ahead):
    """q·k of all rows with the block's first or second page, of a head whose keys are at `keys`.

    At least the first n_seen positions of the page; `ahead` as for `multiply`.
    """
    scores, kind = base + WEIGHTS + 4 * PAGE * page, key_kind(e, op)
    if FLOATS in e.facts:
        float_scores(e, op, base, n_rows, n_seen, keys, scores, ahead)
        return
    with e.choose(is_quantized(kind)) as (numbers, floats):
        with numbers:
            width, n_columns = k_stride(e, op), e.select(n_seen > 32, e.word(PAGE), 32)
            multiply_keys(e, kind, n_rows, width // DIMS, base + QUERIES, 4 * width, base + STATES + QUERY_SCALE, STATE,
                          keys, n_columns, scores, 4 * BLOCK, ahead)
        with floats:
            float_scores(e, op, base, n_rows, n_seen, keys, scores, ahead)


@function
def float_scores(e, op, base, n_rows, n_seen, keys, scores, ahead):
    """`block_scores` for keys that are float32 or float16."""
    dim, half = e.load_i32(op + DIM), key_kind(e, op)
    line = e.select(half.is_(0), e.word(4 * PAGE), 2 * PAGE)
    queries, stride = base + QUERIES, 4 * dim
    narrow = e.select(n_seen > 16, e.word(32), 16)
    width = e.select((n_seen > 32) | (n_rows < NARROW_ROWS[0]), PAGE, narrow)
    with e.choose(half.is_(0) | (n_rows < CONVERT_ROWS)) as (direct, converted):
        with direct:
            multiply(e, width, half, n_rows, dim, queries, stride, keys, line, scores, 4 * BLOCK, 1, ahead)
        with converted, e.loop(0, dim, PAGE) as d:  # as many dimensions at a time as stay in the nearest cache
            n = e.min(dim - d, PAGE)
            convert(e, keys + line * d, line, base + CONVERTED, n, width)
            fresh = e.select(d.is_(0), e.word(1), 0)
            multiply(e, width, e.word(0), n_rows, n, queries + 4 * d, stride, base + CONVERTED, 4 * PAGE, scores,
                     4 * BLOCK, fresh, ahead)


@function
def cap_scores(e, scores, cap):
    """Scores of a block's row to cap * tanh(score / cap), in units of ln 2. `cap` is an address."""
    bound = e.vector(e.load_f32(cap))
    with e.loop(0, 4 * BLOCK, 64) as i:
        e.store(scores + i, bound * LOG2_E * e.apply(emit_tanh, e.load(scores + i) / bound))


@function
def hide(e, scores, low, high):
    """Scores of a block's row outside [low, high) to minus infinity."""
    with e.loop(0, BLOCK, 16) as i:
        seen = e.between(e.lanes_from(i), low, high)
        e.store(scores + 4 * i, e.select(seen, e.load(scores + 4 * i), MINUS_INFINITY))


def _tree(combine, values):
    """Pairwise, neighbours first: in a fixed order, but not one after the other."""
    while len(values) > 1:
        values = [combine(*pair) for pair in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@function
def block_softmax(e, op, base, n_rows, start):
    """Scores of the block at position `start` to weights; their maximum and sum to the rows' states.

    Scores are in units of ln 2: queries were scaled so, or capped scores were.
    """
    with e.loop(0, n_rows) as r:
        row, state = base + WEIGHTS + 4 * BLOCK * r, base + STATES + STATE * r
        low, high = e.load_word(state + LOW) - start, e.load_word(state + HIGH) - start
        with e.when(e.load_f32(op + SOFTCAP) > 0.0):
            cap_scores(e, row, op + SOFTCAP)
        with e.when((low > 0) | (high < BLOCK)):
            hide(e, row, low, high)
        e.store(state + MAX, e.lane(e.vector(MINUS_INFINITY)))
        e.store(state + SUM, e.lane(e.vector(0.0)))
        with e.when((low < BLOCK) & (high > 0)):
            scores = [e.load(row + 4 * i) for i in range(0, BLOCK, 16)]
            m = e.largest(_tree(e.max, scores))
            weights = [e.apply(emit_exp2_negative, score - e.vector(m)) for score in scores]
            for i, weight in enumerate(weights):
                e.store(row + 64 * i, weight)
            e.store(state + MAX, m)
            e.store(state + SUM, e.sum(_tree(lambda x, y: x + y, weights)))


@function
def weigh(e, base, first_row, n_rows, width, half, weights, page_start, m, m_stride, sums, stride, ahead):
    """Adds the values `m` of a page to the sums of some rows. `weights` is where the page's of row first_row are.

    Rows are tokens in order: what all of them see lies between where the last begins and where the first ends.
    """
    state = base + STATES + STATE * first_row

    def seen_by(r):
        low = e.max(e.load_word(state + STATE * r + LOW) - page_start, 0)
        return low, e.min(e.load_word(state + STATE * r + HIGH) - page_start, PAGE)

    def add(r, rows, low, high):
        with e.when(low < high):
            multiply(e, width, half, rows, high - low, weights + 4 * BLOCK * r + 4 * low, 4 * BLOCK, m + m_stride * low,
                     m_stride, sums + stride * r, stride, 0, ahead)

    low, high = seen_by(n_rows - 1)[0], seen_by(e.word(0))[1]
    nothing = low >= high
    with e.loop(0, n_rows) as r:
        mine = seen_by(r)
        add(r, 1, mine[0], e.select(nothing, mine[1], low))
    add(e.word(0), n_rows, low, high)
    with e.when(low < high), e.loop(0, n_rows) as r:
        add(r, 1, high, seen_by(r)[1])


@function
def block_values(e, op, base, n_rows, page, page_start, values, ahead):
    """Adds up p·v of one page, of a head whose values are at `values`."""
    kind = value_kind(e, op)
    if FLOATS in e.facts:
        float_values(e, op, base, n_rows, page, page_start, values, ahead)
        return
    with e.choose(is_quantized(kind)) as (numbers, floats):
        with numbers:
            stride, size = 4 * v_stride(e, op), SCALES + PAGE * DIMS // 8 * kind
            with e.loop(0, v_stride(e, op) // DIMS) as block:
                at, sums = size * block, base + SUMS + 4 * DIMS * block
                weights = base + WEIGHTS + 4 * PAGE * page
                quantize_weights(e, n_rows, weights, 4 * BLOCK, values + at, kind, base + CONVERTED)
                multiply_values(e, kind, n_rows, base + CONVERTED, values + at, sums, stride, ahead + at)
        with floats:
            float_values(e, op, base, n_rows, page, page_start, values, ahead)


@function
def float_values(e, op, base, n_rows, page, page_start, values, ahead):
    """`block_values` for values that are float32 or float16."""
    n_columns, half = v_stride(e, op), value_kind(e, op)
    size = e.select(half.is_(0), e.word(4), 2)
    last = base + STATES + STATE * (n_rows - 1)
    low = e.max(e.load_word(base + STATES + LOW) - page_start, 0)
    high = e.min(e.load_word(last + HIGH) - page_start, PAGE)
    even = (e.load_word(last + LOW) <= page_start) & (e.load_word(base + STATES + HIGH) >= page_start + PAGE)
    at_a_time, stride, weights = e.select(even, n_rows, 6), 4 * n_columns, base + WEIGHTS + 4 * PAGE * page
    column = e.variable(0)
    with e.repeat(lambda: column.get() < n_columns):
        c = column.get()
        width = e.select(n_columns - c >= 64, e.word(64), e.select(n_columns - c >= 32, e.word(32), 16))
        m, m_stride, is_half = e.variable(values + size * c), e.variable(size * n_columns), e.variable(half)
        with e.when(half.is_not(0) & (n_rows >= CONVERT_ROWS)):
            convert(e, m.get() + m_stride.get() * low, m_stride.get(), base + CONVERTED + 4 * PAGE * low, high - low,
                    width)
            m.set(base + CONVERTED)
            m_stride.set(4 * PAGE)
            is_half.set(0)
        row = e.variable(0)
        with e.repeat(lambda: row.get() < n_rows):
            r = row.get()
            weigh(e, base, r, e.min(n_rows - r, at_a_time), width, is_half.get(), weights + 4 * BLOCK * r, page_start,
                  m.get(), m_stride.get(), base + SUMS + stride * r + 4 * c, stride, ahead + PAGE * size * c)
            row.set(r + at_a_time)
        column.set(c + width)


@function
def merge(e, width, state, merged, block, sums):
    """Merges one block into a row's state and values: `block` is the address of its maximum and sum."""
    m, total = e.load_f32(block), e.load_f32(block + 4)
    with e.when(m.is_not(MINUS_INFINITY)):  # it saw something of it
        old = e.load_f32(state + TOTAL_MAX)
        new = e.max(m, old)
        a = e.apply(emit_exp2_negative, e.vector(old - new))
        b = e.apply(emit_exp2_negative, e.vector(m - new))
        e.store(state + TOTAL_MAX, new)
        so_far = e.vector(e.load_f32(state + TOTAL_SUM))
        e.store(state + TOTAL_SUM, e.lane(e.fma(e.vector(total), b, so_far * a)))
        with e.loop(0, 4 * width, 64) as i:
            e.store(merged + i, e.fma(e.load(sums + i), b, e.load(merged + i) * a))


@function
def finish(e, op, state, merged, y):
    """y = values / sum of weights."""
    n = e.load_i32(op + V_DIM)
    if FLOATS not in e.facts:
        with e.when(is_quantized(value_kind(e, op))):
            turn(e, merged, v_stride(e, op), v_stride(e, op))
    total, whole = e.vector(e.load_f32(state + TOTAL_SUM)), n // 16 * 16
    with e.loop(0, whole, 16) as i:
        e.store(y + 4 * i, e.load(merged + 4 * i) / total)
    with e.loop(whole, n) as i:
        e.store(y + 4 * i, e.lane(e.vector(e.load_f32(merged + 4 * i)) / total))
