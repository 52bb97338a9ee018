"""Stores keys and values in the pages of the KV cache, as `kv_types` says they lie there.

What is stored for a position depends on its key and value alone; but what is put into the padding of float values is
whatever follows them. Knows nothing of how pages are managed.
"""

from __future__ import annotations

from edgelm.kernels.abi import WORD
from edgelm.kernels.attention import COUNTER, HALVES, KINDS, LARGEST_HEAD, SPLIT_TOKENS
from edgelm.kernels.attention_layout import (
    ARGS,
    COS,
    DIMS,
    N_TOKENS,
    PAGE,
    POSITIONS,
    SIN,
    WORKSPACE,
    head_bytes,
    is_quantized,
    key_kind,
    key_stride,
    pages_of,
    run_end,
    value_kind,
    value_stride,
)
from edgelm.kernels.attention_quants import store_block
from edgelm.kernels.hadamard import turn
from edgelm.kernels.rope import rotate
from edgelm.kernels.words import function, intrinsic_of

K, K_STRIDE, V, V_STRIDE, HEADS, DIM, V_DIM, K_OFFSET, V_OFFSET, GROUP, SCRATCH, ROPE, PAIRS, FLAGS = ARGS[:14]
FLOAT_ONE = 0x3F800000
COLUMNS = 16  # tokens whose keys are stored at once, if they come after each other


