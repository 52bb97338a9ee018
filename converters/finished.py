"""`Finished`: tensors that a calibration is done with, on the disk, so that another run can go on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.disk import make_folder, replacing

from .resumable import resumable

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

Bytes = NDArray[np.uint8]
_VERSION = "4"  # of what finished tensors are made by: those of another version are not taken
_HEAD = 32 + 16  # sha256 of what follows; rows and bytes of a row, int64


def made_of(checkpoint: Checkpoint, tokens: NDArray[np.int32]) -> str:
    """Names everything that a measurement depends on: the source, what was done to it, the text (chunks, n_ctx)."""
    facts = (_VERSION, checkpoint.fingerprint(), repr(checkpoint.config), dict(checkpoint.facts), tokens.shape)
    return hashlib.sha256(repr(facts).encode() + tokens.tobytes()).hexdigest()


class Finished(Mapping[str, Bytes]):
    """Rows of blocks by the name of their tensor: uint8 (rows, bytes of a row), mapped from the files of a folder.

    identity: what the tensors are made of; those of another one are thrown away, and so is what was cut off or damaged.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = make_folder(folder)
        mark = self.folder / "identity"
        files = list(self.folder.glob("*.rows"))
        if not mark.exists() or mark.read_text(encoding="utf-8") != identity:
            for path in files:
                path.unlink()
            with replacing(mark) as file:
                file.write(identity.encode())
            files = []
        self._names = {path.stem: None for path in files if _is_whole(path)}  # a set in order

    def put(self, name: str, data: Bytes) -> None:
        """Keeps the rows of a tensor. OSError when the disk is full."""
        body = np.array(data.shape, "<i8").tobytes() + np.ascontiguousarray(data).tobytes()
        with resumable(self._path(name)), replacing(self._path(name)) as file:
            file.write(hashlib.sha256(body).digest())
            file.write(body)
        self._names[name] = None

    def __getitem__(self, name: str) -> Bytes:
        if name not in self._names:
            raise KeyError(name)
        shape = np.fromfile(self._path(name), "<i8", 2, offset=_HEAD - 16)
        return np.memmap(self._path(name), np.uint8, "r", _HEAD, (int(shape[0]), int(shape[1])))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.rows"


def _is_whole(path: Path) -> bool:
    data = path.read_bytes()
    shape = np.frombuffer(data[_HEAD - 16 : _HEAD], "<i8") if len(data) >= _HEAD else np.zeros(2, "<i8")
    return hashlib.sha256(data[32:]).digest() == data[:32] and len(data) == _HEAD + int(shape[0] * shape[1])
