"""Instructions of the matrix unit, against what Intel's manual says of them. With `emulated_unit`: the emulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from op_rows import NATIVE, UNIT

from edgelm.kernels import amx, compiler
from edgelm.kernels.amx import DEPTH, LINE, TILE
from edgelm.kernels.matrix_unit import ROWS
from edgelm.kernels.words import Emitter, Value, intrinsic_of

Floats = NDArray[np.float32]
EMULATED = not any(name.startswith("amx-") for name in amx.NEEDS)
TILES = 8
ZEROED = 5
USES = (0, 4, 6), (3, 5, 7), (7, 2, 1), (6, 0, 5)  # sums, rows, columns
pytestmark = pytest.mark.skipif(not UNIT, reason="there is no matrix unit, or the system does not give it")
as_written = pytest.mark.skipif(not EMULATED, reason="processors may add up in another order than the manual writes")


def _moves(e: Emitter, source: Value, to: Value, stride: Value, other_stride: Value) -> None:
    """All tiles from `source`, and back in reverse order, one after the other."""
    amx.configure(e.b)
    for tile in range(TILES):
        amx.load(e.b, tile, (source + stride * (ROWS * tile)).llvm, stride.llvm)
    amx.zero(e.b, ZEROED)
    for i, tile in enumerate(reversed(range(TILES))):
        amx.store(e.b, tile, (to + other_stride * (ROWS * i)).llvm, other_stride.llvm)
    amx.release(e.b)


def _products(e: Emitter, source: Value, to: Value, begin: Value, end: Value) -> None:
    """Sums, rows and columns are three tiles at `source`; what becomes of the sums, by tiles of any number."""
    amx.configure(e.b)
    for i, tiles in enumerate(USES):
        for k, tile in enumerate(tiles):
            amx.load(e.b, tile, (source + TILE * k).llvm, LINE)
        amx.multiply(e.b, *tiles)
        amx.store(e.b, tiles[0], (to + TILE * i).llvm, LINE)
    amx.release(e.b)


_moves_code, _products_code = intrinsic_of(_moves), intrinsic_of(_products)


def moves(op, env, begin, end):  # type: ignore[no-untyped-def]
    _moves_code(op, env, begin, end)


def products(op, env, begin, end):  # type: ignore[no-untyped-def]
    _products_code(op, env, begin, end)


def call(kernel: compiler.Kernel, source: NDArray[Any], to: NDArray[Any], *numbers: int) -> None:
    NATIVE(compiler.address(kernel))(source.ctypes.data, to.ctypes.data, *numbers)


def bfloat16(x: Floats) -> NDArray[np.uint16]:
    """The bits of what is a bfloat16 already."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def multiplied(sums: Floats, rows: Floats, columns: Floats) -> Floats:
    """(16, 16) sums + (16, 32) rows @ (32, 16) columns, which all of `USES` agree on."""
    pairs = bfloat16(columns).reshape(ROWS, 2, ROWS).transpose(0, 2, 1)
    tiles = [part.tobytes() for part in (sums.astype(np.float32), bfloat16(rows), pairs)]
    assert {len(tile) for tile in tiles} == {TILE}
    to = np.full((len(USES), ROWS, ROWS), np.nan, np.float32)
    call(products, np.frombuffer(b"".join(tiles), np.uint8), to, 0, 0)
    for other in to[1:]:
        np.testing.assert_array_equal(other.view(np.uint32), to[0].view(np.uint32))
    result: Floats = to[0]
    return result


def nothing() -> tuple[Floats, Floats, Floats]:
    return np.zeros((ROWS, ROWS), np.float32), np.zeros((ROWS, DEPTH), np.float32), np.zeros((DEPTH, ROWS), np.float32)


