"""`QTensor`: a weight as it lies in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from .format import Bytes, Floats, Format
from .simple import F32

_SLAB = 1 << 18  # weights dequantized at a time: temporaries stay in the processor's cache


@dataclass(frozen=True, eq=False)
class QTensor:
    """A weight as it lies in the file: rows of blocks, read-only, never copied.

    shape: in weights, outermost first (a linear layer is (out, in)); data: uint8 (rows, bytes per row), where rows is
    the product of all dimensions but the last.
    """

    name: str
    format: type[Format]
    shape: tuple[int, ...]
    data: Bytes

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return int(self.data.nbytes)

    @property
    def n_weights(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    def dequantize(self) -> Floats:
        """A new float32 array of `shape`."""
        n_cols = self.shape[-1]
        out = np.empty((len(self.data), n_cols), np.float32)
        for rows in self._slabs(len(self.data), n_cols):
            out[rows] = self._dequantize(self.data[rows])
        return out.reshape(self.shape)

    def rows(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Floats:
        """Some rows, in the order asked for: float32 (len(indices), shape[-1]). IndexError outside the tensor."""
        chosen = np.asarray(indices, dtype=np.int64)
        out = np.empty((len(chosen), self.shape[-1]), np.float32)
        for rows in self._slabs(len(chosen), self.shape[-1]):
            out[rows] = self._dequantize(self.data[chosen[rows]])
        return out

    def _dequantize(self, data: Bytes) -> Floats:
        # A hostile or damaged file may hold NaN and infinity anywhere; they are values here, not events to warn of.
        with np.errstate(all="ignore"):
            return self.format.dequantize(data.reshape(-1).view(self.format.layout)).reshape(len(data), -1)

    @staticmethod
    def _slabs(n_rows: int, n_cols: int) -> Iterator[slice]:
        step = max(1, _SLAB // n_cols)
        return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))

    @classmethod
    def from_array(cls, name: str, array: NDArray[Any], format: type[Format] = F32) -> QTensor:
        """Quantize `array` (outermost first; at least one dimension). FormatError when its rows are no whole blocks.

        UnsupportedError for types that are only read.
        """
        if format.quantize is Format.quantize:
            raise UnsupportedError(
                f"{name}: {format.name} can only be read; choose a type that can be written, such as Q8_0"
            )
        values = np.ascontiguousarray(array, dtype=np.float32)
        n_row_bytes = format.row_bytes(values.shape[-1])
        with np.errstate(all="ignore"):
            blocks = format.quantize(values.reshape(-1, format.block))
        data = blocks.view(np.uint8).reshape(-1, n_row_bytes)
        data.flags.writeable = False
        return cls(name, format, values.shape, data)
