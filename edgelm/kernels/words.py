"""A small language for generators of kernels: machine words, vectors, loops and functions over LLVM's IR builder.

What is written with it looks like what one would write for Numba, and becomes the same machine code. But Numba's way
from Python to LLVM takes about half a second for each function, and this takes milliseconds: it is for the kernels of
many functions. Words are int64, vectors 16 lanes of float32; neither division nor addresses are checked.

    @function
    def total(e, x, n):
        s = e.variable(e.vector(0.0))
        with e.loop(0, n, 16) as i:
            s.set(s.get() + e.load(x + 4 * i))
        return e.sum(s.get())

Knows nothing of what is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from edgelm.kernels.emit import (
    F32,
    I16,
    I32,
    I64,
    F32x16,
    I16x16,
    I32x16,
    call,
    emit_fma,
    load_at,
    narrow_f16,
    prefetch_at,
    repeat,
    spread,
    stack,
    store_at,
    widen_f16,
)
from edgelm.kernels.functions import statement


class Value:
    """An LLVM value with Python's operators: on int64 words, booleans, float32, and vectors of 16 float32.

    Comparisons are signed, and false for NaN. // and % are for words that are not negative.
    """

    __slots__ = ("e", "llvm")

    def __init__(self, e: Emitter, llvm: ir.Value) -> None:
        self.e, self.llvm = e, llvm

    def _combine(self, other: Any, integer: str, real: str, swapped: bool = False) -> Value:
        x, y = self.llvm, self.e.like(self, other).llvm
        if swapped:
            x, y = y, x
        element = x.type.element if isinstance(x.type, ir.VectorType) else x.type
        return Value(self.e, getattr(self.e.b, integer if isinstance(element, ir.IntType) else real)(x, y))

    def _compare(self, other: Any, sign: str) -> Value:
        x, y, b = self.llvm, self.e.like(self, other).llvm, self.e.b
        integer = isinstance(x.type, ir.IntType)
        return Value(self.e, b.icmp_signed(sign, x, y) if integer else b.fcmp_ordered(sign, x, y))

    def __add__(self, other: Any) -> Value:
        return self._combine(other, "add", "fadd")

    __radd__ = __add__

    def __sub__(self, other: Any) -> Value:
        return self._combine(other, "sub", "fsub")

    def __rsub__(self, other: Any) -> Value:
        return self._combine(other, "sub", "fsub", swapped=True)

    def __mul__(self, other: Any) -> Value:
        return self._combine(other, "mul", "fmul")

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Value:
        return self._combine(other, "", "fdiv")

    def __rtruediv__(self, other: Any) -> Value:
        return self._combine(other, "", "fdiv", swapped=True)

    def __floordiv__(self, other: Any) -> Value:
        return self._combine(other, "udiv", "")

    def __mod__(self, other: Any) -> Value:
        return self._combine(other, "urem", "")

    def __and__(self, other: Any) -> Value:
        return self._combine(other, "and_", "")

    def __or__(self, other: Any) -> Value:
        return self._combine(other, "or_", "")

    def __lt__(self, other: Any) -> Value:
        return self._compare(other, "<")

    def __le__(self, other: Any) -> Value:
        return self._compare(other, "<=")

    def __gt__(self, other: Any) -> Value:
        return self._compare(other, ">")

    def __ge__(self, other: Any) -> Value:
        return self._compare(other, ">=")

    def is_(self, other: Any) -> Value:
        """Equality, as a value."""
        return self._compare(other, "==")

    def is_not(self, other: Any) -> Value:
        return self._compare(other, "!=")

    def __bool__(self) -> bool:
        raise TypeError("the value is known when the kernel runs, not while it is written: use when() or select()")


class Variable:
    """A value that changes: what Python's assignment is, between the turns of a loop."""

    def __init__(self, e: Emitter, value: Value) -> None:
        self.e, self.slot = e, cgutils.alloca_once(e.b, value.llvm.type)
        self.set(value)

    def get(self) -> Value:
        return Value(self.e, self.e.b.load(self.slot))

    def set(self, value: Any) -> None:
        if not isinstance(value, Value):
            value = self.e.like(self.get(), value)
        self.e.b.store(value.llvm, self.slot)


