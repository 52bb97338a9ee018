"""Files on disk: checksums, space, folders, locks. Knows nothing of where they come from."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from .errors import FormatError, SourceError, UsageError

if sys.platform != "win32":
    import fcntl

Progress = Callable[[str, int, int], None]  # (stage, done, total), both counted in bytes here; total 0: not known

CHUNK = 1 << 20
SPARE_DISK = 64 << 20  # bytes that are left free for others
PART = ".part"  # end of the name of a file that is not whole yet


def nothing(stage: str, done: int, total: int) -> None:
    """The progress callback of somebody who does not want one."""


def user_cache() -> Path:
    """The platform's folder for what edgelm can fetch or make again. It may not exist yet."""
    if sys.platform == "linux":  # what platformdirs says there, whose import is 4 ms of each start
        return Path(os.environ.get("XDG_CACHE_HOME", "").strip() or os.path.expanduser("~/.cache"), "edgelm")
    import platformdirs

    return Path(platformdirs.user_cache_dir("edgelm", appauthor=False))


def file_sha256(path: Path, progress: Progress = nothing, stage: str = "verify") -> str:
    """sha256 of a file, in hexadecimal."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress(stage, done, total)
    return digest.hexdigest()


def copy_stream(source: IO[bytes], target: IO[bytes], limit: int, step: Callable[[int], None]) -> str:
    """Copies at most `limit` bytes and returns their sha256; more than `limit` raises SourceError."""
    digest, done = hashlib.sha256(), 0
    while chunk := source.read(CHUNK):
        done += len(chunk)
        if done > limit:
            raise SourceError(f"an archive member is longer than the {limit} bytes that the archive declares")
        digest.update(chunk)
        target.write(chunk)
        step(len(chunk))
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """The text of a file. FormatError if it is none in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: no text in UTF-8: {error.reason} at byte {error.start}") from None


@contextlib.contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` when the block ends without an error; until then `path` stays.

    sync: it is on the disk by then, so that even a machine that loses its power has the old one or the new one.
    Raises UsageError if what is there is no file.
    """
    _need_file(path)
    remove_drafts(path)
    with _draft_of(path) as draft:
        with draft.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(draft, path)


@contextlib.contextmanager
def _draft_of(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, gone after the block; within it `remove_drafts` leaves it alone, as it is locked.

    Windows removes no file that somebody has open, and needs no lock.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{PART}")
    with contextlib.ExitStack() as stack:
        while sys.platform != "win32":
            held = stack.enter_context(draft.open("wb"))
            with contextlib.suppress(OSError):  # a disk without locks
                fcntl.flock(held, fcntl.LOCK_EX)
            if os.fstat(held.fileno()).st_nlink:  # else it was removed before it was locked
                break
        try:
            yield draft
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()


def drafts(path: Path) -> Iterator[Path]:
    """What processes write, or have left behind, to put it at `path`, or at a name that begins so."""
    return path.parent.glob(f".{glob.escape(path.name)}.*{PART}")


def remove_drafts(path: Path) -> dict[Path, int]:
    """Removes what processes have left behind that were ended while they wrote `path`: bytes of each."""
    removed = {}
    for draft in drafts(path):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # those that are being written
            if sys.platform != "win32":
                fcntl.flock(stack.enter_context(draft.open("rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed[draft] = remove(draft)
    return removed


def remove(path: Path) -> int:
    """Removes a file: the bytes that are free by that, once nobody has it open; none of one with another name, too."""
    status = path.lstat()
    path.unlink()
    return status.st_size if status.st_nlink == 1 else 0


def bytes_below(folder: Path) -> int:
    """Of all files in a folder and the folders in it; what a link leads to is not among them."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # somebody has just removed it
                total += os.lstat(os.path.join(where, name)).st_size
    return total


def need_place(path: Path) -> None:
    """Raises UsageError unless a file can be put at `path`: for who computes for long before writing it."""
    _need_file(path)
    need_folder_of(path)


def need_folder_of(path: Path) -> None:
    """Raises UsageError unless the folder that `path` lies in is there."""
    if not (folder := path.absolute().parent).is_dir():
        raise UsageError(f"there is no folder {folder} to write into")


def _need_file(path: Path) -> None:
    """What is there and is no file stays: an administrator who wrote into /dev/null would have replaced it."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is {'a folder' if path.is_dir() else 'no file'}; name the file to write")


def need_disk(folder: Path, n_bytes: int, else_: str = "choose another disk with EDGELM_CACHE") -> None:
    """Raises SourceError unless `n_bytes` more fit on the disk that holds `folder`; else_: what else helps."""
    import shutil

    free = shutil.disk_usage(folder).free
    if n_bytes > 0 and free - SPARE_DISK < n_bytes:
        raise SourceError(
            f"{n_bytes / 1e6:.0f} MB are needed in {folder}, {free / 1e6:.0f} MB are free; "
            f"make room, or {else_}"
        )


def make_folder(folder: Path) -> Path:
    """`folder`, made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"cannot make the folder {folder}: {error}; choose another with EDGELM_CACHE") from error
    return folder


@contextlib.contextmanager
def lock(path: Path, progress: Progress = nothing, wait: bool = True) -> Iterator[None]:
    """Holds an exclusive lock on `path` against other processes and threads, waiting for it as long as it takes.

    wait: else SourceError if somebody holds it. The operating system drops the lock when its holder dies. The lock file
    stays: removing it would let a third process lock a new file of the same name while the second still holds the old
    one.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SourceError(f"cannot make the lock file {path}: {error}") from error
    try:
        while not _try_lock(descriptor):
            if not wait:
                raise SourceError(f"another process is at work in {path.parent}; try again when it is done")
            progress("wait for another process", 0, 0)
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # a disk without locks: go on without
    return True
