"""Checkpoints whose matrices somebody has quantized already (FP8, GPTQ, AWQ) -> float arrays, lazily. Knows no file.

Each method keeps a matrix as several tensors; here they become one again, row by row, under the name that the model's
own checkpoint would have. The arithmetic is that of the methods' own loaders (GPTQModel, AutoAWQ, transformers).
Where a GGUF format can hold the integers of a checkpoint, they are kept as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import FormatError, UnsupportedError
from edgelm.formats import by_name
from edgelm.formats.format import pack

from .arrays import Array, Floats

Integers = NDArray[np.uint32]
# In which of eight neighbouring columns each nibble of an AWQ word belongs.
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def as_floats(quantization: Mapping[str, Any], arrays: dict[str, Array]) -> dict[str, Array]:
    """The tensors of a checkpoint with plain matrices in place of quantized ones.

    quantization: config.json's `quantization_config`, or nothing. Raises UnsupportedError for methods that are not
    known, FormatError for tensors that are missing or do not fit together.
    """
    if not quantization:
        return arrays
    method = quantization.get("quant_method")
    if method == "gptq":
        return _replaced(arrays, "qweight", lambda stem: _gptq(stem, arrays, quantization))
    if method == "awq":
        return _replaced(arrays, "qweight", lambda stem: _awq(stem, arrays, quantization))
    if method in ("fp8", "fbgemm_fp8") or quantization.get("format") in ("float-quantized", "naive-quantized"):
        return _scaled(arrays)
    raise UnsupportedError(f"a checkpoint quantized by {method!r:.40}; convert the model's original checkpoint instead")


def _replaced(arrays: dict[str, Array], part: str, make: Callable[[str], Array]) -> dict[str, Array]:
    """STEM.weight, made by `make`, in place of STEM.qweight and what belongs to it."""
    stems = {name.removesuffix(f".{part}") for name in arrays if name.endswith(f".{part}")}
    out: dict[str, Array] = {}
    for name, array in arrays.items():
        stem, _, last = name.rpartition(".")
        if stem not in stems or last not in ("qweight", "qzeros", "scales", "g_idx"):
            out[name] = array
        elif last == part:
            out[f"{stem}.weight"] = make(stem)
    return out


def _part(arrays: Mapping[str, Array], stem: str, name: str, kinds: str, n_dims: int) -> NDArray[Any]:
    """The stored numbers of STEM.NAME; FormatError when it is missing or of another kind."""
    array = arrays.get(f"{stem}.{name}")
    if array is None or array.numbers is None or array.kind not in kinds.split() or len(array.shape) != n_dims:
        raise FormatError(f"the quantized layer {stem} has no {name} that it could be read by")
    return array.numbers


def _words(arrays: Mapping[str, Array], stem: str, name: str) -> Integers:
    """Packed whole numbers; signs mean nothing in them."""
    return _part(arrays, stem, name, "I32", 2).view(np.uint32)


def _fields(words: Integers, bits: int, axis: int) -> NDArray[np.int16]:
    """Every word becomes 32 / bits whole numbers along `axis`, the lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    shape = (1, -1, 1) if axis == 0 else (1, 1, -1)
    found = (np.expand_dims(words, axis + 1) >> shifts.reshape(shape)) & np.uint32((1 << bits) - 1)
    rows, columns = words.shape
    n = len(shifts)
    return found.reshape((rows * n, columns) if axis == 0 else (rows, columns * n)).astype(np.int16)


def _fit(stem: str, condition: bool) -> None:
    if not condition:
        raise FormatError(f"the tensors of the quantized layer {stem} do not fit together")


