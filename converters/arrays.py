"""`Array`: a tensor of a checkpoint that stays on disk until its rows are asked for. Knows no file format.

Whatever the file holds (half floats, float8, packed integers with scales), rows come out as float32. That is the only
thing the rest of the converter knows about a source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.formats import Format, QTensor

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Array:
    """A tensor that can be read row by row.

    name: in the checkpoint; shape: outermost first, () for a number; kind: what the file holds ("F32", "BF16", "Q4_0"
    …); rows(start, stop): float32 (stop - start, …) of the outermost dimension; as_is: the same weights in the bytes of
    a GGUF format, if they lie in the file so; kept(start, stop) by format: rows as uint8 (rows, bytes per row) in a
    format that holds the very integers that the file has; numbers: what the file holds, as it holds it, if these are
    plain numbers; source: the memory-mapped file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    rows: Callable[[int, int], Floats]
    as_is: QTensor | None = None
    kept: Mapping[str, Callable[[int, int], NDArray[np.uint8]]] = field(default_factory=dict)
    numbers: NDArray[Any] | None = None
    source: object = None

    def stored_as(self, format: type[Format]) -> QTensor | None:
        """`as_is`, if that is in this format."""
        return self.as_is if self.as_is is not None and self.as_is.format is format else None

    def read(self) -> Floats:
        """All of it: float32 of `shape`."""
        if not self.shape:
            return self.rows(0, 1).reshape(())
        return self.rows(0, self.shape[0])


# What a stored number is in NumPy, by safetensors' names; formats that NumPy does not have are read as integers.
STORED = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1", "F8_E4M3": "u1", "F8_E5M2": "u1",
}  # fmt: skip


def stored(name: str, kind: str, data: NDArray[Any], source: object) -> Array:
    """An array of plain numbers: `data` is a view into `source`, of `kind`'s type in STORED, in the tensor's shape."""
    listed = np.atleast_1d(data)
    return Array(
        name, data.shape, kind, lambda start, stop: to_float32(listed[start:stop], kind), numbers=data, source=source
    )


def to_float32(values: NDArray[Any], kind: str) -> Floats:
    """Stored numbers as float32, in a new contiguous array."""
    if kind == "BF16":
        upper: Floats = np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
        return upper
    if kind.startswith("F8"):
        decoded: Floats = _float8(kind)[values]
        return decoded
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32)


@cache
def _float8(kind: str) -> Floats:
    """All 256 values of E4M3 (no infinity, one NaN) or E5M2 (as in IEEE 754), arXiv 2209.05433."""
    n_mantissa = 3 if kind == "F8_E4M3" else 2
    codes = np.arange(256)
    exponent, mantissa = codes >> n_mantissa & (127 >> n_mantissa), codes & ((1 << n_mantissa) - 1)
    bias = 7 if kind == "F8_E4M3" else 15
    fraction = mantissa / (1 << n_mantissa) + (exponent > 0)
    values = np.ldexp(fraction, np.maximum(exponent, 1) - bias)
    if kind == "F8_E4M3":
        values[(codes & 127) == 127] = np.nan
    else:
        values[exponent == 31] = np.where(mantissa[exponent == 31] > 0, np.nan, np.inf)
    signed: Floats = np.where(codes > 127, -values, values).astype(np.float32)
    return signed
