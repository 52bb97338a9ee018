"""Writes GGUF files: the whole layout first, then one tensor at a time, so that a conversion may die and go on.

The twin of `edgelm.gguf`, which reads them; it knows no model. While it writes, the file is called OUT.part, and
OUT.part.journal lists the tensors that are finished, each with its sha256. Whatever stops the process, the next run
checks what the journal claims against the bytes on disk, keeps what is true and goes on from there. OUT appears under
its own name only when it is whole and on the disk. The bytes are those that `gguf.GGUFWriter` writes.

    layout = Layout(metadata, tensors)
    hashes = write(path, layout, contents)

A value's type follows from Python's: bool, int (uint32, or the smallest that holds it), float (float32), str, lists of
them (of int: int32), bytes (uint8), NumPy scalars and arrays (their own type), and `Typed` (a value as another file
has it).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgelm.disk import Progress, lock, need_place, nothing
from edgelm.errors import FormatError
from edgelm.formats import Format

from .resumable import resumable

Contents = Callable[["Planned"], Iterable[NDArray[np.uint8]]]

ALIGNMENT = 32
SPARE_DISK = 16 << 20  # bytes left free for everybody else
_STRING, _ARRAY = 8, 9
_KINDS = {
    np.dtype(name): kind
    for kind, name in {
        0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class Typed:
    """A value in the very bytes of another file: the number of its GGUF type, and what follows it."""

    kind: int
    data: bytes


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: its name, its shape in weights (outermost first) and its format."""

    name: str
    shape: tuple[int, ...]
    format: type[Format]

    @property
    def n_weights(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def n_bytes(self) -> int:
        """Bytes of its data, without padding. FormatError when its rows are no whole number of blocks."""
        return self.n_weights // self.shape[-1] * self.format.row_bytes(self.shape[-1])


class Layout:
    """Where everything lies in a file that does not exist yet.

    header: all bytes before the first tensor's; offsets: of each tensor from the beginning of the file, in order;
    n_bytes: of the whole file.
    """

    def __init__(self, metadata: Mapping[str, Any], tensors: Sequence[Planned]) -> None:
        names = [tensor.name for tensor in tensors]
        if len(set(names)) != len(names):
            raise FormatError(f"two tensors are called {next(n for n in names if names.count(n) > 1)!r}")
        self.metadata, self.tensors = dict(metadata), tuple(tensors)
        ends = [0, *itertools.accumulate(_padded(tensor.n_bytes) for tensor in tensors)]
        self.header = _header(self.metadata, self.tensors, ends)
        self.offsets = tuple(len(self.header) + end for end in ends[:-1])
        self.n_bytes = len(self.header) + ends[-1]

    def with_metadata(self, changed: Mapping[str, Any]) -> Layout:
        """The same layout with other values, which must take the very room that the old ones took."""
        other = Layout({**self.metadata, **changed}, self.tensors)
        if len(other.header) != len(self.header):
            raise ValueError("these values do not fit where the old ones were")
        return other


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _header(metadata: Mapping[str, Any], tensors: Sequence[Planned], offsets: Sequence[int]) -> bytes:
    out = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + encode(key, value)
    for tensor, offset in zip(tensors, offsets, strict=False):
        dims = tensor.shape[::-1]
        out += _string(tensor.name)
        out += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.format.id, offset)
    return bytes(out.ljust(_padded(len(out)), b"\0"))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def encode(key: str, value: Any) -> bytes:
    """The type and the bytes of a metadata value; `key` is for messages. TypeError when GGUF has no such thing."""
    if isinstance(value, Typed):
        return struct.pack("<I", value.kind) + value.data
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bytes | list | tuple | np.ndarray):
        return struct.pack("<I", _ARRAY) + _array(key, value)
    scalar = value if isinstance(value, np.generic) else _scalar(key, value)
    return struct.pack("<I", _kind(key, scalar.dtype)) + scalar.tobytes()


def _kind(key: str, dtype: np.dtype[Any]) -> int:
    if dtype not in _KINDS:
        raise TypeError(f"{key}: GGUF holds no values of type {dtype}")
    return _KINDS[dtype]


def _scalar(key: str, value: Any) -> np.generic:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float32(value)
    if isinstance(value, int):
        for kind in (np.uint32, np.int32, np.uint64, np.int64):
            if np.iinfo(kind).min <= value <= np.iinfo(kind).max:
                return kind(value)
    raise TypeError(f"{key}: {value!r:.60} cannot be a GGUF value")


def _array(key: str, items: Any) -> bytes:
    if isinstance(items, bytes):
        items = np.frombuffer(items, np.uint8)
    if isinstance(items, np.ndarray):
        return struct.pack("<IQ", _kind(key, items.dtype), items.size) + items.tobytes()
    kinds = set(map(type, items))
    if kinds == {str}:
        return struct.pack("<IQ", _STRING, len(items)) + b"".join(map(_string, items))
    if kinds not in ({bool}, {int}, {float}):
        raise TypeError(f"{key}: an array holds strings, or numbers of one type, and at least one of them")
    return _array(key, np.array(items, {bool: np.bool_, int: np.int32, float: np.float32}[kinds.pop()]))