def _gptq(stem: str, arrays: Mapping[str, Array], settings: Mapping[str, Any]) -> Array:
    """weight = scale of its group * (q - zero of its group); words run along the inputs (arXiv 2210.17323)."""
    bits = settings.get("bits")
    if bits not in (2, 4, 8):
        raise UnsupportedError(f"a checkpoint quantized by GPTQ to {bits!r:.10} bits")
    q, zeros = _words(arrays, stem, "qweight"), _words(arrays, stem, "qzeros")
    scales = _part(arrays, stem, "scales", "F16 F32", 2)
    n_in, n_out = q.shape[0] * 32 // bits, q.shape[1]
    _fit(stem, scales.shape[1] == n_out and zeros.shape == (len(scales), n_out * bits // 32) and len(scales) > 0)
    if f"{stem}.g_idx" in arrays:
        groups = np.asarray(_part(arrays, stem, "g_idx", "I32", 1), np.int64)
    else:
        groups = _in_order(settings, n_in)
    _fit(stem, groups.shape == (n_in,) and 0 <= int(groups.min()) <= int(groups.max()) < len(scales))
    offset = 0 if settings.get("checkpoint_format", "gptq") == "gptq_v2" else 1
    zero_of = _fields(zeros, bits, 1) + np.int16(offset)

    def integers(start: int, stop: int) -> NDArray[np.int16]:
        return _fields(q[:, start:stop], bits, 0)

    whole = _Grouped(integers, zero_of, scales, groups, bits)
    source = arrays[f"{stem}.qweight"].source
    return Array(f"{stem}.qweight", (n_out, n_in), f"GPTQ{bits}", whole.rows, kept=whole.kept(), source=source)


def _awq(stem: str, arrays: Mapping[str, Array], settings: Mapping[str, Any]) -> Array:
    """weight = scale of its group * (q - zero of its group); words run along the outputs (arXiv 2306.00978)."""
    bits, version = settings.get("bits", settings.get("w_bit")), settings.get("version", "gemm")
    if bits != 4 or str(version).lower() != "gemm":
        raise UnsupportedError(f"a checkpoint quantized by AWQ to {bits!r:.10} bits in the layout {version!r:.20}")
    q, zeros = _words(arrays, stem, "qweight"), _words(arrays, stem, "qzeros")
    scales = _part(arrays, stem, "scales", "F16 F32", 2)
    n_in, n_out = q.shape[0], q.shape[1] * 8
    _fit(stem, scales.shape[1] == n_out and zeros.shape == (len(scales), q.shape[1]) and len(scales) > 0)
    groups = _in_order(settings, n_in)
    _fit(stem, int(groups.max()) < len(scales))
    order = np.argsort(_AWQ_COLUMNS)

    def unpacked(words: Integers) -> NDArray[np.int16]:
        found = _fields(words, 4, 1).reshape(len(words), -1, 8)[:, :, order]
        return found.reshape(len(words), -1)

    def integers(start: int, stop: int) -> NDArray[np.int16]:
        first, last = start // 8, math.ceil(stop / 8)
        return unpacked(q[:, first:last])[:, start - 8 * first : stop - 8 * first]

    whole = _Grouped(integers, unpacked(zeros), scales, groups, 4)
    source = arrays[f"{stem}.qweight"].source
    return Array(f"{stem}.qweight", (n_out, n_in), "AWQ4", whole.rows, kept=whole.kept(), source=source)


@dataclass(frozen=True)
class _Grouped:
    """Whole numbers q (inputs, outputs) with a scale and a zero for each group of inputs and each output.

    integers(start, stop): q of some outputs; zeros, scales: (groups, outputs); groups: of each input.
    """

    integers: Callable[[int, int], NDArray[np.int16]]
    zeros: NDArray[np.int16]
    scales: NDArray[Any]
    groups: NDArray[np.int64]
    bits: int

    def rows(self, start: int, stop: int) -> Floats:
        """weight = scale * (q - zero), float32 (outputs, inputs)."""
        values = self.integers(start, stop) - self.zeros[self.groups, start:stop]
        return np.ascontiguousarray((self.scales[self.groups, start:stop].astype(np.float32) * values).T, np.float32)

    def kept(self) -> dict[str, Callable[[int, int], NDArray[np.uint8]]]:
        """The same in the blocks of GGUF formats that hold q as it is: for groups of whole blocks, with half floats."""
        blocks = self.groups.reshape(-1, 32) if len(self.groups) % 32 == 0 else None
        if blocks is None or self.scales.dtype != np.float16 or (blocks != blocks[:, :1]).any():
            return {}
        names = ["Q4_1"] if self.bits == 4 else []
        names += ["Q4_0"] if self.bits == 4 and (self.zeros == 8).all() else []
        names += ["Q8_0"] if self.bits == 8 and (self.zeros == 128).all() else []
        return {name: partial(self._packed, name) for name in names}

    def _packed(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        q = np.ascontiguousarray(self.integers(start, stop).T).reshape(-1, 32)
        groups = self.groups[::32]
        d, zero = (x[groups, start:stop].T.reshape(-1) for x in (self.scales, self.zeros))
        fields: dict[str, NDArray[Any]] = {"d": d}
        if name == "Q8_0":
            fields["qs"] = (q - 128).astype(np.int8)
        else:
            fields["qs"] = (q[:, :16] | q[:, 16:] << 4).astype(np.uint8)
        if name == "Q4_1":
            fields["m"] = (-zero * d.astype(np.float32)).astype(np.float16)
        return pack(by_name(name), **fields).view(np.uint8).reshape(stop - start, -1)


def _in_order(settings: Mapping[str, Any], n_in: int) -> NDArray[np.int64]:
    """The group of each input, where groups are neighbours."""
    size = settings.get("group_size", settings.get("q_group_size"))
    if type(size) is not int or not (size == -1 or size > 0):
        raise FormatError(f"quantization_config: a group_size of {size!r:.20}")
    return np.arange(n_in) // (n_in if size == -1 else size)


def _scaled(arrays: dict[str, Array]) -> dict[str, Array]:
    """FP8: a scale for the whole matrix, for each row, or for each block of rows and columns."""
    out: dict[str, Array] = {}
    for name, array in arrays.items():
        stem, _, last = name.rpartition(".")
        if last in ("weight_scale", "weight_scale_inv") and f"{stem}.weight" in arrays:
            continue
        if last in ("input_scale", "input_scale_ub", "activation_scale", "k_scale", "v_scale"):
            continue  # how the activations would be rounded: not here
        scale = arrays.get(f"{name}_scale_inv") or arrays.get(f"{name}_scale") if last == "weight" else None
        out[name] = array if scale is None else _multiplied(array, scale)
    return out


def _multiplied(array: Array, scale: Array) -> Array:
    if len(array.shape) != 2 or not math.prod(scale.shape or (1,)) or len(scale.shape) > 2:
        raise FormatError(f"{array.name} and its scale do not fit together")
    (n_rows, n_columns), factors = array.shape, scale.read()
    factors = factors.reshape(-1, 1) if factors.ndim < 2 else factors
    height, width = (-(-n // m) for n, m in zip(array.shape, factors.shape, strict=True))
    _fit(array.name, -(-n_rows // height) == len(factors) and -(-n_columns // width) == factors.shape[1])
    columns = np.arange(n_columns) // width

    def rows(start: int, stop: int) -> Floats:
        product: Floats = array.rows(start, stop) * factors[np.arange(start, stop) // height][:, columns]
        return product

    return Array(array.name, array.shape, array.kind, rows, source=array.source)
