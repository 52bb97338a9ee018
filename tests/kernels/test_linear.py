"""Packed weights: every format against its definition in `edgelm.formats`; the same bits whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
from blocks import random_blocks
from numba.core.registry import cpu_target
from op_rows import Workspace

from edgelm.errors import UnsupportedError
from edgelm.formats import FORMATS, QTensor, by_name
from edgelm.kernels import emit, isas, linear
from edgelm.kernels.abi import Env
from edgelm.kernels.records import LIMIT
from edgelm.kernels.units import UNITS
from edgelm.kernels.weight_layout import packed_bytes

NATIVE = [*UNITS, "F32"]
BITS = {
    "TQ1_0": 2.0625, "IQ1_S": 3.375, "IQ1_M": 3.625, "IQ2_XXS": 3.375, "IQ2_XS": 3.625, "IQ2_S": 3.625,
    "IQ3_XXS": 4.375, "IQ3_S": 4.375,
}  # of a weight in memory, where that is more than in the file
HALVES = ("F16", "BF16")  # of `test_float_linear`
TRANSCODED = [f.name for f in FORMATS.values() if f.name not in (*NATIVE, *HALVES)]


def weight(name: str, n_rows: int, n_cols: int, seed: int = 0) -> QTensor:
    """A matrix of random blocks; its bytes are read-only and not aligned, as those of a mapped file are."""
    format, rng = by_name(name), np.random.default_rng(seed)
    n_bytes = format.row_bytes(n_cols) * n_rows
    data = np.zeros(n_bytes + 3, np.uint8)[3:]
    data[:] = random_blocks(format, n_rows * n_cols // format.block, rng).view(np.uint8)
    data.flags.writeable = False
    return QTensor("w", format, (n_rows, n_cols), data.reshape(n_rows, -1))


def columns(name: str, blocks: int) -> int:
    """About `blocks` blocks of 32 columns: as few as the format allows."""
    format = by_name(name)
    return -(-blocks * 32 // format.block) * format.block if format.block > 1 else blocks * 32 - 7


def activations(n_tokens: int, n_cols: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n_tokens, n_cols)) * rng.uniform(0.1, 3, (n_tokens, n_cols))).astype(np.float32)


ISA = isas.select(cpu_target.target_context)
FACTOR_BITS = ISA.factor_bits
FUSES = emit.fuses(cpu_target.target_context)


def unit(x: np.ndarray) -> np.ndarray:
    """(tokens, 1, 1) float32: in what scales are given. The largest has `FACTOR_BITS` bits before the point."""
    peak = np.abs(x).max(axis=-1)[:, None, None] * np.float32(1 / 127)
    if not FACTOR_BITS:
        return np.ones_like(peak)
    exponent = (peak.view(np.int32) >> 23) - (FACTOR_BITS - 1)
    return np.where(exponent > 0, exponent << 23, 0).astype(np.int32).view(np.float32)


def quantized(x: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a record holds of `x`: int8 (tokens, blocks of 16, 16) and float32 scales (tokens, blocks of 16, 1)."""
    blocks = x.reshape(len(x), -1, 16)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) * np.float32(1 / 127)
    with np.errstate(divide="ignore", over="ignore"):
        if FACTOR_BITS:
            inverse = np.where(units == 0, np.float32(0), 1 / units)
            whole = np.minimum(scale * inverse, np.float32((1 << FACTOR_BITS) - 2)).astype(np.int32) + 1
            return np.rint(blocks * (inverse / whole.astype(np.float32))).astype(np.int8), whole.astype(np.float32)
        scale = (scale.view(np.int32) & -4).view(np.float32)
        inverse = np.where(scale < np.finfo(np.float32).tiny, np.float32(0), np.float32(1) / scale)
    return np.rint(blocks * inverse).astype(np.int8), np.where(inverse == 0, np.float32(0), scale)


def has_remainder(x: np.ndarray, scale: np.ndarray, limit: float = LIMIT) -> np.ndarray:
    """Which blocks of 32 of each row have one."""
    inexactness = (scale.astype(np.float64).reshape(len(scale), -1, 2) ** 2).sum(axis=-1)
    units = unit(x)[:, 0].astype(np.float64)
    in_units = np.divide(x, units, out=np.zeros(x.shape), where=units != 0)
    return inexactness > limit * (in_units**2).mean(axis=1, keepdims=True)


