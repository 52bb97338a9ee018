"""GPTQ: each column is rounded, and the columns that are still to come make up for its error.

After Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2210.17323). The error that matters is that of a layer's outputs on a text, trace of E H Eᵀ, where E is
the error of its weights and H = Xᵀ X of its inputs. With H⁻¹ = Uᵀ U, U upper triangular, rounding column j by e costs
(e / U_jj)², if the columns behind it move by -e / U_jj times the rest of row j of U.

The grids are those of GGUF: when the first column of a block is reached, the scales (and minima) of the block are
searched for its weights as they are by then, each column weighed by 1 / U_jj². Blocks whose inputs are driven most come
first, and within a block its most driven columns ("act-order"): order is free as long as a block stays together.

A column that was rounded early knew nothing of the errors that came later. So each scale can then be moved, and each
column rounded again, to what is best with all others as they are (coordinate descent, as QuantEase, Behdin et al.,
2309.01885): each step makes the error of the outputs smaller, or leaves it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import UsageError
from edgelm.formats import Format, by_name

from . import block_codes
from .feedback import DAMPING, Feedback
from .quantizers import quantize
from .symmetric import damp

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SWEEPS = 0  # of coordinate descent: nothing gained with a few thousand tokens (docs/LOG.md), at twice the time
_SLAB = 32  # columns whose corrections are applied one by one; the columns behind them get theirs by one product


def gptq(
    format_name: str,
    w: Floats,
    hessian: NDArray[np.floating],
    damping: float = DAMPING,
    act_order: bool = True,
    sweeps: int = SWEEPS,
    n_threads: int | None = None,
) -> Bytes:
    """Quantizes a matrix for the inputs that a text gives it: uint8 (n_rows, bytes of a row).

    w: float32 (out, in); hessian: (in, in), the sum of xᵀ x over inputs x, of any scale.

    Raises:
        FormatError: as `quantize`. UnsupportedError: the format has no codes of single weights.
        UsageError: the hessian has another shape, or is no sum of squares.
    """
    format = by_name(format_name)
    n_cols = w.shape[1]
    if hessian.shape != (n_cols, n_cols) or not np.isfinite(hessian).all():
        raise UsageError(f"a hessian of shape {hessian.shape} for {n_cols} columns, or of what is no number")
    order = _order(np.diagonal(hessian), format.block, act_order)
    feedback = Feedback(w, hessian, order, damping)
    out = np.empty((len(w), format.row_bytes(n_cols)), np.uint8)
    for start in range(0, n_cols, format.block):
        end = start + format.block
        columns = order[start:end] % format.block
        data = _block(format, *feedback.block(start, end), columns, n_threads)
        place = int(order[start]) // format.block
        out[:, place * format.n_bytes : (place + 1) * format.n_bytes] = data
        feedback.settle(start, end, block_codes.decode(format, data)[:, columns])
    if sweeps:
        h = hessian.astype(np.float32)
        damp(h, damping)
        out = _descend(format, w, h, out, sweeps)
    return out


def _order(diagonal: NDArray[np.floating], block: int, act_order: bool) -> NDArray[np.intp]:
    """Columns in the order of rounding: blocks that are driven most first, in them columns that are driven most."""
    columns = np.arange(len(diagonal)).reshape(-1, block)
    if not act_order:
        return columns.reshape(-1)
    driven = diagonal.reshape(-1, block)
    columns = np.take_along_axis(columns, np.argsort(-driven, axis=1, kind="stable"), axis=1)
    return columns[np.argsort(-driven.sum(axis=1), kind="stable")].reshape(-1)


def _block(
    format: type[Format], w: Floats, upper: Floats, columns: NDArray[np.intp], n_threads: int | None
) -> Bytes:
    """The bytes of one block of each row, columns w (rows, block) in the order of rounding, which are changed.

    upper: the triangle U between them; columns: where in the block each of w lies.
    """
    pivots = np.diagonal(upper)
    places = np.argsort(columns)
    importance = 1 / pivots.astype(np.float64) ** 2
    data = quantize(format.name, w[:, places], importance[places].astype(np.float32), n_threads)
    start, step = (line[:, columns] for line in block_codes.lines(format, data))
    inverse = np.where(step == 0, 0, 1 / np.where(step == 0, 1, step)).astype(np.float32)
    codes, errors = np.empty(w.shape, np.uint8), np.empty_like(w)
    levels = block_codes.levels(format)
    for first in range(0, w.shape[1], _SLAB):
        last = min(first + _SLAB, w.shape[1])
        for j in range(first, last):
            codes[:, j] = block_codes.nearest(levels, (w[:, j] - start[:, j]) * inverse[:, j])
            errors[:, j] = (w[:, j] - (start[:, j] + step[:, j] * levels[codes[:, j]])) / pivots[j]
            w[:, j + 1 : last] -= errors[:, j, None] * upper[j, j + 1 : last]
        w[:, last:] -= errors[:, first:last] @ upper[first:last, last:]
    return block_codes.with_codes(format, data, codes[:, places])


def _descend(format: type[Format], w: Floats, h: Floats, data: Bytes, sweeps: int) -> Bytes:
    """`data` with better scales, once, and better codes, `sweeps` times: each in turn, with all others as they are.

    slopes, of the error over each weight, are kept up to date.
    """
    slopes: Floats = np.asarray((block_codes.decode(format, data) - w) @ h, np.float32)
    data = _rescale(format, h, data, slopes)
    start, step = block_codes.lines(format, data)
    inverse = np.where(step == 0, 0, 1 / np.where(step == 0, 1, step)).astype(np.float32)
    values, codes = block_codes.decode(format, data), np.empty(w.shape, np.uint8)
    levels, diagonal = block_codes.levels(format), np.diagonal(h)
    for _ in range(sweeps):
        for first in range(0, w.shape[1], _SLAB):
            slab = slice(first, min(first + _SLAB, w.shape[1]))
            old, local = values[:, slab].copy(), slopes[:, slab].copy()
            for j in range(slab.start, slab.stop):
                wanted = values[:, j] - local[:, j - first] / diagonal[j]
                codes[:, j] = block_codes.nearest(levels, (wanted - start[:, j]) * inverse[:, j])
                new = start[:, j] + step[:, j] * levels[codes[:, j]]
                local += (new - values[:, j])[:, None] * h[j, slab]
                values[:, j] = new
            slopes += (values[:, slab] - old) @ h[slab]
    return block_codes.with_codes(format, data, codes)


def _rescale(format: type[Format], h: Floats, data: Bytes, slopes: Floats) -> Bytes:
    """`data` with better scales and minima, block after block: weights are linear in both. Changes slopes with them."""
    data = data.copy()
    for first in range(0, len(h), format.block):
        columns = slice(first, first + format.block)
        place = slice(first // format.block * format.n_bytes, (first // format.block + 1) * format.n_bytes)
        here = np.ascontiguousarray(data[:, place])
        blocks = here.reshape(-1).view(format.layout)
        for name in block_codes.scale_fields(format):
            basis = block_codes.derivative(format, here, name)
            curve = np.einsum("ij,ij->i", basis @ h[columns, columns], basis)
            slope = np.einsum("ij,ij->i", basis, slopes[:, columns])
            old = blocks[name].astype(np.float32)
            change = np.where(curve > 0, slope / np.where(curve > 0, curve, 1), 0)
            blocks[name] = (old - change).clip(-65504, 65504)
            slopes += ((blocks[name].astype(np.float32) - old)[:, None] * basis) @ h[columns]
        data[:, place] = here
    return data
