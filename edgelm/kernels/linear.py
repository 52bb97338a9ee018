"""Rows of the op table that quantize activations, multiply with packed weights, or look rows of them up.

Knows the arguments of the kernels in `quantize`, `linear_kernels` and `embed_kernels`. Imports no Numba: kernels are
named, and compiled only if they never were on this machine. Packed weights come from `packing`.
"""

from __future__ import annotations

from enum import IntEnum

from edgelm.errors import UnsupportedError
from edgelm.kernels import compiler, int16, matrix_unit
from edgelm.kernels.abi import Env, Row, float_bits, row_of
from edgelm.kernels.packing import pack, pack_all
from edgelm.kernels.records import BLOCK, LIMIT, MAX_BLOCKS, MAX_TOKENS, activation_bytes
from edgelm.kernels.weight_layout import Packed, alike, is_float

__all__ = [
    "Packed", "activation_bytes", "can_gate", "is_float", "linear_kernel", "pack", "pack_all", "record_bytes",
    "record_kind", "row_embed", "row_gated", "row_linear", "row_quantize",
]  # fmt: skip

ACTIVATIONS = {"silu": 1, "gelu": 2}
_CACHE = 1 << 21  # bytes of activation records that a unit may go over again and again
_SHARES = 64  # of the work with 512 tokens: no fewer, if matrices are small, so that several threads have as much to do
_UNITS = 6  # of all tokens: fewer are too few to share
_GRAIN = 1 << 15  # bytes of weights that are worth going to the shared counter for


class Arg(IntEnum):
    """Arguments of a linear kernel, from `Row.ARGS` on."""

    WEIGHTS = 0
    SECOND = 1  # weights of the up projection, or 0
    GROUP_STRIDE = 2
    N_GROUPS = 3
    N_UNITS = 4  # of packed weights in a group
    X = 5
    X_STRIDE = 6
    Y = 7  # offset, or below zero: -1 - offset into the environment's logits
    Y_STRIDE = 8
    N_ROWS = 9
    BIAS = 10  # address or 0
    RESIDUAL = 11  # offset or -1
    RESIDUAL_STRIDE = 12
    ACTIVATION = 13


# --- rows of the op table


def record_kind(format: str) -> str:
    """What kernels of a packed format multiply with: records of "int8" or "int16", or "float32" as they are."""
    return "int16" if format == "INT12" else "float32" if is_float(format) else "int8"


def record_bytes(kind: str, n_cols: int) -> int:
    """Bytes from one record of "int8" or "int16" to the next."""
    return int16.record_bytes(n_cols) if kind == "int16" else activation_bytes(n_cols)


