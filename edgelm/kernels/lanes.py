"""What packing calculates with: integers of the generated code, sixteen side by side, one for each row of a group.

`Rows` is a place in each of 16 rows of a file, `Place` one in packed weights, where what belongs to the rows lies lane
by lane. Words of 16 rows are loaded four at a time and turned round in registers, so a format moves the bits of all
rows at once. Knows no format.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgelm.kernels.emit import I8, I32, I64, I32x16, indices, load_at, repeat, spread, store_at, undefined
from edgelm.kernels.units import ROWS

Value = ir.Value
QUAD = 4  # words of a row that are loaded together: 16 bytes


class Int:
    """An integer of the generated code, or sixteen, to be calculated with as in C; shifts to the right bring in zeros.

    A single one beside sixteen, such as an amount to shift by, counts for each of them.
    """

    def __init__(self, b: ir.IRBuilder, value: Value) -> None:
        self.b, self.value = b, value

    def _with(self, emit: Any, other: Int | int) -> Int:
        type_ = self.value.type
        many = isinstance(type_, ir.VectorType)
        if isinstance(other, int):
            return Int(self.b, emit(self.value, repeat(type_, other) if many else type_(other)))
        alike = other.value.type == type_
        return Int(self.b, emit(self.value, other.value if alike else spread(self.b, other.value, type_)))

    def __add__(self, other: Int | int) -> Int:
        return self._with(self.b.add, other)

    def __sub__(self, other: Int | int) -> Int:
        return self._with(self.b.sub, other)

    def __mul__(self, other: Int | int) -> Int:
        return self._with(self.b.mul, other)

    def __and__(self, other: Int | int) -> Int:
        return self._with(self.b.and_, other)

    def __or__(self, other: Int | int) -> Int:
        return self._with(self.b.or_, other)

    def __xor__(self, other: Int | int) -> Int:
        return self._with(self.b.xor, other)

    def __invert__(self) -> Int:
        return self ^ -1

    def __lshift__(self, other: Int | int) -> Int:
        return self._with(self.b.shl, other)

    def __rshift__(self, other: Int | int) -> Int:
        return self._with(self.b.lshr, other)

    def where(self, other: Int, condition: Value) -> Int:
        return Int(self.b, self.b.select(condition, self.value, other.value))

    def below(self, other: int) -> Value:
        return self.b.icmp_signed("<", self.value, self.value.type(other))

    def equals(self, other: int) -> Value:
        return self.b.icmp_signed("==", self.value, repeat(self.value.type, other))

    def i32(self) -> Int:
        return Int(self.b, self.b.trunc(self.value, I32))


class Rows:
    """The bytes `offset` behind each of 16 addresses: the same place in 16 rows."""

    def __init__(self, b: ir.IRBuilder, starts: list[Value], offset: Int) -> None:
        self.b, self._starts, self._offset = b, starts, offset

    @classmethod
    def of(cls, b: ir.IRBuilder, first: Value, row_bytes: Value, n_rows: Value) -> Rows:
        """The beginnings of `n_rows` rows; where these are fewer than 16, the last one stands for those that lack."""
        numbers = [b.select(b.icmp_signed("<", I64(r), n_rows), I64(r), b.sub(n_rows, I64(1))) for r in range(ROWS)]
        return cls(b, [b.add(first, b.mul(number, row_bytes)) for number in numbers], Int(b, I64(0)))

    def __add__(self, n_bytes: Int | int) -> Rows:
        return Rows(self.b, self._starts, self._offset + n_bytes)

    def _each(self, type_: ir.Type) -> list[Value]:
        return [load_at(self.b, self.b.add(start, self._offset.value), type_) for start in self._starts]

    def load(self, bits: int = 32) -> Int:
        """The unsigned integer of `bits` bits of each row."""
        b, type_ = self.b, ir.VectorType(ir.IntType(bits), ROWS)
        found = undefined(type_)
        for row, value in enumerate(self._each(type_.element)):
            found = b.insert_element(found, value, I32(row))
        return Int(b, found if bits == 32 else b.zext(found, I32x16))

    def words(self, n: int) -> list[Int]:
        """The first `n` int32 of each row, a multiple of four of them."""
        return [word for i in range(0, n, QUAD) for word in (self + 4 * i)._quad()]

    def _quad(self) -> list[Int]:
        quads = self._each(ir.VectorType(I32, QUAD))
        vectors = [_joined(self.b, quads[k::QUAD]) for k in range(QUAD)]  # of rows k, k + 4, k + 8, k + 12
        first, second = (_zipped(self.b, *vectors[k : k + 2], 1) for k in (0, 2))
        pairs = [_zipped(self.b, *halves, 2) for halves in zip(first, second, strict=True)]
        return [Int(self.b, word) for pair in pairs for word in pair]


def _joined(b: ir.IRBuilder, vectors: list[Value]) -> Value:
    """Vectors as one, one behind the other."""
    while len(vectors) > 1:
        n = 2 * vectors[0].type.count
        vectors = [b.shuffle_vector(*vectors[i : i + 2], indices(0, n)) for i in range(0, len(vectors), 2)]
    return vectors[0]


def _zipped(b: ir.IRBuilder, one: Value, other: Value, n: int) -> list[Value]:
    """`n` words of each of two vectors in turns, from the lower and from the upper half of each 16 bytes."""
    found = []
    for half in range(0, QUAD, 2):
        lanes = [
            lane + side
            for quad in range(half, ROWS, QUAD)
            for start in range(quad, quad + 2, n)
            for side in (0, ROWS)
            for lane in range(start, start + n)
        ]
        found.append(b.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, ROWS), lanes)))
    return found


class Place:
    """An address in packed weights. Lanes of rows that a group lacks stay zero."""

    def __init__(self, b: ir.IRBuilder, address: Value, n_rows: Value) -> None:
        self.b, self.address, self._n_rows = b, address, n_rows

    def __add__(self, n_bytes: Int | int) -> Place:
        return Place(self.b, (Int(self.b, self.address) + n_bytes).value, self._n_rows)

    def store(self, numbers: Int, bits: int = 32) -> None:
        """Stores the lowest `bits` bits of sixteen numbers, one behind the other."""
        b, type_ = self.b, ir.VectorType(ir.IntType(bits), ROWS)
        value = numbers.value if bits == 32 else b.trunc(numbers.value, type_)
        lane = ir.Constant(ir.VectorType(I8, ROWS), list(range(ROWS)))
        there = b.icmp_signed("<", lane, spread(b, b.trunc(self._n_rows, I8), lane.type))
        store_at(b, b.select(there, value, ir.Constant(type_, None)), self.address)
