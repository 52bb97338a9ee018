"""Matrices of float32, float16 and bfloat16 against NumPy; the same bits whatever the batch.

On x86 the latter two are held as integers (`int16`), whose definition this file repeats in NumPy.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from op_rows import Workspace
from test_isa import ON_X86, TARGETS, restricted

from edgelm.formats import QTensor, by_name
from edgelm.kernels import int16, linear
from edgelm.kernels.abi import Env

FLOATS = ["F32", "F16", "BF16"]


def weight(name: str, values: np.ndarray) -> QTensor:
    """`values` in a format; its bytes are read-only and not aligned, as those of a mapped file are."""
    if name == "BF16":
        values = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        values = values.astype(np.float16 if name == "F16" else np.float32)
    rows = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
    data = np.zeros(rows.size + 3, np.uint8)[3:]
    data[:] = rows.ravel()
    data.flags.writeable = False
    return QTensor("w", by_name(name), values.shape, data.reshape(rows.shape))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Random numbers of which some stand out."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * rng.uniform(0.1, 3, shape)).astype(np.float32)


def in_blocks(x: np.ndarray) -> np.ndarray:
    """(rows, blocks, 64), zeros where columns are missing."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % 64))).reshape(len(x), -1, 64)


def held(tensor: QTensor) -> np.ndarray:
    """The weights as the kernels have them, float64."""
    values = tensor.dequantize()
    return in_integers(values, 2047) if linear.pack(tensor).format == "INT12" else values.astype(np.float64)


def in_integers(x: np.ndarray, most: int) -> np.ndarray:
    """Rows in blocks of 64 as integers up to `most`, times a float32; float64."""
    blocks = in_blocks(x)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) * np.float32(1 / most)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(0), scale)
        whole = np.where(scale == 0, 0, np.rint(blocks * (np.float32(1) / scale)))
    assert np.abs(whole).max() <= most
    return (whole.astype(np.float64) * scale).reshape(len(x), -1)[:, : x.shape[1]]


def rounded(x: np.ndarray, kind: str) -> np.ndarray:
    """Activations as the kernels have them, float64."""
    if kind == "float32":
        return x.astype(np.float64)
    return in_integers(x, 4095)


class Product:
    """Activations in a workspace as the kernels of `packed` want them."""

    def __init__(self, packed: linear.Packed, x: np.ndarray) -> None:
        self.space, self.packed = Workspace(), packed
        self.offset, self.stride = self.space.put(x)
        self.space.set(Env.N_TOKENS, len(x))
        self.tokens, self.kind = len(x), linear.record_kind(packed.format)
        if self.kind != "float32":
            source, self.stride = (self.offset, self.stride), linear.record_bytes(self.kind, x.shape[1])
            self.offset = self.space.take(len(x) * self.stride)
            self.space.run(linear.row_quantize(*source, x.shape[1], self.offset, kind=self.kind))

    def linear(self, first: int = 0, last: int | None = None, **options: int) -> np.ndarray:
        """(tokens, n_rows) results of tokens `first` to `last`."""
        n = (self.tokens if last is None else last) - first
        y, y_stride, view = self.space.buffer(n, self.packed.n_rows)
        self.space.set(Env.N_TOKENS, n)
        x = self.offset + first * self.stride, self.stride
        self.space.run(linear.row_linear(self.packed, *x, y, y_stride, **options))
        return view.copy()


def close(result: np.ndarray, x: np.ndarray, w: np.ndarray, error: float) -> None:
    """result is x @ w.T but for `error` times the magnitudes of what was added."""
    assert result.dtype == np.float32 and np.isfinite(result).all()
    x, w = x.astype(np.float64), w.astype(np.float64)
    share = np.abs(result - x @ w.T) / (np.abs(x) @ np.abs(w).T + 1e-30)
    assert share.max() < error, share.max()


@pytest.mark.parametrize("n_cols", [1, 31, 64, 203, 576])
@pytest.mark.parametrize("name", FLOATS)
def test_products(name: str, n_cols: int) -> None:
    """Rows that fill no group, an odd number of groups; one token, and tiles of several sizes."""
    tensor, x = weight(name, normal(37, n_cols)), normal(13, n_cols, seed=1)
    packed = linear.pack(tensor)
    product = Product(packed, x)
    result = product.linear()
    close(result, rounded(x, product.kind), held(tensor), 1e-6)
    if n_cols >= 64:
        close(result, x, tensor.dequantize(), 1e-6 if product.kind == "float32" else 5e-4)
    for token in range(len(x)):
        assert np.array_equal(product.linear(token, token + 1)[0], result[token])


@pytest.mark.parametrize("n_rows", [1, 16, 33, 96])
@pytest.mark.parametrize("name", FLOATS)
def test_any_number_of_tokens_gives_the_same_bits(name: str, n_rows: int) -> None:
    """Also more tokens than a unit of work has, and more columns than a tile goes over at a time."""
    product = Product(linear.pack(weight(name, normal(n_rows, 1100))), normal(150, 1100, seed=1))
    result = product.linear()
    for first, last in ((0, 1), (1, 3), (3, 8), (8, 27), (27, 91), (91, 150), (149, 150)):
        assert np.array_equal(product.linear(first, last), result[first:last])


