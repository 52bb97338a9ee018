"""Vectors as Numba values: a type whose data model is an LLVM vector, and the operations on it.

All kernels are written for 16 lanes of 32 bits. LLVM splits them into what the machine has: one register of AVX-512,
two of AVX2, four of NEON. Addresses are plain int64 values; nothing here checks bounds.

Knows nothing of formats or of instruction sets beyond what LLVM's generic vectors give: see `isa`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from edgelm.kernels.emit import F32, I8, I16, I32, I64, emit_fma, load_at, prefetch_at, spread, store_at


class Vec(types.Type):
    """A SIMD vector: `lanes` elements of the LLVM type `element`."""

    def __init__(self, name: str, element: ir.Type, lanes: int) -> None:
        self.llvm = ir.VectorType(element, lanes)
        self.element, self.lanes = element, lanes
        super().__init__(name=name)

    def __reduce__(self) -> Any:  # Numba's disk cache pickles signatures
        return _vec_by_name, (self.name,)


def _vec_by_name(name: str) -> Vec:
    return VECS[name]


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vec) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


f32x16 = Vec("f32x16", F32, 16)
i32x16 = Vec("i32x16", I32, 16)
VECS = {v.name: v for v in (f32x16, i32x16)}


# --- building blocks for code generators: plain functions over an IR builder -----------------------------------


def splat(b: ir.IRBuilder, scalar: ir.Value, vec: Vec) -> ir.Value:
    return spread(b, scalar, vec.llvm)


# --- the same, as functions for Numba code ----------------------------------------------------------------------

def _loader(vec: Vec) -> Any:
    @intrinsic
    def load(typingctx, address):
        def codegen(context, b, sig, args):
            return load_at(b, args[0], vec.llvm)
        return vec(types.int64), codegen
    return load


load_f32x16, load_i32x16 = (_loader(v) for v in (f32x16, i32x16))


def _scalar_loader(numba_type: types.Type, llvm_type: ir.Type) -> Any:
    @intrinsic
    def load(typingctx, address):
        def codegen(context, b, sig, args):
            return load_at(b, args[0], llvm_type)
        return numba_type(types.int64), codegen
    return load


load_i64 = _scalar_loader(types.int64, I64)
load_i32 = _scalar_loader(types.int32, I32)
load_u8 = _scalar_loader(types.uint8, I8)
load_i16 = _scalar_loader(types.int16, I16)
load_f32 = _scalar_loader(types.float32, F32)


@intrinsic
def prefetch(typingctx, address):
    """Asks for the cache line at `address`, any address, in the second-level cache."""

    def codegen(context, b, sig, args):
        prefetch_at(b, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def prefetch_to_write(typingctx, address):
    """Asks for the cache line at `address`, any address, to be written."""
    def codegen(context, b, sig, args):
        prefetch_at(b, args[0], near=True, to_write=True)
        return context.get_dummy_value()
    return types.void(types.int64), codegen


@intrinsic
def store(typingctx, address, value):
    """Stores a vector or a scalar of any of the types here."""
    def codegen(context, b, sig, args):
        store_at(b, args[1], args[0])
        return context.get_dummy_value()
    return types.void(types.int64, value), codegen


@intrinsic
def splat_f32(typingctx, x):
    def codegen(context, b, sig, args):
        return splat(b, args[0], f32x16)
    return f32x16(types.float32), codegen


@intrinsic
def splat_i32(typingctx, x):
    def codegen(context, b, sig, args):
        return splat(b, args[0], i32x16)
    return i32x16(types.int32), codegen


def _binary(vec: Vec, emit: Any) -> Any:
    @intrinsic
    def operation(typingctx, x, y):
        def codegen(context, b, sig, args):
            return emit(b, *args)
        return vec(vec, vec), codegen
    return operation


add_f32 = _binary(f32x16, lambda b, x, y: b.fadd(x, y))
sub_f32 = _binary(f32x16, lambda b, x, y: b.fsub(x, y))
mul_f32 = _binary(f32x16, lambda b, x, y: b.fmul(x, y))
max_f32 = _binary(f32x16, lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
add_i32 = _binary(i32x16, lambda b, x, y: b.add(x, y))


@intrinsic
def fma(typingctx, x, y, z):
    """x * y + z, rounded once where the machine can (see `emit_fma`)."""
    def codegen(context, b, sig, args):
        return emit_fma(context, b, *args)
    return f32x16(f32x16, f32x16, f32x16), codegen


def _halving(b: ir.IRBuilder, v: ir.Value, combine: Any) -> ir.Value:
    """Combines lanes pairwise, upper half with lower half, in an order that no option changes."""
    n = v.type.count
    while n > 1:
        n //= 2
        low, high = (ir.Constant(ir.VectorType(I32, n), list(range(at, at + n))) for at in (0, n))
        undefined = ir.Constant(v.type, ir.Undefined)
        v = combine(b.shuffle_vector(v, undefined, low), b.shuffle_vector(v, undefined, high))
    return b.extract_element(v, I32(0))


@intrinsic
def sum_f32(typingctx, x):
    """The sum of the lanes, always added in the same order."""
    def codegen(context, b, sig, args):
        return _halving(b, args[0], b.fadd)
    return types.float32(f32x16), codegen


@intrinsic
def lanes_max_f32(typingctx, x):
    def codegen(context, b, sig, args):
        return _halving(b, args[0], lambda p, q: b.select(b.fcmp_ordered(">", p, q), p, q))
    return types.float32(f32x16), codegen


@intrinsic
def sum_i32(typingctx, x):
    def codegen(context, b, sig, args):
        return _halving(b, args[0], b.add)
    return types.int32(i32x16), codegen