def row_quantize(
    x_off: int, x_stride: int, n_cols: int, q_off: int, count: int = Env.N_TOKENS, kind: str = "int8",
    limit: float = LIMIT,
) -> list[int]:
    """Writes the records of (count, n_cols) float32 at `x_off` to `q_off`, `record_bytes(kind, n_cols)` apart.

    Offsets into the workspace; strides in bytes. A unit is a token. limit: as in `records`, for int8.
    """
    kernel = "quantize:quantize" if kind == "int8" else f"quantize:quantize_{kind}"
    args = [x_off, x_stride, n_cols, q_off, record_bytes(kind, n_cols), float_bits(limit)]
    return row_of(compiler.address(kernel), 1, 1, count, max(1, 4096 // n_cols), args)


def linear_kernel(format: str) -> str:
    """Name, for `compiler`, of the kernel of `row_linear` and `row_gated` for a packed format."""
    return f"linear_kernels:linear_{format.lower()}"


def row_linear(
    packed: Packed,
    x_off: int,
    x_stride: int,
    y_off: int,
    y_stride: int,
    bias_address: int = 0,
    residual_off: int = -1,
    residual_stride: int = 0,
    count: int = Env.N_TOKENS,
    to_logits: bool = False,
    by_unit: bool = True,
) -> list[int]:
    """y = x @ W.T + bias + residual.

    x: (count, n_cols) activations as `record_kind(packed.format)` says. Offsets into the workspace,
    strides in bytes. Rows of y and of the residual must have room for whole groups of 16 columns, except with
    `to_logits`: then y is `Env.LOGITS`, rows of n_rows float32 without gaps. The residual may be y. by_unit: whether
    many tokens will go through the matrix unit, if there is one: `Env.TILES` says.
    """
    units, y = -(-packed.n_groups // 2), (-1, 4 * packed.n_rows) if to_logits else (y_off, y_stride)
    row = _linear(packed, units, (x_off, x_stride), y, count, by_unit)
    row[Row.ARGS + Arg.BIAS] = bias_address
    row[Row.ARGS + Arg.RESIDUAL], row[Row.ARGS + Arg.RESIDUAL_STRIDE] = residual_off, residual_stride
    return row


def row_gated(
    gate: Packed,
    up: Packed,
    x_off: int,
    x_stride: int,
    y_off: int,
    y_stride: int,
    activation: str = "silu",
    count: int = Env.N_TOKENS,
    by_unit: bool = True,
) -> list[int]:
    """y = activation(x @ gate.T) * (x @ up.T), "silu" or "gelu" (tanh form), else as `row_linear`.

    Raises:
        UnsupportedError: the two have different formats or shapes (`can_gate` tells before).
    """
    if not can_gate(gate, up):
        raise UnsupportedError(f"gate ({gate.format}) and up ({up.format}) projections do not fit into one kernel")
    row = _linear(gate, gate.n_groups, (x_off, x_stride), (y_off, y_stride), count, by_unit)
    row[Row.ARGS + Arg.SECOND], row[Row.ARGS + Arg.ACTIVATION] = up.address, ACTIVATIONS[activation]
    return row


def can_gate(gate: Packed, up: Packed) -> bool:
    """Whether `row_gated` can do these two in one pass."""
    return alike(gate, up) and gate.stride == up.stride


def _linear(
    packed: Packed, units: int, x: tuple[int, int], y: tuple[int, int], count: int, by_unit: bool
) -> list[int]:
    """A row without what is special."""
    if packed.n_cols > BLOCK * MAX_BLOCKS:
        raise UnsupportedError(f"a matrix has {packed.n_cols} columns; kernels take at most {BLOCK * MAX_BLOCKS}")
    args = [0] * len(Arg)
    args[Arg.WEIGHTS], args[Arg.GROUP_STRIDE] = packed.address, packed.stride
    args[Arg.N_GROUPS], args[Arg.N_UNITS], args[Arg.N_ROWS] = packed.n_groups, packed.n_units, packed.n_rows
    args[Arg.X], args[Arg.X_STRIDE] = x
    args[Arg.Y], args[Arg.Y_STRIDE] = y
    args[Arg.RESIDUAL] = -1
    if by_unit and not is_float(packed.format) and matrix_unit.permitted():
        tokens = MAX_TOKENS if units >= _UNITS else MAX_TOKENS // 2  # unpacked for all of them
    else:
        reads = 2 * packed.n_cols if record_kind(packed.format) == "int8" else x[1]  # there are few remainders
        few = max(120, 512 * units // _SHARES)
        tokens = min(MAX_TOKENS, max(24, min(few, _CACHE // reads) // 12 * 12))  # so many fill tiles
    grain = max(1, _GRAIN // (2 * packed.group_bytes))
    row = row_of(compiler.address(linear_kernel(packed.format)), units, tokens, count, grain, args)
    row[Row.READS], row[Row.READ_BYTES] = packed.address, packed.span // units
    return row


def row_embed(
    packed: Packed, y_off: int, y_stride: int, by: str = "tokens", offset: int = 0, scale: float = 1.0
) -> list[int]:
    """y = rows of the matrix times `scale`, chosen by `Env.TOKENS` or by `Env.POSITIONS` plus `offset`. (T, n_cols)

    Offsets into the workspace, strides in bytes. A unit is a token. Values are those of `QTensor.dequantize`.
    """
    ids = {"tokens": Env.TOKENS, "positions": Env.POSITIONS}[by]
    args = [packed.address, packed.stride, packed.n_cols, int(ids), offset, y_off, y_stride, float_bits(scale)]
    kernel = compiler.address(f"embed_kernels:embed_{packed.format.lower()}")
    return row_of(kernel, 1, 1, Env.N_TOKENS, 4, args)
