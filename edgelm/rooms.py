"""The folders of what was fetched: one for each source, with a lock, the file, and what is written down of it.

Everything is checked and renamed into place only when whole. `hub` and `packages` say which sources there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from . import disk
from .disk import Progress
from .errors import SourceError, UsageError

LOCK, JOINED = ".lock", ".joined"  # in the folder of a source: its lock, and how names of what is put together end


def cache_dir() -> Path:
    """Folder of fetched models: EDGELM_CACHE, else the platform's cache folder of the user. It may not exist yet."""
    if chosen := os.environ.get("EDGELM_CACHE"):
        return Path(chosen).expanduser()
    return disk.user_cache()


def is_offline(offline: bool = False) -> bool:
    """Whether the network is out of bounds: asked for here, or by EDGELM_OFFLINE=1."""
    return offline or os.environ.get("EDGELM_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def split_pin(text: str) -> tuple[str, str]:
    body, _, pin = text.partition("#sha256=")
    if pin and not re.fullmatch(r"[0-9a-fA-F]{64}", pin):
        raise UsageError(f"#sha256= takes 64 hexadecimal digits, got {pin!r}")
    return body, pin.lower()


def safe_name(name: str) -> str:
    """A file name that means nothing special on any system."""
    kept = re.sub(r"[^A-Za-z0-9._+-]", "_", PurePosixPath(name).name).lstrip(".")[-120:]
    return kept if kept and kept.split(".")[0].upper() not in ("CON", "PRN", "AUX", "NUL") else f"file-{kept}"


def is_whole(file: Path, pin: str, progress: Progress) -> bool:
    """Whether `file` is in the cache, unchanged since it was verified, and what `pin` wants.

    The record beside the file spares reading all of it at each start: it is hashed again only when its size or its
    time differ from what was recorded.
    """
    record = read_record(file)
    try:
        status, sha256, seen = file.stat(), str(record["sha256"]), (record["n_bytes"], record["mtime_ns"])
    except (OSError, KeyError):
        return False
    if seen != (status.st_size, status.st_mtime_ns):
        if disk.file_sha256(file, progress, f"verify {file.name}") != sha256:
            return False
        write_record(file, sha256, str(record.get("source", "")))
    return not pin or pin == sha256


def record_of(file: Path) -> Path:
    """Where it is written down what a file in the cache is."""
    return file.with_name(file.name + ".json")


def read_record(file: Path) -> dict[str, Any]:
    """What is written down of a file in the cache; nothing of one that was not fetched."""
    try:
        record = json.loads(record_of(file).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(file: Path, sha256: str, source: str) -> None:
    status = file.stat()
    facts = {"source": source, "sha256": sha256, "n_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    with disk.replacing(record_of(file)) as record:
        record.write(json.dumps(facts, indent=1).encode())


def begin(file: Path, source: str) -> None:
    """Writes down what a file is going to be, for who wonders what an end before its time has left."""
    try:
        if not record_of(file).exists():
            with disk.replacing(record_of(file)) as record:
                record.write(json.dumps({"source": source}).encode())
    except OSError as error:
        raise SourceError(f"cannot write {record_of(file)}: {error}") from error


def room_of(kind: str, key: str, label: str) -> Path:
    """The folder in the cache that belongs to one source."""
    return cache_dir() / "models" / kind / f"{safe_name(label)}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


@contextmanager
def locked(room: Path, progress: Progress) -> Iterator[None]:
    disk.make_folder(room)
    with disk.lock(room / LOCK, progress):
        yield


def offline_error(what: str) -> SourceError:
    return SourceError(f"{what} is not in {cache_dir()}, and the network is switched off; fetch it without --offline")