class Emitter:
    """Writes one function: `b` is its IR builder, `context` Numba's, which knows the machine."""

    def __init__(self, context: Any, b: ir.IRBuilder) -> None:
        self.context, self.b = context, b

    @property
    def facts(self) -> set[str]:
        """What whoever began the module knows of its use, and its functions may rely on."""
        facts: set[str] = self.b.module.__dict__.setdefault("facts", set())
        return facts

    # --- values

    def word(self, value: int) -> Value:
        return Value(self, I64(value))

    def vector(self, value: Any) -> Value:
        """A vector with the number, or the float32, in each lane."""
        if isinstance(value, Value):
            return Value(self, spread(self.b, value.llvm, F32x16))
        return Value(self, repeat(F32x16, value))

    def like(self, other: Value, value: Any) -> Value:
        """`value` itself, or the number as a constant of the type of `other`."""
        if isinstance(value, Value):
            return value
        type_ = other.llvm.type
        return Value(self, repeat(type_, value) if isinstance(type_, ir.VectorType) else ir.Constant(type_, value))

    def variable(self, value: Any) -> Variable:
        """A variable that begins as a value, or as the word `value`."""
        return Variable(self, value if isinstance(value, Value) else self.word(value))

    def select(self, condition: Value, x: Any, y: Any) -> Value:
        if not isinstance(x, Value):
            x = self.like(y, x) if isinstance(y, Value) else self.word(x)
        return Value(self, self.b.select(condition.llvm, x.llvm, self.like(x, y).llvm))

    def max(self, x: Value, y: Any) -> Value:
        return self.select(x > y, x, y)

    def min(self, x: Value, y: Any) -> Value:
        return self.select(x < y, x, y)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        return Value(self, emit_fma(self.context, self.b, x.llvm, y.llvm, z.llvm))

    def to_f32(self, x: Value) -> Value:
        return Value(self, self.b.sitofp(x.llvm, F32))

    def lane(self, x: Value, i: int = 0) -> Value:
        return Value(self, self.b.extract_element(x.llvm, I32(i)))

    def shuffle(self, x: Value, y: Value, order: list[int]) -> Value:
        return Value(self, self.b.shuffle_vector(x.llvm, y.llvm, ir.Constant(ir.VectorType(I32, len(order)), order)))

    def across(self, x: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """Lanes combined pairwise, upper half with lower half."""
        n = x.llvm.type.count
        while n > 1:
            n //= 2
            x = combine(*(self.shuffle(x, x, list(range(at, at + n))) for at in (0, n)))
        return self.lane(x)

    def sum(self, x: Value) -> Value:
        return self.across(x, lambda p, q: p + q)

    def largest(self, x: Value) -> Value:
        return self.across(x, self.max)

    def narrow(self, x: Value) -> Value:
        """float32 lanes to the bits of float16."""
        return Value(self, narrow_f16(self.context, self.b, x.llvm))

    def widen(self, bits: Value) -> Value:
        """The bits of 16 float16 to float32 lanes."""
        return Value(self, widen_f16(self.context, self.b, bits.llvm))

    def apply(self, emit: Callable[..., ir.Value], x: Value) -> Value:
        """A function of `vector_math`."""
        return Value(self, emit(self.context, self.b, x.llvm))

    def intrinsic(self, name: str, x: Value) -> Value:
        """A function of one argument that LLVM has, as "llvm.sqrt.f32"."""
        return Value(self, call(self.b, name, x.llvm.type, x.llvm))

    def lanes_from(self, first: Value) -> Value:
        """int32 lanes first, first + 1, …"""
        start = spread(self.b, self.b.trunc(first.llvm, I32), I32x16)
        return Value(self, self.b.add(start, ir.Constant(I32x16, list(range(16)))))

    def spread_int(self, x: Value) -> Value:
        return Value(self, spread(self.b, self.b.trunc(x.llvm, I32), I32x16))

    def between(self, lanes: Value, low: Value, high: Value) -> Value:
        """low <= lane < high, in each lane of int32."""
        b, (low, high) = self.b, (self.spread_int(low), self.spread_int(high))
        below, above = b.icmp_signed("<", lanes.llvm, high.llvm), b.icmp_signed(">=", lanes.llvm, low.llvm)
        return Value(self, b.and_(below, above))

    # --- memory: addresses are words

    def load(self, address: Value) -> Value:
        """A vector."""
        return Value(self, load_at(self.b, address.llvm, F32x16))

    def load_f16(self, address: Value) -> Value:
        """A vector, from 16 float16."""
        return Value(self, widen_f16(self.context, self.b, load_at(self.b, address.llvm, I16x16)))

    def load_f32(self, address: Value) -> Value:
        return Value(self, load_at(self.b, address.llvm, F32))

    def load_word(self, address: Value) -> Value:
        return Value(self, load_at(self.b, address.llvm, I64))

    def load_i32(self, address: Value) -> Value:
        return Value(self, self.b.sext(load_at(self.b, address.llvm, I32), I64))

    def load_i16(self, address: Value) -> Value:
        return Value(self, load_at(self.b, address.llvm, I16))

    def store(self, address: Value, value: Value) -> None:
        store_at(self.b, value.llvm, address.llvm)

    def prefetch(self, address: Value) -> None:
        """Has the cache line fetched into the second-level cache, if the address is one; does nothing if not."""
        prefetch_at(self.b, address.llvm)

    def prefetch_to_write(self, address: Value) -> None:
        """The same in the nearest cache, to be written."""
        prefetch_at(self.b, address.llvm, near=True, to_write=True)

    def stack(self, n_bytes: int) -> Value:
        """Address of memory that lasts until the function returns; aligned to 64 bytes, not cleared."""
        return Value(self, stack(self.b, n_bytes))

    def atomic_add(self, address: Value, n: Value) -> Value:
        """Adds n to a word, returns what was there. What other threads wrote before they added is then seen."""
        return Value(self, self.b.atomic_rmw("add", self.b.inttoptr(address.llvm, I64.as_pointer()), n.llvm, "seq_cst"))

    # --- control

    @contextmanager
    def loop(self, begin: Any, end: Any, step: int = 1) -> Iterator[Value]:
        """The body, for each word of range(begin, end, step)."""
        b, begin = self.b, begin if isinstance(begin, Value) else self.word(begin)
        head, body, after = (b.append_basic_block(name) for name in ("loop", "body", "after"))
        before, end = b.block, self.like(begin, end)
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(begin.llvm, before)
        b.cbranch(b.icmp_signed("<", i, end.llvm), body, after)
        b.position_at_end(body)
        yield Value(self, i)
        i.add_incoming(b.add(i, I64(step)), b.block)
        b.branch(head)
        b.position_at_end(after)

    @contextmanager
    def repeat(self, condition: Callable[[], Value]) -> Iterator[None]:
        """The body, while the condition holds, which is asked before each turn."""
        b = self.b
        head, body, after = (b.append_basic_block(name) for name in ("while", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        b.cbranch(condition().llvm, body, after)
        b.position_at_end(body)
        yield
        b.branch(head)
        b.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.b.if_then(condition.llvm):
            yield

    @contextmanager
    def choose(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """Two bodies: ``with e.choose(c) as (then, otherwise): with then: … with otherwise: …``."""
        with self.b.if_else(condition.llvm) as branches:
            yield branches


def function(write: Callable[..., Value | None]) -> Callable[..., Value]:
    """A function of words, written once into each module that calls it, and never inlined.

    `write(e, *arguments)` writes its body and returns its result: a word, or None. Call it as f(e, *arguments), where
    arguments may be Python's integers.
    """
    @functools.wraps(write)
    def invoke(e: Emitter, *arguments: Any) -> Value:
        module = e.b.module
        name = f"{write.__module__}.{write.__qualname__}"
        fn = module.globals.get(name)
        if fn is None:
            fn = ir.Function(module, ir.FunctionType(I64, [I64] * len(arguments)), name)
            fn.linkage = "internal"
            fn.attributes.add("noinline")
            inner = Emitter(e.context, ir.IRBuilder(fn.append_basic_block("entry")))
            result = write(inner, *(Value(inner, argument) for argument in fn.args))
            inner.b.ret(I64(0) if result is None else result.llvm)
        words = [a.llvm if isinstance(a, Value) else I64(a) for a in arguments]
        return Value(e, e.b.call(fn, words))
    return invoke


def intrinsic_of(write: Callable[..., Value | None], n_arguments: int = 4) -> Any:
    """What `write(e, *words)` writes, as a function without result for code that Numba compiles: a kernel's body.

    Of three words, or of the four of a kernel.
    """
    def emit(context: Any, b: ir.IRBuilder, *args: ir.Value) -> None:
        e = Emitter(context, b)
        write(e, *(Value(e, argument) for argument in args))

    return statement(emit, n_arguments)
