"""Float16 and bfloat16 weights as int16, and activations to multiply them with: the forms of `int16_tiles`.

x86 adds two products of int16 to each 32-bit lane in the time of one float32 multiply-add. So matrices of float16 and
bfloat16 become integers there, with one scale for 64 weights of a row; the scale is a power of two, and so
float16 is exact down to a quarter of the largest weight there, bfloat16 down to a 32nd. Activations get a scale of
their own for the same 64 inputs.

    weights       |w| <= 8191, times 2 ** k          a unit: 32 pairs of columns of 16 rows (int16), 16 scales (float32)
    activations   |x| <= 4095, times float32         a record: the scale, 64 int16

The sum of 64 such products is exact in int32. Imports no Numba.
"""

from __future__ import annotations

import platform

BLOCK = 64  # inputs that share a scale
WEIGHT_BITS = 13
X_MAX = 4095
SCALES = 2 * 16 * BLOCK  # where in a unit the scales of 16 rows lie
UNIT = SCALES + 4 * 16
VALUES = 4  # where in a record the integers begin
RECORD = VALUES + 2 * BLOCK
assert BLOCK * ((1 << WEIGHT_BITS) - 1) * X_MAX < 1 << 31


def preferred() -> bool:
    """Whether this machine multiplies int16 faster than float32."""
    return platform.machine().lower() in ("x86_64", "amd64")


def n_blocks(n_cols: int) -> int:
    return -(-n_cols // BLOCK)


def record_bytes(n_cols: int) -> int:
    """Bytes from the records of one token to those of the next; a multiple of 64, but not of 4096."""
    lines = -(-n_blocks(n_cols) * RECORD // 64)
    return 64 * (lines + (lines % 64 == 0))
