"""`Format`: what a ggml tensor type declares, the registry of all of them, and the pieces that their code shares."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, UnsupportedError

Blocks = NDArray[np.void]  # (n,) structured, one element per block
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

FORMATS: dict[int, type[Format]] = {}


class Format:
    """A ggml tensor type. Defining a subclass registers it in `FORMATS`; its name is the name of the class.

    id: the number in the file; block: weights per block; n_bytes: bytes per block;
    layout: NumPy dtype of a block, written "type field, type field", where "16u1 qs" is sixteen bytes;
    coarse: whether so much of a model is lost by it that what else is lost counts twice.
    """

    id: ClassVar[int]
    name: ClassVar[str]
    block: ClassVar[int]
    n_bytes: ClassVar[int]
    layout: ClassVar[np.dtype[np.void]]
    coarse: ClassVar[bool]

    def __init_subclass__(cls, *, id: int, block: int, n_bytes: int, layout: str, coarse: bool = False) -> None:
        cls.id, cls.name, cls.block, cls.n_bytes, cls.coarse = id, cls.__name__, block, n_bytes, coarse
        cls.layout = np.dtype([(field.split()[1], field.split()[0]) for field in layout.split(",")])
        assert cls.layout.itemsize == n_bytes and id not in FORMATS, cls.name
        FORMATS[id] = cls

    @classmethod
    def row_bytes(cls, n_cols: int) -> int:
        """Bytes of a row of `n_cols` weights; FormatError when the row is no whole number of blocks."""
        if n_cols % cls.block:
            raise FormatError(f"a row of {n_cols} weights is no whole number of {cls.name} blocks of {cls.block}")
        return n_cols // cls.block * cls.n_bytes

    @classmethod
    def bits_per_weight(cls) -> float:
        """Bits that one weight takes in a file."""
        return 8 * cls.n_bytes / cls.block

    @staticmethod
    def quantize(x: Floats) -> Blocks:
        """(n, block) float32 -> (n,) blocks, by plain rounding. UnsupportedError for formats that have none.

        `converters.quantizers` writes those whose scales are searched for: K-quants, IQ4_NL, IQ4_XS.
        """
        raise UnsupportedError("this tensor type can only be read; choose one that can be written, such as Q8_0")

    @staticmethod
    def dequantize(blocks: Blocks) -> Floats:
        """(n,) blocks -> (n, block) float32."""
        raise NotImplementedError


def by_name(name: str) -> type[Format]:
    """The format called `name`, such as "Q4_K" (any case). UnsupportedError when there is none."""
    for format in FORMATS.values():
        if format.name == name.upper():
            return format
    raise UnsupportedError(
        f"no tensor type is called {name!r}; there are: {', '.join(f.name for f in FORMATS.values())}"
    )


# --------------------------------------------------------------------------------------- pieces that formats share


def pack(format: type[Format], **fields: NDArray[Any]) -> Blocks:
    blocks = np.empty(len(next(iter(fields.values()))), format.layout)
    for name, values in fields.items():
        blocks[name] = values
    return blocks


def f32(x: NDArray[Any]) -> Floats:
    """float32 of a field; one number per block becomes a column, so that it broadcasts over the block."""
    x = x.astype(np.float32)
    return x[:, None] if x.ndim == 1 else x


def planes(q: Bytes, group: int, bits: int) -> Bytes:
    """Bit fields (n, m) -> (n, m * 8 / bits): each `group` bytes hold planes, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    planes: Bytes = q.reshape(len(q), -1, 1, group) >> shifts & np.uint8((1 << bits) - 1)
    return planes.reshape(len(q), -1)


def extreme(x: Floats) -> Floats:
    """The value of largest magnitude of each block, with its sign: (n, 1)."""
    extreme: Floats = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    return extreme


def inverse(d: Floats) -> Floats:
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d)


def round_half_away(x: Floats) -> Floats:
    """Round half away from zero, exactly (adding 0.5 would round 0.49999997 up)."""
    magnitude = np.abs(x)
    floor = np.floor(magnitude)
    rounded: Floats = np.copysign(floor + (magnitude - floor >= 0.5), x)
    return rounded
