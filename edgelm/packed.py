"""Where packed weights live: in memory, or in a file that is mapped, beside the model or in the cache.

Weights are packed for the kernels when a model is loaded. `edgelm pack` writes the result down, so that later starts
map it and do no work; and a model that does not fit into memory is packed into a file as well, which the system then
reads in and drops piece by piece as it is used.

Such a file is a head of fixed size and the weights behind it. Nothing is read from it that could point anywhere: where
each weight lies follows from the model, and the head only has to be, byte for byte, what this model, this layout and
this processor lead to. Who can write the file can change weights, and nothing else. Behind it stands what the model's
files looked like from outside: while they do, their weights need not be looked at to know them again.
"""

from __future__ import annotations

import glob
import hashlib
import mmap
import os
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import disk, rooms
from .arch import Config
from .disk import Progress, need_disk, remove_drafts, replacing
from .errors import EdgelmError, FormatError, SourceError
from .formats import QTensor
from .free_memory import free_memory
from .gguf import GGUF
from .graph import Recorder, gates, in_order, matrices
from .models import model_of
from .threads import default_threads
from .weights import Weights

if TYPE_CHECKING:
    from .kernels.packing import Packing
    from .kernels.weight_layout import Packed, Pairs

SUFFIX = ".packed"
SPARE_MEMORY = 128 << 20  # bytes that are left for everything else
DATA = 1 << 16  # where the weights begin: a multiple of any page size
_HEAD = struct.Struct("<8sIQ32s32s")  # magic, version, bytes of weights, digests of their order and of the model
_MAGIC, _VERSION = b"edgelmPK", 1
_STAMP = 32  # bytes behind the head: digest of the head and of `GGUF.stamps`
_ELSEWHERE = "name another place: `edgelm pack MODEL OUT` and then --packed OUT; or EDGELM_CACHE, for --packed file"
_SAMPLE, _EVERY = 64, 1 << 20  # bytes of a weight that stand for so many


