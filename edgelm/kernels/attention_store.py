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
from edgelm.kernels.attention_tiles import round_row, rounded
from edgelm.kernels.emit import I16x32
from edgelm.kernels.hadamard import turn
from edgelm.kernels.rope import rotate
from edgelm.kernels.words import Value, function, intrinsic_of

K, K_STRIDE, V, V_STRIDE, HEADS, DIM, V_DIM, K_OFFSET, V_OFFSET, GROUP, SCRATCH, ROPE, PAIRS, FLAGS = ARGS[:14]
FLOAT_ONE = 0x3F800000
COLUMNS = 16  # tokens whose keys are stored at once, if they come after each other


@function
def store_pairs(e, x, n, width, to):
    """n float32 at x to a column of a page of keys in pairs, `width` with padding. x is overwritten."""
    with e.when(n < width):
        e.store(x + 4 * n, e.lane(e.vector(0.0)))
    round_row(e, x, width)
    with e.loop(0, width // 2) as i:
        e.store(to + 4 * PAGE * i, e.load_f32(x + 4 * i))


@function
def store_pairs_of_columns(e, x, n, to):
    """16 rows of n float32 at x, a multiple of 16, to as many neighbouring columns of a page of keys in pairs."""
    in_turns = [lane // 2 + 8 * (lane % 2) for lane in range(16)]
    with e.loop(0, n, 16) as i:
        rows = [rounded(e, *(e.load(x + 4 * n * r + 4 * i) for r in (row, row + 8))) for row in range(8)]
        for pair, columns in enumerate(_transposed(e, [e.shuffle(row, row, in_turns) for row in rows])):
            e.store(to + 2 * PAGE * i + 4 * PAGE * pair, columns)


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
    """The columns of 16 vectors of 16 lanes: each round takes the lanes of two that are 8 apart in turns.

    Or of 8 vectors, 8 columns: of row r in the lanes with even numbers, of row r + 8 in the others.
    """
    low, high = ([i // 2 + 16 * (i % 2) for i in range(at, at + 16)] for at in (0, 16))
    n = len(rows)
    for _ in range(n.bit_length() - 1):
        pairs = zip(rows[: n // 2], rows[n // 2 :], strict=True)
        rows = [e.shuffle(x, y, lanes) for x, y in pairs for lanes in (low, high)]
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
            pairs = kind.is_(KINDS["bf16"])
            first = to + e.select(kind.is_(KINDS["f16"]), e.word(2), 4) * column
            with e.choose(n > 1) as (many, one):
                with many, e.choose(pairs) as (paired, single):
                    with paired:
                        store_pairs_of_columns(e, x, dim, first)
                    with single:
                        store_columns(e, x, dim, kind, first)
                with one, e.choose(pairs) as (paired, single):
                    with paired:
                        store_pairs(e, x, dim, width, first)
                    with single:
                        store_column(e, x, dim, kind, first)


@function
def store_pair_of_values(e, source, other, width, column, to):
    """A row of values in pairs, at position `column` of a page; and a row `other` at the next, if that is not 0.

    column is even then. `width` float32 are read of a row. Of a pair only what is stored is written: another thread may
    be writing its other half.
    """
    with e.loop(0, width, 16) as i:
        together = i // PAGE * PAGE
        line = 4 * e.min(width - together, PAGE)
        at = to + 2 * PAGE * together + line * (column // 2) + 4 * (i - together)
        row = e.load(source + 4 * i)
        with e.choose(other.is_not(0)) as (two, one):
            with two:
                halves = rounded(e, row, e.load(other + 4 * i))
                bits = e.b.bitcast(halves.llvm, I16x32)
                in_turns = [lane // 2 + 16 * (lane % 2) for lane in range(32)]
                e.store(at, e.shuffle(Value(e, bits), Value(e, bits), in_turns))
            with one:
                bits = Value(e, e.b.bitcast(rounded(e, row, row).llvm, I16x32))
                for lane in range(16):
                    e.store(at + 2 * (column % 2) + 4 * lane, e.lane(bits, lane))


@function
def store_values_in_pairs(e, op, env, head, token, n, page, column):
    """`store_value` for n tokens that come after each other in a page, and values in pairs."""
    size, i = e.load_word(op + V_DIM), e.variable(0)
    kind, stride = e.word(KINDS["bf16"]), e.load_word(op + V_STRIDE)
    width = value_stride(e, kind, size)
    source = e.load_word(env + WORKSPACE) + e.load_word(op + V) + token * stride + 4 * size * head
    to = page + e.load_word(op + V_OFFSET) + head_bytes(e, kind, width) * head
    with e.repeat(lambda: i.get() < n):
        at, own = column + i.get(), source + stride * i.get()
        two = (at % 2).is_(0) & (i.get() + 1 < n)
        store_pair_of_values(e, own, e.select(two, own + stride, 0), width, at, to)
        i.set(i.get() + e.select(two, e.word(2), 1))


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
        with e.choose(value_kind(e, op, FLAGS).is_(KINDS["bf16"])) as (pairs, others):
            with pairs:
                store_values_in_pairs(e, op, env, head, token, n.get(), page, position % PAGE)
            with others, e.loop(0, n.get()) as i:
                store_value(e, op, env, x, head, token + i, page, position % PAGE + i)
        unit.set(unit.get() + n.get())


_store_kv_code = intrinsic_of(_store_kv)


def store_kv(op, env, begin, end):
    """Unit: one KV head of one token. The first also sets the counters of `attention` to zero."""
    _store_kv_code(op, env, begin, end)
