"""Activations as int8: the record that every integer kernel multiplies with.

A record holds one row of activations: for each block of 32 inputs 64 bytes, one cache line,

    0   int8 (32,)   q: round to nearest even of x / d
    32  float32      d of inputs 0-15: max|x| * (1 / 127) without its last two bits, 0 if that is no normal number
    36  float32      d of inputs 16-31
    40  float32      sum of d * q over the block, for weights that have a minimum
    44  float32      -MAGIC * d of inputs 0-15, exactly; at 48 of inputs 16-31
    52  int32        bits of MAGIC, less 128 * sum(q) of inputs 0-15, for weights stored with an offset; at 56 of 16-31

and is padded to an odd number of cache lines, so that the records of a batch do not all meet in the same lines of the
cache. The number of blocks is rounded up to even; a block that pads is zero.

Whole numbers between -2 ** 22 and 2 ** 22 added to the bits of MAGIC as a float32 give the bits of their sum with MAGIC:
that is how sums of products become floats without being converted.

Where 8 bits are too few, two records stand for one row: the second holds what the first is short of, with scales of its
own, and products with either are added. That makes about 15 bits.

Imports no Numba; `quantize` writes records.
"""

from __future__ import annotations

BLOCK = 32  # inputs of a block; each half has a scale: one for all 32 nearly doubles the divergence (docs/LOG.md)
RECORD = 64  # bytes of a block
SCALE_LOW, SCALE_HIGH = 32, 36
SCALED_SUM = 40
MAGIC_LOW, MAGIC_HIGH = 44, 48
OFFSET_LOW, OFFSET_HIGH = 52, 56
MAGIC, MAGIC_BITS = 1.5 * 2.0**23, 0x4B400000


def activation_bytes(n_cols: int) -> int:
    """Bytes from one record to the next; a multiple of 64. `n_cols` activations, a multiple of 32."""
    n_blocks = n_cols // BLOCK
    return RECORD * (n_blocks + n_blocks % 2 + 1)