@np.errstate(invalid="ignore")
def represented(x: np.ndarray, limit: float) -> np.ndarray:
    """What a record stands for, as float64; of a token that has something else than numbers, anything."""
    units = unit(x)
    q, scale = quantized(x, units)
    first = (q * scale.astype(np.float64) * units).reshape(x.shape)
    chosen = np.repeat(has_remainder(x, scale, limit), 32, axis=1)
    q, scale = quantized((x - first).astype(np.float32), units)
    return first + np.where(chosen, (q * scale.astype(np.float64) * units).reshape(x.shape), 0)


class Product:
    """Activations in a workspace as the kernels of a format want them, and what they are multiplied with exactly."""

    def __init__(self, packed: linear.Packed, x: np.ndarray, limit: float = LIMIT) -> None:
        self.space, self.x, self.tokens = Workspace(), x, len(x)
        self.exact = x.astype(np.float64)
        self.offset, self.stride = self.space.put(x)
        self.space.set(Env.N_TOKENS, len(x))
        if not linear.is_float(packed.format):
            source = self.offset, self.stride
            self.stride = linear.activation_bytes(x.shape[1])
            self.offset = self.space.take(len(x) * self.stride)
            self.space.run(linear.row_quantize(*source, x.shape[1], self.offset, limit=limit))
            self.exact = represented(x, limit)

    def linear(self, packed: linear.Packed, tokens: slice | None = None, **options: int) -> np.ndarray:
        """(tokens, n_rows) results."""
        first, last, _ = (tokens or slice(None)).indices(self.tokens)
        y, y_stride, view = self.space.buffer(last - first, packed.n_rows)
        self.space.set(Env.N_TOKENS, last - first)
        x = self.offset + first * self.stride, self.stride
        self.space.run(linear.row_linear(packed, *x, y, y_stride, **options))
        return view.copy()


def close(result: np.ndarray, expected: np.ndarray, size: np.ndarray) -> None:
    """Equal but for rounding: `size` is the sum of the magnitudes of what was added."""
    assert result.dtype == np.float32 and np.isfinite(result).all()
    error = np.abs(result - expected) / (size + 1e-30)
    assert error.max() < 2e-6, error.max()


