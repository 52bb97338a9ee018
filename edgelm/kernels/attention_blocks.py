"""What attention does with one block of positions: scores, softmax, weighted values; and the merging of blocks.

A tile is some query heads that share a KV head, of some tokens in a row: its rows are (token, head). It lives on the
stack of the thread that works on it. Values of positions that a query must not see are never read; keys are, and their
scores replaced: pages hold anything beyond the end.

Knows nothing of how the work is divided; see `attention_kernels`.
"""

from __future__ import annotations

from edgelm.kernels.abi import WORD
from edgelm.kernels.attention import BLOCK, HALVES
from edgelm.kernels.attention_floats import float_scores, float_values, keys_in_pairs, values_in_pairs
from edgelm.kernels.attention_layout import (
    CONVERTED,
    COS,
    DIM,
    FLAGS,
    FLOATS,
    HIGH,
    LOW,
    MAX,
    MERGED,
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
    SUMS,
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
from edgelm.kernels.attention_quants import BLOCK as DIMS
from edgelm.kernels.attention_quants import (
    SCALES,
    multiply_keys,
    multiply_values,
    quantize_query,
    quantize_weights,
)
from edgelm.kernels.attention_tiles import has_pairs, round_row
from edgelm.kernels.hadamard import turn
from edgelm.kernels.rope import rotate
from edgelm.kernels.vector_math import LOG2_E, emit_exp2_negative, emit_tanh
from edgelm.kernels.words import function


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
            if has_pairs(e):
                with e.when(keys_in_pairs(e, op)):
                    round_row(e, query, dim)
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
            if has_pairs(e):
                with e.when(values_in_pairs(e, op)):
                    round_row(e, row, BLOCK)
            e.store(state + MAX, m)
            e.store(state + SUM, e.sum(_tree(lambda x, y: x + y, weights)))


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