class PackedFile:
    """The file that the packed weights of a model would be.

    forms, n_bytes: where each of `tensors` lies in it, and bytes of all of them; pairs: as for `weight_layout.arrange`.
    """

    def __init__(self, file: GGUF, tensors: Sequence[QTensor], pairs: Pairs = ()) -> None:
        from .kernels import weight_layout

        self.file, self.tensors = file, tensors
        self.forms, self.n_bytes = weight_layout.arrange(tensors, pairs)

    @classmethod
    def of(cls, file: GGUF) -> PackedFile:
        """That of a model which is not loaded. Raises what `edgelm.load` raises for files that it cannot run."""
        config = Config.from_gguf(file.metadata)
        head = "hidden" if config.spec.family == "encoder" else "logits"
        recorder = Recorder(config, head)
        result = model_of(config)(recorder, config, Weights.from_gguf(config, file.tensors))
        nodes = in_order([result])
        weights = matrices(nodes)
        return cls(file, [matrix.slice() for matrix in weights], gates(nodes, weights))

    @property
    def beside(self) -> Path:
        return beside(self.file.paths[0])

    @property
    def cached(self) -> Path:
        """In the cache: two models never share a place."""
        return in_cache() / f"{self.file.paths[0].stem}-{self._model.hex()[:16]}{SUFFIX}"

    def _places(self) -> Iterator[Path]:
        """Where a file may be. The name of one in the cache takes a look at all weights, so if there may be one."""
        yield self.beside
        with suppress(OSError):
            if any(name.lstrip(".").startswith(self.file.paths[0].stem) for name in os.listdir(in_cache())):
                yield self.cached

    def there(self) -> dict[Path, str]:
        """The files in the places where they are looked for, each with the reason why it cannot be used, or ""."""
        found = {}
        for path in self._places():
            if os.path.exists(path):  # not Path.exists, which raises where a folder is not readable
                try:
                    self._open(path).close()
                    found[path] = ""
                except EdgelmError as error:
                    found[path] = str(error)
        return found

    def found(self) -> Path | None:
        """A file that can be used. One that cannot is warned of."""
        for path, wrong in self.there().items():
            if not wrong:
                return path
            warnings.warn(wrong, stacklevel=2)
        return None

    def remove(self) -> dict[Path, int]:
        """Removes the files in these places, and what was left of making them: bytes of each."""
        removed = {path: disk.remove(path) for path in self.there()}
        for path in self._places():
            removed |= remove_drafts(path)
        return removed

    def map(self, path: Path) -> list[Packed]:
        """The weights in a file, which takes memory only as they are read.

        Raises:
            FormatError: it was made for another model, layout or processor, or is damaged.
            SourceError: it cannot be read.
        """
        with self._open(path) as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        memory = np.frombuffer(data, np.uint8, self.n_bytes, DATA)
        return [form.within(memory) for form in self.forms]

    def write(self, path: Path, n_threads: int | None = None, progress: Progress | None = None) -> Path:
        """Packs the weights into a file, a few megabytes of memory at a time. It is whole, or not there.

        Raises SourceError if it cannot be written, or the disk is too full.
        """
        from .kernels import packing

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, sync=True) as file:
                need_disk(path.parent, DATA + self.n_bytes, _ELSEWHERE)
                file.truncate(DATA + self.n_bytes)
                lend, find, n = self.file.lend, self.file.find, n_threads or default_threads()
                packing.Packing(_Writer(file), self.tensors, self.forms, n, progress, lend, find).run()
                file.seek(0)
                file.write(self._head + self._stamp(self._head))
            newest = max(model.stat().st_mtime_ns for model in self.file.paths)
            if path.stat().st_mtime_ns < newest:  # a model from a clock that is ahead of ours
                os.utime(path, ns=(newest, newest))
        except OSError as error:
            raise SourceError(f"cannot write {path}: {error.strerror or error}; {_ELSEWHERE}") from error
        return path

    def _open(self, path: Path) -> IO[bytes]:
        try:
            file = path.open("rb")
        except OSError as error:
            raise SourceError(
                f"{path}: cannot be opened: {error.strerror}; packed weights are in memory, in a file (the words auto, "
                "memory and file), or at the path of what `edgelm pack` has made"
            ) from error
        if wrong := self._wrong(file):
            file.close()
            model = self.file.paths[0]
            raise FormatError(f"{path} is not used: {wrong}; renew it with `edgelm pack {model}`, or remove it")
        return file

    def _wrong(self, file: IO[bytes]) -> str:
        """Why a file cannot be used; nothing if it can."""
        status, head, stamp = os.fstat(file.fileno()), file.read(_HEAD.size), file.read(_STAMP)
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            return "it does not hold packed weights"
        _, version, n_bytes, order, model = _HEAD.unpack(head)
        if version != _VERSION:
            return "another version of edgelm has made it"
        if stamp != self._stamp(head) and model != self._model:
            return "it was made for another model"
        if order != self._order:
            return "it was made by another version of edgelm, or for another processor"
        if status.st_size != DATA + self.n_bytes or n_bytes != self.n_bytes:
            return "it is damaged"
        if any(path.stat().st_mtime_ns > status.st_mtime_ns for path in self.file.paths):
            return "the model is newer"
        return ""

    @property
    def _head(self) -> bytes:
        return _HEAD.pack(_MAGIC, _VERSION, self.n_bytes, self._order, self._model)

    @cached_property
    def _order(self) -> bytes:
        """Digest of everything that decides which byte is where."""
        from .kernels.weight_layout import LAYOUT

        forms = [
            (f.format, f.transcoded_from, f.n_rows, f.n_cols, f.address, f.stride, f.n_bytes) for f in self.forms
        ]
        return hashlib.sha256(repr((LAYOUT, forms)).encode()).digest()

    def _stamp(self, head: bytes) -> bytes:
        return hashlib.sha256(head + repr(self.file.stamps).encode()).digest()

    @cached_property
    def _model(self) -> bytes:
        """Digest of the weights in the model's file: as a packed file in the cache that was made from this very file
        has it, or made anew."""
        for path in in_cache().glob(f"{glob.escape(self.file.paths[0].stem)}-*{SUFFIX}"):
            with suppress(OSError), path.open("rb") as file:
                head, stamp = file.read(_HEAD.size), file.read(_STAMP)
                if stamp == self._stamp(head) and _HEAD.unpack(head)[3] == self._order:
                    return bytes(_HEAD.unpack(head)[-1])
        return self._sampled()

    def _sampled(self) -> bytes:
        """By names, types, shapes of weights, and a few bytes of each megabyte: seconds of a slow disk."""
        digest = hashlib.sha256()
        for tensor in self.tensors:
            digest.update(repr((tensor.name, tensor.format.name, tensor.shape)).encode())
            data = tensor.data.reshape(-1)
            for start in (*range(0, max(1, len(data) - _SAMPLE), _EVERY), max(0, len(data) - _SAMPLE)):
                digest.update(data[start : start + _SAMPLE].data)
        self.file.forget()
        return digest.digest()