def expected_products(product: Product, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w = weights.astype(np.float64)
    return product.exact @ w.T, np.abs(product.exact) @ np.abs(w).T


@pytest.mark.parametrize("name", NATIVE + TRANSCODED)
def test_products_are_those_of_the_dequantized_weights(name: str) -> None:
    """Rows that fill no group, an odd number of groups and of blocks; one token, and tiles of several sizes."""
    tensor = weight(name, 37, columns(name, 3))
    packed = linear.pack(tensor)
    assert (packed.n_rows, packed.n_cols) == tensor.shape
    assert packed.transcoded_from == (None if name in NATIVE else name)
    product = Product(packed, activations(11, packed.n_cols))
    result = product.linear(packed)
    # A minimum is not small beside its weight: what is added is larger than the product.
    expected, size = expected_products(product, tensor.dequantize())
    close(result, expected, size + np.abs(product.exact).sum(axis=1, keepdims=True) * np.abs(tensor.dequantize()).max())
    for token in range(product.tokens):
        assert np.array_equal(product.linear(packed, slice(token, token + 1))[0], result[token])


@pytest.mark.parametrize("name", NATIVE + TRANSCODED)
def test_looked_up_rows_are_the_dequantized_ones(name: str) -> None:
    tensor = weight(name, 37, columns(name, 3))
    packed, values = linear.pack(tensor), tensor.dequantize()
    space, ids = Workspace(), np.array([0, 36, 17, 17, 31, 5], np.int32)
    space.set(Env.N_TOKENS, len(ids))
    space.set(Env.TOKENS, ids)
    space.set(Env.POSITIONS, np.arange(3, 9, dtype=np.int32))
    y, stride, view = space.buffer(len(ids), packed.n_cols)
    space.run(linear.row_embed(packed, y, stride, scale=1.7))
    expected = values[ids] * np.float32(1.7)
    if name in NATIVE:
        assert np.array_equal(view, expected)
    else:
        np.testing.assert_allclose(view, expected, rtol=3e-7)
    space.run(linear.row_embed(packed, y, stride, by="positions", offset=2))
    np.testing.assert_allclose(view, values[5:11], rtol=3e-7)


def looked_up(tensor: QTensor) -> np.ndarray:
    """All rows of a weight, as `row_embed` gives them."""
    packed, space, n = linear.pack(tensor), Workspace(), len(tensor.data)
    space.set(Env.N_TOKENS, n)
    space.set(Env.TOKENS, np.arange(n, dtype=np.int32))
    y, stride, view = space.buffer(n, packed.n_cols)
    space.run(linear.row_embed(packed, y, stride))
    return view.copy()


@pytest.mark.parametrize("name", UNITS)
def test_any_bytes_mean_the_same(name: str) -> None:
    """What is no number included."""
    format = by_name(name)
    data = np.random.default_rng(0).integers(0, 256, (200, 2 * format.n_bytes), dtype=np.uint8)
    data[0], data[1] = 0, 255
    tensor = QTensor("w", format, (200, 2 * format.block), data)
    np.testing.assert_array_equal(looked_up(tensor), tensor.dequantize())


@pytest.mark.parametrize(("name", "scale"), [("MXFP4", "e"), ("NVFP4", "d")])
def test_every_scale_of_a_byte(name: str, scale: str) -> None:
    tensor = weight(name, 256, 64)
    data = tensor.data.copy()
    blocks = data.view(tensor.format.layout)[scale]
    blocks[:] = np.arange(256, dtype=np.uint8).reshape(256, *[1] * (blocks.ndim - 1))
    tensor = QTensor("w", tensor.format, tensor.shape, data)
    np.testing.assert_array_equal(looked_up(tensor), tensor.dequantize())


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K", "Q6_K", "Q8_0", "TQ2_0", "IQ2_XS", "F32"])
@pytest.mark.parametrize("n_rows", [1, 16, 33, 96])
def test_any_number_of_tokens_gives_the_same_bits(name: str, n_rows: int) -> None:
    """Also more tokens than a unit of work has, and more blocks than a slab has."""
    packed = linear.pack(weight(name, n_rows, columns(name, 17)))
    product = Product(packed, activations(150, packed.n_cols))
    result = product.linear(packed)
    for first, last in ((0, 1), (1, 3), (3, 8), (8, 27), (27, 91), (91, 150), (149, 150)):
        assert np.array_equal(product.linear(packed, slice(first, last)), result[first:last])


@pytest.mark.parametrize("limit", [0, LIMIT])
@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q6_K", "Q8_0"])
def test_what_records_are_short_of_is_added(name: str, limit: float) -> None:
    """Products of a row with outliers are those of a row in 15 bits, and have the same bits whatever the batch."""
    tensor = weight(name, 37, columns(name, 9))
    packed, x = linear.pack(tensor), activations(150, tensor.shape[1])
    x[::3, 5] *= 30
    x[::2, 77] = 100
    product = Product(packed, x, limit)
    size = np.abs(x.reshape(len(x), -1, 16)).max(axis=-1, keepdims=True)
    error = np.maximum(np.abs(product.exact - x).reshape(len(x), -1, 16) - unit(x) * ISA.whole_scales, 0) / size
    least = 1 / 250**2
    assert error.max() < least if limit == 0 else error[::2, 77 // 16].max() < least < error.max()
    result = product.linear(packed)
    expected, size = expected_products(product, tensor.dequantize())
    close(result, expected, size + np.abs(product.exact).sum(axis=1, keepdims=True) * np.abs(tensor.dequantize()).max())
    for first, last in ((0, 1), (1, 3), (3, 8), (8, 91), (91, 150)):
        assert np.array_equal(product.linear(packed, slice(first, last)), result[first:last])


def test_remainders_of_more_blocks_than_are_listed_at_once() -> None:
    packed, x = linear.pack(weight("Q4_1", 16, 270 * 32)), activations(20, 270 * 32)
    x[::3, 5] *= 30
    x[1::2, 265 * 32] = 100
    product = Product(packed, x)
    result = product.linear(packed)
    for first, last in ((0, 1), (1, 3), (3, 20)):
        assert np.array_equal(product.linear(packed, slice(first, last)), result[first:last])


@pytest.mark.parametrize("name", ["Q4_1", "F32"])
def test_bias_and_residual_are_added(name: str) -> None:
    packed = linear.pack(weight(name, 43, 96))
    product = Product(packed, activations(5, 96))
    bias = activations(1, 43, seed=5)[0]
    residual, residual_stride = product.space.put(activations(5, 43, seed=6))
    plain = product.linear(packed)
    result = product.linear(
        packed, bias_address=bias.ctypes.data, residual_off=residual, residual_stride=residual_stride
    )
    assert np.array_equal(result, plain + bias + activations(5, 43, seed=6))
    row = linear.row_linear(
        packed, product.offset, product.stride, residual, residual_stride, 0, residual, residual_stride
    )
    product.space.run(row)  # in place
    in_place = product.space.bytes_at(residual, 5 * residual_stride).view(np.float32).reshape(5, -1)[:, :43]
    assert np.array_equal(in_place, plain + activations(5, 43, seed=6))


def test_logits_are_written_without_gaps() -> None:
    packed = linear.pack(weight("Q8_0", 43, 96))
    product = Product(packed, activations(5, 96))
    plain = product.linear(packed)
    logits = np.full((4, 43), np.nan, np.float32)
    product.space.set(Env.LOGITS, logits)
    product.space.set(Env.N_OUTPUTS, 3)
    row = linear.row_linear(packed, product.offset, product.stride, 0, 0, count=Env.N_OUTPUTS, to_logits=True)
    product.space.run(row)
    assert np.array_equal(logits[:3], plain[:3]) and np.isnan(logits[3]).all()


@pytest.mark.parametrize("kind", ["silu", "gelu"])
@pytest.mark.parametrize("name", ["Q4_1", "F32"])
def test_gate_and_up_in_one_pass(name: str, kind: str) -> None:
    gate, up = (linear.pack(weight(name, 37, 96, seed)) for seed in (1, 2))
    product = Product(gate, activations(11, 96))
    g, u = product.linear(gate).astype(np.float64), product.linear(up)
    act = g / (1 + np.exp(-g)) if kind == "silu" else g / 2 * (1 + np.tanh(0.7978845608 * (g + 0.044715 * g**3)))
    y, stride, view = product.space.buffer(11, 37)
    product.space.set(Env.N_TOKENS, 11)
    product.space.run(linear.row_gated(gate, up, product.offset, product.stride, y, stride, kind))
    np.testing.assert_allclose(view, act * u, rtol=2e-5, atol=1e-6 * np.abs(act * u).max())
    batch = view.copy()
    product.space.set(Env.N_TOKENS, 1)
    row = linear.row_gated(gate, up, product.offset + 10 * product.stride, product.stride, y, stride, kind)
    product.space.run(row)
    assert np.array_equal(view[0], batch[10])


def test_gate_and_up_of_different_formats_are_refused() -> None:
    gate, up = linear.pack(weight("Q4_1", 16, 64)), linear.pack(weight("Q4_0", 16, 64))
    assert not linear.can_gate(gate, up)
    with pytest.raises(UnsupportedError, match="Q4_1"):
        linear.row_gated(gate, up, 0, 0, 0, 0)


def test_records() -> None:
    """Bytes of a record, also of zeros, of tiny numbers, of outliers and with an odd number of blocks."""
    x = activations(4, 160)
    x[1] = 0
    x[2] *= np.float32(1e-38)
    x[3, :32] = 0
    x[3, 32] = 127.5
    space = Workspace()
    source, stride = space.put(x)
    size = linear.activation_bytes(160)
    assert size % 1024 == 512
    target = space.take(4 * size)
    space.set(Env.N_TOKENS, 4)
    space.run(linear.row_quantize(source, stride, 160, target))
    lines = space.bytes_at(target, 4 * size).reshape(4, -1)
    ends, lines = lines[:, -64:].copy().view(np.float32), lines.reshape(4, 2, -1, 64)[:, :, :6]
    units = unit(x)
    q, scale = quantized(x, units)
    flags = has_remainder(x, scale)
    assert flags[3].tolist() == [False, True, False, False, False]
    check_lines(lines[:, 0, :5], q, scale, flags)
    product = (q * scale.astype(np.float64) * units).reshape(x.shape)
    rest = (x - (product if FUSES else product.astype(np.float32))).astype(np.float32)
    check_lines(lines[:, 1, :5][flags], *(part.reshape(4, 5, -1)[flags] for part in quantized(rest, units)))
    assert np.array_equal(ends[:, :1], units[..., 0])
    assert np.array_equal(ends[:, 1] * ends[:, 0], ends[:, 0] != 0)
    assert not lines[:, 1, :5][~flags].any() and not lines[:, :, 5].any()


def check_lines(lines: np.ndarray, q: np.ndarray, scale: np.ndarray, flags: np.ndarray | int = 0) -> None:
    """Cache lines of blocks, of any shape, hold these numbers."""
    shape = lines.shape[:-1]
    stored = q.reshape(*shape, 2, 4, 4).swapaxes(-3, -2) if ISA.in_turn else q  # halves in turn, four at a time
    assert np.array_equal(lines[..., :32].view(np.int8), stored.reshape(*shape, 32))
    floats, ints = (np.ascontiguousarray(lines[..., 32:]).view(t) for t in (np.float32, np.int32))
    sums, scale = q.reshape(*shape, 2, 16).astype(np.int32).sum(axis=-1), scale.reshape(*shape, 2)
    assert np.array_equal(floats[..., :2], scale)
    assert np.array_equal(floats[..., 2], (scale * sums.astype(np.float32)).sum(axis=-1))
    if ISA.whole_scales:
        factors = scale.astype(np.int32)
        assert np.array_equal(np.ascontiguousarray(lines[..., 44:48]).view(np.int16), factors)
        assert np.array_equal(ints[..., 4], -8 * (factors * sums).sum(axis=-1))
    else:
        assert np.array_equal(floats[..., 3:5].astype(np.float64), -1.5 * 2.0**23 * scale.astype(np.float64))
    assert ISA.first in (0, np.float32(1.5 * 2**23).view(np.int32))
    offsets = -32 * scale.astype(np.int32) * sums if ISA.scales_sums else ISA.first - 128 * sums
    assert np.array_equal(ints[..., 5:7], offsets)
    assert np.array_equal(ints[..., 7], np.broadcast_to(flags, shape))


@pytest.mark.parametrize("name", NATIVE)
def test_packed_weights_take_hardly_more_than_the_file(name: str) -> None:
    n_bytes = 1024 * by_name(name).row_bytes(2048)
    if name in BITS:
        assert packed_bytes(name, 1024, 2048) == 1024 * 2048 * BITS[name] / 8 > n_bytes
    else:
        assert packed_bytes(name, 1024, 2048) <= 1.07 * n_bytes


def test_many_weights_are_packed_at_once() -> None:
    tensors = [weight(name, rows, 256, seed=rows) for name in ("Q4_K", "Q8_0", "TQ1_0") for rows in (5, 700)]
    told: list[tuple[str, int, int]] = []
    packed = linear.pack_all(tensors, progress=lambda *progress: told.append(progress))
    seen = [(done, total) for stage, done, total in told if stage == "packing weights"]
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    for tensor, one in zip(tensors, packed, strict=True):
        assert one.address % 64 == 0
        alone = linear.pack(tensor)
        offset = one.address - one.keep.ctypes.data
        assert np.array_equal(one.keep[offset : offset + one.n_bytes], alone.keep[: alone.n_bytes])


@pytest.mark.parametrize("name", ["Q4_1", "TQ2_0", "IQ2_XXS", "Q8_K"])
def test_a_damaged_scale_stays_in_its_row(name: str) -> None:
    """Not a number in one row: the other rows of its group are as they would be. Also where weights are transcoded."""
    tensor = weight(name, 16, columns(name, 2))
    packed = linear.pack(tensor)
    product = Product(packed, activations(9, packed.n_cols))
    sound = product.linear(packed)
    data = tensor.data.copy()
    data.view(tensor.format.layout)["d"][3, 0] = np.nan
    damaged = QTensor("w", tensor.format, tensor.shape, data)
    result = product.linear(linear.pack(damaged))
    others = np.arange(16) != 3
    assert np.isnan(result[:, 3]).all() and np.array_equal(result[:, others], sound[:, others])


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q6_K", "IQ4_NL"])
def test_what_is_no_number_stays_in_its_token(name: str, number: float) -> None:
    """The results of its token are none either; those of the others are as they would be. Few tokens, and many."""
    packed = linear.pack(weight(name, 37, columns(name, 9)))
    x = activations(27, packed.n_cols)
    x[::4, 7] *= 30
    sound = Product(packed, x).linear(packed)
    x[5, 70] = number
    product, others = Product(packed, x), np.arange(len(x)) != 5
    result = product.linear(packed)
    assert not np.isfinite(result[5]).any() and np.array_equal(result[others], sound[others])
    assert not np.isfinite(product.linear(packed, slice(5, 6))).any()
