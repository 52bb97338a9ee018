"""Numbers become blocks: the quantizers of every weight format that can be written.

Two ways: rounding to the scale that the largest weight asks for, byte for byte what `gguf.quants` writes; and a search
for the scales with the least squared error, weighed by how strongly each input drives a layer. K-quants and the
IQ4 formats are always searched. The search is compiled (`quantizer_search`, `quantizer_kernels`) and runs on several
threads; the result depends neither on their number nor on the machine. Imports no Numba.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import FormatError, UnsupportedError, UsageError
from edgelm.formats import Format, by_name
from edgelm.threads import default_threads

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

PLAIN = ("F32", "F16", "BF16")
ROUNDED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4")  # can be quantized without a search
SEARCHED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
LARGEST = 65504.0  # of float16, in which every block's scale is written
_ROOM = (2 * 256 + 164) * 64 + 256 * 16 + 64  # bytes that a kernel works in: its ROOM, a test compares; and a line
_SLAB = 1 << 18  # weights that a thread takes at a time


def quantize(
    format_name: str,
    x: Floats,
    importance: Floats | None = None,
    n_threads: int | None = None,
    search: bool | None = None,
) -> Bytes:
    """A matrix as it is written to a file: uint8 (n_rows, bytes of a row).

    x: float32 (n_rows, n_cols). importance: float32 (n_cols,), not negative, the weight of each column's squared error
    (mean squares of the inputs of a linear layer: `imatrix`); only their ratios count. search: whether to look for
    better scales than the largest weight asks for; by default where there is an importance, and always where a format
    cannot be had otherwise.

    Raises:
        FormatError: rows are no whole number of blocks; or a weight is not a number, infinite, or too large.
        UnsupportedError: the format can only be read.
        UsageError: importance has another length than a row, is negative, or no number.
    """
    format = by_name(format_name)
    need_writable(format)
    x = np.ascontiguousarray(x, np.float32)
    if x.ndim != 2:
        raise UsageError(f"a matrix has two dimensions, not {x.ndim}")
    out = np.empty((len(x), format.row_bytes(x.shape[1])), np.uint8)
    if search is None:
        search = importance is not None
    searched = format.name in SEARCHED and (search or format.name not in ROUNDED)
    work = _Search(format, x, _weights(importance, x.shape[1]), out) if searched else _Rounding(format, x, out)
    n_rows = max(1, _SLAB // max(1, x.shape[1]))
    if len(x) <= n_rows:
        work(0, n_rows)
        return out
    with ThreadPoolExecutor(n_threads or default_threads()) as pool:
        for done in pool.map(work, range(0, len(x), n_rows), [n_rows] * -(-len(x) // n_rows)):
            assert done is None
    return out


def need_writable(format: type[Format]) -> None:
    """Raises UnsupportedError for a format that `quantize` does not know."""
    if format.name not in (*PLAIN, *ROUNDED, *SEARCHED):
        raise UnsupportedError(f"{format.name} can only be read; types that can be written: {', '.join(writable())}")


def writable() -> tuple[str, ...]:
    """Names of the formats that `quantize` knows."""
    return tuple(dict.fromkeys((*PLAIN, *ROUNDED, *SEARCHED)))


def _weights(importance: Floats | None, n_cols: int) -> Floats | None:
    """Importances around 1. A column that was never used still counts a little."""
    if importance is None:
        return None
    weights = np.asarray(importance, np.float64)
    if weights.shape != (n_cols,):
        raise UsageError(f"there are {weights.size} importances for rows of {n_cols} weights")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise UsageError(f"importance of column {int(np.argmin(np.isfinite(weights) & (weights >= 0)))} is no weight")
    mean = weights.mean() if n_cols else 0.0
    if mean == 0:
        return None
    return np.maximum(weights / mean, 1e-6).astype(np.float32)


def _check(format: type[Format], x: Floats, first_row: int) -> None:
    """FormatError when a weight cannot be held, saying which."""
    largest = np.abs(x).max(initial=0)
    if not largest <= (LARGEST if format.name not in ("F32", "BF16") else np.finfo(np.float32).max):
        bad = ~np.isfinite(x)
        row, column = np.argwhere(bad if bad.any() else np.abs(x) == largest)[0]
        what = "can hold" if not bad.any() else "is made for"
        where = f"row {first_row + row}, column {column}"
        raise FormatError(f"the weight in {where} is {x[row, column]}: no number that {format.name} {what}")


class _Rounding:
    """Rows from … on, rounded as the definition of the format does."""

    def __init__(self, format: type[Format], x: Floats, out: Bytes) -> None:
        self.format, self.x, self.out = format, x, out

    def __call__(self, first: int, n_rows: int) -> None:
        rows = self.x[first : first + n_rows]
        _check(self.format, rows, first)
        with np.errstate(all="ignore"):
            blocks = self.format.quantize(rows.reshape(-1, self.format.block))
        self.out[first : first + n_rows] = blocks.view(np.uint8).reshape(len(rows), -1)


class _Search:
    """Rows from … on, searched by a compiled kernel."""

    def __init__(self, format: type[Format], x: Floats, importance: Floats | None, out: Bytes) -> None:
        from edgelm.kernels import compiler
        from edgelm.kernels.executor import Native

        self.format, self.x, self.out = format, x, out
        self.period = 1 if importance is None else x.shape[1] // format.block
        self.importance = np.ones(format.block, np.float32) if importance is None else importance
        self.kernel: Any = Native(compiler.address(f"converters.quantizer_kernels:{format.name.lower()}"))

    def __call__(self, first: int, n_rows: int) -> None:
        rows, out = self.x[first : first + n_rows], self.out[first : first + n_rows]
        _check(self.format, rows, first)
        n_blocks = rows.size // self.format.block
        room = np.empty(_ROOM, np.uint8)
        job = np.array(
            [
                rows.ctypes.data,
                self.importance.ctypes.data,
                out.ctypes.data,
                -(-room.ctypes.data // 64) * 64,
                n_blocks,
                self.period,
            ],
            np.int64,
        )
        self.kernel(job.ctypes.data, 0, 0, -(-n_blocks // 16))
