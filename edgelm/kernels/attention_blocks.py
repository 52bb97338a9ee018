"""What attention does with one block of positions: scores, softmax, weighted values; and the merging of blocks.

A tile is some query heads that share a KV head, of some tokens in a row: its rows are (token, head). It lives on the
stack of the thread that works on it. Pages hold anything beyond the end: keys of positions that a query must not see
may be read, and their scores are replaced; values are not, or their weights are 0 and all of them finite.

Knows nothing of how the work is divided; see `attention_kernels`.
"""

from __future__ import annotations

from edgelm.kernels.abi import WORD
from edgelm.kernels.attention import AHEAD, BLOCK, HALVES, KINDS
from edgelm.kernels.attention_floats import (
    all_see,
    float_scores,
    float_values,
    half_values,
    keys_in_pairs,
    values_in_pairs,
)
from edgelm.kernels.attention_layout import (
    AHEAD_OF,
    CONVERT_ROWS,
    CONVERTED,
    COS,
    DIM,
    FLAGS,
    FLOATS,
    HIGH,
    LOW,
    MAX,
    MINUS_INFINITY,
    PAGE,
    PAIRS,
    POSITIONS,
    Q_STRIDE,
    QUERIES,
    QUERY_SCALE,
    ROPE,
    SCALE,
    SIN,
    SOFTCAP,
    STATE,
    STATES,
    SUM,
    TOTAL_MAX,
    TOTAL_SUM,
    V_DIM,
    WEIGHTS,
    WORKSPACE,
    Q,
    is_quantized,
    k_stride,
    key_kind,
    limits,
    v_stride,
    value_kind,
)
from edgelm.kernels.attention_quants import multiply_keys, multiply_values, quantize_query, quantize_weights
from edgelm.kernels.attention_tiles import has_pairs, places_ahead, round_row, rounded
from edgelm.kernels.hadamard import turn
from edgelm.kernels.rope import rotate
from edgelm.kernels.vector_math import LOG2_E, emit_exp2_negative, emit_exp2_rough, emit_tanh
from edgelm.kernels.words import function
from edgelm.kv_types import BLOCK as DIMS
from edgelm.kv_types import block_bytes

LOWEST = -3.4028234663852886e38  # of float32
ROWS_AT_ONCE = 16  # of a softmax: their scores stay in the nearest cache


def queries_of(e, op, env):
    """A function of (token, head, address) that writes the query there, rotated and scaled, and fetches a later one."""
    dim, rope = e.load_i32(op + DIM), e.load_word(op + ROPE)
    q, stride = e.load_word(env + WORKSPACE) + e.load_word(op + Q), e.load_word(op + Q_STRIDE)
    pairs, cos, sin = e.variable(0), e.variable(0), e.variable(0)
    with e.when(rope >= 0):
        pairs.set(e.load_word(op + PAIRS))
        cos.set(e.load_word(e.load_word(env + COS) + WORD * rope))
        sin.set(e.load_word(e.load_word(env + SIN) + WORD * rope))
    halves, scale = e.load_word(op + FLAGS) & HALVES, e.load_i32(op + SCALE)

    def write(token, head, to):
        angle = 4 * pairs.get() * e.load_i32(e.load_word(env + POSITIONS) + 4 * token)
        with e.loop(0, 4 * dim, 64) as line:
            e.prefetch(q + stride * (token + AHEAD) + 4 * dim * head + line)
        rotate(e, q + stride * token + 4 * dim * head, to, dim, pairs.get(), halves, cos.get() + angle,
               sin.get() + angle, scale)

    return write


@function
def begin_tile(e, op, env, base, token, n_tokens, first_head, n_heads):
    """Queries into the tile, rotated and scaled; what each row sees."""
    dim, width, kind = e.load_i32(op + DIM), k_stride(e, op), key_kind(e, op)
    write_query = queries_of(e, op, env)
    with e.loop(0, n_tokens) as i:
        low, high = limits(e, op, env, token + i)
        with e.loop(0, n_heads) as g:
            row = n_heads * i + g
            query, state = base + QUERIES + 4 * width * row, base + STATES + STATE * row
            write_query(token + i, first_head + g, query)
            if FLOATS not in e.facts:
                with e.when(is_quantized(kind)):
                    turn(e, query, dim, width)
                    quantize_query(e, query, width, kind, state + QUERY_SCALE)
            with e.when(keys_in_pairs(e, op)):
                with e.when(dim < width):
                    e.store(query + 4 * dim, e.lane(e.vector(0.0)))
                if has_pairs(e):
                    round_row(e, query, width)
            e.store(state + LOW, low)
            e.store(state + HIGH, high)


@function
def begin_row(e, state, merged, width):
    """Nothing merged into a row yet."""
    e.store(state + TOTAL_MAX, e.lane(e.vector(MINUS_INFINITY)))
    e.store(state + TOTAL_SUM, e.lane(e.vector(0.0)))
    with e.loop(0, 4 * width, 64) as i:
        e.store(merged + i, e.vector(0.0))


