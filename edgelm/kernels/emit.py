"""Pieces of LLVM code that generators share: types, constants, loads, conversions, over an IR builder.

Imports no Numba, so that the descriptions of formats, which emit code when asked, can be read without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
F32x16, I64x8, I64x16, I32x16, I32x32, I16x16, I16x32, I16x64, I8x16, I8x64 = (
    ir.VectorType(element, lanes)
    for element, lanes in (
        (F32, 16), (I64, 8), (I64, 16), (I32, 16), (I32, 32), (I16, 16), (I16, 32), (I16, 64), (I8, 16), (I8, 64),
    )
)
_IN_TURNS = ir.Constant(ir.VectorType(I32, 32), [i + 16 * odd for i in range(16) for odd in (0, 1)])


# Constants are kept: most of the time that it takes to generate code goes into writing them down.


def repeat(type_: ir.VectorType, value: float) -> ir.Constant:
    """A constant with `value` in each lane."""
    return _repeat(type_, value, math.copysign(1, value))


@cache
def _repeat(type_: ir.VectorType, value: float, sign: float) -> ir.Constant:  # 0.0 == -0.0
    return ir.Constant(type_, [value] * type_.count)


@cache
def undefined(type_: ir.Type) -> ir.Constant:
    return ir.Constant(type_, ir.Undefined)


@cache
def indices(first: int, n: int) -> ir.Constant:
    """first, first + 1, …: the lanes that a shuffle picks."""
    return ir.Constant(ir.VectorType(I32, n), list(range(first, first + n)))


@cache
def _zeros(type_: ir.VectorType) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, type_.count), None)


def spread(b: ir.IRBuilder, scalar: ir.Value, type_: ir.VectorType) -> ir.Value:
    """A vector with `scalar` in each lane."""
    one = b.insert_element(undefined(type_), scalar, I32(0))
    return b.shuffle_vector(one, undefined(type_), _zeros(type_))


def shuffle(b: ir.IRBuilder, low: ir.Value, high: ir.Value, lanes: list[int]) -> ir.Value:
    """Some lanes of two vectors, those of the second one counted on from those of the first."""
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of each two unsigned integers."""
    return b.select(b.icmp_unsigned(">", x, y), x, y)


