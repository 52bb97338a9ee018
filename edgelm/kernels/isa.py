"""How a machine multiplies int8, four products into each of 16 lanes of 32 bits, and in what form it wants the weights.

An `Isa` is chosen while Numba compiles, from the features Numba compiles for, which also key its disk cache; tests
choose with NUMBA_CPU_NAME and NUMBA_CPU_FEATURES. Activations are int8 in [-127, 127]; weights have one of three forms:

    LOW     unsigned, as the format defines them (at most 6 bits): x * (w - zero), the zero point made good by OFFSET
    TOP     unsigned, shifted to the top of the byte, so that the zero point is 128 whatever the format
    SIGNED  int8 with the zero point already subtracted

All sums are exact in int32. `isa_x86` and `isa_arm` are the machines, `isas` the choice among them. Knows nothing of
formats but the number of bits and whether there is a zero point.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar, NamedTuple

from llvmlite import ir

from edgelm.kernels.emit import (
    I32,
    I64,
    I8x64,
    I16x32,
    I16x64,
    I32x16,
    I64x8,
    indices,
    load_at,
    repeat,
    shuffle,
    spread,
    undefined,
)
from edgelm.kernels.records import BLOCK, MAGIC_BITS

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


def apart(b: ir.IRBuilder, n: int, emit: Callable[..., Value], *values: Value) -> Value:
    """What `emit` makes of vectors, of `n` equal parts of them at a time."""
    return joined(b, [emit(*each) for each in zip(*(parts(b, value, n) for value in values), strict=True)])


class Isa:
    """A way to multiply. `needs`: features, any one of these sets; `tokens`, `groups`: shape of the matrix tile."""

    machines: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[frozenset[str], ...]] = ()
    tokens: ClassVar[tuple[int, ...]] = (4, 2, 1)  # sizes of tiles, at most four; the last must be 1
    groups: ClassVar[int] = 1  # groups of 16 rows in a tile: 1 or 2
    direct: ClassVar[tuple[int, ...]] = (1,)  # the same where few tokens are multiplied straight from packed weights
    direct_groups: ClassVar[int] = 1
    direct_most: ClassVar[int] = 1  # tokens up to which that is faster than to unpack weights first
    float_tokens: ClassVar[tuple[int, ...]] = (4, 2, 1)  # the same for float32 activations
    float_groups: ClassVar[int] = 1
    n_parts: ClassVar[int] = 1  # registers that hold 64 bytes
    kept: ClassVar[int] = 16  # registers for packed weights of a block; if it has more, each half is read by itself
    ordered: ClassVar[bool] = False  # whether steps of tiles stay in order; LLVM would sum up one register of weights,
    # then the next, and spill what both have in common
    two_by_two: ClassVar[bool] = False  # tiles multiply two rows with two tokens at a time: `step_pair`
    shifts_bytes: ClassVar[bool] = False  # by an instruction, not only larger lanes
    magic: ClassVar[bool] = False  # whether sums that are not joined start at MAGIC_BITS, to become floats without a
    # conversion; only where there is a fused multiply-add
    joins_halves: ClassVar[bool] = False  # whether both halves of a block are added before a scale that they share
    factor_bits: ClassVar[int] = 0  # of the whole numbers that d are in records: `records.FACTORS`; 0: they are any
    scales_sums: ClassVar[bool] = False  # whether sums can come multiplied with these: `times`
    side_by_side: ClassVar[bool] = False  # whether tiles have both halves in neighbouring lanes: `join_neighbours`
    asks_for_records: ClassVar[bool] = False  # whether a tile does, for those of the next one

    def form(self, bits: int, zero: bool) -> Form:
        """The form in which weights of `bits` bits, with a zero point or without, are wanted."""
        raise NotImplementedError

    def direct_form(self, bits: int, zero: bool) -> Form:
        """The same for what is multiplied straight from packed weights. Of both `Blocks.factor` must be the same."""
        return self.form(bits, zero)

    @property
    def whole_scales(self) -> bool:
        return self.factor_bits > 0

    @property
    def in_turn(self) -> bool:
        """Whether halves of a block take turns in records, four inputs at a time; `step_pair` wants eight of one."""
        return self.whole_scales and not self.two_by_two

    @property
    def first(self) -> int:
        """What a sum of products starts at, but for those that are joined."""
        return MAGIC_BITS if self.magic else 0

    def start(self, b: ir.IRBuilder, record: Value, field: int, form: Form, bits: int, zero: bool, first: int) -> Any:
        """An empty accumulator, which starts at `first`.

        `record` + `field`: address of `self.first` - 128 times the sum of the inputs to come.
        """
        if not zero or form is Form.SIGNED:
            return self.empty(b, repeat(I32x16, first))
        offset = spread(b, load_at(b, b.add(record, record.type(field)), I32, 4), I32x16)
        return self.empty(b, self.offset(b, offset, 8 - bits if form is Form.LOW else 0, first))

    def offset(self, b: ir.IRBuilder, field: Value, shift: int, first: int) -> Value:
        """`first` less what the zero point of weights takes that are `shift` bits less than TOP; field: as for it."""
        if shift:
            field = b.ashr(field, repeat(field.type, shift))
        if change := first - (self.first >> shift):
            field = b.add(field, repeat(field.type, change))
        return field

    def empty(self, b: ir.IRBuilder, first: Value) -> Any:
        return first

    def input(self, b: ir.IRBuilder, record: Value, chunk: int) -> Value:
        """Activations 4 * chunk and the three that follow, in every lane."""
        return spread(b, load_at(b, b.add(record, record.type(4 * chunk)), I32, 4), I32x16)

    def inputs_of_halves(self, b: ir.IRBuilder, record: Value, i: int) -> Value:
        """Four activations of each half, 4 * i and the three that follow, in every two lanes; of halves in turn."""
        return b.bitcast(spread(b, load_at(b, b.add(record, record.type(8 * i)), I64, 4), I64x8), I32x16)

    def step(self, b: ir.IRBuilder, sums: Any, w: Value, x: Value, form: Form, bits: int) -> Any:
        """Adds w * x: w as I8x64, x from `input`; or from `words` and `input_words`."""
        raise NotImplementedError

    def end(self, b: ir.IRBuilder, sums: Any) -> Value:
        """The sums as I32x16."""
        return sums

    def widens(self, form: Form) -> bool:
        """Whether tiles multiply weights of a form as int16: `words`."""
        return False

    def add_pairs(self, b: ir.IRBuilder, sums: Value, w: Value, x: Value) -> Value:
        """Adds products of int16 to int32, two to each; of a register. Only where it `widens`."""
        raise NotImplementedError

    def words(self, b: ir.IRBuilder, w: Value) -> Value:
        """Four int8 of 16 rows as I16x64: the first two of each row, then the others."""
        w = b.bitcast(w, I16x32)
        return b.sext(b.bitcast(shuffle(b, w, w, [*range(0, 32, 2), *range(1, 32, 2)]), I8x64), I16x64)

    def input_words(self, b: ir.IRBuilder, words: Value, chunk: int) -> list[Value]:
        """Activations as for `words`, each pair in every lane; words: address of them as int16."""
        return [spread(b, load_at(b, b.add(words, words.type(8 * chunk + i)), I32, 4), I32x16) for i in (0, 4)]

    def times(self, b: ir.IRBuilder, sums: Any, record: Value, half: int) -> Any:
        """The same sums, to which products come from now on that are multiplied with d of half a block."""
        raise NotImplementedError

    def joins(self, bits: int, zero: bool) -> bool:
        """Whether sums of both halves of a block are added up as integers, each times its d, as far as they fit.

        That are those with weights of `bits` bits, less a zero point if `zero`.
        """
        return self.whole_scales and self.fits(BLOCK, bits, zero)

    def fits(self, n: int, bits: int, zero: bool) -> bool:
        """Whether the sum of `n` such products, times whole d, fits into int32."""
        return n * X_MAX * (1 << bits - 1 if zero else (1 << bits) - 1) << self.factor_bits <= 1 << 31

    def direct_sizes(self, joins: bool) -> tuple[int, ...]:
        """`direct`, for sums that go through `join` or do not."""
        return self.direct

    def join(self, b: ir.IRBuilder, low: Value, high: Value, factors: Value) -> Value:
        """low * one factor + high * the other, exactly: I32x16, of sums that fit into int16.

        factors: two int16 in each lane.
        """
        raise NotImplementedError

    def join_neighbours(self, b: ir.IRBuilder, first: Value, second: Value, factors: Value) -> Value:
        """The same of sums that lie as `slab_tiles.side_by_side` has them."""
        raise NotImplementedError

    def step_pair(self, b: ir.IRBuilder, sums: Value, w: Value, x: Value) -> Value:
        """Adds the products of 8 inputs of two rows with those of two tokens, in each four lanes: see `pair_tiles`.

        sums: I32x16; w: I8x64, eight bytes for each of 8 rows; x: I8x16, eight bytes a token.
        """
        raise NotImplementedError

    def lookup(self, b: ir.IRBuilder, table: list[int], index: Value) -> Value:
        """table[i] for each byte i of `index` (I8x64, values 0-15)."""
        picked = ir.Constant(I8x64, None)
        for i, entry in enumerate(table):
            picked = b.select(b.icmp_unsigned("==", index, repeat(I8x64, i)), repeat(I8x64, entry), picked)
        return picked


class Partial(NamedTuple):
    """Of a `Narrow` machine: in 32 bits, and what was added up in 16 bits since."""

    wide: list[Value]
    narrow: list[Value] | None = None
    steps: int = 0  # that are in `narrow`
    factor: Value | None = None  # address of the int16 that it is multiplied with as it is widened


class Narrow(Isa):
    """Machines that add products in 16 bits, as many steps as fit, and then widen the sums to 32."""

    def most(self, form: Form, bits: int) -> int:
        """Steps whose products can be added in 16 bits."""
        raise NotImplementedError

    def products(self, b: ir.IRBuilder, w: Value, x: Value, form: Form) -> list[Value]:
        """The products of a step, or sums of neighbouring ones, in vectors of int16."""
        raise NotImplementedError

    def widened(self, b: ir.IRBuilder, sums: Partial, narrow: list[Value]) -> list[Value]:
        """The wide sums plus sums of what `products` gave, in vectors of int32."""
        raise NotImplementedError

    def empty(self, b: ir.IRBuilder, first: Value) -> Any:
        return Partial(parts(b, first, self.n_parts))

    def step(self, b: ir.IRBuilder, sums: Any, w: Value, x: Value, form: Form, bits: int) -> Any:
        products = self.products(b, w, x, form)
        if sums.narrow is not None:
            products = [b.add(old, product) for old, product in zip(sums.narrow, products, strict=True)]
        sums = sums._replace(narrow=products, steps=sums.steps + 1)
        return self._widen(b, sums) if sums.steps == self.most(form, bits) else sums

    def _widen(self, b: ir.IRBuilder, sums: Partial) -> Partial:
        if sums.narrow is None:
            return sums
        return Partial(self.widened(b, sums, sums.narrow), factor=sums.factor)

    def end(self, b: ir.IRBuilder, sums: Any) -> Value:
        return joined(b, self._widen(b, sums).wide)
