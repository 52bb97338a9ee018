"""A safetensors file -> named arrays, memory-mapped. It believes nothing that the header says.

Layout (https://github.com/huggingface/safetensors): the length of a JSON header as eight bytes, the header, the data.
The header names each tensor's type, shape and extent in the data. The format demands that the extents leave no hole and
do not overlap; a file that breaks this, or lies about any size, is a `FormatError`.
"""

from __future__ import annotations

import json
import mmap
import stat
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.errors import FormatError, SourceError, UnsupportedError

from .arrays import STORED, Array, stored

MAX_HEADER_BYTES = 100 << 20  # as in the library itself
MAX_DIMS = 8


def read(path: Path) -> dict[str, Array]:
    """The arrays of a file, in the order in which they lie.

    Raises SourceError when it cannot be opened, FormatError when it is broken, UnsupportedError for a type of numbers
    that the converter does not know.
    """
    data = open_map(path)
    if len(data) < 8:
        raise FormatError(f"{path}: {len(data)} bytes are too few for a safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise FormatError(f"{path}: a header of {length} bytes is declared, and the file has {len(data)}")
    header = parse_json(data[8 : 8 + length], path)
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header is no JSON object")
    header.pop("__metadata__", None)
    start, extents, arrays = 8 + length, [], {}
    for name, entry in header.items():
        kind, shape, begin, end = _entry(path, name, entry, len(data) - start)
        extents.append((begin, end, name))
        flat = np.frombuffer(data, STORED[kind], _product(shape), start + begin)
        arrays[name] = stored(name, kind, flat.reshape(shape), data)
    extents.sort()
    expected = 0
    for begin, end, name in extents:
        if begin != expected:
            raise FormatError(f"{path}: tensor {name!r:.80} begins at {begin}, where {expected} was expected")
        expected = end
    if start + expected != len(data):
        raise FormatError(f"{path}: {len(data) - start - expected} bytes belong to no tensor")
    return {name: arrays[name] for _, _, name in extents}


def _entry(path: Path, name: str, entry: Any, n_data: int) -> tuple[str, tuple[int, ...], int, int]:
    what = f"{path}: tensor {name!r:.80}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{what} is not described by dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str):
        raise FormatError(f"{what} has a dtype that is no text")
    if not _sizes(shape) or len(shape) > MAX_DIMS or not _sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{what} has the impossible shape {shape!r:.60} or the impossible extent {offsets!r:.60}")
    if kind not in STORED:
        raise UnsupportedError(f"{what} is of type {kind!r:.30}, which this version does not know")
    begin, end = offsets
    n_bytes = _product(shape) * np.dtype(STORED[kind]).itemsize
    if not begin <= end <= n_data or end - begin != n_bytes:
        raise FormatError(f"{what} of {n_bytes} bytes lies at {begin} to {end} of {n_data}")
    return kind, tuple(shape), begin, end


def _sizes(numbers: Any) -> bool:
    """A list of whole numbers that are not negative (true and false are none)."""
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def _product(shape: Any) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


# --------------------------------------------------------------------------------- what other readers of files share


def open_map(path: Path) -> mmap.mmap | bytes:
    """A file's bytes, read when they are needed. SourceError when it cannot be opened or is no file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block, a device never ends
            raise SourceError(f"{path}: not a file")
        with path.open("rb") as file:
            if not path.stat().st_size:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error


def parse_json(text: bytes, path: Path) -> Any:
    """JSON without duplicate keys. FormatError when it is none, or nested beyond reason."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise FormatError(f"{path}: {key!r:.80} appears twice")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(f"{path}: not valid JSON: {reason:.100}") from None


def read_json(path: Path, limit: int = 1 << 28) -> Any:
    """The JSON in a file. FormatError when it is longer than `limit` bytes or no JSON."""
    data = open_map(path)
    if len(data) > limit:
        raise FormatError(f"{path}: {len(data)} bytes, more than {limit}")
    return parse_json(bytes(data), path)
