"""Rotary position embedding of one head, for the kernels that need it: see Su et al. 2021, "RoFormer".

Knows nothing of how angles come about: it gets the cosines and sines of a position.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic

from edgelm.kernels.simd import (
    I32,
    f32x16,
    fma,
    load_f32,
    load_f32x16,
    mul_f32,
    splat_f32,
    store,
    sub_f32,
)

_F32 = np.float32


def _shuffle(order):
    @intrinsic
    def shuffle(typingctx, x, y):
        def codegen(context, b, sig, args):
            return b.shuffle_vector(*args, ir.Constant(ir.VectorType(I32, 16), order))
        return f32x16(f32x16, f32x16), codegen
    return shuffle


even, odd = _shuffle(list(range(0, 32, 2))), _shuffle(list(range(1, 32, 2)))
zip_low, zip_high = (_shuffle([i // 2 + 16 * (i % 2) for i in range(at, at + 16)]) for at in (0, 16))


@njit
def rotate(x, y, n, pairs, halves, cos, sin, scale):
    """y = x rotated and times scale: n columns, of which 2 * pairs turn. y may be x.

    x, y, cos, sin are addresses of float32. With `halves` column i turns with column i + pairs, else 2i with 2i + 1.
    """
    factor = splat_f32(scale)
    whole = pairs - pairs % 16
    for i in range(0, whole, 16):
        c, s = mul_f32(load_f32x16(cos + 4 * i), factor), mul_f32(load_f32x16(sin + 4 * i), factor)
        if halves != 0:
            a, b = load_f32x16(x + 4 * i), load_f32x16(x + 4 * (i + pairs))
            store(y + 4 * i, sub_f32(mul_f32(a, c), mul_f32(b, s)))
            store(y + 4 * (i + pairs), fma(a, s, mul_f32(b, c)))
        else:
            v, w = load_f32x16(x + 8 * i), load_f32x16(x + 8 * i + 64)
            a, b = even(v, w), odd(v, w)
            v, w = sub_f32(mul_f32(a, c), mul_f32(b, s)), fma(a, s, mul_f32(b, c))
            store(y + 8 * i, zip_low(v, w))
            store(y + 8 * i + 64, zip_high(v, w))
    for i in range(whole, pairs):
        c1, s1 = _F32(load_f32(cos + 4 * i) * scale), _F32(load_f32(sin + 4 * i) * scale)
        first, second = 8 * i, 8 * i + 4
        if halves != 0:
            first, second = 4 * i, 4 * (i + pairs)
        a1, b1 = load_f32(x + first), load_f32(x + second)
        store(y + first, _F32(_F32(a1 * c1) - _F32(b1 * s1)))
        store(y + second, _F32(_F32(a1 * s1) + _F32(b1 * c1)))
    turned = 2 * pairs
    whole = turned + (n - turned) // 16 * 16
    for i in range(turned, whole, 16):
        store(y + 4 * i, mul_f32(load_f32x16(x + 4 * i), factor))
    for i in range(whole, n):
        store(y + 4 * i, _F32(load_f32(x + 4 * i) * scale))