def across(b: ir.IRBuilder, vectors: list[ir.Value], combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """The 16 lanes of each vector combined: as many lanes as there are vectors, a power of two."""
    def halves(one: ir.Value, other: ir.Value, piece: int) -> list[ir.Value]:
        n = one.type.count if one is other else 2 * one.type.count
        lanes = ([i for i in range(n) if i // piece % 2 == part] for part in range(2))
        return [shuffle(b, one, other, each) for each in lanes]

    piece = 16  # lanes that each of them has in a vector
    while len(vectors) > 1:
        piece //= 2
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [combine(*halves(*pair, piece)) for pair in pairs]
    (v,) = vectors
    while piece > 1:
        piece //= 2
        v = combine(*halves(v, v, 1))
    return v


def call(b: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Calls an LLVM intrinsic or an external function by name."""
    fn = b.module.globals.get(name)
    if fn is None:
        fn = ir.Function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(fn, args)


def load_at(b: ir.IRBuilder, address: ir.Value, type_: ir.Type, align: int = 1) -> ir.Value:
    return b.load(b.inttoptr(address, type_.as_pointer()), align=align)


def store_at(b: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = 1) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=align)


def stack(b: ir.IRBuilder, n_bytes: int) -> ir.Value:
    """Address of uninitialised memory on the stack (`cgutils.alloca_once` would fill it with zeros, for minutes)."""
    with b.goto_entry_block():
        memory = b.alloca(ir.ArrayType(I8, n_bytes))
        memory.align = 64
        return b.ptrtoint(memory, I64)


def opaque(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """An address, or integers in a register of x86, of which LLVM knows no more: an empty piece of assembler.

    So it makes no chain of additions, or does what follows after all that comes before.
    """
    return assembler(b, value.type, "", f"={_register(value)},0", [value])


def _register(value: ir.Value) -> str:
    """Where it may be: any of 32 registers for 64 bytes, or of 16."""
    if not isinstance(value.type, ir.VectorType):
        return "r"
    return "v" if value.type.count * value.type.element.width == 512 else "x"


def fence(b: ir.IRBuilder) -> None:
    """Loads stay on their side of this place: LLVM would begin them all at once, and run out of registers."""
    b.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)


def here(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Integers, computed before this place, and before anything behind it is loaded: a `fence` for vectors of x86."""
    function = ir.FunctionType(value.type, [value.type])
    return b.asm(function, "", f"={_register(value)},0,~{{memory}}", [value], side_effect=True)


def assembler(b: ir.IRBuilder, type_: ir.Type, code: str, places: str, values: list[ir.Value]) -> ir.Value:
    """What a piece of assembler makes of `values`, in LLVM's notation; places: where it has its result, and them."""
    _load_assembler()
    return b.call(ir.InlineAsm(ir.FunctionType(type_, [v.type for v in values]), code, places), values)


@cache
def _load_assembler() -> None:
    """Without LLVM's assembler LLVM ends the process where it meets some."""
    from llvmlite.binding import initialize_native_asmparser

    initialize_native_asmparser()


def prefetch_at(b: ir.IRBuilder, address: ir.Value, near: bool = False, to_write: bool = False) -> None:
    """Asks for the cache line at `address`, any address, in the second-level cache; near: in the first."""
    how = I32(int(to_write)), I32(3 if near else 2), I32(1)
    call(b, "llvm.prefetch.p0", ir.VoidType(), b.inttoptr(address, I8.as_pointer()), *how)


def target(context: Any) -> tuple[str, frozenset[str]]:
    """(machine, features) that Numba compiles for; its disk cache is keyed by the same. ARM is "aarch64" everywhere."""
    triple, cpu, features = context.codegen().magic_tuple()
    machine = triple.split("-")[0]
    found = frozenset(f[1:] for f in features.split(",") if f.startswith("+"))
    if machine in ("aarch64", "arm64"):
        return "aarch64", found | _arm_features(triple, cpu, features)
    return machine, found


# Sums of products: of signed bytes, and of signed with unsigned ones.
_DOT_PRODUCTS = "\n".join(
    f"""define i32 @{extend}(<16 x i8> %a, <16 x i8> %b) {{
      %x = sext <16 x i8> %a to <16 x i32>
      %y = {extend} <16 x i8> %b to <16 x i32>
      %z = mul <16 x i32> %x, %y
      %sum = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %z)
      ret i32 %sum
    }}"""
    for extend in ("sext", "zext")
)


@cache
def _arm_features(triple: str, cpu: str, features: str) -> frozenset[str]:
    """Which of dotprod and i8mm an ARM processor has.

    Neither Linux' nor macOS' list of features says so, but LLVM knows it of each processor that it knows by name: seen
    in what it makes of sums of products.
    """
    import llvmlite.binding as llvm

    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    source = f"{_DOT_PRODUCTS}\ndeclare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)"
    code = machine.emit_assembly(llvm.parse_assembly(source))
    signs = {"dotprod": r"\bsdot\b", "i8mm": r"\busdot\b"}
    return frozenset(name for name, instruction in signs.items() if re.search(instruction, code))


def fuses(context: Any) -> bool:
    """Whether the machine rounds x * y + z once."""
    machine, features = target(context)
    return machine not in ("x86_64", "i686") or bool(features & {"fma", "fma4", "avx512f"})


def emit_fma(context: Any, b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z of float32 vectors: rounded once where the machine can, else twice (a library call would be slow)."""
    if fuses(context):
        return call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)
    return b.fadd(b.fmul(x, y), z)


def to_bfloat16(b: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """32 float32, two vectors, to nearest even, in the same order: I16x32. Only where there is AVX-512 for it."""
    both = assembler(b, I32x16, "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v", [high, low])
    return b.bitcast(both, I16x32)


def bfloat16_pairs(b: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """A pair of bfloat16 in each 32 bits, one of each vector of 16 float32: I16x32."""
    both = to_bfloat16(b, first, second)
    return b.shuffle_vector(both, both, _IN_TURNS)


def widen_f16(context: Any, b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Bits of float16 (a vector of int16 or one int16) to float32, exactly, subnormals and infinities included."""
    vector = isinstance(bits.type, ir.VectorType)
    shape = (lambda t: ir.VectorType(t, bits.type.count)) if vector else (lambda t: t)
    machine, features = target(context)
    if machine == "aarch64" or "f16c" in features:
        return b.fpext(b.bitcast(bits, shape(F16)), shape(F32))
    # Without the instruction LLVM would call a library function that is not there.
    k = (lambda v: ir.Constant(shape(I32), [v] * bits.type.count)) if vector else (lambda v: I32(v))
    wide = b.zext(bits, shape(I32))
    magnitude = b.shl(b.and_(wide, k(0x7FFF)), k(13))
    scale = ir.Constant(shape(F32), [2.0**112] * bits.type.count if vector else 2.0**112)
    scaled = b.bitcast(b.fmul(b.bitcast(magnitude, shape(F32)), scale), shape(I32))  # rebias the exponent
    special = b.icmp_unsigned(">=", magnitude, k(0x1F << 23))
    scaled = b.select(special, b.or_(magnitude, k(0xFF << 23)), scaled)
    return b.bitcast(b.or_(scaled, b.shl(b.and_(wide, k(0x8000)), k(16))), shape(F32))


def narrow_f16(context: Any, b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """float32 to the bits of float16, rounded to nearest even. Scalar or vector."""
    vector = isinstance(value.type, ir.VectorType)
    shape = (lambda t: ir.VectorType(t, value.type.count)) if vector else (lambda t: t)
    machine, features = target(context)
    if machine == "aarch64" or "f16c" in features:
        return b.bitcast(b.fptrunc(value, shape(F16)), shape(I16))
    k = (lambda v: ir.Constant(shape(I32), [v] * value.type.count)) if vector else (lambda v: I32(v))
    bits = b.bitcast(value, shape(I32))
    sign = b.and_(b.lshr(bits, k(16)), k(0x8000))
    magnitude = b.and_(bits, k(0x7FFFFFFF))
    odd = b.and_(b.lshr(magnitude, k(13)), k(1))
    normal = b.lshr(b.add(b.sub(magnitude, k(112 << 23)), b.add(odd, k(0xFFF))), k(13))
    half = ir.Constant(shape(F32), [0.5] * value.type.count if vector else 0.5)
    tiny = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, shape(F32)), half), shape(I32)), k(126 << 23))
    out = b.select(b.icmp_unsigned("<", magnitude, k(113 << 23)), tiny, normal)
    out = b.select(b.icmp_unsigned(">=", magnitude, k(0x47800000)), k(0x7C00), out)
    out = b.select(b.icmp_unsigned(">", magnitude, k(0x7F800000)), k(0x7E00), out)
    return b.trunc(b.or_(out, sign), shape(I16))
