"""Activations as int8: the record that every integer kernel multiplies with.

A record holds one row of activations: for each block of 32 inputs 64 bytes, one cache line,

    0   int8 (32,)   q: round to nearest even of x / d
    32  float32      d of inputs 0-15: max|x| * (1 / 127) without its last two bits; 0 if that is less than any normal
                     number, NaN if one of them is: what is multiplied with that token is NaN, too
    36  float32      d of inputs 16-31
    40  float32      sum of d * q over the block, for weights that have a minimum
    44  float32      -MAGIC * d of inputs 0-15, exactly; at 48 of inputs 16-31
    52  int32        `Isa.first`, at which sums start, less 128 * sum(q) of inputs 0-15, for weights stored with an
                     offset; at 56 of inputs 16-31
    60  int32        not 0 if the block has a remainder

and at its end, in the last line, two float32: a unit, in which all d are given, and 1 / unit. So sums of products
are multiplied with the unit at their end. It is 1, or, where `Isa.whole_scales`, a power of two such that all d are
whole numbers of `Isa.factor_bits` bits, none of them 0; 0 if no d is a normal number, NaN if one is not finite. There,

    44  int16        both d
    48  int32        -8 * (d * sum of q of inputs 0-15 + d * sum of q of inputs 16-31), for weights of 4 bits less 8
    52  int32        where `Isa.scales_sums`, -32 * d * sum of q of inputs 0-15, for weights of 6 bits less 32; at 56
                     of inputs 16-31

Where `Isa.in_turn`, the q of both halves take turns, four at a time.

The number of blocks is rounded up to even; a block that pads is zero. Half way to the next record is a place for as
many remainders: what q * d is short of, for a block of which q * d would be too inexact, in the same form; else zeros.
Adding products with zeros changes nothing, so a kernel may leave them out or not. Most of the inexactness of a row is
in few of its blocks, those with an outlier: a limit chooses them, beside what the whole row is. From one record to the
next it is 8 cache lines more than a multiple of 16: so eight blocks, which a matrix kernel goes over at a time, of
eight records lie in all 64 sets of a cache, and not in the same.

A whole number between -2 ** 22 and 2 ** 22 added to the bits of MAGIC as a float32 gives the bits of its sum with
MAGIC: that is how sums of products become floats without being converted.

Imports no Numba; `quantize` writes records.
"""

from __future__ import annotations

BLOCK = 32  # inputs of a block; each half has a scale: one for all 32 nearly doubles the divergence (docs/LOG.md)
RECORD = 64  # bytes of a block
SCALE_LOW, SCALE_HIGH = 32, 36
SCALED_SUM = 40
MAGIC_LOW, MAGIC_HIGH = 44, 48
FACTORS, ZERO = 44, 48
OFFSET_LOW, OFFSET_HIGH = 52, 56
FLAG = 60
LIMIT = 2.4e-3  # times the mean square of its row the sum of d² of a block must be for a remainder (docs/LOG.md);
PRODUCT_LIMIT = 7.2e-3  # if it is a product of two values, which has many outliers; those far out make most of the loss
FRAGILE = 1 / 3  # times both for a model with weights of a coarse format, to which the same rounding does more
MAX_BLOCKS = 1 << 14  # of a row
MAX_TOKENS = 256  # of a unit of work: a byte holds the number of each, and 512 are no faster (docs/LOG.md)
ENTRY = 3  # bytes that say where a unit has remainders: which block of a slab, and which two tokens; or one, twice
MAGIC, MAGIC_BITS = 1.5 * 2.0**23, 0x4B400000


def chunk_at(chunk: int, in_turn: bool) -> int:
    """Where in a record inputs 4 * chunk and the three that follow are; in_turn: whether halves take turns."""
    return 8 * (chunk % 4) + 4 * (chunk // 4) if in_turn else 4 * chunk


def activation_bytes(n_cols: int) -> int:
    """Bytes from one record to the next; an odd multiple of 512. `n_cols` activations, a multiple of 32."""
    return 2 * RECORD * ((n_cols // BLOCK + 1 + 4) // 8 * 8 + 4)
