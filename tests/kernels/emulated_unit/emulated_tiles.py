"""Instructions of Intel's matrix unit as LLVM code over memory, for processors that have all but the unit.

Tiles are memory on the stack of the function that configures them. Whatever its thread calls finds them by the base of
the segment GS, which programs have no other use for on Linux. So they last from one function to the next, and who uses
them before they are configured, or after they are released, reaches for address 0, which ends the process. Tiles are
of full size: any other configuration ends it, too.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2, TDPBF16PS.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core.registry import cpu_target

from edgelm.kernels import emit
from edgelm.kernels.emit import I8, I32, I64, F32x16, I8x64, I32x16, repeat
from edgelm.kernels.words import Emitter, Value, function

TILES, ROWS, LINE = 8, 16, 64
TILE = ROWS * LINE
OF_THREAD = 256  # LLVM's address space of what lies at the base of GS
SHAPE = bytes([1, *[0] * 15, *[LINE, 0] * TILES, *[0] * 16, *[ROWS] * TILES, *[0] * 8])
SMALLEST = 0x00800000  # the bits of the smallest float32 that is not subnormal


def call(b: ir.IRBuilder, name: str, *arguments: ir.Value) -> None:
    """Emits what stands for an instruction, by LLVM's name of it: instead of `amx._call`."""
    e = Emitter(cpu_target.target_context, b)
    if name == "ldtilecfg":
        _configure(e, arguments[0])
    elif name == "tilerelease":
        _set_base(e, e.word(0))
    elif name == "tdpbf16ps":
        tiles = [_number(argument) for argument in arguments]
        assert len(set(tiles)) == 3, "an invalid instruction"
        _multiply(e, *(TILE * tile for tile in tiles))
    elif name == "tilezero":
        _zero(e, TILE * _number(arguments[0]))
    else:
        tile, place, stride = arguments
        {"tileloadd64": _load, "tilestored64": _store}[name](
            e, TILE * _number(tile), Value(e, b.ptrtoint(place, I64)), Value(e, stride)
        )


def _number(tile: ir.Value) -> int:
    """Tiles are a part of the instruction."""
    assert isinstance(tile, ir.Constant) and tile.type == I8 and 0 <= tile.constant < TILES
    return int(tile.constant)


# --- tiles, by how many bytes they lie behind the base


def _set_base(e: Emitter, address: Value) -> None:
    emit.call(e.b, "llvm.x86.wrgsbase.64", ir.VoidType(), address.llvm)


def _configure(e: Emitter, shape: ir.Value) -> None:
    given = e.b.load(e.b.bitcast(shape, I8x64.as_pointer()), align=1)
    differ = e.b.icmp_unsigned("!=", given, ir.Constant(I8x64, list(SHAPE)))
    with e.when(Value(e, e.b.icmp_unsigned("!=", e.b.bitcast(differ, I64), I64(0)))):
        emit.call(e.b, "llvm.trap", ir.VoidType())
    tiles = e.stack(TILES * TILE)
    with e.loop(0, TILES * TILE, LINE) as line:
        e.store(tiles + line, e.vector(0.0))
    _set_base(e, tiles)


def _pointer(e: Emitter, at: Value, type_: ir.Type) -> ir.Value:
    return e.b.inttoptr(at.llvm, type_.as_pointer(OF_THREAD))


def _row(e: Emitter, at: Value) -> Value:
    return Value(e, e.b.load(_pointer(e, at, F32x16), align=LINE))


def _set_row(e: Emitter, at: Value, row: Value) -> None:
    e.b.store(row.llvm, _pointer(e, at, F32x16), align=LINE)


@function
def _zero(e: Emitter, tile: Value) -> None:
    with e.loop(0, TILE, LINE) as line:
        _set_row(e, tile + line, e.vector(0.0))


@function
def _load(e: Emitter, tile: Value, address: Value, stride: Value) -> None:
    with e.loop(0, ROWS) as r:
        _set_row(e, tile + LINE * r, e.load(address + stride * r))


@function
def _store(e: Emitter, tile: Value, address: Value, stride: Value) -> None:
    with e.loop(0, ROWS) as r:
        e.store(address + stride * r, _row(e, tile + LINE * r))


# --- products


def _flushed(e: Emitter, x: Value) -> Value:
    """float32 lanes, zeros of the same sign where they are subnormal."""
    bits = Value(e, e.b.bitcast(x.llvm, I32x16))
    subnormal = e.b.icmp_unsigned("<", (bits & 0x7FFFFFFF).llvm, repeat(I32x16, SMALLEST))
    return Value(e, e.b.bitcast(e.b.select(subnormal, (bits & 0x80000000).llvm, bits.llvm), F32x16))


def _halves(e: Emitter, pairs: ir.Value) -> list[Value]:
    """Lanes of pairs of bfloat16 as float32: the first of each pair, and the second."""
    low, high = e.b.shl(pairs, repeat(I32x16, 16)), e.b.and_(pairs, repeat(I32x16, 0xFFFF0000))
    return [_flushed(e, Value(e, e.b.bitcast(half, F32x16))) for half in (low, high)]


@function
def _multiply(e: Emitter, sums: Value, rows: Value, columns: Value) -> None:
    """The first numbers of pairs are added up for themselves, and the second ones; then both; then what was there."""
    with e.loop(0, ROWS) as r:
        totals = [e.variable(e.vector(0.0)) for _ in range(2)]
        with e.loop(0, ROWS) as k:
            pair = e.b.load(_pointer(e, rows + LINE * r + 4 * k, I32), align=4)
            x = _halves(e, emit.spread(e.b, pair, I32x16))
            y = _halves(e, e.b.bitcast(_row(e, columns + LINE * k).llvm, I32x16))
            for total, own, other in zip(totals, x, y, strict=True):
                total.set(_flushed(e, e.fma(own, other, total.get())))
        both = _flushed(e, totals[0].get() + totals[1].get())
        before = _flushed(e, _row(e, sums + LINE * r))
        _set_row(e, sums + LINE * r, _flushed(e, before + both))
