"""Members of wheels, zip and tar archives, read one by one. An archive is hostile input.

Names of members are compared, and only used as paths after `inner_path` has proven that they lead nowhere else.
"""

from __future__ import annotations

import fnmatch
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from .disk import Progress, copy_stream, need_disk
from .errors import EdgelmError, SourceError


@dataclass(frozen=True)
class Entry:
    """A regular file in an archive."""

    name: str
    n_bytes: int
    archive: Any
    handle: Any

    def open(self) -> IO[bytes]:
        stream = (
            self.archive.open(self.handle)
            if isinstance(self.archive, zipfile.ZipFile)
            else self.archive.extractfile(self.handle)
        )
        if stream is None:
            raise SourceError(f"{self.name} is not a regular file")
        return stream


@contextmanager
def open_archive(path: Path) -> Iterator[Iterator[Entry]]:
    """The regular files of a zip (wheels too) or tar archive; what is broken in it raises SourceError."""
    try:
        if path.name.endswith((".whl", ".zip")):
            with zipfile.ZipFile(path) as wheel:
                yield (Entry(i.filename, i.file_size, wheel, i) for i in wheel.infolist() if not i.is_dir())
        else:
            with tarfile.open(path) as tar:
                yield (Entry(i.name, i.size, tar, i) for i in tar if i.isreg())
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        EOFError,
        RuntimeError,
        NotImplementedError,
        UnicodeDecodeError,
    ) as error:
        if isinstance(error, EdgelmError):
            raise
        raise SourceError(f"{path.name} is a broken archive: {error}") from error


def inner_path(name: str) -> tuple[str, ...]:
    """The parts of a relative path inside an archive; anything that could lead elsewhere raises SourceError."""
    parts = tuple(name.split("/"))
    if any(p in ("", ".", "..") or re.search(r'[\x00-\x1f\\:*?"<>|]', p) for p in parts):
        raise SourceError(f"the archive has a member with the unsafe name {name!r}")
    return parts


def copy_member(entry: Entry, target: Any, folder: Path, progress: Progress) -> str:
    need_disk(folder, entry.n_bytes)
    done = 0

    def step(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(f"unpack {PurePosixPath(entry.name).name}", done, entry.n_bytes)

    with entry.open() as stream:
        return copy_stream(stream, target, entry.n_bytes, step)


def extract(archive: Path, pattern: str, target: Any, folder: Path, progress: Progress) -> None:
    """Streams the one member that fits `pattern` into `target`. Its name is only compared, never used as a path."""
    with open_archive(archive) as members:
        entries = list(members)
        fitting = [e for e in entries if e.name == pattern] or [
            e for e in entries if fnmatch.fnmatchcase(e.name, pattern)
        ]
        if len(fitting) != 1:
            names = [e.name for e in fitting or entries if fitting or not e.name.endswith((".py", ".pyc"))]
            raise SourceError(
                f"{len(fitting) or 'no'} members of {archive.name} fit {pattern!r}; "
                f"it holds {', '.join(sorted(names)[:8])}{' …' if len(names) > 8 else ''}"
            )
        copy_member(fitting[0], target, folder, progress)