@pytest.mark.parametrize("name", FLOATS)
def test_looked_up_rows(name: str) -> None:
    tensor = weight(name, normal(37, 203))
    packed, space, ids = linear.pack(tensor), Workspace(), np.array([0, 36, 17, 17, 31, 5], np.int32)
    space.set(Env.N_TOKENS, len(ids))
    space.set(Env.TOKENS, ids)
    y, stride, view = space.buffer(len(ids), packed.n_cols)
    space.run(linear.row_embed(packed, y, stride, scale=1.7))
    assert np.array_equal(view, held(tensor)[ids].astype(np.float32) * np.float32(1.7))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_weights_are_off_by_half_a_step_at_most(name: str) -> None:
    values = weight(name, normal(16, 640)).dequantize()
    peaks = np.repeat(np.abs(in_blocks(values)).max(axis=-1), 64, axis=1)
    assert (np.abs(held(weight(name, values)) - values) <= peaks * (0.5001 / 2047)).all()


@pytest.mark.parametrize("name", FLOATS)
def test_the_smallest_and_the_largest_numbers(name: str) -> None:
    values = normal(16, 128, seed=3)
    values[0] *= 2.0**-20  # subnormal float16
    values[1] = 0
    values[2] *= 5e3
    if name != "F16":
        values[3] *= np.float32(1e-30)
        values[4] *= np.float32(1e30)
    tensor, x = weight(name, values), normal(9, 128, seed=4)
    x[1] = 0
    x[2, :64] *= np.float32(1e-36)
    product = Product(linear.pack(tensor), x)
    close(product.linear(), rounded(x, product.kind), held(tensor), 1e-6)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_row(name: str, number: float) -> None:
    values, x = normal(16, 96), normal(9, 96, seed=1)
    sound = Product(linear.pack(weight(name, values)), x).linear()
    values[3, 7] = number
    result = Product(linear.pack(weight(name, values)), x).linear()
    others = np.arange(16) != 3
    assert not np.isfinite(result[:, 3]).any() and np.array_equal(result[:, others], sound[:, others])
    values[3, 7] = 0
    x[5, 90] = number
    result = Product(linear.pack(weight(name, values)), x).linear()
    others = np.arange(9) != 5
    assert not np.isfinite(result[5]).any() and np.array_equal(result[others][:, :3], sound[others][:, :3])


@pytest.mark.parametrize("name", FLOATS)
def test_bias_and_residual_are_added(name: str) -> None:
    product, bias, before = Product(linear.pack(weight(name, normal(43, 96))), normal(5, 96)), normal(43), normal(5, 43)
    residual, stride = product.space.put(before)
    plain = product.linear()
    result = product.linear(bias_address=bias.ctypes.data, residual_off=residual, residual_stride=stride)
    assert np.array_equal(result, plain + bias + before)


@pytest.mark.parametrize("kind", ["silu", "gelu"])
@pytest.mark.parametrize("name", FLOATS)
def test_gate_and_up_in_one_pass(name: str, kind: str) -> None:
    gate, up = (linear.pack(weight(name, normal(37, 96, seed=seed))) for seed in (1, 2))
    product, other = Product(gate, normal(11, 96)), Product(up, normal(11, 96))
    g, u = product.linear().astype(np.float64), other.linear()
    act = g / (1 + np.exp(-g)) if kind == "silu" else g / 2 * (1 + np.tanh(0.7978845608 * (g + 0.044715 * g**3)))
    for n in (11, 1):
        y, stride, view = product.space.buffer(n, 37)
        product.space.set(Env.N_TOKENS, n)
        product.space.run(linear.row_gated(gate, up, product.offset, product.stride, y, stride, kind))
        np.testing.assert_allclose(view, (act * u)[:n], rtol=2e-5, atol=1e-6 * np.abs(act * u).max())


@ON_X86
def test_bytes_of_weights_and_records() -> None:
    """A unit: pieces of four pairs of columns of 16 rows, then scales; a record: the scale, then integers."""
    values, x = normal(16, 100), normal(3, 100, seed=1)
    tensor = weight("F16", values)
    packed = linear.pack(tensor)
    units = packed.keep[packed.address - packed.keep.ctypes.data :][: packed.n_bytes].reshape(2, int16.UNIT)
    pieces = units[:, : int16.SCALES].reshape(2, 8, 3, 4, 2, 4, 2)  # vector, rows by four, pair, row, column of a pair
    lower = np.stack([pieces[:, :, 2] & 15, pieces[:, :, 2] >> 4], axis=2)
    whole = pieces[:, :, :2].view(np.int8).astype(int) * 16 + lower  # block, piece, two pairs, rows, pair, row, column
    whole = whole.transpose(3, 5, 0, 1, 2, 4, 6).reshape(16, 2, 64)
    scales = units[:, int16.SCALES :].copy().view(np.float32)
    blocks = whole * scales.T[:, :, None].astype(np.float64)
    assert np.array_equal(blocks.reshape(16, -1)[:, :100], held(tensor)) and not blocks.reshape(16, -1)[:, 100:].any()
    product = Product(packed, x)
    records = product.space.bytes_at(product.offset, 3 * product.stride).reshape(3, -1)[:, : 2 * int16.RECORD]
    records = records.reshape(3, 2, int16.RECORD)
    scale = records[:, :, :4].copy().view(np.float32)
    whole = records[:, :, 4:].copy().view(np.int16)
    assert np.array_equal((whole * scale.astype(np.float64)).reshape(3, -1)[:, :100], rounded(x, "int16"))
    assert np.abs(whole).max() == int16.X_MAX and not whole[:, 1, 36:].any()


@pytest.mark.slow
@ON_X86
@pytest.mark.parametrize("target", TARGETS)
def test_on_other_instruction_sets(target: str) -> None:
    environment = {**os.environ, **restricted(target)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
