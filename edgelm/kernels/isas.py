"""Any machine, and the choice among all of them. Made while Numba compiles, from the features it compiles for."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgelm.kernels.emit import I32x16, repeat, target
from edgelm.kernels.isa import Form, Isa, Value
from edgelm.kernels.isa_arm import Neon, NeonDot, NeonI8mm
from edgelm.kernels.isa_x86 import AMD, Avx2, Avx512, Ssse3, Vnni256, Vnni512, Vnni512Zen


class Portable(Isa):
    """Any machine: bytes widened to 16 bits, two products added at a time (LLVM finds `pmaddwd` and its like)."""

    needs = (frozenset(),)
    tokens = (2, 1)

    def form(self, bits: int, zero: bool) -> Form:
        return Form.SIGNED if zero else Form.LOW

    def step(self, b: ir.IRBuilder, sums: Any, w: Value, x: Value, form: Form, bits: int) -> Any:
        w = b.bitcast(w, I32x16)
        for byte in range(4):
            u = b.shl(w, repeat(I32x16, 24 - 8 * byte))
            u = (b.ashr if form is Form.SIGNED else b.lshr)(u, repeat(I32x16, 24))
            s = b.ashr(b.shl(x, repeat(I32x16, 24 - 8 * byte)), repeat(I32x16, 24))
            sums = b.add(sums, b.mul(u, s))
        return sums


ISAS: tuple[type[Isa], ...] = (
    Vnni512Zen, Vnni512, Vnni256, Avx512, Avx2, Ssse3, NeonI8mm, NeonDot, Neon, Portable,
)  # fmt: skip


def select(context: Any) -> Isa:
    """The first of `ISAS` that the machine has."""
    machine, features = target(context)
    for isa in ISAS:
        if (not isa.machines or machine in isa.machines) and any(needs <= features for needs in isa.needs):
            return isa()
    raise AssertionError("the portable one fits every machine")


def is_amd(context: Any) -> bool:
    """Whether Numba compiles for a processor of AMD's."""
    return AMD in target(context)[1]
