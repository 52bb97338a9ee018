"""Every format against an outside oracle: `gguf.quants`, or a loop over the bits for types that it does not know."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import gguf
import numpy as np
import pytest
from blocks import random_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgelm import formats
from edgelm.errors import FormatError, UnsupportedError
from edgelm.formats import FORMATS, Format, QTensor, by_name, grids

ALL = sorted(FORMATS.values(), key=lambda format: format.id)
WRITABLE = [format for format in ALL if format.quantize is not Format.quantize]


def bits(code: str, n: int) -> Callable[[bytes], list[float]]:
    """A decoder for n plain numbers."""
    return lambda block: list(struct.unpack(f"<{n}{code}", block))


def q8_1(block: bytes) -> list[float]:
    d, _, *q = struct.unpack("<ee32b", block)
    return [d * x for x in q]


def q8_k(block: bytes) -> list[float]:
    d, *q = struct.unpack("<f256b", block[:260])
    return [d * x for x in q]


def q1_0(block: bytes) -> list[float]:
    (d,) = struct.unpack_from("<e", block)
    return [d if block[2 + j // 8] >> j % 8 & 1 else -d for j in range(128)]


def q2_0(block: bytes) -> list[float]:
    (d,) = struct.unpack_from("<e", block)
    return [d * ((block[2 + j // 4] >> j % 4 * 2 & 3) - 1) for j in range(64)]


# Types that gguf.quants cannot decode, written out bit by bit from the definition in ggml.
TWINS: dict[str, Callable[[bytes], list[float]]] = {
    "F64": bits("d", 1), "I8": bits("b", 1), "I16": bits("h", 1), "I32": bits("i", 1), "I64": bits("q", 1),
    "Q8_1": q8_1, "Q8_K": q8_k, "Q1_0": q1_0, "Q2_0": q2_0,
}  # fmt: skip


def expected(format: type[Format], data: np.ndarray) -> np.ndarray:
    """(rows, bytes) -> (rows, weights) by the oracle."""
    if twin := TWINS.get(format.name):
        rows = [
            [x for i in range(0, len(row), format.n_bytes) for x in twin(row[i : i + format.n_bytes])]
            for row in map(bytes, data)
        ]
        return np.array(rows, np.float64).astype(np.float32)
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[format.name])


def assert_same_bits(actual: np.ndarray, wanted: np.ndarray) -> None:
    assert actual.dtype == wanted.dtype == np.float32 and actual.shape == wanted.shape
    same = (actual.view(np.uint32) == wanted.view(np.uint32)) | (np.isnan(actual) & np.isnan(wanted))
    assert same.all(), f"{np.count_nonzero(~same)} of {same.size} differ, first at {np.argwhere(~same)[0]}"


def test_every_type_of_ggml_is_there() -> None:
    assert {(t.value, t.name) for t in gguf.GGMLQuantizationType} <= {(f.id, f.name) for f in ALL}
    assert all(FORMATS[f.id] is f and getattr(formats, f.name) is f for f in ALL)
    assert "Q8_0" in formats.__all__


@pytest.mark.parametrize("format", ALL, ids=lambda f: f.name)
def test_size_and_layout(format: type[Format]) -> None:
    assert format.layout.itemsize == format.n_bytes
    # The gguf package still has the former Q8_1 with two float32 in front; in ggml they have been float16 for years.
    if format.name in gguf.GGMLQuantizationType.__members__ and format.name != "Q8_1":
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format.name]] == (format.block, format.n_bytes)
    assert format.row_bytes(3 * format.block) == 3 * format.n_bytes
    assert format.bits_per_weight() == 8 * format.n_bytes / format.block
    if format.block > 1:
        with pytest.raises(FormatError, match=format.name):
            format.row_bytes(format.block + 1)


@pytest.mark.parametrize("format", ALL, ids=lambda f: f.name)
def test_dequantize_equals_the_oracle(format: type[Format]) -> None:
    rng = np.random.default_rng(format.id)
    blocks = random_blocks(format, 6 * 50, rng)
    data = blocks.view(np.uint8).reshape(50, 6 * format.n_bytes)
    assert_same_bits(QTensor("w", format, (50, 6 * format.block), data).dequantize(), expected(format, data))
    assert_same_bits(format.dequantize(blocks).reshape(50, -1), expected(format, data))


@pytest.mark.parametrize("format", ALL, ids=lambda f: f.name)
def test_any_bytes_dequantize_without_a_warning(format: type[Format]) -> None:
    """NaN, infinities and unused codes included, and all as the oracle has it."""
    data = np.random.default_rng(format.id).integers(0, 256, (40, 7 * format.n_bytes), dtype=np.uint8)
    data[0], data[1] = 0, 255
    with np.errstate(all="ignore"):
        wanted = expected(format, data)
    assert_same_bits(QTensor("w", format, (40, 7 * format.block), data).dequantize(), wanted)


@pytest.mark.parametrize("name", grids._GRIDS)
def test_codebooks(name: str) -> None:
    oracle = getattr(gguf.quants, name)
    oracle.init_grid()
    grid = grids.grid(name)
    assert np.array_equal(grid, oracle.grid.reshape(oracle.grid_shape)) and not grid.flags.writeable


@pytest.mark.parametrize("format", WRITABLE, ids=lambda f: f.name)
@given(
    values=arrays(np.float32, (3, 64), elements=st.floats(-8, 8, width=32, allow_subnormal=False)),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e3, 1e20]),
)
@settings(max_examples=60, deadline=None)
def test_quantize_equals_the_oracle(format: type[Format], values: np.ndarray, scale: float) -> None:
    x = values * np.float32(scale)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.quantize(x, gguf.GGMLQuantizationType[format.name]).view(np.uint8)
    assert np.array_equal(QTensor.from_array("w", x, format).data, wanted)


@pytest.mark.parametrize("format", WRITABLE, ids=lambda f: f.name)
def test_quantize_ties_zeros_and_many_values(format: type[Format]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 256)).astype(np.float32)
    x[0], x[1], x[2], x[3] = 0, -1, np.repeat([1, -1], 128), np.linspace(-127, 127, 256)
    x[4:8] = np.round(x[4:8] * 8) / 2
    x[8, 5], x[9, :32] = np.float32(0.49999997), np.arange(32) + np.float32(0.5)
    wanted = gguf.quants.quantize(x, gguf.GGMLQuantizationType[format.name]).view(np.uint8)
    assert np.array_equal(QTensor.from_array("w", x, format).data, wanted)


@pytest.mark.parametrize("format", WRITABLE, ids=lambda f: f.name)
def test_quantization_error(format: type[Format]) -> None:
    """The bound that ggml sets for itself, on the same values, for types of four bits and more."""
    x = (0.1 + 2 * np.cos(np.arange(4096))).astype(np.float32)[None]
    error = QTensor.from_array("w", x, format).dequantize() - x
    assert np.sqrt((error.astype(np.float64) ** 2).sum()) / 4096 < 0.002


def test_bfloat16_rounds_to_even_and_keeps_nan() -> None:
    x = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7FFFFFFF, 0xFF800001, 0x7F800000, 0x7F7FFFFF], np.uint32)
    stored = QTensor.from_array("w", x.view(np.float32)[None], formats.BF16).data.view(np.uint16)
    assert [hex(bits) for bits in stored[0]] == ["0x3f80", "0x3f82", "0x3f81", "0x7fff", "0xffc0", "0x7f80", "0x7f80"]


def test_types_that_are_only_read_say_so() -> None:
    x = np.zeros((2, 256), np.float32)
    assert {"Q4_K", "IQ2_XS", "TQ1_0"} <= {f.name for f in ALL} - {f.name for f in WRITABLE}
    for format in set(ALL) - set(WRITABLE):
        with pytest.raises(UnsupportedError, match=format.name):
            QTensor.from_array("w", x, format)
        with pytest.raises(UnsupportedError):
            format.quantize(x)


def test_by_name() -> None:
    assert by_name("q4_k") is FORMATS[12] and by_name("IQ3_XXS").id == 18
    with pytest.raises(UnsupportedError, match="Q9_9"):
        by_name("Q9_9")


# ------------------------------------------------------------------------------------------------------------- QTensor


def test_rows_equal_the_rows_of_the_whole() -> None:
    rng = np.random.default_rng(3)
    w = QTensor.from_array("w", rng.normal(size=(100, 96)), formats.Q5_1)
    whole = w.dequantize()
    for indices in ([], [7], [99, 0, 7, 7, -1], np.arange(100)[::3]):
        assert_same_bits(w.rows(indices), whole[np.asarray(indices, int)])
    with pytest.raises(IndexError):
        w.rows([100])
    assert (w.n_bytes, w.n_weights, w.shape) == (100 * 3 * 24, 9600, (100, 96))


@pytest.mark.parametrize("shape", [(64,), (1, 32), (2, 3, 64), (1, 1, 1, 32), (0, 32), (5, 40_000)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    for format in (formats.F32, formats.Q8_0):
        w = QTensor.from_array("w", x, format)
        assert w.shape == shape and w.data.shape[1] == format.row_bytes(shape[-1]) and not w.data.flags.writeable
        assert w.n_weights == x.size
        np.testing.assert_allclose(w.dequantize(), x, atol=0 if format is formats.F32 else 0.03)
    with pytest.raises(FormatError, match="Q4_0"):
        QTensor.from_array("w", x[..., :-1], formats.Q4_0)


def test_long_rows_are_worked_on_in_slabs() -> None:
    w = QTensor("w", formats.Q4_0, (1, 1 << 22), np.zeros((1, (1 << 22) // 32 * 18), np.uint8))
    tracemalloc.start()
    try:
        w.dequantize()
        assert tracemalloc.get_traced_memory()[1] < 4 * (1 << 22) + (4 << 20)  # the result and a few slabs
    finally:
        tracemalloc.stop()