@function
def store_column(e, x, n, kind, to):
    """n float32 at x to a column of a page of keys. x is overwritten."""
    with e.choose(kind.is_(KINDS["f16"])) as (f16, f32):
        with f16:
            with e.loop(0, n // 16 * 16, 16) as i:
                bits = e.narrow(e.load(x + 4 * i))
                for lane in range(16):
                    e.store(to + 2 * PAGE * (i + lane), e.lane(bits, lane))
            whole = n // 16 * 16
            rest = x + 4 * whole
            e.store(rest, e.narrow(e.load(rest)))
            with e.loop(whole, n) as i:
                e.store(to + 2 * PAGE * i, e.load_i16(rest + 2 * (i - whole)))
        with f32, e.loop(0, n) as i:
            e.store(to + 4 * PAGE * i, e.load_f32(x + 4 * i))


def _transposed(e, rows):
    """The columns of 16 vectors of 16 lanes: each round takes the lanes of two that are 8 apart in turns."""
    low, high = ([i // 2 + 16 * (i % 2) for i in range(at, at + 16)] for at in (0, 16))
    for _ in range(4):
        rows = [e.shuffle(x, y, lanes) for x, y in zip(rows[:8], rows[8:], strict=True) for lanes in (low, high)]
    return rows


@function
def store_columns(e, x, n, kind, to):
    """16 rows of n float32 at x, a multiple of 16, to as many neighbouring columns of a page of keys."""
    def write(size, convert):
        with e.loop(0, n, 16) as i:
            rows = [convert(e.load(x + 4 * n * row + 4 * i)) for row in range(COLUMNS)]
            for row, columns in enumerate(_transposed(e, rows)):
                e.store(to + size * PAGE * (i + row), columns)

    with e.choose(kind.is_(KINDS["f16"])) as (f16, f32):
        with f16:
            write(2, e.narrow)
        with f32:
            write(4, lambda keys: keys)


@function
def store_blocks(e, x, n, width, kind, column, keys, to):
    """n float32 at x to the blocks of a head, `width` wide with padding. x is overwritten."""
    turn(e, x, n, width)
    size = head_bytes(e, kind, e.word(DIMS))
    with e.loop(0, width // DIMS) as i:
        store_block(e, x + 4 * DIMS * i, kind, column, keys, to + size * i)


@function
def rotate_key(e, op, env, x, head, token):
    """A key, rotated, to x."""
    position, pairs, cos, sin = e.load_i32(e.load_word(env + POSITIONS) + 4 * token), *(e.variable(0) for _ in range(3))
    rope, dim = e.load_word(op + ROPE), e.load_word(op + DIM)
    with e.when(rope >= 0):
        pairs.set(e.load_word(op + PAIRS))
        angle = 4 * pairs.get() * position
        cos.set(e.load_word(e.load_word(env + COS) + WORD * rope) + angle)
        sin.set(e.load_word(e.load_word(env + SIN) + WORD * rope) + angle)
    source = e.load_word(env + WORKSPACE) + e.load_word(op + K) + token * e.load_word(op + K_STRIDE) + 4 * dim * head
    halves = e.load_word(op + FLAGS) & HALVES
    rotate(e, source, x, dim, pairs.get(), halves, cos.get(), sin.get(), FLOAT_ONE)


@function
def store_keys(e, op, env, x, head, token, n, page, column):
    """The keys of a token, or of COLUMNS of them that come after each other in a page."""
    dim, kind = e.load_word(op + DIM), key_kind(e, op, FLAGS)
    width = key_stride(e, kind, dim)
    to = page + e.load_word(op + K_OFFSET) + head_bytes(e, kind, width) * head
    with e.loop(0, n) as i:
        rotate_key(e, op, env, x + 4 * dim * i, head, token + i)
    with e.choose(is_quantized(kind)) as (numbers, floats):
        with numbers:
            store_blocks(e, x, dim, width, kind, column, 1, to)
        with floats:
            first = to + e.select(kind.is_(KINDS["f32"]), e.word(4), 2) * column
            with e.choose(n > 1) as (many, one):
                with many:
                    store_columns(e, x, dim, kind, first)
                with one:
                    store_column(e, x, dim, kind, first)


@function
def store_value(e, op, env, x, head, token, page, column):
    n, kind = e.load_word(op + V_DIM), value_kind(e, op, FLAGS)
    source = e.load_word(env + WORKSPACE) + e.load_word(op + V) + token * e.load_word(op + V_STRIDE) + 4 * n * head
    width = value_stride(e, kind, n)
    to = page + e.load_word(op + V_OFFSET) + head_bytes(e, kind, width) * head
    with e.when(is_quantized(kind)):
        with e.loop(0, n, 16) as i:
            e.store(x + 4 * i, e.load(source + 4 * i))
        store_blocks(e, x, n, width, kind, column, 0, to)
    with e.when(kind.is_(KINDS["f32"])), e.loop(0, n, 16) as i:
        e.store(to + 4 * width * column + 4 * i, e.load(source + 4 * i))
    with e.when(kind.is_(KINDS["f16"])), e.loop(0, n, 16) as i:
        e.store(to + 2 * width * column + 2 * i, e.narrow(e.load(source + 4 * i)))


def _store_kv(e, op, env, begin, end):
    x, n_tokens = e.stack(4 * COLUMNS * LARGEST_HEAD + 64), e.load_word(env + N_TOKENS)
    counters = e.load_word(env + WORKSPACE) + e.load_word(op + SCRATCH)
    with e.when(begin.is_(0)), e.loop(0, SPLIT_TOKENS * e.load_word(op + HEADS)) as i:
        e.store(counters + COUNTER * i, e.word(0))
    in_vectors = is_quantized(key_kind(e, op, FLAGS)).is_(0) & (e.load_word(op + DIM) % 16).is_(0)
    unit = e.variable(begin)
    with e.repeat(lambda: unit.get() < end):
        head, token = unit.get() // n_tokens, unit.get() % n_tokens
        position = e.load_i32(e.load_word(env + POSITIONS) + 4 * token)
        page = e.load_word(pages_of(e, env, token, e.load_word(op + GROUP)) + WORD * (position // PAGE))
        left = e.min(e.min(end - unit.get(), n_tokens - token), PAGE - position % PAGE)
        n = e.variable(1)
        with e.when(in_vectors & (left >= COLUMNS)), e.when(run_end(e, env, token, token + COLUMNS) - token >= COLUMNS):
            n.set(COLUMNS)
        store_keys(e, op, env, x, head, token, n.get(), page, position % PAGE)
        with e.loop(0, n.get()) as i:
            store_value(e, op, env, x, head, token + i, page, position % PAGE + i)
        unit.set(unit.get() + n.get())


_store_kv_code = intrinsic_of(_store_kv)


def store_kv(op, env, begin, end):
    """Unit: one KV head of one token. The first also sets the counters of `attention` to zero."""
    _store_kv_code(op, env, begin, end)
