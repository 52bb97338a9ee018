"""Float16 and bfloat16 weights as int12, and activations as int16 to multiply them with: the forms of `int16_tiles`.

x86 adds two products of int16 to each 32-bit lane in the time of one float32 multiply-add. So matrices of float16 and
bfloat16 become integers there, of 12 bits, with one scale for 64 weights of a row: a token has to read three quarters
of the file's bytes, and what is lost is a hundredth of what 8 bits lose (docs/LOG.md). They become int16 on the way to
the registers. Activations get a scale of their own for the same 64 inputs.

    weights       |w| <= 2047, times float32    a unit: 8 pieces of 4 pairs of columns of 16 rows, 16 scales (float32)
    activations   |x| <= 4095, times float32    a record: the scale, 64 int16

A piece is three vectors of 64 bytes: the upper eight bits of two pairs, of the other two, and the lower four bits, in
the low halves of the bytes for the first two pairs. A pair as int16 is a vector of 16 rows x 2 columns; the lower half
of each 16 bytes of a vector of upper bits belongs to the first pair, so that interleaving them with the lower bits
gives both pairs.

The sum of 64 such products is exact in int32. Imports no Numba.
"""

from __future__ import annotations

import platform

BLOCK = 64  # inputs that share a scale
W_MAX = 2047
X_MAX = 4095
PIECE = 3 * 64  # bytes of 4 pairs of columns
SCALES = BLOCK // 8 * PIECE  # where in a unit the scales of 16 rows lie
UNIT = SCALES + 4 * 16
VALUES = 4  # where in a record the integers begin
RECORD = VALUES + 2 * BLOCK
assert BLOCK * W_MAX * X_MAX < 1 << 31


def preferred() -> bool:
    """Whether this machine multiplies int16 faster than float32."""
    return platform.machine().lower() in ("x86_64", "amd64")


def n_blocks(n_cols: int) -> int:
    return -(-n_cols // BLOCK)


def record_bytes(n_cols: int) -> int:
    """Bytes from the records of one token to those of the next; a multiple of 64, but not of 4096."""
    lines = -(-n_blocks(n_cols) * RECORD // 64)
    return 64 * (lines + (lines % 64 == 0))