# ------------------------------------------------------------------------------------------------------ to the disk


def write(
    path: Path,
    layout: Layout,
    contents: Contents,
    *,
    fingerprint: str = "",
    seal: Callable[[Mapping[str, str]], Mapping[str, Any]] | None = None,
    progress: Progress = nothing,
) -> dict[str, str]:
    """Write the file, or what is missing of it, and return the sha256 of each tensor by name.

    Args:
        contents: the bytes of a tensor, in pieces; called once for each, in order, and not for those that are there.
        fingerprint: says what the contents are made of; a part that was begun with another one is thrown away.
        seal: metadata that only the finished tensors tell (their sha256 by name is given), in place of values of the
            very same size.
        progress: called with ("write", bytes done, bytes in all).

    Raises UsageError when something is at `path` that is no file; OSError when the disk is full (before anything is
    written, if that can be foreseen) or does not work: then the part stays, and the next call goes on.
    """
    part, journal_path = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.journal")
    guard = path.with_name(path.name + ".part.lock")
    need_place(path)
    with lock(guard), resumable(part):
        journal = _Journal(journal_path, hashlib.sha256(layout.header + fingerprint.encode()).hexdigest())
        hashes = journal.proven(part, layout, progress)
        _need_disk(path.parent, layout.n_bytes - _allocated(part))
        with part.open("r+b" if part.exists() else "w+b", buffering=0) as file, journal.appending():
            _write_tensors(file, layout, contents, hashes, journal, progress)
            if seal is not None:
                _put(file, 0, layout.with_metadata(seal(hashes)).header)
            os.fsync(file.fileno())
        os.replace(part, path)
        journal_path.unlink()
        _sync_folder(path.parent)
    with contextlib.suppress(OSError):
        guard.unlink()
    return hashes


def _write_tensors(
    file: BinaryIO, layout: Layout, contents: Contents, hashes: dict[str, str], journal: _Journal, progress: Progress
) -> None:
    _put(file, 0, layout.header)
    for tensor, offset in zip(layout.tensors, layout.offsets, strict=True):
        if tensor.name in hashes:
            continue
        digest, at = hashlib.sha256(), offset
        for piece in contents(tensor):
            data = np.ascontiguousarray(piece).data.cast("B")
            digest.update(data)
            _put(file, at, data)
            at += len(data)
            progress("write", at, layout.n_bytes)
        if at != offset + tensor.n_bytes:
            raise AssertionError(f"{tensor.name}: {at - offset} bytes came, {tensor.n_bytes} were planned")
        _put(file, at, bytes(_padded(tensor.n_bytes) - tensor.n_bytes))
        hashes[tensor.name] = digest.hexdigest()
        journal.add(tensor.name, hashes[tensor.name])
    file.truncate(layout.n_bytes)


def _put(file: BinaryIO, offset: int, data: bytes | memoryview) -> None:
    file.seek(offset)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


class _Journal:
    """What is finished: one JSON line for the layout, then one for each tensor."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self._file: Any = None

    def proven(self, part: Path, layout: Layout, progress: Progress) -> dict[str, str]:
        """The tensors that an earlier run finished and whose bytes are still what it wrote; forgets all others."""
        hashes: dict[str, str] = {}
        claims = self._claims()
        if claims and part.exists():
            with part.open("rb") as file:
                for tensor, offset in zip(layout.tensors, layout.offsets, strict=True):
                    if claims.get(tensor.name) != _sha256(file, offset, tensor.n_bytes):
                        break
                    hashes[tensor.name] = claims[tensor.name]
                    progress("check what is there", offset + tensor.n_bytes, layout.n_bytes)
        elif part.exists():
            part.unlink()
        lines = [{"layout": self.identity}, *({"tensor": name, "sha256": sha} for name, sha in hashes.items())]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return hashes

    def _claims(self) -> dict[str, str]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        claims = {}
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be torn
            if not lines or json.loads(lines[0])["layout"] != self.identity:
                return {}
            for line in lines[1:]:
                claim = json.loads(line)
                claims[claim["tensor"]] = claim["sha256"]
        return claims

    @contextlib.contextmanager
    def appending(self) -> Iterator[None]:
        with self.path.open("a", encoding="utf-8") as self._file:
            yield

    def add(self, name: str, sha256: str) -> None:
        self._file.write(json.dumps({"tensor": name, "sha256": sha256}) + "\n")
        self._file.flush()


def _sha256(file: BinaryIO, offset: int, n_bytes: int) -> str:
    file.seek(offset)
    digest = hashlib.sha256()
    while n_bytes and (piece := file.read(min(n_bytes, 1 << 22))):
        digest.update(piece)
        n_bytes -= len(piece)
    return digest.hexdigest() if not n_bytes else ""


def _allocated(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _need_disk(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if n_bytes > 0 and free - SPARE_DISK < n_bytes:
        raise OSError(errno.ENOSPC, f"{n_bytes / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free", str(folder))


def _sync_folder(folder: Path) -> None:
    """Makes the new name survive a power failure; systems that cannot open folders do this by themselves."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
