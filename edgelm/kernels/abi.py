"""What a kernel is given: the layout of an operation's row, and of the environment that all rows share.

Every kernel has the C signature ``void kernel(int64 op, int64 env, int64 begin, int64 end)``. `op` is the address
of its row in the op table, `env` the address of the environment, and [begin, end) the units of work to do. The
executor hands out ranges of units to threads in any order, so two units of one operation never write the same byte.

A row holds what is fixed when a program is recorded, the environment what changes from call to call. Buffers are
given as byte offsets into the workspace (`Env.WORKSPACE`), weights as absolute addresses: so one program can run
in several workspaces at once.

Operations that ask where a token stands can be told to ask the second environment, if their rows are wanted outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

WORD = 8  # bytes of one field of a row or of the environment


class Row(IntEnum):
    """Fields of an operation, int64 each. Kernels name their own arguments from `ARGS` on."""

    KERNEL = 0  # address of the kernel
    UNITS = 1  # units of work if UNITS_PER == 0, else units for every UNITS_PER items counted by COUNT
    UNITS_PER = 2
    COUNT = 3  # which field of the environment counts the items: Env.N_TOKENS or Env.N_OUTPUTS
    GRAIN = 4  # units that a thread takes at least at a time
    BARRIER = 5  # 1: what follows needs the result of this row and of the rows before it
    READS = 6  # address of constants that the units read, one behind the other, or 0: a thread that waits fetches them
    READ_BYTES = 7  # that each unit reads there
    ARGS = 8
    SIZE = 24


class Env(IntEnum):
    """Fields of the environment, int64 each. Addresses unless said otherwise."""

    WORKSPACE = 0  # base of the activation buffers
    N_TOKENS = 1  # count: T, tokens in this call
    N_OUTPUTS = 2  # count: R, rows that want logits
    TOKENS = 3  # int32 (T,)
    POSITIONS = 4  # int32 (T,)
    ROWS = 5  # int32 (T,): which sequence of this call a token belongs to
    OUTPUTS = 6  # int32 (R,): which tokens want logits
    TABLES = 7  # int64 (n_sequences, n_groups): addresses of page tables, themselves int64 addresses of pages
    LENGTHS = 8  # int32 (n_sequences,): tokens of each sequence once this call is done
    COS = 9  # int64 (n_ropes,): addresses of float32 (positions, pairs) tables
    SIN = 10
    LOGITS = 11  # float32 (R, vocab), written by the last operation
    N_THREADS = 12  # count
    N_GROUPS = 13  # count: cache groups, the row length of TABLES
    YIELD = 14  # void (*)(void): gives the core away
    TILES = 15  # count: of tokens, or of outputs, from which they go through the matrix unit; 0: none do
    SIZE = 16


ENVS = 2  # environments, one behind the other; in the second, the tokens are those that want logits


def row_of(kernel: int, units: int, units_per: int, count: int, grain: int, args: Sequence[int]) -> list[int]:
    """A row that the rows after it wait for; kernel: its address."""
    row = [0] * Row.SIZE
    row[Row.KERNEL], row[Row.UNITS], row[Row.UNITS_PER], row[Row.COUNT] = kernel, units, units_per, int(count)
    row[Row.GRAIN], row[Row.BARRIER] = grain, 1
    row[Row.ARGS : Row.ARGS + len(args)] = args
    return row


def float_bits(x: float) -> int:
    """A float32 as the low half of a field."""
    return int(np.float32(x).view(np.uint32))
