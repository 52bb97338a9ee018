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

_SLAB = 1 << 17  # weights worked on at a time: temporaries stay in the processor's cache, however long a row is


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
        return self._weights(self.data).reshape(self.shape)

    def rows(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Floats:
        """Some rows, in the order asked for: float32 (len(indices), shape[-1]). IndexError outside the tensor."""
        return self._weights(self.data[np.asarray(indices, dtype=np.int64)]).reshape(-1, self.shape[-1])

    def _weights(self, data: Bytes) -> Floats:
        blocks = data.reshape(-1).view(self.format.layout)
        weights = np.empty((len(blocks), self.format.block), np.float32)
        # A damaged file may hold NaN and infinity anywhere; they are values here, not events to warn of.
        with np.errstate(all="ignore"):
            for slab in _slabs(len(blocks), self.format.block):
                weights[slab] = self.format.dequantize(blocks[slab])
        return weights.reshape(-1)

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
        x = values.reshape(values.size // format.block, format.block)
        blocks = np.empty(len(x), format.layout)
        with np.errstate(all="ignore"):
            for slab in _slabs(len(x), format.block):
                blocks[slab] = format.quantize(x[slab])
        data = blocks.view(np.uint8).reshape(values.size // max(1, values.shape[-1]), n_row_bytes)
        data.flags.writeable = False
        return cls(name, format, values.shape, data)


def _slabs(n_blocks: int, block: int) -> Iterator[slice]:
    step = _SLAB // block
    return (slice(start, start + step) for start in range(0, n_blocks, step))
