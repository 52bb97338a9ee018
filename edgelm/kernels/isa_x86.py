"""x86: unsigned times signed bytes, from SSSE3 to AVX-512 VNNI.

Sources: Intel intrinsics guide (vpdpbusd, pmaddubsw); the sign trick for int8 x int8 is that of ggml and of Intel's
oneDNN.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from llvmlite import ir
from llvmlite.binding import llvm_version_info

from edgelm.kernels.emit import I8, I16, I32, I8x64, I16x32, I32x16, assembler, call, here, load_at, repeat, spread
from edgelm.kernels.isa import X_MAX, Form, Isa, Narrow, Partial, Value, apart, parts
from edgelm.kernels.records import FACTORS

AMD = "sse4a"  # an extension that AMD's processors have, and nobody else's


class _Bytes(Isa):
    """x86: unsigned times signed bytes."""

    machines = ("x86_64", "i686")
    shuffle: ClassVar[str]

    def lookup(self, b: ir.IRBuilder, table: list[int], index: Value) -> Value:
        size = 64 // self.n_parts
        vector = ir.VectorType(I8, size)
        entries = ir.Constant(vector, table * (size // 16))
        return apart(b, self.n_parts, partial(call, b, self.shuffle, vector, entries), index)


class Vnni512(_Bytes):
    """AVX-512 VNNI: `vpdpbusd` adds 64 products of unsigned and signed bytes to 16 lanes, without saturation."""

    needs = (frozenset({"avx512vnni", "avx512bw"}),)
    magic = True
    direct, direct_groups, direct_most = (4, 2, 1), 2, 4
    tokens, groups = (6, 4, 2, 1), 2  # 12 sums and 12 accumulators: all but a few of 32 registers
    float_tokens, float_groups = (8, 2, 1), 2
    shuffle = "llvm.x86.avx512.pshuf.b.512"
    dot = "llvm.x86.avx512.vpdpbusd.512"

    def form(self, bits: int, zero: bool) -> Form:
        return Form.TOP if zero else Form.LOW

    def step(self, b: ir.IRBuilder, sums: Any, w: Value, x: Value, form: Form, bits: int) -> Any:
        def add(own: Value, *pair: Value) -> Value:
            if llvm_version_info[0] < 22:  # which took the bytes as int32
                pair = tuple(b.bitcast(v, own.type) for v in pair)
            return call(b, self.dot, own.type, own, *pair)

        return apart(b, self.n_parts, add, sums, b.bitcast(w, I8x64), b.bitcast(x, I8x64))


class _Joining(Vnni512):
    """VNNI where what counts are products and FMA (docs/LOG.md).

    Sums of 16 products with weights of four bits, or of five less a zero point, fit into int16, so one instruction
    multiplies those of both halves of a block with whole scales and adds them. In tiles both are neighbours, and one
    instruction makes pairs of int16 of all of them; where few tokens meet packed weights they are not: it takes two.
    """

    magic, joins_halves, factor_bits, side_by_side = False, True, 15, True
    pack: ClassVar[str]  # int32 of two registers to int16, within each 16 bytes
    pairs: ClassVar[str]  # int16 to sums of products of pairs, in int32

    def form(self, bits: int, zero: bool) -> Form:
        return Form.LOW if self.joins(bits, zero) else super().form(bits, zero)

    def direct_sizes(self, joins: bool) -> tuple[int, ...]:
        return (2, 1) if joins else self.direct

    def join(self, b: ir.IRBuilder, low: Value, high: Value, factors: Value) -> Value:
        pairs = self._together(b, low, b.shl(high, repeat(I32x16, 16)))
        return self._products(b, b.bitcast(pairs, I16x32), factors)

    def _together(self, b: ir.IRBuilder, low: Value, high: Value) -> Value:
        """The lower halves of `low`, and the upper ones of `high`."""
        return b.or_(b.and_(low, repeat(I32x16, 0xFFFF)), high)

    def join_neighbours(self, b: ir.IRBuilder, first: Value, second: Value, factors: Value) -> Value:
        words = ir.VectorType(I16, 32 // self.n_parts)
        pairs = apart(b, self.n_parts, partial(call, b, self.pack, words), first, second)
        return self._products(b, pairs, factors)

    def _products(self, b: ir.IRBuilder, pairs: Value, factors: Value) -> Value:
        sums = ir.VectorType(I32, 16 // self.n_parts)
        return apart(b, self.n_parts, partial(call, b, self.pairs, sums), pairs, b.bitcast(factors, I16x32))


class Vnni512Zen(_Joining):
    """AVX-512 VNNI on AMD. With one group in a tile, every product reads its activations as it goes: a load and a
    product are one instruction."""

    needs = (frozenset({"avx512vnni", "avx512bw", AMD}),)
    groups = 1  # 12 sums of halves and 6 accumulators, and weights of the next block can be under way
    asks_for_records = True
    pack = "llvm.x86.avx512.packssdw.512"
    pairs = "llvm.x86.avx512.pmaddw.d.512"

    def _together(self, b: ir.IRBuilder, low: Value, high: Value) -> Value:
        operands = [low, high, repeat(I32x16, 0xFFFF)]  # LLVM would permute words
        return assembler(b, I32x16, "vpternlogd $$0xe4, $3, $2, $0", "=v,0,v,v", operands)


class Vnni256(_Joining):
    """The same on 32 bytes: AVX-VNNI, or AVX-512 VNNI on 256 bits."""

    needs = (frozenset({"avxvnni", "fma"}), frozenset({"avx512vnni", "avx512vl"}))
    direct, direct_groups, direct_most = (2, 1), 1, 2
    tokens, groups, magic = (2, 1), 1, True  # 8 sums of halves and 4 accumulators: with more it spills
    float_tokens, float_groups = (4, 2, 1), 1
    n_parts, kept, ordered = 2, 4, True  # reading again costs nothing: an instruction takes one operand from memory
    shuffle = "llvm.x86.avx2.pshuf.b"
    dot = "llvm.x86.avx512.vpdpbusd.256"
    pack = "llvm.x86.avx2.packssdw"
    pairs = "llvm.x86.avx2.pmadd.wd"


class _Maddubs(Narrow, _Bytes):
    """`pmaddubsw` adds pairs of products of unsigned and signed bytes in 16 bits, with saturation.

    Up to 6 bits nothing can saturate, and with fewer bits several steps fit into 16 bits before they are widened.
    `pmaddwd` widens them, and multiplies them with whole d as it does, where that fits into 32 bits. For 8 bits the
    sign of the weight moves to the activation, as 2 * 128 * 127 fits; in tiles both are int16 instead, which takes two
    multiplications for three.
    """

    factor_bits, scales_sums = 15, True
    pairs: ClassVar[str]  # bytes to sums of pairs in int16
    quads: ClassVar[str]  # int16 to sums of pairs in int32

    def form(self, bits: int, zero: bool) -> Form:
        return Form.LOW if bits <= 6 else Form.SIGNED

    def most(self, form: Form, bits: int) -> int:
        return 1 if form is Form.SIGNED else 32767 // (2 * X_MAX * ((1 << bits) - 1))

    def products(self, b: ir.IRBuilder, w: Value, x: Value, form: Form) -> list[Value]:
        terms = []
        for u, s in zip(parts(b, w, self.n_parts), parts(b, b.bitcast(x, w.type), self.n_parts), strict=True):
            if form is Form.SIGNED:
                s = self.signed_like(b, s, u)
                u = call(b, f"llvm.abs.v{u.type.count}i8", u.type, u, ir.IntType(1)(0))
            terms.append(call(b, self.pairs, ir.VectorType(I16, u.type.count // 2), u, s))
        return terms

    def step(self, b: ir.IRBuilder, sums: Any, w: Value, x: Any, form: Form, bits: int) -> Any:
        sums = self._add_words(b, sums, w, x) if isinstance(x, list) else super().step(b, sums, w, x, form, bits)
        if not self.ordered:
            return sums
        if sums.narrow is None:
            return sums._replace(wide=[here(b, own) for own in sums.wide])
        return sums._replace(narrow=[here(b, own) for own in sums.narrow])

    def widens(self, form: Form) -> bool:
        return form is Form.SIGNED

    def _add_words(self, b: ir.IRBuilder, sums: Partial, w: Value, x: list[Value]) -> Partial:
        wide = sums.wide
        for word, pair in zip(parts(b, w, 2), x, strict=True):
            both = zip(wide, *(parts(b, v, self.n_parts) for v in (word, b.bitcast(pair, word.type))), strict=True)
            wide = [self.add_pairs(b, *words) for words in both]
        return sums._replace(wide=wide)

    def add_pairs(self, b: ir.IRBuilder, sums: Value, w: Value, x: Value) -> Value:
        return b.add(sums, call(b, self.quads, sums.type, w, x))

    def times(self, b: ir.IRBuilder, sums: Any, record: Value, half: int) -> Any:
        return self._widen(b, sums)._replace(factor=b.add(record, record.type(FACTORS + 2 * half)))

    def widened(self, b: ir.IRBuilder, sums: Partial, narrow: list[Value]) -> list[Value]:
        factors = repeat(narrow[0].type, 1)
        if sums.factor is not None:
            factors = spread(b, load_at(b, sums.factor, I16, 2), narrow[0].type)
        wide = [call(b, self.quads, own.type, pairs, factors) for own, pairs in zip(sums.wide, narrow, strict=True)]
        return [b.add(own, quad) for own, quad in zip(sums.wide, wide, strict=True)]

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
    needs = (frozenset({"avx2", "fma"}),)
    tokens = (2, 1)  # more spill
    n_parts, kept = 2, 4
    ordered = True
    shuffle = "llvm.x86.avx2.pshuf.b"
    pairs = "llvm.x86.avx2.pmadd.ub.sw"
    quads = "llvm.x86.avx2.pmadd.wd"
    sign = "llvm.x86.avx2.psign.b"

    def signed_like(self, b: ir.IRBuilder, s: Value, w: Value) -> Value:
        return call(b, self.sign, s.type, s, w)


class Ssse3(Avx2):
    needs = (frozenset({"ssse3"}),)
    n_parts = 4
    shuffle = "llvm.x86.ssse3.pshuf.b.128"
    pairs = "llvm.x86.ssse3.pmadd.ub.sw.128"
    quads = "llvm.x86.sse2.pmadd.wd"
    sign = "llvm.x86.ssse3.psign.b.128"
