"""The GGUF container: bytes <-> (metadata, named read-only weights). It knows no model and believes nothing.

A model file is hostile input. Every number read from it is a Python int (which cannot wrap), every length is compared
with the bytes that are left before anything is read or allocated, and every limit below is far above what real models
need. What comes out is correct or a `FormatError` / `UnsupportedError`; memory stays in proportion to the header.

Layout (version 3; version 2 is the same, little endian; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):
magic, version, number of tensors, number of keys; the keys with typed values; for each tensor its name, dimensions
(innermost first), type and offset; padding; the tensors' bytes.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, SourceError, UnsupportedError
from .formats import FORMATS, QTensor
from .gguf_strings import some_strings
from .mapped_file import GIVES_BACK, MappedFile

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 22  # in all the arrays of a file; the largest vocabularies with their merges hold under a million
MAX_KEY_BYTES = (1 << 16) - 1
MAX_NAME_BYTES = 64
MAX_STRING_BYTES = 1 << 26
MAX_ARRAY_BYTES = 1 << 28
MAX_DIMS = 4
_ONE_BY_ONE = 256  # strings, before more of them are read at once again

_U32, _BOOL, _STRING, _ARRAY, _U64 = 4, 7, 8, 9, 10
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GGUF:
    """A model file as it lies on disk.

    paths: the file, or all parts of a split one in order; version: 2 or 3; n_bytes: size of all of them together.
    metadata: bool, int, float or str; list[str] for arrays of strings; read-only arrays for arrays of numbers.
    tensors: in file order, memory-mapped: a weight takes no memory until it is read.
    """

    paths: tuple[Path, ...]
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, QTensor]
    n_bytes: int
    _maps: tuple[MappedFile, ...] = field(repr=False, default=())

    def forget(self) -> None:
        """Gives the memory of everything that was read back to the system; what is used again is read again."""
        for data in self._maps:
            data.forget(0, len(data))

    @cached_property
    def stamps(self) -> tuple[tuple[int, ...], ...]:
        """What shows, without reading it, that a file is another one or was changed: size, time, inode of each."""
        found = (os.fstat(data.descriptor) for data in self._maps)
        return tuple((status.st_size, status.st_mtime_ns, status.st_ino) for status in found)

    @contextmanager
    def lend(self, rows: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        """The bytes of a part of a weight, to be read once: after the `with` block they take no memory.

        They are those of the mapped file where its pages can be given back, elsewhere read into a buffer. SourceError
        if they cannot be read any more.
        """
        place = self._place(rows)
        if place is None:  # a weight that was never in a file
            yield rows
        elif GIVES_BACK:
            yield rows
            self._maps[place[0]].forget(place[1], place[1] + rows.nbytes)
        else:
            yield self._maps[place[0]].read_at(place[1], rows.nbytes).reshape(rows.shape)

    def find(self, rows: NDArray[np.uint8]) -> tuple[int, int] | None:
        """Descriptor of the file that a part of a weight lies in, and where, for who reads it without mapping it; None
        for a weight that was never in a file."""
        place = self._place(rows)
        return None if place is None else (self._maps[place[0]].descriptor, place[1])

    def _place(self, rows: NDArray[np.uint8]) -> tuple[int, int] | None:
        """Which of the files, and where in it."""
        starts = [rows.ctypes.data - first for first in self._addresses]
        return next(((i, start) for i, start in enumerate(starts) if 0 <= start < len(self._maps[i])), None)

    @cached_property
    def _addresses(self) -> tuple[int, ...]:
        """Of the first byte of each file."""
        return tuple(np.frombuffer(data, np.uint8).ctypes.data for data in self._maps)


def read(path: str | os.PathLike[str]) -> GGUF:
    """Read a GGUF file; of a split model (name-00001-of-0000N.gguf) any part may be named, all are read.

    All text must be valid UTF-8, as the format demands; a name or value that is not makes the file broken. The files
    must not change while the result is in use: their weights are read from disk when they are needed.

    Raises SourceError when a file cannot be opened, FormatError when one is broken, UnsupportedError when it is a GGUF
    file that edgelm cannot read (version 1, big endian, an array of arrays, an unknown tensor type).
    """
    paths = _parts(Path(path))
    parts = [_read_part(part) for part in paths]
    if len(parts) > 1 or _split(parts[0], "split.count", 1) > 1:
        return _join(parts)
    return parts[0]


def _parts(path: Path) -> tuple[Path, ...]:
    match = _SPLIT_NAME.fullmatch(path.name)
    if not match:
        return (path,)
    stem, count = match[1], int(match[3])
    if not 1 <= int(match[2]) <= count:
        raise FormatError(f"{path}: part {int(match[2])} of {count} cannot be")
    paths = tuple(path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1))
    for part in paths:
        if not os.path.exists(part):  # not Path.exists, which raises when a folder is not readable
            raise SourceError(f"{part}: this part of a split model is missing; put all {count} parts into one folder")
    return paths


def _join(parts: list[GGUF]) -> GGUF:
    first, tensors = parts[0], dict[str, QTensor]()
    for number, part in enumerate(parts):
        where, number_inside, count_inside = part.paths[0], _split(part, "split.no", 0), _split(part, "split.count", 1)
        if (number_inside, count_inside) != (number, len(parts)):
            raise FormatError(
                f"{where}: part {number_inside + 1} of {count_inside} by metadata, part {number + 1} of {len(parts)} "
                "by name; the parts of a model must be called NAME-00001-of-0000N.gguf"
            )
        if again := tensors.keys() & part.tensors.keys():
            raise FormatError(f"{where}: tensor {min(again)!r} is in another part, too")
        tensors.update(part.tensors)
    if (declared := _split(first, "split.tensors.count", len(tensors))) != len(tensors):
        raise FormatError(f"{first.paths[0]}: {declared} tensors declared, {len(tensors)} found in all parts")
    return GGUF(
        tuple(part.paths[0] for part in parts),
        first.version,
        first.metadata,
        MappingProxyType(tensors),
        sum(part.n_bytes for part in parts),
        tuple(data for part in parts for data in part._maps),
    )


def _split(part: GGUF, key: str, default: int) -> int:
    number = part.metadata.get(key, default)
    if not isinstance(number, int):
        raise FormatError(f"{part.paths[0]}: the value of {key!r} is no whole number")
    return number


def _map(path: Path) -> MappedFile:
    try:
        # A pipe would block and a device never ends, so look before opening.
        if not stat.S_ISREG(path.stat().st_mode):
            raise SourceError(f"{path}: not a file; give the path of a .gguf file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise FormatError(f"{path}: {os.fstat(file.fileno()).st_size} bytes are too few for a GGUF file")
            return MappedFile.of(file)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path, a file emptied this very moment
        reason = error.strerror if isinstance(error, OSError) else error
        raise SourceError(f"{path}: cannot be opened: {reason}") from error


def _read_part(path: Path) -> GGUF:
    data = _map(path)
    version = _check_magic(path, data)
    header = _Header(path, data)
    n_tensors, n_keys = header.scalar(_U64), header.scalar(_U64)
    header.check(n_tensors <= MAX_TENSORS, f"{n_tensors} tensors are declared, more than any model has")
    header.check(n_keys <= MAX_KEYS, f"{n_keys} metadata keys are declared, more than any model has")
    metadata: dict[str, Any] = {}
    alignment = 32
    for _ in range(n_keys):
        key = header.name(MAX_KEY_BYTES, "metadata key")
        header.check(key not in metadata, f"metadata key {key!r:.100} appears twice")
        kind = header.scalar(_U32)
        metadata[key] = header.value(kind, key)
        if key == "general.alignment":
            header.check(kind == _U32, "general.alignment is not of type uint32")
            alignment = metadata[key]
            header.check(
                alignment >= 8 and not alignment & (alignment - 1),
                f"general.alignment is {alignment}, not a power of two of at least 8",
            )
    infos = [_tensor_info(header) for _ in range(n_tensors)]
    start = -(-header.offset // alignment) * alignment
    tensors = _tensors(header, infos, start, alignment)
    data.forget(0, start)  # what was read is in `metadata` now
    return GGUF((path,), version, MappingProxyType(metadata), MappingProxyType(tensors), len(data), (data,))


def _check_magic(path: Path, data: mmap.mmap) -> int:
    if data[:4] != b"GGUF":
        if data[:11] == b"version htt":
            raise FormatError(f"{path}: a Git LFS pointer, not the model itself; fetch it with `git lfs pull`")
        raise FormatError(
            f"{path}: not a GGUF file: it begins with {bytes(data[:4])!r}; convert the model to GGUF first"
        )
    version = int.from_bytes(data[4:8], "little")
    if version & 0xFFFF == 0 and version:
        raise UnsupportedError(f"{path}: a big-endian GGUF file; get the little-endian file of the same model")
    if version == 1:
        raise UnsupportedError(f"{path}: GGUF version 1 is obsolete; get a newer file of the same model")
    if version == 0:
        raise FormatError(f"{path}: GGUF version 0 does not exist")
    if version > 3:
        raise UnsupportedError(
            f"{path}: GGUF version {version} is newer than this version of edgelm, which reads 2 and 3"
        )
    return version


class _Header:
    """A position in the file that only moves forward over bytes that exist."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.offset, self.n_strings = path, data, len(data), 8, 0

    def damaged(self, message: str) -> FormatError:
        return FormatError(f"{self.path}: {message}; the file is damaged: get it again")

    def check(self, condition: bool, message: str) -> None:
        if not condition:
            raise self.damaged(message)

    def take(self, n_bytes: int, what: str) -> int:
        """Step over `n_bytes` and return where they begin."""
        start = self.offset
        if n_bytes > self.size - start:
            left = self.size - start
            raise self.damaged(f"the file ends inside {what}: {n_bytes} bytes needed at offset {start}, {left} left")
        self.offset = start + n_bytes
        return start

    def scalar(self, kind: int, what: str = "the header") -> Any:
        packed = _SCALARS[kind]
        return packed.unpack_from(self.data, self.take(packed.size, what))[0]

    def string(self, limit: int, what: str) -> str:
        n_bytes = self.scalar(_U64, what)
        self.check(n_bytes <= limit, f"{what} is {n_bytes} bytes long, more than {limit}")
        start = self.take(n_bytes, what)
        try:
            return self.data[start : start + n_bytes].decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} at offset {start} is not valid UTF-8") from None

    def name(self, limit: int, what: str) -> str:
        name = self.string(limit, what)
        self.check(name.isprintable() and name != "", f"{what} at offset {self.offset} is empty or unprintable")
        return name

    def value(self, kind: int, key: str) -> Any:
        what = f"the value of {key!r:.100}"
        if kind == _STRING:
            return self.string(MAX_STRING_BYTES, what)
        if kind == _ARRAY:
            item_kind, n_items = self.scalar(_U32, what), self.scalar(_U64, what)
            if item_kind == _STRING:
                return self.strings(n_items, what)
            return self.numbers(item_kind, n_items, what)
        self.check(kind in _SCALARS, f"{what} is of the unknown type {kind}")
        value = self.scalar(kind, what)
        if kind == _BOOL:
            self.check(value <= 1, f"{what} is a truth value of {value}")
            return bool(value)
        return value

    def numbers(self, kind: int, n_items: int, what: str) -> NDArray[Any]:
        if kind == _ARRAY:
            raise UnsupportedError(f"{self.path}: {what} is an array of arrays")
        self.check(kind in _SCALARS, f"{what} is an array of the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind].format)
        n_bytes = n_items * dtype.itemsize
        self.check(n_bytes <= MAX_ARRAY_BYTES, f"{what} is {n_bytes} bytes long, more than {MAX_ARRAY_BYTES}")
        start = self.take(n_bytes, what)
        values = np.frombuffer(self.data[start : start + n_bytes], dtype)
        if kind == _BOOL:
            self.check(n_items == 0 or int(values.max()) <= 1, f"{what} holds truth values that are neither 0 nor 1")
            values = values.view(np.bool_)
        return values

    def strings(self, n_items: int, what: str) -> list[str]:
        """The vocabulary and its merges: 300,000 strings are most of opening a file."""
        self.check(
            8 * n_items <= self.size - self.offset, f"{what} declares {n_items} strings, more than the file can hold"
        )
        self.n_strings += n_items
        self.check(self.n_strings <= MAX_STRINGS, f"more than {MAX_STRINGS} strings, more than any model has")
        items: list[str] = []
        while (left := n_items - len(items)) > 0:
            found, self.offset = some_strings(self.data, self.offset, left)
            items += found
            items += self._one_by_one(min(left - len(found), _ONE_BY_ONE), what)
        return items

    def _one_by_one(self, n_items: int, what: str) -> list[str]:
        data, size, offset, length_at = self.data, self.size, self.offset, _SCALARS[_U64].unpack_from
        items: list[str] = []
        try:
            for _ in range(n_items):
                start = offset + 8
                offset = start + length_at(data, offset)[0]
                if offset > size or offset - start > MAX_STRING_BYTES:
                    raise self.damaged(f"a string in {what} at offset {start} is {offset - start} bytes long")
                items.append(data[start:offset].decode())
        except struct.error:
            raise self.damaged(f"the file ends inside {what}") from None
        except UnicodeDecodeError:
            raise self.damaged(f"{what} holds a string at offset {start} that is not valid UTF-8") from None
        self.offset = offset
        return items


@dataclass(frozen=True)
class _TensorInfo:
    name: str
    dims: tuple[int, ...]  # innermost first, as in the file
    type: int
    offset: int


def _tensor_info(header: _Header) -> _TensorInfo:
    name = header.name(MAX_NAME_BYTES, "tensor name")
    what = f"the description of tensor {name!r}"
    n_dims = header.scalar(_U32, what)
    header.check(n_dims <= MAX_DIMS, f"tensor {name!r} has {n_dims} dimensions, more than {MAX_DIMS}")
    dims = tuple(header.scalar(_U64, what) for _ in range(n_dims)) or (1,)
    return _TensorInfo(name, dims, header.scalar(_U32, what), header.scalar(_U64, what))


def _tensors(header: _Header, infos: list[_TensorInfo], start: int, alignment: int) -> dict[str, QTensor]:
    tensors: dict[str, QTensor] = {}
    extents: list[tuple[int, int, str]] = []
    for info in infos:
        what = f"tensor {info.name!r}"
        header.check(info.name not in tensors, f"{what} appears twice")
        if info.type not in FORMATS:
            raise UnsupportedError(f"{header.path}: {what} is of type {info.type}, which this version does not know")
        header.check(
            all(1 <= n <= header.size * 8 for n in info.dims), f"{what} cannot have the dimensions {info.dims}"
        )
        format, n_rows = FORMATS[info.type], 1
        for n in info.dims[1:]:
            n_rows *= n
        try:
            row_bytes = format.row_bytes(info.dims[0])
        except FormatError as error:
            raise FormatError(f"{header.path}: {what}: {error}") from None
        header.check(info.offset % alignment == 0, f"{what} is at offset {info.offset}, no multiple of {alignment}")
        begin, n_bytes = start + info.offset, n_rows * row_bytes
        header.check(
            begin + n_bytes <= header.size,
            f"{what} needs bytes {begin} to {begin + n_bytes}, and the file has {header.size}: it is cut short",
        )
        extents.append((begin, begin + n_bytes, info.name))
        data = np.frombuffer(header.data, np.uint8, n_bytes, begin).reshape(n_rows, row_bytes)
        tensors[info.name] = QTensor(info.name, format, info.dims[::-1], data)
    extents.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(extents):
        header.check(end <= begin, f"tensors {name!r} and {other!r} overlap")
    return tensors
