"""How a machine multiplies int8, four products into each of 16 lanes of 32 bits, and in what form it wants the weights.

An `Isa` is chosen while Numba compiles, from the features Numba compiles for, which also key its disk cache; tests
choose with NUMBA_CPU_NAME and NUMBA_CPU_FEATURES. Activations are int8 in [-127, 127]; weights have one of three forms:

    LOW     unsigned, as the format defines them (at most 6 bits): x * (w - zero), the zero point made good by OFFSET
    TOP     unsigned, shifted to the top of the byte, so that the zero point is 128 whatever the format
    SIGNED  int8 with the zero point already subtracted

All sums are exact in int32. Knows nothing of formats but the number of bits and whether there is a zero point.

Sources: Intel intrinsics guide (vpdpbusd, pmaddubsw), Arm ACLE (sdot, smull); the sign trick for int8 x int8 on
machines that multiply unsigned by signed is that of ggml and of Intel's oneDNN.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar

from llvmlite import ir
from llvmlite.binding import llvm_version_info

from edgelm.kernels.emit import (
    I8,
    I16,
    I32,
    I8x64,
    I32x16,
    call,
    indices,
    load_at,
    repeat,
    spread,
    target,
    undefined,
)

Value = ir.Value
X_MAX = 127  # largest |activation|


class Form(Enum):
    LOW = "low"
    TOP = "top"
    SIGNED = "signed"


def parts(b: ir.IRBuilder, value: Value, n: int) -> list[Value]:
    """A vector as `n` equal vectors: free when they are what the machine's registers hold."""
    if n == 1:
        return [value]
    size = value.type.count // n
    return [b.shuffle_vector(value, undefined(value.type), indices(i * size, size)) for i in range(n)]


def joined(b: ir.IRBuilder, values: list[Value]) -> Value:
    """The inverse of `parts`."""
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=True)
        size = 2 * values[0].type.count
        values = [b.shuffle_vector(low, high, indices(0, size)) for low, high in pairs]
    return values[0]


class Isa:
    """A way to multiply. `needs`: features, any one of these sets; `tokens`, `groups`: shape of the matrix tile."""

    machines: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[frozenset[str], ...]] = ()
    tokens: ClassVar[tuple[int, ...]] = (4, 2, 1)  # sizes of tiles, at most four; the last must be 1
    groups: ClassVar[int] = 1  # groups of 16 rows in a tile: 1 or 2
    direct_groups: ClassVar[int] = 1  # the same where one token is multiplied straight from packed weights
    float_tokens: ClassVar[tuple[int, ...]] = (4, 2, 1)  # the same for float32 activations
    float_groups: ClassVar[int] = 1
    n_parts: ClassVar[int] = 1  # registers that hold 64 bytes

    def form(self, bits: int, zero: bool) -> Form:
        """The form in which weights of `bits` bits, with a zero point or without, are wanted."""
        raise NotImplementedError

    def start(self, b: ir.IRBuilder, record: Value, field: int, form: Form, bits: int, zero: bool) -> Any:
        """An empty accumulator. `record` + `field`: address of -128 times the sum of the activations to come."""
        if not zero or form is Form.SIGNED:
            return self.empty(b, ir.Constant(I32x16, None))
        offset = spread(b, load_at(b, b.add(record, record.type(field)), I32, 4), I32x16)
        if form is Form.LOW:
            offset = b.ashr(offset, repeat(I32x16, 8 - bits))
        return self.empty(b, offset)

    def empty(self, b: ir.IRBuilder, first: Value) -> Any:
        return first

    def input(self, b: ir.IRBuilder, record: Value, chunk: int) -> Value:
        """Activations 4 * chunk and the three that follow, in every lane."""
        return spread(b, load_at(b, b.add(record, record.type(4 * chunk)), I32, 4), I32x16)

    def step(self, b: ir.IRBuilder, sums: Any, w: Value, x: Value, form: Form, bits: int) -> Any:
        """Adds w * x: w as I8x64, x from `input`."""
        raise NotImplementedError

    def end(self, b: ir.IRBuilder, sums: Any) -> Value:
        """The sums as I32x16."""
        return sums

    def lookup(self, b: ir.IRBuilder, table: list[int], index: Value) -> Value:
        """table[i] for each byte i of `index` (I8x64, values 0-15)."""
        picked = ir.Constant(I8x64, None)
        for i, entry in enumerate(table):
            picked = b.select(b.icmp_unsigned("==", index, repeat(I8x64, i)), repeat(I8x64, entry), picked)
        return picked


