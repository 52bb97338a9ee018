"""Code for Intel's matrix unit (AMX): eight tiles of 16 rows of 64 bytes, and products that add two of them to a third.

A tile of float32 holds sums of 16 rows with 16 columns. `multiply` adds to it the products of 16 rows of 32 bfloat16
with 32 rows of 16 columns, of which two neighbouring rows lie in turns: a line of 64 bytes is a pair for each column.
That is 8192 multiply-adds, where `vdpbf16ps` does 32. Sums are float32; subnormal numbers are taken for zero.

A process asks before it uses tiles (`matrix_unit.permitted`), a thread says first what they look like (`configure`).
Nothing lasts in tiles beyond a function: another one may use them, too.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from edgelm.kernels.emit import I8, I64, call, target
from edgelm.kernels.matrix_unit import ROWS

Value = ir.Value
LINE = 64  # bytes of a row of a tile
TILE = ROWS * LINE
DEPTH = 32  # bfloat16 of a row: products that are added to each sum at a time
NEEDS = frozenset({"amx-tile", "amx-bf16", "avx512bw", "avx512bf16"})
_KIND, _LINES, _ROWS = 0, 16, 48  # where in what `configure` says: the only kind of tiles, bytes of rows, rows


def has_tiles(context: Any) -> bool:
    """Whether Numba compiles for a processor with a matrix unit for bfloat16."""
    machine, features = target(context)
    return machine == "x86_64" and features >= NEEDS


# Tiles are numbers from 0 to 7; addresses and strides are words, a stride perhaps an integer of Python's.


def configure(b: ir.IRBuilder) -> None:
    """Gives all tiles their full size, and zeros."""
    data = bytearray(64)
    data[_KIND], data[_LINES:_ROWS], data[_ROWS : _ROWS + 8] = 1, LINE.to_bytes(2, "little") * 8 + bytes(16), [ROWS] * 8
    shape = cgutils.global_constant(b, "edgelm.tiles", ir.Constant(ir.ArrayType(I8, 64), data))
    _call(b, "ldtilecfg", b.bitcast(shape, I8.as_pointer()))


def release(b: ir.IRBuilder) -> None:
    """After the last use: what is in tiles need not be kept when the thread is interrupted."""
    _call(b, "tilerelease")


def zero(b: ir.IRBuilder, tile: int) -> None:
    _call(b, "tilezero", I8(tile))


def load(b: ir.IRBuilder, tile: int, address: Value, stride: Value | int) -> None:
    """16 rows of 64 bytes, `stride` bytes apart."""
    _call(b, "tileloadd64", I8(tile), *_place(b, address, stride))


def store(b: ir.IRBuilder, tile: int, address: Value, stride: Value | int) -> None:
    _call(b, "tilestored64", I8(tile), *_place(b, address, stride))


def multiply(b: ir.IRBuilder, sums: int, rows: int, columns: int) -> None:
    """sums += rows @ columns: see the module's docstring."""
    _call(b, "tdpbf16ps", I8(sums), I8(rows), I8(columns))


def _place(b: ir.IRBuilder, address: Value, stride: Value | int) -> tuple[Value, Value]:
    return b.inttoptr(address, I8.as_pointer()), I64(stride) if isinstance(stride, int) else stride


def _call(b: ir.IRBuilder, name: str, *arguments: Value) -> None:
    call(b, f"llvm.x86.{name}", ir.VoidType(), *arguments)
