"""Attention over the pages of the KV cache.

What is computed for a query head is fixed, whoever computes it beside what: for each block of BLOCK positions, counted
from the beginning of the sequence, the scores, their maximum m, weights exp(score - m), the weights' sum and the sum of
values so weighted, position by position; and then the blocks are merged in ascending order (Milakov & Gimelshein 2018,
Dao et al. 2022). So a prompt gives the same bits at once, in chunks, token by token, or beside other sequences; but
not where a matrix unit takes prompts, see `attention_prompts`.

Units are (KV head, tile of TILE tokens, one of TILE parts). With many tokens a part is a token, and a thread works on
as many neighbouring ones at a time as it was given. With few tokens and a long past a part is some of the blocks:
results of blocks go to the scratch buffer, and the thread that finishes the last block of a KV head merges them.

Knows nothing of how pages are managed.
"""

from __future__ import annotations

from edgelm.kernels import amx, attention_amx, attention_prompts
from edgelm.kernels.abi import WORD, Env
from edgelm.kernels.attention import AHEAD, BLOCK, COUNTER, OF_OUTPUTS, PARTIAL, SPLIT_TOKENS, TILE
from edgelm.kernels.attention_blocks import (
    begin_row,
    begin_tile,
    block_scores,
    block_softmax,
    block_values,
    finish,
    merge,
    will_read,
)
from edgelm.kernels.attention_layout import (
    FLAGS,
    FLOATS,
    GROUP,
    HEADS,
    HIGH,
    K_OFFSET,
    KV_HEADS,
    LOW,
    MAX,
    MERGED,
    N_SCRATCH,
    N_TOKENS,
    PAGE,
    ROWS,
    SCRATCH,
    STATE,
    STATES,
    SUMS,
    TILE_BYTES,
    TILE_FLOATS,
    TOTAL_MAX,
    V_DIM,
    V_OFFSET,
    WORKSPACE,
    Y_STRIDE,
    Y,
    head_bytes,
    k_stride,
    key_kind,
    limits,
    pages_of,
    run_end,
    v_stride,
    value_kind,
)
from edgelm.kernels.words import function, intrinsic_of


def blocks(e, low, high):
    """(first, last + 1) of the blocks that positions [low, high) lie in."""
    return low // BLOCK, (high + (BLOCK - 1)) // BLOCK


