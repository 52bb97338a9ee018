"""The orthonormal Hadamard transform of a head, in place: what protects quantized keys and values from outliers.

The same sums in the same order as `kv_types.hadamard`, so that both give the same bits.
"""

from __future__ import annotations

from llvmlite import ir

from edgelm.kernels.emit import F32x16
from edgelm.kernels.words import Value, function


def _within(e, x, step):
    """Sums and differences of lanes that are `step` apart."""
    signs = Value(e, ir.Constant(F32x16, [-1.0 if lane & step else 1.0 for lane in range(16)]))
    return e.fma(x, signs, e.shuffle(x, x, [lane ^ step for lane in range(16)]))


@function
def hadamard(e, x, n, size):
    """Transforms n float32 at x, `size` at a time, a power of two that divides n. Of what lies behind them, up to a
    whole vector of 16, zeros stay zeros."""
    with e.loop(0, n, 16) as i:
        vector = e.variable(e.load(x + 4 * i))
        for step in (1, 2, 4, 8):
            with e.when(size > step):
                vector.set(_within(e, vector.get(), step))
        e.store(x + 4 * i, vector.get())
    step = e.variable(16)
    with e.repeat(lambda: step.get() < size):
        first = e.variable(0)
        with e.repeat(lambda: first.get() < n):
            with e.loop(first.get(), first.get() + step.get(), 16) as i:
                a, b = e.load(x + 4 * i), e.load(x + 4 * (i + step.get()))
                e.store(x + 4 * i, a + b)
                e.store(x + 4 * (i + step.get()), a - b)
            first.set(first.get() + 2 * step.get())
        step.set(2 * step.get())
    factor = e.vector(1.0) / e.vector(e.intrinsic("llvm.sqrt.f32", e.to_f32(size)))
    with e.loop(0, n, 16) as i:
        e.store(x + 4 * i, e.load(x + 4 * i) * factor)
