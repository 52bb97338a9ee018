"""Row-wise kernels against NumPy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from op_rows import Workspace

from edgelm.kernels import elementwise, linear
from edgelm.kernels.abi import Env
from edgelm.kernels.records import activation_bytes

T = 7
COLUMNS = (1, 15, 16, 40, 576, 640)


@pytest.fixture
def ws() -> Workspace:
    workspace = Workspace()
    workspace.set(Env.N_TOKENS, T)
    return workspace


def values(ws: Workspace, n_cols: int, scale: float = 3.0) -> np.ndarray:
    return (ws.rng.standard_normal((T, n_cols)) * scale).astype(np.float32)


def check(got: np.ndarray, want: np.ndarray, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def norm(x: np.ndarray, weight: np.ndarray | float, eps: float, heads: int = 1) -> np.ndarray:
    x = x.astype(np.float64).reshape(len(x), heads, -1)
    return (x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight).reshape(len(x), -1)


@pytest.mark.parametrize("n_cols", COLUMNS)
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(ws, n_cols, weighted):
    x, weight = values(ws, n_cols), ws.rng.standard_normal(n_cols).astype(np.float32)
    x_off, stride = ws.put(x)
    y_off, _, y = ws.buffer(T, n_cols)
    address = weight.ctypes.data if weighted else 0
    ws.run(elementwise.row_rms_norm(x_off, stride, y_off, stride, n_cols, address, 1e-5))
    check(y, norm(x, weight if weighted else 1.0, 1e-5))
    ws.run(elementwise.row_rms_norm(x_off, stride, x_off, stride, n_cols, address, 1e-5))  # in place
    np.testing.assert_array_equal(ws.bytes_at(x_off, T * stride).view(np.float32).reshape(T, -1)[:, :n_cols], y)


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (4, 24), (1, 256), (5, 8)])
def test_rms_norm_of_heads(ws, heads, head_dim):
    x, weight = values(ws, heads * head_dim), ws.rng.standard_normal(head_dim).astype(np.float32)
    x_off, stride = ws.put(x)
    y_off, _, y = ws.buffer(T, heads * head_dim)
    ws.run(elementwise.row_rms_norm(
        x_off, stride, y_off, stride, heads * head_dim, weight.ctypes.data, 1e-6, heads=heads))
    check(y, norm(x, weight, 1e-6, heads))


@pytest.mark.parametrize("n_cols", COLUMNS)
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm(ws, n_cols, biased):
    x = values(ws, n_cols) + np.float32(5)
    weight, bias = ws.rng.standard_normal((2, n_cols)).astype(np.float32)
    x_off, stride = ws.put(x)
    y_off, _, y = ws.buffer(T, n_cols)
    bias_address = bias.ctypes.data if biased else 0
    ws.run(elementwise.row_layer_norm(x_off, stride, y_off, stride, n_cols, weight.ctypes.data, bias_address, 1e-5))
    centred = x.astype(np.float64) - x.mean(-1, dtype=np.float64, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + (bias if biased else 0)
    check(y, want, 1e-5)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("n_cols", [32, 576])
def test_norm_and_quantize_in_one(ws, kind, n_cols):
    weight = ws.rng.standard_normal(n_cols).astype(np.float32)
    x_off, stride = ws.put(values(ws, n_cols))
    y_off, _, _ = ws.buffer(T, n_cols)
    n_bytes = activation_bytes(n_cols)
    q_off, want_off = ws.take(T * n_bytes), ws.take(T * n_bytes)
    ws.bytes_at(q_off, 2 * T * n_bytes)[:] = 0
    arguments = (x_off, stride, y_off, stride, n_cols, weight.ctypes.data)
    if kind == "rms":
        row = elementwise.row_rms_norm(*arguments, 1e-5, quantized_off=q_off)
    else:
        row = elementwise.row_layer_norm(*arguments, 0, 1e-5, quantized_off=q_off)
    ws.run(row, linear.row_quantize(y_off, stride, n_cols, want_off))
    np.testing.assert_array_equal(ws.bytes_at(q_off, T * n_bytes), ws.bytes_at(want_off, T * n_bytes))
    assert ws.bytes_at(q_off, T * n_bytes).any()


@pytest.mark.parametrize("n_cols", COLUMNS)
def test_add_mul_and_constant(ws, n_cols):
    x, z = values(ws, n_cols), values(ws, n_cols)
    (x_off, stride), (z_off, _) = ws.put(x), ws.put(z)
    y_off, _, y = ws.buffer(T, n_cols)
    ws.run(elementwise.row_add(x_off, stride, z_off, stride, y_off, stride, n_cols))
    np.testing.assert_array_equal(y, x + z)
    ws.run(elementwise.row_mul(x_off, stride, z_off, stride, y_off, stride, n_cols))
    np.testing.assert_array_equal(y, x * z)
    constant = z[0].copy()
    ws.run(elementwise.row_add_constant(x_off, stride, constant.ctypes.data, y_off, stride, n_cols))
    np.testing.assert_array_equal(y, x + constant)


@pytest.mark.parametrize("n_cols", COLUMNS)
def test_scale_softcap_activations(ws, n_cols):
    x = values(ws, n_cols)
    x_off, stride = ws.put(x)
    y_off, _, y = ws.buffer(T, n_cols)
    ws.run(elementwise.row_scale(x_off, stride, y_off, stride, n_cols, 0.3))
    np.testing.assert_array_equal(y, x * np.float32(0.3))
    wide = x.astype(np.float64)
    ws.run(elementwise.row_softcap(x_off, stride, y_off, stride, n_cols, 2.5))
    check(y, 2.5 * np.tanh(wide / 2.5))
    erf = np.vectorize(math.erf)
    for kind, want in {
        "silu": wide / (1 + np.exp(-wide)),
        "gelu": wide / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))),
        "gelu_erf": wide / 2 * (1 + erf(wide / math.sqrt(2))),
        "relu": np.maximum(wide, 0),
        "tanh": np.tanh(wide),
    }.items():
        ws.run(elementwise.row_activation(kind, x_off, stride, y_off, stride, n_cols))
        check(y, want)


def test_nothing_is_written_beside_the_columns(ws):
    """Views of columns of one buffer: what a split hands out."""
    x = values(ws, 100)
    x_off, stride = ws.put(x)
    y_off, _, y = ws.buffer(T, 100)
    y[:] = 0
    part = slice(21, 21 + 37)
    weight = np.ones(37, np.float32)
    at, to = x_off + 4 * 21, y_off + 4 * 21
    for row in (
        elementwise.row_copy(at, stride, to, stride, 37),
        elementwise.row_activation("silu", at, stride, to, stride, 37),
        elementwise.row_add(at, stride, at, stride, to, stride, 37),
        elementwise.row_rms_norm(at, stride, to, stride, 37, weight.ctypes.data, 1e-5),
        elementwise.row_layer_norm(at, stride, to, stride, 37, weight.ctypes.data, 0, 1e-5),
    ):
        y[:] = 0
        ws.run(row)
        assert y[:, part].all()
        assert not y[:, : part.start].any()
        assert not y[:, part.stop :].any()


def test_outputs(ws):
    x = values(ws, 40)
    x_off, stride = ws.put(x)
    y_off, _, y = ws.buffer(3, 40)
    outputs = np.array([1, 2, 6], np.int32)
    ws.set(Env.OUTPUTS, outputs)
    ws.set(Env.N_OUTPUTS, 3)
    ws.run(elementwise.row_outputs(x_off, stride, y_off, stride, 40))
    np.testing.assert_array_equal(y, x[outputs])


def turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, heads: int, halves: bool) -> np.ndarray:
    x = x.astype(np.float64).reshape(len(x), heads, -1)
    y, pairs = x.copy(), cos.shape[1]
    first = np.arange(pairs) if halves else 2 * np.arange(pairs)
    second = first + (pairs if halves else 1)
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    y[..., first], y[..., second] = x[..., first] * c - x[..., second] * s, x[..., first] * s + x[..., second] * c
    return y.reshape(len(x), -1)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize(
    ("head_dim", "rope_dim"), [(64, 64), (256, 256), (96, 64), (80, 32), (8, 8), (24, 10), (48, 40)]
)
def test_rope(ws, head_dim, rope_dim, halves):
    heads, n_positions = 3, 50
    x = values(ws, heads * head_dim)
    cos, sin = ws.rng.standard_normal((2, n_positions, rope_dim // 2)).astype(np.float32)
    other = np.zeros((1, 1), np.float32)
    ws.set(Env.COS, np.array([other.ctypes.data, cos.ctypes.data]))
    ws.set(Env.SIN, np.array([other.ctypes.data, sin.ctypes.data]))
    positions = ws.rng.integers(0, n_positions, T).astype(np.int32)
    ws.set(Env.POSITIONS, positions)
    x_off, stride = ws.put(x)
    y_off, _, y = ws.buffer(T, heads * head_dim)
    place = {"rope": 1, "rope_dim": rope_dim, "halves": halves}
    ws.run(elementwise.row_rope(x_off, stride, y_off, stride, heads, head_dim, **place))
    check(y, turned(x, cos[positions], sin[positions], heads, halves))
    ws.run(elementwise.row_rope(x_off, stride, x_off, stride, heads, head_dim, **place))
    in_place = ws.bytes_at(x_off, T * stride).view(np.float32).reshape(T, -1)[:, : heads * head_dim]
    np.testing.assert_array_equal(in_place, y)
    positions = ws.rng.integers(0, n_positions, 2).astype(np.int32)
    ws.env_of_outputs[:] = ws.env
    ws.env_of_outputs[Env.POSITIONS] = positions.ctypes.data
    ws.set(Env.N_OUTPUTS, 2)
    of_outputs = elementwise.row_rope(
        ws.put(x)[0], stride, y_off, stride, heads, head_dim, **place, count=Env.N_OUTPUTS
    )
    untouched = y[2:].copy()
    ws.run(of_outputs)
    check(y[:2], turned(x[:2], cos[positions], sin[positions], heads, halves))
    np.testing.assert_array_equal(y[2:], untouched)
