"""Where attention finds what: the fields of its rows, what a tile of queries holds, and how pages hold keys and values.

Knows nothing of what is computed with them.
"""

from __future__ import annotations

from edgelm.kernels.abi import WORD, Env, Row
from edgelm.kernels.attention import BLOCK, CAUSAL, KEY_KIND, KINDS, VALUE_KIND
from edgelm.kernels.attention_quants import WEIGHTS as WEIGHTS_OF_ROW
from edgelm.kernels.emit import I1
from edgelm.kernels.words import Value, function
from edgelm.kv_types import BLOCK as DIMS
from edgelm.kv_types import PAGE, block_bytes

ROWS = 192  # of a tile: as many tokens as a thread takes at a time, of three heads
TILE_FLOATS = 24576  # values of all its queries: 96 KiB
CONVERT_ROWS = 12  # from so many rows on, half floats are converted once for all of them

WORKSPACE, N_TOKENS, POSITIONS, SEQUENCES, TABLES, LENGTHS, N_GROUPS, COS, SIN, TILES = (
    WORD * field for field in (
        Env.WORKSPACE, Env.N_TOKENS, Env.POSITIONS, Env.ROWS, Env.TABLES, Env.LENGTHS, Env.N_GROUPS, Env.COS,
        Env.SIN, Env.TILES,
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
STATES = CONVERTED + max(4 * BLOCK * PAGE, ROWS * WEIGHTS_OF_ROW)
STATE = 64  # bytes of a row's state:
LOW, HIGH = 0, 8  # words: the first position that it sees, and the one after the last
TOTAL_MAX, TOTAL_SUM, MAX, SUM = 16, 20, 24, 28  # float32: of all blocks so far, and of the last
QUERY_SCALE = 32  # float32, of a quantized query
AHEAD_OF = STATES + STATE * ROWS  # words: what will be read next, of the keys and values of a page that is being read
TILE_BYTES = AHEAD_OF + 64
MINUS_INFINITY = float("-inf")
FLOATS = "keys and values are not quantized"  # a fact: half of the code need not be compiled


def key_kind(e, op, flags=FLAGS):
    """Of KINDS; the bits of a number if keys are quantized. `flags` is the field of the row."""
    return e.load_word(op + flags) // KEY_KIND % 256


def value_kind(e, op, flags=FLAGS):
    return e.load_word(op + flags) // VALUE_KIND % 256


def is_quantized(kind):
    if FLOATS in kind.e.facts:
        return Value(kind.e, I1(0))
    return kind >= KINDS["q4_0"]


def whole(n, size):
    """n, or as much more as makes it a multiple of size."""
    return (n + (size - 1)) // size * size


def key_stride(e, kind, dim):
    """Values of a key as they lie in pages and tiles, with padding."""
    return e.select(is_quantized(kind), whole(dim, DIMS), e.select(kind.is_(KINDS["bf16"]), whole(dim, 2), dim))


def value_stride(e, kind, dim):
    """The same of a value: in whole vectors, or blocks."""
    return e.select(is_quantized(kind), whole(dim, DIMS), whole(dim, 16))


def k_stride(e, op):
    return key_stride(e, key_kind(e, op), e.load_i32(op + DIM))


def v_stride(e, op):
    return value_stride(e, value_kind(e, op), e.load_i32(op + V_DIM))


def head_bytes(e, kind, stride):
    """Bytes of a head's keys, or values, in a page."""
    floats = stride * e.select(kind.is_(KINDS["f32"]), e.word(4 * PAGE), 2 * PAGE)
    return e.select(is_quantized(kind), stride // DIMS * block_bytes(kind), floats)


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
def run_end(e, env, token, limit):
    """The first token after `token` that is not its successor in the same sequence, or `limit`."""
    rows, positions, end = e.load_word(env + SEQUENCES), e.load_word(env + POSITIONS), e.variable(token + 1)
    follows = e.variable(1)
    with e.repeat(lambda: (end.get() < limit) & follows.get().is_(1)):
        at = 4 * end.get()
        same = e.load_i32(rows + at).is_(e.load_i32(rows + 4 * token))
        ahead = e.load_i32(positions + at) - e.load_i32(positions + 4 * token)
        with e.choose(same & ahead.is_(end.get() - token)) as (then, otherwise):
            with then:
                end.set(end.get() + 1)
            with otherwise:
                follows.set(0)
    return end.get()