@function
def will_read(e, base, pages, last_page, piece, block, later, keys, values, later_keys):
    """Notes what comes after piece `piece` of a block: keys of its pages, their values, and then the same of `later`.

    keys, values: where those of a head are in a page; later_keys: where keys are in pages of block `later`.
    """
    n = BLOCK // PAGE
    for i, place in enumerate(places_ahead(e)):
        own = piece + place < 2 * n
        next_one = e.select(own, piece + place, piece + place - 2 * n)
        page = e.load_word(pages + WORD * e.min(n * e.select(own, block, later) + next_one % n, last_page))
        at = e.select(next_one >= n, values, e.select(own, keys, later_keys))
        e.store(base + AHEAD_OF + WORD * i, page + at)


@function
def block_scores(e, op, base, n_rows, page, page_start, n_seen, keys):
    """q·k of all rows with the block's first or second page, of a head whose keys are at `keys`.

    At least what each row sees of the first n_seen positions of the page.
    """
    scores, kind = base + WEIGHTS + 4 * PAGE * page, key_kind(e, op)
    if FLOATS in e.facts:
        float_scores(e, op, base, n_rows, page_start, n_seen, keys, scores)
        return
    with e.choose(is_quantized(kind)) as (numbers, floats):
        with numbers:
            width, n_columns = k_stride(e, op), e.select(n_seen > 32, e.word(PAGE), 32)
            multiply_keys(e, kind, n_rows, width // DIMS, base + QUERIES, 4 * width, base + STATES + QUERY_SCALE, STATE,
                          keys, n_columns, scores, 4 * BLOCK, base + AHEAD_OF)
        with floats:
            float_scores(e, op, base, n_rows, page_start, n_seen, keys, scores)


@function
def cap_scores(e, scores, n, cap):
    """n scores of a block's row to cap * tanh(score / cap), in units of ln 2. `cap` is an address."""
    bound = e.vector(e.load_f32(cap))
    with e.loop(0, 4 * n, 64) as i:
        e.store(scores + i, bound * LOG2_E * e.apply(emit_tanh, e.load(scores + i) / bound))


@function
def hide(e, base, begin, end, n, start):
    """Scores of rows [begin, end), of n positions from `start` on, to minus infinity where a row does not see them."""
    with e.loop(begin, end) as r:
        scores, state = base + WEIGHTS + 4 * BLOCK * r, base + STATES + STATE * r
        hide_row(e, scores, e.word(0), n, e.load_word(state + LOW) - start, e.load_word(state + HIGH) - start)


