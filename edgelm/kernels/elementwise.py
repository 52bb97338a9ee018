"""Rows of the op table for what works on activations row by row: norms, sums, products, activations, copies, RoPE.

Buffers are float32 (rows, stride): byte offsets into the workspace and strides in bytes. A result may take the place
of an input. Imports no Numba; the kernels are in `elementwise_kernels`.
"""

from __future__ import annotations

from edgelm.kernels import compiler
from edgelm.kernels.abi import WORD, Env, float_bits, row_of
from edgelm.kernels.records import LIMIT, activation_bytes


def _row(kernel: str, n_values: int, arguments: list[int], count: int = Env.N_TOKENS) -> list[int]:
    """A row whose units are rows of about n_values float32 each: a thread takes some 4000 at a time."""
    address, grain = compiler.address(f"elementwise_kernels:{kernel}"), max(1, 4096 // n_values)
    return row_of(address, 1, 1, count, grain, arguments)


def row_rms_norm(
    x_off: int, x_stride: int, y_off: int, y_stride: int, n_cols: int, weight_address: int, eps: float, *,
    heads: int = 0, quantized_off: int = -1, limit: float = LIMIT, count: int = Env.N_TOKENS,
) -> list[int]:
    """y (rows, n_cols) = x normed and times weight. weight_address 0: no weight.

    With `heads`, each head of n_cols // heads columns is normed on its own, all by one weight of that length.
    With quantized_off >= 0 the records of y (`activation_bytes` apart) are written there too; limit: as in `records`.
    """
    n_heads = max(1, heads)
    return _row("rms_norm", n_cols, [
        x_off, x_stride, y_off, y_stride, n_cols // n_heads, n_heads, weight_address, 0, float_bits(eps),
        quantized_off, activation_bytes(n_cols), float_bits(limit),
    ], count)


def row_layer_norm(
    x_off: int, x_stride: int, y_off: int, y_stride: int, n_cols: int, weight_address: int, bias_address: int,
    eps: float, *, quantized_off: int = -1, limit: float = LIMIT, count: int = Env.N_TOKENS,
) -> list[int]:
    """y (rows, n_cols) = x normed, times weight, plus bias; each address may be 0. Records as in row_rms_norm."""
    return _row("layer_norm", n_cols, [
        x_off, x_stride, y_off, y_stride, n_cols, 1, weight_address, bias_address, float_bits(eps),
        quantized_off, activation_bytes(n_cols), float_bits(limit),
    ], count)


def row_add(
    x_off: int, x_stride: int, z_off: int, z_stride: int, y_off: int, y_stride: int, n_cols: int, *,
    count: int = Env.N_TOKENS,
) -> list[int]:
    """y = x + z, all (rows, n_cols)."""
    return _row("combine", n_cols, [x_off, x_stride, y_off, y_stride, n_cols, z_off, z_stride, 1, 0], count)


def row_mul(
    x_off: int, x_stride: int, z_off: int, z_stride: int, y_off: int, y_stride: int, n_cols: int, *,
    count: int = Env.N_TOKENS,
) -> list[int]:
    """y = x * z, all (rows, n_cols)."""
    return _row("combine", n_cols, [x_off, x_stride, y_off, y_stride, n_cols, z_off, z_stride, 1, 1], count)


def row_add_constant(
    x_off: int, x_stride: int, constant_address: int, y_off: int, y_stride: int, n_cols: int, *,
    count: int = Env.N_TOKENS,
) -> list[int]:
    """y (rows, n_cols) = x + the float32 (n_cols,) at an absolute address."""
    return _row("combine", n_cols, [x_off, x_stride, y_off, y_stride, n_cols, constant_address, 0, 0, 0], count)


def row_scale(
    x_off: int, x_stride: int, y_off: int, y_stride: int, n_cols: int, factor: float, *, count: int = Env.N_TOKENS
) -> list[int]:
    """y = x * factor."""
    return _row("scale", n_cols, [x_off, x_stride, y_off, y_stride, n_cols, float_bits(factor), float_bits(1.0)], count)


def row_softcap(
    x_off: int, x_stride: int, y_off: int, y_stride: int, n_cols: int, cap: float, *, count: int = Env.N_TOKENS
) -> list[int]:
    """y = cap * tanh(x / cap)."""
    factors = [float_bits(1.0 / cap), float_bits(cap)]
    return _row("tanh", n_cols, [x_off, x_stride, y_off, y_stride, n_cols, *factors], count)


def row_activation(
    kind: str, x_off: int, x_stride: int, y_off: int, y_stride: int, n_cols: int, *, count: int = Env.N_TOKENS
) -> list[int]:
    """y = f(x), f one of "silu", "gelu", "gelu_erf", "relu", "tanh"."""
    if kind not in ("silu", "gelu", "gelu_erf", "relu", "tanh"):
        raise ValueError(f"no such activation: {kind}")
    return _row(kind, n_cols, [x_off, x_stride, y_off, y_stride, n_cols, float_bits(1.0), float_bits(1.0)], count)


def row_copy(
    x_off: int, x_stride: int, y_off: int, y_stride: int, n_cols: int, *, count: int = Env.N_TOKENS
) -> list[int]:
    """y = x."""
    return _row("copy", n_cols, [x_off, x_stride, y_off, y_stride, n_cols, 0], count)


def row_outputs(x_off: int, x_stride: int, y_off: int, y_stride: int, n_cols: int) -> list[int]:
    """y (R, n_cols) = the rows of x (T, n_cols) that want an output."""
    return _row("copy", n_cols, [x_off, x_stride, y_off, y_stride, n_cols, 1], Env.N_OUTPUTS)


def row_rope(
    x_off: int, x_stride: int, y_off: int, y_stride: int, heads: int, head_dim: int, *,
    rope: int, rope_dim: int, halves: bool, count: int = Env.N_TOKENS,
) -> list[int]:
    """Each head of x (rows, heads * head_dim) rotated by its token's position; `rope` is the index into Env.COS, SIN.

    The first rope_dim columns of a head turn: in pairs (0, 1), (2, 3) …, or with `halves` (0, rope_dim / 2) ….
    """
    return _row("rope", heads * head_dim, [
        x_off, x_stride, y_off, y_stride, head_dim, heads, rope, rope_dim // 2, int(halves),
        WORD * Env.SIZE * (count == Env.N_OUTPUTS),
    ], count)
