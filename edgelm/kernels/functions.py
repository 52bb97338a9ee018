"""Functions of generated code, and how Numba code gets hold of them.

A generator's code is put into functions of its own, because LLVM takes minutes over one function that has everything in
it. What a kernel's body needs of its format goes through a table of their addresses, `Code`, so that the body itself is
compiled once for all formats.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgelm.kernels.emit import I64, stack

Value = ir.Value


class Code(IntEnum):
    """Fields, int64 each, of what the body of a linear kernel knows of its format."""

    DIRECT = 0  # addresses of four functions, of fewer and fewer tokens
    DIRECT_TOKENS = 4  # of these functions
    DIRECT_MOST = 8  # tokens that they do; more, or if there are none of them: tiles
    TILES = 9  # four, of fewer and fewer tokens
    TILE_TOKENS = 13
    UNPACK = 17  # 0: tiles read packed weights
    BLOCKS = 18  # of a unit
    UNIT_BYTES = 19
    RECORD_BYTES = 20  # of activations for a block
    SLAB_BLOCKS = 21  # that a tile goes over at a time
    SLAB_BYTES = 22
    FACTOR = 23  # of the sums: a power of two, as the bits of a float32
    REST = 24  # adds the remainders of a slab; 0: activations have no remainders, and no unit: see `records`
    PAIRS = 25  # unpacks blocks to tiles of pairs of bfloat16: see `amx_tiles`; 0: the matrix unit is not used
    PAIR_TILES = 26  # of a block
    DIRECT_LISTS = 27  # whether functions of few tokens take a list of the blocks that have a remainder
    SIZE = 28


def tile_fields(sizes: tuple[int, ...], function: Any, first: Code = Code.TILES) -> dict[int, Any]:
    """The fields of tiles: `function(tokens)` returns the address of each. Those that are not there never fit."""
    fields: dict[int, Any] = {first + 4 + i: 1 << 30 for i in range(4)}
    for i, tokens in enumerate(sizes):
        fields[first + i], fields[first + 4 + i] = function(tokens), tokens
    return fields


def function_address(context: Any, module: ir.Module, fmt: Any, emit: Any, n_args: int, *numbers: int) -> Value:
    """Address of the function whose body is emit(context, b, fmt, arguments, *numbers), all int64. A constant."""
    name = ".".join(["edgelm", emit.__name__, fmt.name, *map(str, numbers)])
    found = module.globals.get(name)
    if found is None:
        found = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * n_args), name)
        found.linkage = "internal"
        found.attributes.add("noinline")
        found.attributes.add("nounwind")
        b = ir.IRBuilder(found.append_basic_block())
        emit(context, b, fmt, list(found.args), *numbers)
        b.ret_void()
    return found.ptrtoint(I64)


def code_address(b: ir.IRBuilder, name: str, fields: dict[int, Any]) -> Value:
    """Address of a `Code` with these fields."""
    values = [fields.get(field, 0) for field in range(Code.SIZE)]
    values = [I64(value) if isinstance(value, int) else value for value in values]
    array = ir.Constant(ir.ArrayType(I64, len(values)), values)
    return b.ptrtoint(cgutils.global_constant(b, f"edgelm.code.{name}", array), I64)


def address_of(formats: dict[str, Any], emit: Any, n_args: int) -> Any:
    """An intrinsic of one format's name (a literal) that returns the address of what `emit` emits for it."""

    @intrinsic(prefer_literal=True)
    def address(typingctx, fmt):
        if not isinstance(fmt, types.StringLiteral):
            return None

        def codegen(context, b, sig, args):
            return function_address(context, b.module, formats[fmt.literal_value], emit, n_args)

        return types.int64(fmt), codegen

    return address


@intrinsic
def call_function(typingctx, function, *args):
    """Calls a function of int64 arguments by its address."""

    def codegen(context, b, sig, args):
        values = cgutils.unpack_tuple(b, args[1])
        type_ = ir.FunctionType(ir.VoidType(), [I64] * len(values))
        b.call(b.inttoptr(args[0], type_.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, types.StarArgTuple([types.int64] * len(args))), codegen


@intrinsic(prefer_literal=True)
def scratch(typingctx, n_bytes):
    """Address of `n_bytes` (a literal) on the stack, at a multiple of 64; good until the kernel returns."""
    if not isinstance(n_bytes, types.IntegerLiteral):
        return None

    def codegen(context, b, sig, args):
        return stack(b, n_bytes.literal_value)

    return types.int64(n_bytes), codegen


def statement(emit: Callable[..., None], n_arguments: int) -> Any:
    """What `emit(context, b, *words)` emits, of up to four words, as a function without result for Numba's code."""

    def typed() -> Any:
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
            emit(context, b, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * n_arguments), codegen

    of_words = (  # Numba takes the number of arguments from the function
        lambda typingctx: typed(),
        lambda typingctx, x: typed(),
        lambda typingctx, x, y: typed(),
        lambda typingctx, x, y, z: typed(),
        lambda typingctx, x, y, z, w: typed(),
    )
    return intrinsic(of_words[n_arguments])
