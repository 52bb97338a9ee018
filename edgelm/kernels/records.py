"""Activations as int8: the record that every integer kernel multiplies with.

A record holds one row of activations: for each block of 32 inputs 64 bytes, one cache line,

    0   int8 (32,)   q: round to nearest even of x / d
    32  float32      d: max|x| / 127 of the block; 0 where that is no normal float32
    36  float32      d * sum(q), for weights that have a minimum; at 40 and 44 the same of inputs 0-15 and 16-31
    48  int32        -128 * sum(q), for weights stored with an offset; at 52 and 56 of inputs 0-15 and 16-31

and is padded to an odd number of cache lines, so that the records of a batch do not all meet in the same lines of the
cache. The number of blocks is rounded up to even; a block that pads is zero.

Imports no Numba; `quantize` writes records.
"""

from __future__ import annotations

BLOCK = 32  # inputs that share a scale
RECORD = 64  # bytes of a block
SCALE, SCALED_SUM, SCALED_SUM_LOW, SCALED_SUM_HIGH = 32, 36, 40, 44
OFFSET, OFFSET_LOW, OFFSET_HIGH = 48, 52, 56


def activation_bytes(n_cols: int) -> int:
    """Bytes from one record to the next; a multiple of 64. `n_cols` activations, a multiple of 32."""
    n_blocks = n_cols // BLOCK
    return RECORD * (n_blocks + n_blocks % 2 + 1)