@pytest.mark.parametrize(("stride", "other"), [(LINE, LINE), (80, LINE), (LINE, 4096), (1000, 72)])
def test_tiles_go_from_lines_to_lines(stride: int, other: int) -> None:
    source = np.random.default_rng(1).integers(0, 256, (TILES, ROWS, stride), np.uint8)
    to, expected = (np.full((TILES, ROWS, other), 7, np.uint8) for _ in range(2))
    expected[:, :, :LINE] = source[::-1, :, :LINE]
    expected[TILES - 1 - ZEROED, :, :LINE] = 0
    call(moves, source, to, stride, other)
    np.testing.assert_array_equal(to, expected)


def test_whole_numbers() -> None:
    """Whose products nothing rounds, in any order."""
    rng = np.random.default_rng(2)
    sums, rows, columns = (rng.integers(-99, 100, x.shape).astype(np.float32) for x in nothing())
    np.testing.assert_array_equal(multiplied(sums, rows, columns), sums + rows @ columns)


def test_sums_are_rounded_to_nearest_even() -> None:
    """One product each, which lies in the middle between two float32."""
    sums, rows, columns = nothing()
    sums[:] = 1 + np.random.default_rng(3).integers(0, 1 << 23, sums.shape) / (1 << 23)
    rows[:, 21] = 2.0**-12
    columns[21] = 2.0**-12 * (2 * np.arange(ROWS) + 1)
    expected = (sums.astype(np.float64) + rows.astype(np.float64) @ columns).astype(np.float32)
    assert (expected == sums).any() and (expected > sums).any()
    np.testing.assert_array_equal(multiplied(sums, rows, columns), expected)


def test_subnormal_numbers_are_zero() -> None:
    """Where they are multiplied, where they would come out, and where something is added to them."""
    sums, rows, columns = nothing()
    columns[0], columns[1] = 2.0**100, 2.0**-30
    rows[0, 0] = np.uint32(1 << 16).view(np.float32)
    rows[1, 1], rows[2, 1] = 2.0**-97, 2.0**-96
    sums[3], sums[4], sums[5] = 1e-40, -1e-40, 2.0**-126
    expected = np.zeros_like(sums)
    expected[2] = expected[5] = 2.0**-126
    np.testing.assert_array_equal(multiplied(sums, rows, columns), expected)


def test_what_is_no_number_stays_in_its_row_or_column() -> None:
    sums, rows, columns = (np.ones_like(x) for x in nothing())
    rows[3, 8], columns[9, 5] = np.nan, np.inf
    result = multiplied(sums, rows, columns)
    assert np.isnan(result[3]).all() and np.isnan(result).sum() == ROWS
    assert np.isinf(result[:, 5]).sum() == ROWS - 1 and (result == DEPTH + 1).sum() == (ROWS - 1) ** 2


@as_written
def test_sums_on_the_way_are_not_subnormal_either() -> None:
    sums, rows, columns = nothing()
    columns[:] = 2.0**-30
    rows[3, 7], rows[3, 9] = 2.0**-97, 2.0**-97  # half of the smallest normal number each
    rows[4, 7], rows[4, 9] = 2.0**-96, 2.0**-97
    expected = np.zeros_like(sums)
    expected[4] = 1.5 * 2.0**-126
    np.testing.assert_array_equal(multiplied(sums, rows, columns), expected)


@as_written
def test_the_order_of_sums() -> None:
    """With single roundings, bit for bit."""
    rng = np.random.default_rng(4)
    sums, rows, columns = (rng.standard_normal(x.shape).astype(np.float32) for x in nothing())
    for x in (rows, columns):
        x.view(np.uint32)[:] &= 0xFFFF0000
    totals = [np.zeros_like(sums) for _ in range(2)]
    for k in range(DEPTH):
        exact = totals[k % 2] + np.outer(rows[:, k].astype(np.float64), columns[k].astype(np.float64))
        totals[k % 2] = exact.astype(np.float32)
    np.testing.assert_array_equal(multiplied(sums, rows, columns), sums + (totals[0] + totals[1]))