def hide_row(e, scores, begin, end, low, high):
    """Scores of a row's columns [begin, end), multiples of 16, to minus infinity where they are not in [low, high)."""
    for first, last in ((begin, e.min(low, end)), (e.max(e.max(high, 0) // 16 * 16, begin), end)):
        with e.loop(first, last, 16) as i:
            seen = e.between(e.lanes_from(i), low, high)
            e.store(scores + 4 * i, e.select(seen, e.load(scores + 4 * i), MINUS_INFINITY))


def combined(combine, values):
    """Pairwise, neighbours first: in a fixed order, but not one after the other."""
    while len(values) > 1:
        rest = values[len(values) // 2 * 2 :]
        values = [combine(*pair) for pair in zip(values[::2], values[1::2], strict=False)] + rest
    return values[0]


def _softmax(n: int, in_pairs: bool):
    def write(e, op, base, n_rows, start):
        """Scores of the first n positions of a block to weights, float32 or bfloat16.

        Some rows at a time, first the maxima of all of them: so no row's weights wait for its own.
        """
        exp2 = emit_exp2_rough if in_pairs else emit_exp2_negative

        def places(r):
            return base + WEIGHTS + 4 * BLOCK * r, base + STATES + STATE * r

        seen = all_see(e, base, n_rows, start, start + n)
        with e.loop(0, n_rows, ROWS_AT_ONCE) as begin:
            end = e.min(begin + ROWS_AT_ONCE, n_rows)
            with e.when(e.load_f32(op + SOFTCAP) > 0.0), e.loop(begin, end) as r:
                cap_scores(e, places(r)[0], n, op + SOFTCAP)
            with e.when(seen.is_(0)):
                hide(e, base, begin, end, n, start)
            with e.loop(begin, end) as r:
                row, state = places(r)
                e.store(state + MAX, e.largest(combined(e.max, [e.load(row + 4 * i) for i in range(0, n, 16)])))
            with e.loop(begin, end) as r:
                row, state = places(r)
                m = e.vector(e.max(e.load_f32(state + MAX), LOWEST))  # the weights are 0 if a row sees nothing
                weights = [e.apply(exp2, e.load(row + 4 * i) - m) for i in range(0, n, 16)]
                if in_pairs:
                    for i, pair in enumerate(zip(weights[::2], weights[1::2], strict=True)):
                        e.store(row + 64 * i, rounded(e, *pair))
                else:
                    for i, weight in enumerate(weights):
                        e.store(row + 64 * i, weight)
                e.store(state + SUM, e.sum(combined(lambda x, y: x + y, weights)))

    write.__qualname__ = f"softmax_{n}{'_pairs' * in_pairs}"
    return function(write)


_SOFTMAX = {(n, in_pairs): _softmax(n, in_pairs) for n in (PAGE, BLOCK) for in_pairs in (True, False)}


@function
def block_softmax(e, op, base, n_rows, start, n_seen):
    """Scores of the block at position `start` to weights; their maximum and sum to the rows' states.

    Scores are in units of ln 2: queries were scaled so, or capped scores were. Weights of positions that a row does
    not see are 0; those of the second page are not written if no row sees more than n_seen positions, a page.
    """
    for n, fits in ((PAGE, n_seen <= PAGE), (BLOCK, n_seen > PAGE)):
        with e.when(fits):
            if not has_pairs(e):
                _SOFTMAX[n, False](e, op, base, n_rows, start)
                continue
            with e.choose(values_in_pairs(e, op)) as (pairs, singles):
                with pairs:
                    _SOFTMAX[n, True](e, op, base, n_rows, start)
                with singles:
                    _SOFTMAX[n, False](e, op, base, n_rows, start)


@function
def block_values(e, op, base, n_rows, start, begin, end, pages, last_page, later, keys, values, later_keys, sums):
    """Sums of p·v over positions [begin, end) of the block at `start`, to `sums`; begin is that of a page.

    values: where those of a head are in a page; `pages` is the table of these. For all else see `will_read`.
    """
    def page_by_page():
        with e.loop(0, 4 * n_rows * v_stride(e, op), 64) as i:
            e.store(sums + i, e.vector(0.0))
        with e.loop(begin, end, PAGE) as at:
            index = (at - start) // PAGE
            will_read(e, base, pages, last_page, index + BLOCK // PAGE, start // BLOCK, later, keys, values, later_keys)
            page_values(e, op, base, n_rows, index, at, e.load_word(pages + WORD * (at // PAGE)) + values, sums)

    with e.choose(value_kind(e, op).is_(KINDS["f16"]) & (n_rows >= CONVERT_ROWS)) as (made_ready, others):
        with made_ready:
            half_values(e, op, base, n_rows, start, begin, end, pages, values, sums)
        with others:
            page_by_page()


@function
def page_values(e, op, base, n_rows, page, page_start, values, sums):
    """Adds up p·v of one page, of a head whose values are at `values`."""
    kind = value_kind(e, op)
    if FLOATS in e.facts:
        float_values(e, op, base, n_rows, page, page_start, values, sums)
        return
    with e.choose(is_quantized(kind)) as (numbers, floats):
        with numbers:
            stride, size = 4 * v_stride(e, op), block_bytes(kind)
            with e.loop(0, v_stride(e, op) // DIMS) as block:
                at, own = size * block, sums + 4 * DIMS * block
                weights = base + WEIGHTS + 4 * PAGE * page
                quantize_weights(e, n_rows, weights, 4 * BLOCK, values + at, kind, base + CONVERTED)
                multiply_values(e, kind, n_rows, base + CONVERTED, values + at, own, stride, base + AHEAD_OF, at)
        with floats:
            float_values(e, op, base, n_rows, page, page_start, values, sums)


@function
def merge(e, width, state, merged, block, sums):
    """Merges one block into a row's state and values: `block` is the address of its maximum and sum."""
    m, total = e.load_f32(block), e.load_f32(block + 4)
    with e.when(m.is_(MINUS_INFINITY).is_(0)):  # it saw something of it; a maximum that is not a number too
        old = e.load_f32(state + TOTAL_MAX)
        grows, one = m > old, e.vector(1.0)
        smaller = e.apply(emit_exp2_negative, e.vector(e.select(grows, old, m) - e.select(grows, m, old)))
        a, b = e.select(grows, smaller, one), e.select(grows, one, smaller)
        e.store(state + TOTAL_MAX, e.select(grows, m, old))
        so_far = e.vector(e.load_f32(state + TOTAL_SUM))
        e.store(state + TOTAL_SUM, e.lane(e.fma(e.vector(total), b, so_far * a)))
        with e.loop(0, 4 * width, 64) as i:
            e.store(merged + i, e.fma(e.load(sums + i), b, e.load(merged + i) * a))


@function
def finish(e, op, state, merged, y):
    """y = values / sum of weights."""
    if FLOATS not in e.facts:
        with e.when(is_quantized(value_kind(e, op))):
            turn(e, merged, v_stride(e, op), v_stride(e, op))
    write_result(e, op, merged, e.load_f32(state + TOTAL_SUM), y)


def write_result(e, op, values, total, y):
    """y = values / total."""
    n, factor = e.load_i32(op + V_DIM), e.vector(1.0) / e.vector(total)
    vectors = n // 16 * 16
    with e.loop(0, vectors, 16) as i:
        e.store(y + 4 * i, e.load(values + 4 * i) * factor)
    with e.loop(vectors, n) as i:
        e.store(y + 4 * i, e.lane(e.vector(e.load_f32(values + 4 * i)) * factor))
