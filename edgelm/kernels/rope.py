"""Rotary position embedding of one head, for the kernels that need it: see Su et al. 2021, "RoFormer".

Knows nothing of how angles come about: it gets the cosines and sines of a position.
"""

from __future__ import annotations

from edgelm.kernels.emit import F32, I32
from edgelm.kernels.words import Value, function

EVEN, ODD = list(range(0, 32, 2)), list(range(1, 32, 2))
ZIP_LOW, ZIP_HIGH = ([i // 2 + 16 * (i % 2) for i in range(at, at + 16)] for at in (0, 16))


def _turn(e, a, b, c, s):
    return a * c - b * s, e.fma(a, s, b * c)


@function
def rotate(e, x, y, n, pairs, halves, cos, sin, scale_bits):
    """y = x rotated and times scale: n columns, of which 2 * pairs turn. y may be x.

    x, y, cos, sin are addresses of float32; scale_bits are the bits of one. With `halves` column i turns with column
    i + pairs, else 2i with 2i + 1.
    """
    scale = Value(e, e.b.bitcast(e.b.trunc(scale_bits.llvm, I32), F32))
    factor, whole = e.vector(scale), pairs - pairs % 16
    with e.loop(0, whole, 16) as i:
        c, s = e.load(cos + 4 * i) * factor, e.load(sin + 4 * i) * factor
        with e.choose(halves.is_not(0)) as (then, otherwise):
            with then:
                first, second = 4 * i, 4 * (i + pairs)
                a, b = _turn(e, e.load(x + first), e.load(x + second), c, s)
                e.store(y + first, a)
                e.store(y + second, b)
            with otherwise:
                v, w = e.load(x + 8 * i), e.load(x + 8 * i + 64)
                a, b = _turn(e, e.shuffle(v, w, EVEN), e.shuffle(v, w, ODD), c, s)
                e.store(y + 8 * i, e.shuffle(a, b, ZIP_LOW))
                e.store(y + 8 * i + 64, e.shuffle(a, b, ZIP_HIGH))
    with e.loop(whole, pairs) as i:  # one by one, through a vector: the same operations
        c, s = e.vector(e.load_f32(cos + 4 * i)) * factor, e.vector(e.load_f32(sin + 4 * i)) * factor
        first = e.select(halves.is_not(0), 4 * i, 8 * i)
        second = e.select(halves.is_not(0), 4 * (i + pairs), 8 * i + 4)
        a, b = _turn(e, e.vector(e.load_f32(x + first)), e.vector(e.load_f32(x + second)), c, s)
        e.store(y + first, e.lane(a))
        e.store(y + second, e.lane(b))
    turned = 2 * pairs
    whole = turned + (n - turned) // 16 * 16
    with e.loop(turned, whole, 16) as i:
        e.store(y + 4 * i, e.load(x + 4 * i) * factor)
    with e.loop(whole, n) as i:
        e.store(y + 4 * i, e.load_f32(x + 4 * i) * scale)