def beside(model: Path) -> Path:
    """Where packed weights are that every start of `model` finds."""
    return model.with_name(model.name + SUFFIX)


def in_cache() -> Path:
    """The folder of packed weights that do not lie beside their model."""
    return rooms.cache_dir() / "packed"


class _Writer:
    """A file as a target of packing: pieces are packed in memory, then written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._lock, self._own = file, threading.Lock(), threading.local()

    def room(self, start: int, n_bytes: int) -> NDArray[np.uint8]:
        room: NDArray[np.uint8] = getattr(self._own, "room", np.empty(0, np.uint8))
        if len(room) < n_bytes + 64:
            room = self._own.room = np.empty(n_bytes + 64, np.uint8)
        at = -room.ctypes.data % 64
        piece = room[at : at + n_bytes]
        piece[:] = 0
        return piece

    def done(self, start: int, piece: NDArray[np.uint8]) -> None:
        with self._lock:
            self._file.seek(DATA + start)
            self._file.write(piece.data)


def load(
    file: GGUF,
    tensors: Sequence[QTensor],
    place: str = "auto",
    n_more: int = 0,
    n_threads: int | None = None,
    progress: Progress | None = None,
    pairs: Pairs = (),
) -> tuple[list[Packed], Path | Packing | None]:
    """The packed forms of a model's weights, and the file that they are in, or the packing if it is under way.

    It is where the first run of a model can do without it: see `kernels.streamed`.

    Args:
        place: "file" maps a file and makes it if there is none; "memory" packs into memory; "auto" maps a file that is
            there, and makes one, with a warning, only if the weights do not fit into memory. Anything else is the path
            of a file.
        n_more: bytes that will be needed besides.
        progress: called as progress(stage, done, total) while kernels are compiled and weights packed.
        pairs: as for `weight_layout.arrange`.

    Raises:
        FormatError: the file at a path that was given cannot be used.
        SourceError: it is not there, or a file has to be written and cannot be.
    """
    from .kernels import packing, streamed

    packed_file = PackedFile(file, tensors, pairs)
    if place not in ("auto", "memory", "file"):
        return packed_file.map(Path(place)), Path(place)
    if place != "memory" and (path := packed_file.found()):
        return packed_file.map(path), path
    need, free = packed_file.n_bytes + n_more + SPARE_MEMORY, free_memory()
    fits = free is None or need <= free
    if place == "file" or (place == "auto" and not fits):
        path = packed_file.cached
        if not fits:
            warnings.warn(
                f"{need / 1e9:.1f} GB of memory are needed and {(free or 0) / 1e9:.1f} GB are free: the weights are "
                f"packed into {path} and read from there, slower; `edgelm pack --remove` removes that file",
                stacklevel=2,
            )
        return packed_file.map(packed_file.write(path, n_threads, progress)), path
    if streamed.can_stream(packed_file.forms):
        return packing.pack_behind(tensors, n_threads, file.lend, pairs, file.find)
    return packing.pack_all(tensors, n_threads, progress, file.lend, pairs), None
