"""Weights on their way into an ONNX graph: floats, or integers in blocks with a scale, and perhaps a zero point.

What a GGUF format means is said once, in `edgelm.formats`. Here stands only how many bits its integers take in ONNX and
where their scales lie; the integers come back from the weights divided by them, and are proven to be the same ones.

    weight = Tensor(step, array)
    blocked = weight.blocked()           # codes uint8 (rows, blocks, block), scales (rows, blocks), zeros or None
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import FormatError, UnsupportedError
from edgelm.formats import Format, QTensor, by_name
from edgelm.formats.k_quants import scales_and_minima

from .arrays import Array, Floats
from .gguf_export import tensor_bytes
from .prune_cut import cut_array
from .recipe import Step

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """How a format's weights become integers: w = scale * (code - zero).

    bits: of a code, 4 or 8; own_bits: of the format's own codes; block: weights that share a scale; scales: blocks of
    the format -> (scales, minima), both float32 (n, blocks in one of the format's), minima None where the zero point is
    the middle, 2^(bits - 1).
    """

    bits: int
    own_bits: int
    block: int
    scales: Callable[[NDArray[Any]], tuple[Floats, Floats | None]]


def _one_scale(blocks: NDArray[Any]) -> tuple[Floats, None]:
    return blocks["d"].astype(np.float32)[:, None], None


def _scale_and_minimum(blocks: NDArray[Any]) -> tuple[Floats, Floats]:
    return blocks["d"].astype(np.float32)[:, None], blocks["m"].astype(np.float32)[:, None]


def _super_block(blocks: NDArray[Any]) -> tuple[Floats, Floats]:
    scales, minima = scales_and_minima(blocks)
    return scales[..., 0], -minima[..., 0]


def _two_bits(blocks: NDArray[Any]) -> tuple[Floats, Floats]:
    d, dmin = (blocks[name].astype(np.float32)[:, None] for name in ("d", "dmin"))
    return d * (blocks["scales"] & 15).astype(np.float32), -dmin * (blocks["scales"] >> 4).astype(np.float32)


def _signed_super_block(blocks: NDArray[Any]) -> tuple[Floats, None]:
    return blocks["d"].astype(np.float32)[:, None] * blocks["scales"].astype(np.float32), None


def _probed(name: str, block: int, byte: int, level: int) -> Callable[[NDArray[Any]], tuple[Floats, None]]:
    """Scales of a format whose own arithmetic tells them: the weight of a code that means `level`, divided by it.

    byte: what all bytes of codes must be for that.
    """

    def scales(blocks: NDArray[Any]) -> tuple[Floats, None]:
        probe, format = blocks.copy(), by_name(name)
        for field in {"qs", "qh", "hmask"}.intersection(format.layout.names or ()):
            probe[field] = byte
        weights = format.dequantize(probe).reshape(len(blocks), -1, block)[..., 0]
        return weights / np.float32(level), None

    return scales


# Every format whose integers ONNX can hold as they are; left are those with codebooks of whole vectors.
LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout(4, 4, 32, _one_scale),
    "Q8_0": Layout(8, 8, 32, _one_scale),
    "Q5_0": Layout(8, 5, 32, _one_scale),
    "IQ4_NL": Layout(8, 8, 32, _one_scale),
    "Q6_K": Layout(8, 6, 16, _signed_super_block),
    "Q3_K": Layout(4, 3, 16, _probed("Q3_K", 16, 0, -4)),
    "IQ4_XS": Layout(8, 8, 32, _probed("IQ4_XS", 32, 0, -127)),
    "MXFP4": Layout(8, 5, 32, _probed("MXFP4", 32, 0x77, 12)),
    "NVFP4": Layout(8, 5, 16, _probed("NVFP4", 16, 0x77, 12)),
    "TQ1_0": Layout(4, 2, 256, _probed("TQ1_0", 256, 0, -1)),
    "TQ2_0": Layout(4, 2, 256, _probed("TQ2_0", 256, 0, -1)),
    "Q1_0": Layout(4, 2, 128, _probed("Q1_0", 128, 0, -1)),
    "Q2_0": Layout(4, 3, 64, _probed("Q2_0", 64, 0, -1)),
    "Q4_1": Layout(4, 4, 32, _scale_and_minimum),
    "Q5_1": Layout(8, 5, 32, _scale_and_minimum),
    "Q4_K": Layout(4, 4, 32, _super_block),
    "Q5_K": Layout(8, 5, 32, _super_block),
    "Q2_K": Layout(4, 2, 16, _two_bits),
}


@dataclass(frozen=True)
class Blocked:
    """A matrix (rows, columns) as integers: scales[r, b] * (codes[r, b, i] - zeros[r, b]).

    codes: uint8 (rows, blocks, block), of `bits` bits each; scales: float32 (rows, blocks); zeros: None for the middle
    of the range, uint8 where all of them are whole, else float32.
    """

    bits: int
    codes: Bytes
    scales: Floats
    zeros: NDArray[Any] | None = None

    @property
    def block(self) -> int:
        return int(self.codes.shape[2])

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def offsets(self) -> Floats | None:
        """What is missing where no zero points can be given: w = scale * (code - middle) + offset."""
        if self.zeros is None or self.zeros.dtype == np.uint8:
            return None
        offsets: Floats = (self.scales * (np.float32(self.middle) - self.zeros)).astype(np.float32)
        return offsets

    def dequantize(self) -> Floats:
        """float32 (rows, blocks * block)."""
        zeros = np.float32(self.middle) if self.zeros is None else self.zeros.astype(np.float32)[..., None]
        values: Floats = self.scales[..., None] * (self.codes.astype(np.float32) - zeros)
        return values.reshape(len(self.codes), -1)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the plan, for `Weights`: a name, a shape and a format at once, its numbers when they are asked for.

    importance: of its columns, for quantizers; ready: its bytes, where they were chosen already; block: weights that
    shall share a scale instead of the format's own number (Q4_0 and Q8_0 alone).
    """

    step: Step
    array: Array
    importance: Floats | None = None
    ready: Bytes | None = None
    block: int = 0

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.step.shape

    @property
    def format(self) -> type[Format]:
        return self.step.format

    @property
    def n_bytes(self) -> int:
        return self.step.n_bytes

    @property
    def is_blocked(self) -> bool:
        """Whether it is integers in ONNX, not floats."""
        return self.format.block > 1

    @property
    def has_other_blocks(self) -> bool:
        """Whether more or fewer weights share a scale than in the format itself."""
        return self.block not in (0, self.format.block) and self.format.name in ("Q4_0", "Q8_0")

    def _parts(self) -> Iterator[QTensor]:
        """Its rows in the format of the plan, some at a time."""
        for rows in tensor_bytes(self.step, self.array, self.importance, self.ready):
            n = len(rows) if len(self.shape) > 1 else self.shape[0]
            yield QTensor(self.name, self.format, (n, *self.shape[1:]), rows)

    def dequantize(self) -> Floats:
        """float32 of `shape`: exactly what the graph will compute with, unless it rounds floats further."""
        if self.is_blocked and len(self.shape) == 2:
            return self.blocked().dequantize()[:, : self.shape[1]]
        return np.concatenate([part.dequantize() for part in self._parts()])

    def rows(self, indices: NDArray[np.intp]) -> Floats:
        """The same for some of its rows, in ascending order, alone: none of the others is rounded for that."""
        if len(self.shape) != 2:
            return self.dequantize().reshape(-1, self.shape[-1])[indices]
        part = cut_array(self.array, (indices, None))
        if self.has_other_blocks:
            values = rounded(part.read(), LAYOUTS[self.format.name].bits, self.block).dequantize()
            return values[:, : self.shape[1]]
        step = replace(self.step, shape=part.shape, is_kept=self.format.name in part.kept)
        ready = None if self.ready is None else self.ready[indices]
        data = np.concatenate(list(tensor_bytes(step, part, self.importance, ready)))
        return QTensor(self.name, self.format, part.shape, data).dequantize()

    def floats(self) -> Iterator[Floats]:
        """Its rows as float32, some at a time."""
        for part in self._parts():
            yield part.dequantize()

    def trained(self) -> Iterator[Floats]:
        """Its rows as the source has them, before anything is rounded."""
        n_rows = max(1, (1 << 24) // self.shape[1])
        return (self.array.rows(at, min(at + n_rows, self.shape[0])) for at in range(0, self.shape[0], n_rows))

    def blocked(self) -> Blocked:
        """Its integers.

        Raises FormatError for a matrix that holds infinity or NaN, UnsupportedError for a format that has no integers.
        """
        if self.has_other_blocks:
            bits = LAYOUTS[self.format.name].bits
            return joined([rounded(part, bits, self.block) for part in self.trained()])
        if self.format.name not in LAYOUTS:
            raise UnsupportedError(
                f"MatMulNBits and DequantizeLinear have no integers for {self.format.name} ({self.name}); choose a "
                f"type such as q4_0, and --allow-requantize; those that are kept: {', '.join(LAYOUTS)}"
            )
        return joined([_integers(part) for part in self._parts()])


def joined(parts: list[Blocked]) -> Blocked:
    """One matrix of several parts of its rows; zero points are whole only if all of them are."""
    first = parts[0]
    if len(parts) == 1:
        return first
    zeros = None if first.zeros is None else np.concatenate([_as_floats(p) for p in parts])
    if all(p.zeros is not None and p.zeros.dtype == np.uint8 for p in parts):
        zeros = np.concatenate([p.zeros for p in parts if p.zeros is not None])
    codes, scales = np.concatenate([p.codes for p in parts]), np.concatenate([p.scales for p in parts])
    return replace(first, codes=codes, scales=scales, zeros=zeros)


def _as_floats(part: Blocked) -> Floats:
    assert part.zeros is not None
    return part.zeros.astype(np.float32)


def _integers(part: QTensor) -> Blocked:
    """The integers of a part of a matrix, with their scales: no rounding, whatever the format."""
    layout = LAYOUTS[part.format.name]
    n_rows, n_cols = part.shape
    blocks = part.data.reshape(-1).view(part.format.layout)
    with np.errstate(all="ignore"):
        scales, minima = layout.scales(blocks)
        values = part.dequantize().reshape(-1, layout.block)
        scales = scales.reshape(-1, 1)
        shifted = values if minima is None else values - minima.reshape(-1, 1)
        codes = np.rint(np.where(scales == 0, 0, shifted / scales))
    # Around the middle: where activations are rounded, too, a distance from it would cost precision.
    middle = 1 << (layout.bits - 1)
    codes += middle if minima is None else middle - (1 << (layout.own_bits - 1))
    if not (np.isfinite(codes).all() and codes.min() >= 0 and codes.max() < 1 << layout.bits):
        raise FormatError(f"{part.name} holds infinity or NaN; such weights have no integers")
    shape = (n_rows, n_cols // layout.block)
    found = Blocked(layout.bits, codes.astype(np.uint8).reshape(*shape, layout.block), scales.reshape(shape))
    return found if minima is None else _with_minima(found, minima.reshape(shape), 1 << (layout.own_bits - 1))


def _with_minima(blocked: Blocked, minima: Floats, half: int) -> Blocked:
    """w = scale * own code + minimum, as w = scale * (code - zero). A block of one value becomes one times that value.

    half: of the range of the format's own codes, which lies at the middle of the codes.
    """
    lowest = np.float32(blocked.middle - half)
    scales, codes = blocked.scales, blocked.codes
    with np.errstate(all="ignore"):
        flat = scales == 0
        scales = np.where(flat, np.where(minima == 0, np.float32(1), minima), scales)
        zeros = np.where(flat, np.where(minima == 0, np.float32(0), np.float32(-1)), -minima / scales) + lowest
        codes = np.where(flat[..., None], np.uint8(lowest), codes)
        whole = np.rint(zeros)
        # A minimum was rounded to float16 after it was a multiple of the scale.
        near = np.abs(zeros - whole) <= whole * 2.0**-11
    is_whole = bool((near & (whole >= 0) & (whole < 1 << blocked.bits)).all())
    return replace(blocked, scales=scales, codes=codes, zeros=whole.astype(np.uint8) if is_whole else zeros)


def rounded(rows: Floats, bits: int, block: int) -> Blocked:
    """Plain rounding of float32 (n, columns) to blocks of any size; the last one is filled with zeros.

    The value of largest magnitude of a block becomes the lowest code, so that the whole range is used, whatever its
    sign: the scale is that value by -2^(bits - 1). Scales are rounded to float16, as in GGUF.
    """
    n, n_cols = rows.shape
    padded = np.zeros((n, -(-n_cols // block) * block), np.float32)
    padded[:, :n_cols] = rows
    blocks = padded.reshape(n, -1, block)
    if not np.isfinite(blocks).all():
        raise FormatError("a matrix holds infinity or NaN; such weights have no integers")
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    middle = 1 << (bits - 1)
    with np.errstate(all="ignore"):
        scales = (largest / np.float32(-middle)).astype(np.float16).astype(np.float32)
        codes = np.where(scales[..., None] == 0, 0, np.rint(blocks / scales[..., None])) + middle
    return Blocked(bits, codes.clip(0, 2 * middle - 1).astype(np.uint8), scales)


def by_rows(values: Floats) -> tuple[NDArray[np.int8], Floats]:
    """int8 (rows, columns) from -127 to 127, and a scale for each row."""
    scales = np.maximum(np.abs(values).max(axis=1), np.finfo(np.float32).tiny) / np.float32(127)
    return np.rint(values / scales[:, None]).astype(np.int8), scales.astype(np.float32)


def packed(codes: Bytes, bits: int) -> Bytes:
    """Codes of 4 bits, two to a byte along the last axis, the first in the low half; of 8 bits as they are."""
    if bits == 8:
        return codes
    even = np.zeros((*codes.shape[:-1], codes.shape[-1] + codes.shape[-1] % 2), np.uint8)
    even[..., : codes.shape[-1]] = codes
    nibbles: Bytes = even[..., ::2] | even[..., 1::2] << 4
    return nibbles