class _Bytes(Isa):
    """x86: unsigned times signed bytes."""

    machines = ("x86_64", "i686")
    shuffle: ClassVar[str]

    def lookup(self, b: ir.IRBuilder, table: list[int], index: Value) -> Value:
        size = 64 // self.n_parts
        vector = ir.VectorType(I8, size)
        entries = ir.Constant(vector, table * (size // 16))
        return joined(b, [call(b, self.shuffle, vector, entries, i) for i in parts(b, index, self.n_parts)])


class Vnni512(_Bytes):
    """AVX-512 VNNI: `vpdpbusd` adds 64 products of unsigned and signed bytes to 16 lanes, without saturation."""

    needs = (frozenset({"avx512vnni", "avx512bw"}),)
    direct_groups = 2
    tokens, groups = (6, 4, 2, 1), 2  # 12 sums and 12 accumulators: all but a few of 32 registers
    float_tokens, float_groups = (8, 2, 1), 2
    shuffle = "llvm.x86.avx512.pshuf.b.512"
    dot = "llvm.x86.avx512.vpdpbusd.512"

    def form(self, bits: int, zero: bool) -> Form:
        return Form.TOP if zero else Form.LOW

    def step(self, b: ir.IRBuilder, sums: Any, w: Value, x: Value, form: Form, bits: int) -> Any:
        operands = b.bitcast(w, I8x64), b.bitcast(x, I8x64)
        done = []
        for acc, *pair in zip(*(parts(b, v, self.n_parts) for v in (sums, *operands)), strict=True):
            if llvm_version_info[0] < 22:  # which took the bytes as int32
                pair = [b.bitcast(v, acc.type) for v in pair]
            done.append(call(b, self.dot, acc.type, acc, *pair))
        return joined(b, done)


class Vnni256(Vnni512):
    """The same on 32 bytes: AVX-VNNI, or AVX-512 VNNI on 256 bits."""

    needs = (frozenset({"avxvnni"}), frozenset({"avx512vnni", "avx512vl"}))
    direct_groups = 1
    tokens, groups = (4, 2, 1), 1
    float_tokens, float_groups = (4, 2, 1), 1
    n_parts = 2
    shuffle = "llvm.x86.avx2.pshuf.b"
    dot = "llvm.x86.avx512.vpdpbusd.256"


class _Maddubs(_Bytes):
    """`pmaddubsw` adds pairs of products of unsigned and signed bytes in 16 bits, with saturation.

    Up to 6 bits nothing can saturate, and with fewer bits several steps fit into 16 bits before they are widened. For 8
    bits the sign of the weight moves to the activation: 2 * 128 * 127 fits.
    """

    tokens = (4, 2, 1)
    pairs: ClassVar[str]  # bytes to sums of pairs in int16
    quads: ClassVar[str]  # int16 to sums of pairs in int32

    def form(self, bits: int, zero: bool) -> Form:
        return Form.LOW if bits <= 6 else Form.SIGNED

    def empty(self, b: ir.IRBuilder, first: Value) -> Any:
        return parts(b, first, self.n_parts), None, 0

    def step(self, b: ir.IRBuilder, sums: Any, w: Value, x: Value, form: Form, bits: int) -> Any:
        acc, narrow, n = sums
        limit = 1 if form is Form.SIGNED else 32767 // (2 * X_MAX * ((1 << bits) - 1))
        terms = []
        for u, s in zip(parts(b, w, self.n_parts), parts(b, b.bitcast(x, w.type), self.n_parts), strict=True):
            if form is Form.SIGNED:
                s = self.signed_like(b, s, u)
                u = call(b, f"llvm.abs.v{u.type.count}i8", u.type, u, ir.IntType(1)(0))
            terms.append(call(b, self.pairs, ir.VectorType(I16, u.type.count // 2), u, s))
        if narrow is not None:
            terms = [b.add(old, term) for old, term in zip(narrow, terms, strict=True)]
        sums = acc, terms, n + 1
        return self._widen(b, sums) if n + 1 == limit else sums

    def _widen(self, b: ir.IRBuilder, sums: Any) -> Any:
        acc, narrow, _ = sums
        if narrow is None:
            return sums
        ones = repeat(narrow[0].type, 1)
        wide = [call(b, self.quads, a.type, term, ones) for a, term in zip(acc, narrow, strict=True)]
        return [b.add(a, quad) for a, quad in zip(acc, wide, strict=True)], None, 0

    def end(self, b: ir.IRBuilder, sums: Any) -> Value:
        return joined(b, self._widen(b, sums)[0])

    def signed_like(self, b: ir.IRBuilder, s: Value, w: Value) -> Value:
        """s where w > 0, -s where w < 0; anything where w is 0."""
        raise NotImplementedError


class Avx512(_Maddubs):
    """AVX-512 without VNNI (Skylake-X)."""

    needs = (frozenset({"avx512bw"}),)
    tokens = (8, 4, 2, 1)
    float_tokens, float_groups = (8, 2, 1), 2
    shuffle = "llvm.x86.avx512.pshuf.b.512"
    pairs = "llvm.x86.avx512.pmaddubs.w.512"
    quads = "llvm.x86.avx512.pmaddw.d.512"

    def signed_like(self, b: ir.IRBuilder, s: Value, w: Value) -> Value:
        zero = ir.Constant(w.type, None)
        return b.select(b.icmp_signed("<", w, zero), b.sub(zero, s), s)


class Avx2(_Maddubs):
    needs = (frozenset({"avx2"}),)
    tokens, groups = (3, 2, 1), 2
    n_parts = 2
    shuffle = "llvm.x86.avx2.pshuf.b"
    pairs = "llvm.x86.avx2.pmadd.ub.sw"
    quads = "llvm.x86.avx2.pmadd.wd"
    sign = "llvm.x86.avx2.psign.b"

    def signed_like(self, b: ir.IRBuilder, s: Value, w: Value) -> Value:
        return call(b, self.sign, s.type, s, w)


class Ssse3(Avx2):
    needs = (frozenset({"ssse3"}),)
    tokens, groups = (2, 1), 1
    n_parts = 4
    shuffle = "llvm.x86.ssse3.pshuf.b.128"
    pairs = "llvm.x86.ssse3.pmadd.ub.sw.128"
    quads = "llvm.x86.sse2.pmadd.wd"
    sign = "llvm.x86.ssse3.psign.b.128"


class _Neon(Isa):
    machines = ("aarch64",)
    n_parts = 4

    def form(self, bits: int, zero: bool) -> Form:
        return Form.SIGNED if zero else Form.LOW

    def input(self, b: ir.IRBuilder, record: Value, chunk: int) -> Value:
        """One lane of a register that holds four chunks: `sdot` takes a lane as it is."""
        four = load_at(b, b.add(record, record.type(16 * (chunk // 4))), ir.VectorType(I32, 4), 4)
        return b.shuffle_vector(four, undefined(four.type), repeat(I32x16, chunk % 4))

    def lookup(self, b: ir.IRBuilder, table: list[int], index: Value) -> Value:
        entries = ir.Constant(ir.VectorType(I8, 16), table)
        name = "llvm.aarch64.neon.tbl1.v16i8"
        return joined(b, [call(b, name, entries.type, entries, i) for i in parts(b, index, 4)])


class NeonDot(_Neon):
    """ARMv8.2 dot product: `sdot` adds 16 products of signed bytes to 4 lanes."""

    needs = (frozenset({"dotprod"}),)
    tokens = (2, 1)  # of 32 registers, 16 hold sums and products; more tokens spill

    def step(self, b: ir.IRBuilder, sums: Any, w: Value, x: Value, form: Form, bits: int) -> Any:
        done = []
        for acc, u, s in zip(*(parts(b, v, 4) for v in (sums, w, b.bitcast(x, w.type))), strict=True):
            done.append(call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, u, s))
        return joined(b, done)


class Neon(_Neon):
    """ARMv8.0: products in 16 bits, neighbours added."""

    needs = (frozenset(),)
    tokens = (1,)

    def empty(self, b: ir.IRBuilder, first: Value) -> Any:
        return parts(b, first, 4), None, 0

    def step(self, b: ir.IRBuilder, sums: Any, w: Value, x: Value, form: Form, bits: int) -> Any:
        acc, narrow, n = sums
        limit = 32767 // (2 * X_MAX * (1 << bits if form is Form.LOW else 1 << (bits - 1)))
        i16x8 = ir.VectorType(I16, 8)
        products = [  # the forms are LOW of at most 6 bits and SIGNED: both are good signed bytes
            b.mul(b.sext(u, i16x8), b.sext(s, i16x8))
            for u, s in zip(parts(b, w, 8), parts(b, b.bitcast(x, w.type), 8), strict=True)
        ]
        if narrow is not None:
            products = [b.add(old, product) for old, product in zip(narrow, products, strict=True)]
        sums = acc, products, n + 1
        return self._widen(b, sums) if n + 1 == limit else sums

    def _widen(self, b: ir.IRBuilder, sums: Any) -> Any:
        acc, narrow, _ = sums
        if narrow is None:
            return sums
        done = []
        for a, low, high in zip(acc, narrow[::2], narrow[1::2], strict=True):
            pairs = call(b, "llvm.aarch64.neon.addp.v8i16", low.type, low, high)
            done.append(b.add(a, call(b, "llvm.aarch64.neon.saddlp.v4i32.v8i16", a.type, pairs)))
        return done, None, 0

    def end(self, b: ir.IRBuilder, sums: Any) -> Value:
        return joined(b, self._widen(b, sums)[0])


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


ISAS: tuple[type[Isa], ...] = (Vnni512, Vnni256, Avx512, Avx2, Ssse3, NeonDot, Neon, Portable)


def select(context: Any) -> Isa:
    """The first of `ISAS` that the machine has."""
    machine, features = target(context)
    for isa in ISAS:
        if (not isa.machines or machine in isa.machines) and any(needs <= features for needs in isa.needs):
            return isa()
    raise AssertionError("the portable one fits every machine")
