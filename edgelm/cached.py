"""What was fetched: the models in the caches of this machine, what else takes room there, and taking a model away.

There are two caches: `rooms.cache_dir()`, and the one that huggingface_hub shares with other programs, where nothing is
removed from here. What is removed comes from the list of what is there, never from a path that somebody gave, and only
where no link leads out of the cache. Nothing here asks the network.
"""

from __future__ import annotations

import difflib
import os
import shlex
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import disk, gguf, hub, huggingface, packed, rooms
from .errors import EdgelmError, SourceError, UsageError
from .kernels import compiler

_WHEEL = ".whl"


@dataclass(frozen=True)
class Cached:
    """A model in a cache, or what is left of fetching one.

    Attributes:
        name: what `hub.resolve` takes for it.
        path: its file, of a split model the first one.
        n_bytes: size of all its files, or of what is left; packed_bytes: that of packed weights beside it.
        fetched: when, in seconds since 1970; None if it is not whole.
        is_ours: it lies in the cache of edgelm; removed_by: the command that removes it.
    """

    name: str
    path: Path
    n_bytes: int
    packed_bytes: int
    fetched: float | None
    is_ours: bool
    removed_by: str

    def to_dict(self) -> dict[str, Any]:
        when = None if self.fetched is None else f"{datetime.fromtimestamp(self.fetched, UTC):%Y-%m-%dT%H:%M:%SZ}"
        return vars(self) | {"path": str(self.path), "fetched": when}


def models() -> list[Cached]:
    """Every model, those of edgelm's own cache first."""
    return [*sorted(_own(), key=lambda model: model.name), *_shared()]


def _own() -> Iterator[Cached]:
    for found in hub.fetched():
        sizes = {path: path.stat().st_size for path in _belonging(found.file) if path.exists()}
        n_packed, n_record = sizes.get(packed.beside(found.file), 0), sizes.get(rooms.record_of(found.file), 0)
        whole = found.file.stat() if found.is_whole else None
        n_bytes = whole.st_size if whole else sum(sizes.values()) - n_packed - n_record
        if n_bytes or n_packed:
            when, command = whole.st_mtime if whole else None, shlex.join(["edgelm", "rm", found.name])
            yield Cached(found.name, found.file, n_bytes, n_packed, when, True, command)


def _shared() -> Iterator[Cached]:
    for name, paths, command in huggingface.cached():
        with suppress(OSError):  # another program has just removed it
            n_packed = packed.beside(paths[0]).stat().st_size if packed.beside(paths[0]).exists() else 0
            found = [path.stat() for path in paths]
            when = max(status.st_mtime for status in found)
            yield Cached(name, paths[0], sum(status.st_size for status in found), n_packed, when, False, command)


def beside() -> dict[str, tuple[Path, int]]:
    """What takes room besides models, and can be made or fetched again: where it is, and its bytes."""
    models = rooms.cache_dir() / "models"
    places = {"packages": models / "distributions", "unpacked packages": models / "folders"}
    places |= {"packed weights": packed.in_cache()}
    found = {what: (path, disk.bytes_below(path)) for what, path in places.items()}
    found["compiled kernels"] = compiler.kept()
    return {what: (path, n_bytes) for what, (path, n_bytes) in found.items() if n_bytes}


def _belonging(file: Path) -> list[Path]:
    """What there is of a model in its folder: file, record, packed weights, and what was left of making them."""
    unfinished = (file.with_name(file.name + end) for end in (disk.PART, rooms.JOINED))
    record = rooms.record_of(file)
    own = {file, record, packed.beside(file), *unfinished, *disk.drafts(file)}

    def belongs(path: Path) -> bool:
        return path in own or path.name.endswith((_WHEEL, _WHEEL + disk.PART))

    return sorted(filter(belongs, file.parent.iterdir()), key=lambda path: (path != file, path == record))


# --- taking away -----------------------------------------------------------------------------------------------------


def remove(names: Sequence[str]) -> tuple[dict[Path, int], list[Path]]:
    """Removes models from edgelm's own cache, with all that belongs to them: all those that are named, or none.

    Returns the files that were removed, each with the bytes that this frees, and those of others that lie beside them.

    Raises:
        SourceError: a model is not there, or another process is fetching it.
        UsageError: it lies in a cache that is not ours, or behind a link.
    """
    there = models()
    chosen = dict.fromkeys(_find(name, there) for name in names)
    for model in chosen:
        _need_ours(model)
    removed: dict[Path, int] = {}
    for model in chosen:
        with disk.lock(model.path.with_name(rooms.LOCK), wait=False):
            removed |= _remove_packed(model.path)
            removed |= {path: disk.remove(path) for path in _belonging(model.path)}
    others = [path for model in chosen for path in sorted(model.path.parent.iterdir()) if path.name != rooms.LOCK]
    return removed, others


def _find(name: str, there: Sequence[Cached]) -> Cached:
    meant = os.path.realpath(path) if (path := _meant(name)) else None
    for model in there:
        if name in (model.name, str(model.path)) or os.path.realpath(model.path) == meant:
            return model
    if os.path.lexists(os.path.expanduser(name)):
        raise UsageError(f"{name} is no model that edgelm has fetched, and it removes no others")
    known = [model.name for model in there]
    near = [n for n in known if name and name.lower() in n.lower()] or difflib.get_close_matches(name, known, 3)
    hint = f" (did you mean {' or '.join(near[:3])}?)" if near else ""
    raise SourceError(f"no model {name} was fetched{hint}; `edgelm list` shows those that were")


def _meant(name: str) -> Path | None:
    """Where the file that a source means lies, if it does."""
    with suppress(SourceError, UsageError):
        return hub.resolve(name, offline=True) if name.startswith("hf:") else hub.place(name)
    return None


def _need_ours(model: Cached) -> None:
    """Raises UsageError unless removing `model` takes nothing but what edgelm has put into its own cache."""
    cache = rooms.cache_dir()
    if not model.is_ours:
        raise UsageError(
            f"{model.name} is in the cache of huggingface_hub, which other programs share: {model.removed_by}"
            + (f", after edgelm pack --remove {shlex.quote(model.name)}" if model.packed_bytes else "")
        )
    for path in (*_belonging(model.path), model.path.with_name(rooms.LOCK), packed.in_cache()):
        if os.path.realpath(path) != os.path.join(os.path.realpath(cache), path.relative_to(cache)):
            raise UsageError(f"a link leads from {path} out of edgelm's cache, and edgelm removes nothing there")
        if path != packed.in_cache() and path.exists() and not stat.S_ISREG(path.lstat().st_mode):
            raise UsageError(f"{path} is no file of edgelm's, which removes nothing else")


def _remove_packed(file: Path) -> dict[Path, int]:
    try:
        return packed.PackedFile.of(gguf.read(file)).remove()
    except (EdgelmError, ImportError):  # it cannot be packed, or not on this machine
        return {}