@function
def attend(e, op, env, base, token, n_tokens, kv_head, head, n_heads, begin, end, partial, n_partial):
    """Query heads [head, head + n_heads) of a KV head, of tokens of one sequence, over blocks [begin, end).

    Leaves them merged in the tile; or, with partial != 0, writes those of each block there: see `partials`.
    """
    n_rows, n_head = n_tokens * n_heads, e.load_i32(op + HEADS)
    begin_tile(e, op, env, base, token, n_tokens, n_head * kv_head + head, n_heads)
    low, high = e.load_word(base + STATES + LOW), e.load_word(base + STATES + STATE * (n_rows - 1) + HIGH)
    width, pages = v_stride(e, op), pages_of(e, env, token, e.load_word(op + GROUP))
    k = e.load_word(op + K_OFFSET) + head_bytes(e, key_kind(e, op), k_stride(e, op)) * kv_head
    v = e.load_word(op + V_OFFSET) + head_bytes(e, value_kind(e, op), width) * kv_head
    first, last = blocks(e, low, high)
    first, last, last_page = e.max(begin, first), e.min(end, last), (high - 1) // PAGE
    next_head = k + head_bytes(e, key_kind(e, op), k_stride(e, op))
    with e.loop(first, last) as block:
        start = BLOCK * block
        from_, to = e.max(start, low // PAGE * PAGE), e.min(start + BLOCK, high)
        later, keys = e.select(block < last - 1, block + 1, first), e.select(block < last - 1, k, next_head)
        with e.loop(from_, to, PAGE) as at:
            will_read(e, base, pages, last_page, (at - start) // PAGE, block, later, k, v, keys)
            keys_of_page = e.load_word(pages + WORD * (at // PAGE)) + k
            block_scores(e, op, base, n_rows, (at - start) // PAGE, at, to - at, keys_of_page)
        block_softmax(e, op, base, n_rows, start, to - start)
        whole = partial.is_(0)
        alone = whole & block.is_(first)  # nothing to be merged with
        sums = base + e.select(alone, MERGED, e.word(SUMS))
        block_values(e, op, base, n_rows, start, from_, to, pages, last_page, later, k, v, keys, sums)
        with e.loop(0, n_rows) as r:
            state, own = base + STATES + STATE * r, sums + 4 * width * r
            with e.when(alone):
                e.store(state + TOTAL_MAX, e.load_word(state + MAX))
            with e.when(whole & alone.is_(0)):
                merge(e, width, state, base + MERGED + 4 * width * r, state + MAX, own)
            with e.when(whole.is_(0)):
                row = n_head * (r // n_heads) + head + r % n_heads
                target = partial + (n_partial * row + block - begin) * (4 * width + PARTIAL)
                e.store(target, e.load_word(state + MAX))
                with e.loop(0, 4 * width, 64) as i:
                    e.store(target + PARTIAL + i, e.load(own + i))


def result_at(e, op, env, token, head):
    """Address of the result of a query head."""
    y = e.load_word(env + WORKSPACE) + e.load_word(op + Y) + e.load_word(op + Y_STRIDE) * token
    return y + 4 * e.load_i32(op + V_DIM) * head


@function
def fetch_results(e, op, env, token, head, n_heads):
    """The lines that results will be written to."""
    at = result_at(e, op, env, token, head)
    with e.loop(0, 4 * e.load_i32(op + V_DIM) * n_heads, 64) as line:
        e.prefetch_to_write(at + line)


def rows_of_tile(e, op):
    return e.max(e.min(e.word(TILE_FLOATS) // e.max(k_stride(e, op), v_stride(e, op)), ROWS), 1)


# --- many tokens: each thread has some, with all their past ------------------------------------------------------

@function
def attend_tokens(e, op, env, base, first, limit, kv_head):
    """All heads of a KV head for tokens [first, limit), of any sequences."""
    n_head, rows, width = e.load_i32(op + HEADS), rows_of_tile(e, op), v_stride(e, op)
    token = e.variable(first)
    with e.repeat(lambda: token.get() < limit):
        t = token.get()
        end = e.min(run_end(e, env, t, limit), t + e.max(rows // n_head, 1))
        begin, _ = blocks(e, *limits(e, op, env, t))
        _, last = blocks(e, *limits(e, op, env, end - 1))
        head = e.variable(0)
        with e.repeat(lambda: head.get() < n_head):
            h, n_heads = head.get(), e.min(n_head - head.get(), rows)
            attend(e, op, env, base, t, end - t, kv_head, h, n_heads, begin, last, 0, 0)
            with e.loop(t, end) as i:
                fetch_results(e, op, env, i + AHEAD, n_head * kv_head + h, n_heads)
                with e.loop(0, n_heads) as g:
                    r, y = n_heads * (i - t) + g, result_at(e, op, env, i, n_head * kv_head + h + g)
                    finish(e, op, base + STATES + STATE * r, base + MERGED + 4 * width * r, y)
            head.set(h + n_heads)
        token.set(end)


# --- many tokens, through the matrix unit ------------------------------------------------------------------------

@function
def attend_ranges(e, op, env, base, begin, end):
    """Units [begin, end) through the matrix unit: as many tokens of a KV head at a time as there are."""
    n_tokens, unit = e.load_word(env + N_TOKENS), e.variable(begin)
    units_of_head = (n_tokens + (TILE - 1)) // TILE * TILE
    amx.configure(e.b)
    with e.repeat(lambda: unit.get() < end):
        kv_head, token = unit.get() // units_of_head, unit.get() % units_of_head
        n = e.min(units_of_head - token, end - unit.get())
        attend_prompts(e, op, env, base, token, e.min(token + n, n_tokens), kv_head)
        unit.set(unit.get() + n)
    amx.release(e.b)


@function
def attend_prompts(e, op, env, base, first, limit, kv_head):
    """`attend_tokens` through the matrix unit, where there are enough tokens of a sequence."""
    n_head, rows = e.load_i32(op + HEADS), attention_prompts.rows_of_tile(e, op)
    token = e.variable(first)
    with e.repeat(lambda: token.get() < limit):
        t, stop = token.get(), run_end(e, env, token.get(), limit)
        with e.choose(attention_prompts.is_prompt(e, op, env, t).is_(0)) as (few, many):
            with few:
                attend_tokens(e, op, env, base, t, stop, kv_head)
                token.set(stop)
            with many:
                end, head = e.min(stop, t + e.max(rows // n_head, 1)), e.variable(0)
                with e.repeat(lambda: head.get() < n_head):
                    h, n_heads = head.get(), e.min(n_head - head.get(), rows)
                    done = attention_prompts.attend(e, op, env, base, t, end - t, kv_head, h, n_heads)
                    with e.when(done.is_not(0)), e.loop(t, end) as i:
                        fetch_results(e, op, env, i + AHEAD, n_head * kv_head + h, n_heads)
                        with e.loop(0, n_heads) as g:
                            y = result_at(e, op, env, i, n_head * kv_head + h + g)
                            attention_prompts.finish(e, op, base, n_heads * (i - t) + g, y)
                    with e.when(done.is_(0)):  # rare: all heads again
                        attend_tokens(e, op, env, base, t, end, kv_head)
                    head.set(h + n_heads)
                token.set(end)


# --- few tokens with a long past: each thread has some of the blocks ---------------------------------------------

def partial_bytes(e, op):
    return 4 * v_stride(e, op) + PARTIAL


@function
def blocks_to_divide(e, op, env):
    """The most blocks that a run of tokens sees, if their results fit into the scratch buffer; else 0."""
    n_tokens, most = e.load_word(env + N_TOKENS), e.variable(0)
    with e.when(n_tokens <= SPLIT_TOKENS):
        token = e.variable(0)
        with e.repeat(lambda: token.get() < n_tokens):
            end = run_end(e, env, token.get(), n_tokens)
            first, _ = blocks(e, *limits(e, op, env, token.get()))
            _, last = blocks(e, *limits(e, op, env, end - 1))
            most.set(e.max(most.get(), last - first))
            token.set(end)
    n_heads = e.load_i32(op + KV_HEADS)
    n_results = n_tokens * n_heads * e.load_i32(op + HEADS) * most.get()
    too_many = COUNTER * SPLIT_TOKENS * n_heads + n_results * partial_bytes(e, op) > e.load_word(op + N_SCRATCH)
    return e.select((most.get() <= 1) | too_many, 0, most.get())


def partials(e, op, env, token, kv_head, n_partial):
    """Address of results of blocks: (KV heads, tokens, heads, n_partial) of maximum, sum and, at PARTIAL, values."""
    counters = COUNTER * SPLIT_TOKENS * e.load_i32(op + KV_HEADS)
    first = e.load_word(env + WORKSPACE) + e.load_word(op + SCRATCH) + counters
    row = (kv_head * e.load_word(env + N_TOKENS) + token) * e.load_i32(op + HEADS)
    return first + row * n_partial * partial_bytes(e, op)


@function
def attend_parts(e, op, env, base, kv_head, begin, end, n_partial):
    """Parts [begin, end) of TILE of the past of every token, for a KV head."""
    n_tokens, token = e.load_word(env + N_TOKENS), e.variable(0)
    with e.repeat(lambda: token.get() < n_tokens):
        t = token.get()
        stop = run_end(e, env, t, n_tokens)
        low, _ = blocks(e, *limits(e, op, env, t))
        _, high = blocks(e, *limits(e, op, env, stop - 1))
        n_blocks = high - low
        first, last = low + n_blocks * begin // TILE, low + n_blocks * end // TILE
        with e.choose((last - first).is_(n_blocks)) as (alone, together):
            with alone:
                attend_tokens(e, op, env, base, t, stop, kv_head)
            with together, e.when(first < last):
                attend_part(e, op, env, base, kv_head, t, stop, low, n_blocks, first, last, n_partial)
        token.set(stop)


@function
def attend_part(e, op, env, base, kv_head, token, stop, low, n_blocks, first, last, n_partial):
    """Blocks [first, last) of `n_blocks` from `low` on, for tokens [token, stop); all merged if they were the last."""
    n_head, rows = e.load_i32(op + HEADS), rows_of_tile(e, op)
    size, t = e.max(rows // n_head, 1), e.variable(token)
    with e.repeat(lambda: t.get() < stop):
        to = partials(e, op, env, t.get(), kv_head, n_partial) + (first - low) * partial_bytes(e, op)
        head = e.variable(0)
        with e.repeat(lambda: head.get() < n_head):
            n_heads = e.min(n_head - head.get(), rows)
            n = e.min(stop - t.get(), size)
            attend(e, op, env, base, t.get(), n, kv_head, head.get(), n_heads, first, last, to, n_partial)
            head.set(head.get() + n_heads)
        t.set(t.get() + size)
    counters = e.load_word(env + WORKSPACE) + e.load_word(op + SCRATCH)
    counter = counters + COUNTER * (e.load_i32(op + KV_HEADS) * token + kv_head)
    done = e.atomic_add(counter, last - first) + last - first
    with e.when(done.is_(n_blocks)), e.loop(token, stop) as i:
        merge_parts(e, op, env, base, i, kv_head, low, n_partial)


@function
def merge_parts(e, op, env, base, token, kv_head, first, n_partial):
    """Merges the blocks of one token, of which the first result is block `first`'s."""
    width, n_head, state, merged = v_stride(e, op), e.load_i32(op + HEADS), base + STATES, base + MERGED
    begin, end = blocks(e, *limits(e, op, env, token))
    with e.loop(0, n_head) as head:
        begin_row(e, state, merged, width)
        results = partials(e, op, env, token, kv_head, n_partial) + n_partial * head * partial_bytes(e, op)
        with e.loop(begin - first, end - first) as block:
            at = results + block * partial_bytes(e, op)
            merge(e, width, state, merged, at, at + PARTIAL)
        finish(e, op, state, merged, result_at(e, op, env, token, n_head * kv_head + head))


def _attention(e, op, env, begin, end):
    env = env + e.select((e.load_word(op + FLAGS) & OF_OUTPUTS).is_(0), e.word(0), WORD * Env.SIZE)
    with_unit = amx.has_tiles(e.context)
    base = e.stack(max(TILE_BYTES, attention_amx.TILE_BYTES) if with_unit else TILE_BYTES)
    if with_unit:
        use = attention_prompts.through_unit(e, op, env)
        with e.when(use):
            attend_ranges(e, op, env, base, begin, end)
        begin = e.select(use, end, begin)
    n_tokens, n_partial, unit = e.load_word(env + N_TOKENS), blocks_to_divide(e, op, env), e.variable(begin)
    n_tiles = (n_tokens + (TILE - 1)) // TILE
    with e.repeat(lambda: unit.get() < end):
        group, part = unit.get() // TILE, unit.get() % TILE
        n = e.min(TILE - part, end - unit.get())
        with e.choose(n_partial > 0) as (few, many):
            with few:
                attend_parts(e, op, env, base, group, part, part + n, n_partial)
            with many:
                token = group % n_tiles * TILE + part
                attend_tokens(e, op, env, base, token, e.min(token + n, n_tokens), group // n_tiles)
        unit.set(unit.get() + n)


# --- kernels -----------------------------------------------------------------------------------------------------

def _attention_of_floats(e, op, env, begin, end):
    e.facts.add(FLOATS)
    _attention(e, op, env, begin, end)


_attention_code, _attention_of_floats_code = intrinsic_of(_attention), intrinsic_of(_attention_of_floats)


def attention(op, env, begin, end):
    """Unit: see the module's docstring."""
    _attention_code(op, env, begin, end)


def attention_of_floats(op, env, begin, end):
    """The same for keys and values that are not quantized: compiled in half the time."""
    _attention_of_floats_code(op, env, begin, end)
