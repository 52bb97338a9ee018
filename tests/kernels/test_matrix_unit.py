"""Products by the processor's matrix unit: those of weights and activations rounded to bfloat16, whatever the shape."""

from __future__ import annotations

import numpy as np
import pytest
from op_rows import UNIT, Workspace
from test_linear import HALVES, NATIVE, TRANSCODED, activations, columns, weight

from edgelm.kernels import elementwise, linear, matrix_unit
from edgelm.kernels.abi import Env
from edgelm.kernels.linear_amx import BATCH

FLOATS = "F32", "F64", "I8", "I16", "I32", "I64"  # multiplied as float32
BY_UNIT = [name for name in (*NATIVE, *TRANSCODED, *HALVES) if name not in FLOATS]
pytestmark = pytest.mark.skipif(
    not UNIT,
    reason="this processor has no matrix unit for bfloat16, or the system does not permit its use",
)


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, to even if there are two, as float64."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


class Product:
    """Activations in a workspace as the matrix unit wants them."""

    def __init__(self, packed: linear.Packed, x: np.ndarray) -> None:
        self.packed, self.x, self.space = packed, x, Workspace()
        self.kind = linear.record_kind(packed.format)
        source = self.space.put(x)
        self.stride = linear.record_bytes(self.kind, x.shape[1])
        whole = -(-len(x) // matrix_unit.ROWS) * matrix_unit.ROWS
        self.offset = self.space.take(whole * self.stride)
        self.space.set(Env.N_TOKENS, len(x))
        self.space.set(Env.TILES, 1)
        self.space.run(linear.row_quantize(*source, x.shape[1], self.offset, kind=self.kind))

    def linear(self, portions: int | None = 3, **options: int) -> np.ndarray:
        """(tokens, n_rows) results; portions: see `Workspace.run`."""
        y, stride, view = self.space.buffer(len(self.x), self.packed.n_rows)
        row = linear.row_linear(self.packed, self.offset, self.stride, y, stride, **options)
        self.space.run(row, portions=portions)
        return view.copy()


def values(packed: linear.Packed) -> np.ndarray:
    """(rows, columns) float32: looked up, because float16 and bfloat16 are not what is in the file: `kernels.int16`."""
    space, ids = Workspace(1 << 25), np.arange(packed.n_rows, dtype=np.int32)
    space.set(Env.N_TOKENS, len(ids))
    space.set(Env.TOKENS, ids)
    y, stride, view = space.buffer(len(ids), packed.n_cols)
    space.run(linear.row_embed(packed, y, stride))
    return view.copy()


def check(packed: linear.Packed, x: np.ndarray, portions: int | None = 3) -> None:
    """Products are those of what is rounded, but for the order of sums and single roundings the other way."""
    result, weights = Product(packed, x).linear(portions), values(packed)
    expected = rounded(x) @ rounded(weights).T
    size = np.abs(x.astype(np.float64)) @ np.abs(weights.astype(np.float64)).T + 1e-30
    assert result.dtype == np.float32 and np.isfinite(result).all()
    assert (np.abs(result - expected) / size).max() < 1e-4
    assert np.sqrt(np.mean(((result - expected) / size) ** 2)) < 1e-5


@pytest.mark.parametrize("name", BY_UNIT)
def test_products_are_those_of_what_is_rounded(name: str) -> None:
    """Rows that fill no group, an odd number of groups, of blocks and of tiles of tokens."""
    tensor = weight(name, 37, columns(name, 3))
    x = activations(49, tensor.shape[1])
    check(linear.pack(tensor), x)


@pytest.mark.parametrize("n_tokens", [1, 16, 17, 130, 300])
@pytest.mark.parametrize(("name", "n_rows", "n_cols"), [("Q4_0", 80, 96), ("Q6_K", 48, 4352), ("F16", 33, 2200)])
def test_products_of_any_shape(name: str, n_rows: int, n_cols: int, n_tokens: int) -> None:
    """Also of more inputs than are gone over at once, and of more tokens than a unit of work has."""
    tensor = weight(name, n_rows, n_cols)
    x = activations(n_tokens, n_cols)
    check(linear.pack(tensor), x)


@pytest.mark.parametrize("n_tokens", [130, 300])
def test_units_of_work_side_by_side(n_tokens: int) -> None:
    """As many as are done at once, then as many again and some, of one chunk of tokens after the other; each alone."""
    assert 2 * BATCH * 32 < 1100
    packed, x = linear.pack(weight("Q4_0", 1100, 4352)), activations(n_tokens, 4352)
    check(packed, x, portions=None)
    product = Product(packed, x)
    side_by_side = product.linear(portions=None)
    assert np.array_equal(product.linear(portions=200), side_by_side)


@pytest.mark.parametrize("n_cols", [96, 128])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_norms_write_what_is_multiplied(norm: str, n_cols: int) -> None:
    """The same as they write first and that is then made bfloat16."""
    packed, space = linear.pack(weight("Q4_0", 40, n_cols)), Workspace()
    source = space.put(activations(50, n_cols))
    y, y_stride, normed = space.buffer(50, n_cols)
    stride = linear.record_bytes("int8", n_cols)
    tiles = space.take(64 * stride)
    space.set(Env.N_TOKENS, 50)
    space.set(Env.TILES, 1)
    if norm == "rms_norm":
        row = elementwise.row_rms_norm(*source, y, y_stride, n_cols, 0, 1e-5, quantized_off=tiles)
    else:
        row = elementwise.row_layer_norm(*source, y, y_stride, n_cols, 0, 0, 1e-5, quantized_off=tiles)
    out, out_stride, result = space.buffer(50, 40)
    space.run(row, linear.row_linear(packed, tiles, stride, out, out_stride))
    assert np.array_equal(result, Product(packed, normed.copy()).linear())


def test_a_token_does_not_depend_on_the_others() -> None:
    """Not even if these are no numbers."""
    packed, x = linear.pack(weight("Q4_K", 40, 512)), activations(70, 512)
    all_of_them = Product(packed, x).linear()
    assert np.array_equal(Product(packed, x[:33]).linear(), all_of_them[:33])
    x[1::2] = np.nan
    assert np.array_equal(Product(packed, x).linear()[::2], all_of_them[::2])


def test_bias_and_residual_are_added() -> None:
    product = Product(linear.pack(weight("Q4_1", 43, 96)), activations(50, 96))
    bias, other = activations(1, 43, seed=5)[0], activations(50, 43, seed=6)
    residual, stride = product.space.put(other)
    options = {"bias_address": bias.ctypes.data, "residual_off": residual, "residual_stride": stride}
    assert np.array_equal(product.linear(**options), product.linear() + bias + other)


def test_logits_are_written_without_gaps() -> None:
    product = Product(linear.pack(weight("Q8_0", 43, 96)), activations(5, 96))
    plain, logits = product.linear(), np.full((4, 43), np.nan, np.float32)
    product.space.set(Env.LOGITS, logits)
    product.space.set(Env.N_OUTPUTS, 3)
    at = product.offset, product.stride
    product.space.run(linear.row_linear(product.packed, *at, 0, 0, count=Env.N_OUTPUTS, to_logits=True))
    assert np.array_equal(logits[:3], plain[:3]) and np.isnan(logits[3]).all()


@pytest.mark.parametrize("kind", ["silu", "gelu"])
def test_gate_and_up_in_one_pass(kind: str) -> None:
    gate, up = (linear.pack(weight("Q4_1", 37, 96, seed)) for seed in (1, 2))
    x = activations(41, 96)
    product = Product(gate, x)
    g, u = product.linear().astype(np.float64), Product(up, x).linear()
    act = g / (1 + np.exp(-g)) if kind == "silu" else g / 2 * (1 + np.tanh(0.7978845608 * (g + 0.044715 * g**3)))
    y, stride, view = product.space.buffer(41, 37)
    product.space.run(linear.row_gated(gate, up, product.offset, product.stride, y, stride, kind))
    np.testing.assert_allclose(view, act * u, rtol=2e-5, atol=1e-6 * np.abs(act * u).max())


def test_few_tokens_do_without_it() -> None:
    """Fewer than the environment says are multiplied as int8."""
    packed, x = linear.pack(weight("Q4_0", 40, 96)), activations(20, 96)
    by_unit = Product(packed, x)
    assert by_unit.space.env[Env.TILES] == 1
    others = []
    for least in (0, 21, 20):
        space = Workspace()
        source, at = space.put(x), space.take(32 * by_unit.stride)
        space.set(Env.N_TOKENS, len(x))
        space.set(Env.TILES, least)
        space.run(linear.row_quantize(*source, 96, at))
        y, stride, view = space.buffer(len(x), 40)
        space.run(linear.row_linear(packed, at, by_unit.stride, y, stride))
        others.append(view.copy())
    assert np.array_equal(others[0], others[1]) and not np.array_equal(others[0], others[2])
    assert np.array_equal(others[2], by_unit.linear())
