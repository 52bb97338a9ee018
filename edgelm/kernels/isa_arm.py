"""ARM: signed bytes, from plain NEON on. Source: Arm C language extensions (sdot, smull, addp, saddlp)."""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir

from edgelm.kernels.emit import I8, I16, I32, I32x16, call, load_at, repeat, undefined
from edgelm.kernels.isa import X_MAX, Form, Isa, Narrow, Partial, Value, apart, parts

I32x4 = ir.VectorType(I32, 4)


class _Neon(Isa):
    machines = ("aarch64",)
    n_parts = 4
    shifts_bytes = True

    def form(self, bits: int, zero: bool) -> Form:
        return Form.SIGNED if zero else Form.LOW

    def direct_form(self, bits: int, zero: bool) -> Form:
        """To add the offset of 16 inputs once takes less than to subtract the zero point of each."""
        return Form.LOW if bits <= 6 else Form.SIGNED

    def input(self, b: ir.IRBuilder, record: Value, chunk: int) -> Value:
        """One lane of a register that holds four chunks: `sdot` takes a lane as it is."""
        four = load_at(b, b.add(record, record.type(16 * (chunk // 4))), ir.VectorType(I32, 4), 4)
        return b.shuffle_vector(four, undefined(four.type), repeat(I32x16, chunk % 4))

    def lookup(self, b: ir.IRBuilder, table: list[int], index: Value) -> Value:
        entries = ir.Constant(ir.VectorType(I8, 16), table)
        name = "llvm.aarch64.neon.tbl1.v16i8"
        return apart(b, 4, partial(call, b, name, entries.type, entries), index)


class NeonDot(_Neon):
    """ARMv8.2 dot product: `sdot` adds 16 products of signed bytes to 4 lanes."""

    needs = (frozenset({"dotprod"}),)
    tokens = (2, 1)  # of 32 registers, 16 hold sums and products; more tokens spill
    def step(self, b: ir.IRBuilder, sums: Any, w: Value, x: Value, form: Form, bits: int) -> Any:
        add = partial(call, b, "llvm.aarch64.neon.sdot.v4i32.v16i8", I32x4)
        return apart(b, 4, add, sums, w, b.bitcast(x, w.type))


class NeonI8mm(NeonDot):
    """ARMv8.6 matrix products: `smmla` adds 32 products of signed bytes, of two rows with two tokens, to 4 lanes."""

    needs = (frozenset({"dotprod", "i8mm"}),)
    two_by_two, factor_bits = True, 15

    def join(self, b: ir.IRBuilder, low: Value, high: Value, factors: Value) -> Value:
        upper = repeat(I32x16, 16)
        first, second = b.ashr(b.shl(factors, upper), upper), b.ashr(factors, upper)
        return b.add(b.mul(low, first), b.mul(high, second))

    def step_pair(self, b: ir.IRBuilder, sums: Value, w: Value, x: Value) -> Value:
        name = "llvm.aarch64.neon.smmla.v4i32.v16i8"
        return apart(b, 4, lambda own, u: call(b, name, I32x4, own, u, x), sums, w)


class Neon(Narrow, _Neon):
    """ARMv8.0: products in 16 bits, neighbours added."""

    needs = (frozenset(),)
    tokens = (1,)

    def most(self, form: Form, bits: int) -> int:
        return 32767 // (2 * X_MAX * (1 << bits if form is Form.LOW else 1 << (bits - 1)))

    def products(self, b: ir.IRBuilder, w: Value, x: Value, form: Form) -> list[Value]:
        """The forms are LOW of at most 6 bits and SIGNED: both are good signed bytes."""
        i16x8 = ir.VectorType(I16, 8)
        return [
            b.mul(b.sext(u, i16x8), b.sext(s, i16x8))
            for u, s in zip(parts(b, w, 8), parts(b, b.bitcast(x, w.type), 8), strict=True)
        ]

    def widened(self, b: ir.IRBuilder, sums: Partial, narrow: list[Value]) -> list[Value]:
        done = []
        for a, low, high in zip(sums.wide, narrow[::2], narrow[1::2], strict=True):
            pairs = call(b, "llvm.aarch64.neon.addp.v8i16", low.type, low, high)
            done.append(b.add(a, call(b, "llvm.aarch64.neon.saddlp.v4i32.v8i16", a.type, pairs)))
        return done
