"""Files in Python package registries: from a name and a version to a URL and its checksum.

Reads what `pip` is configured with (index-url, extra-index-url, find-links, cert, trusted-host, proxy: environment and
configuration files), so that whoever can `pip install` can fetch a model. Speaks the Simple API as JSON (PEP 691) and
as HTML (PEP 503). Nothing is ever installed or executed. Knows nothing of models.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from .download import Client, read_page, redacted
from .errors import SourceError
from .packages import canonical

PYPI = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"


@dataclass(frozen=True)
class Distribution:
    """One file of a package: a wheel or a source archive."""

    filename: str
    url: str
    sha256: str  # as the index gives it; "" when it gives none


@dataclass(frozen=True)
class Registry:
    """The configured indexes, in the order in which they are asked."""

    indexes: tuple[str, ...] = (PYPI,)
    find_links: tuple[str, ...] = ()
    client: Client = field(default_factory=Client)

    @classmethod
    def configured(cls, environ: Mapping[str, str] | None = None) -> Registry:
        """The registry that pip would use here: environment variables win over configuration files."""
        environ = os.environ if environ is None else environ
        settings = _pip_settings(environ)

        def several(key: str) -> tuple[str, ...]:
            return tuple(settings.get(key, "").split())

        main = () if _is_true(settings.get("no-index", "")) else (settings.get("index-url", "").strip() or PYPI,)
        extra = several("extra-index-url") if main else ()
        try:
            timeout_s = max(float(settings.get("timeout") or settings.get("default-timeout") or 60), 1.0)
        except ValueError:
            timeout_s = 60.0
        client = Client(
            certificates=settings.get("cert", ""),
            trusted_hosts=frozenset(several("trusted-host")),
            proxy=settings.get("proxy", ""),
            timeout_s=timeout_s,
        )
        return cls(tuple(dict.fromkeys(main + extra)), several("find-links"), client)

    def find(self, name: str, version: str, kind: str = "wheel") -> Distribution:
        """The file of `name`==`version`; `kind` is "wheel" or "sdist".

        Of several wheels the one for any platform is taken, else the first by name: their data is the same.

        Raises:
            SourceError: no index has it; the message tells what each one said.
        """
        said: list[str] = []
        for index in self.indexes:
            url = index.rstrip("/") + f"/{canonical(name)}/"
            try:
                files = self._listing(url)
            except FileNotFoundError:
                said.append(f"{redacted(index)}: no such package")
                continue
            except SourceError as error:
                said.append(str(error))
                continue
            if found := select(files, name, version, kind):
                return found
            have = sorted({v for f in files if (v := version_of(f.filename, name, kind))}, key=_sortable)
            said.append(
                f"{redacted(index)}: no {kind} of version {version}"
                + (f", only of {', '.join(have[-8:])}" if have else "")
            )
        for folder in self.find_links:
            try:
                files = self._links(folder)
            except (SourceError, OSError) as error:
                said.append(str(error))
                continue
            if found := select(files, name, version, kind):
                return found
        raise SourceError(f"package {name}=={version} was not found ({'; '.join(said) or 'no index is configured'})")

    def _listing(self, url: str) -> list[Distribution]:
        if url.startswith("file:"):
            return self._links(url)
        data, kind, final = read_page(self.client, url, {"Accept": ACCEPT})
        if "json" in kind.split(";")[0]:
            files = parse_json(data, final)
        else:
            files = parse_html(data.decode("utf-8", "replace"), final)
        return [_same_credentials(f, url) for f in files if urllib.parse.urlsplit(f.url).scheme in ("http", "https")]

    def _links(self, place: str) -> list[Distribution]:
        """A folder of files, a folder with an index.html, or a page of links."""
        if re.match(r"https?://", place):
            return self._listing(place)
        path = (
            Path(urllib.request.url2pathname(urllib.parse.urlsplit(place).path))
            if place.startswith("file:")
            else Path(place).expanduser()
        )
        page = path / "index.html" if path.is_dir() else path
        if page.is_file():
            return parse_html(page.read_text("utf-8", "replace"), page.resolve().as_uri())
        if not path.is_dir():
            raise FileNotFoundError(f"{place}: no such folder")
        return [Distribution(f.name, f.resolve().as_uri(), "") for f in sorted(path.iterdir()) if f.is_file()]


def _same_credentials(found: Distribution, index: str) -> Distribution:
    """A private index wants its password for files on the same host too."""
    asked, given = urllib.parse.urlsplit(index), urllib.parse.urlsplit(found.url)
    userinfo, at, host = asked.netloc.rpartition("@")
    if at and given.netloc == host and given.scheme == asked.scheme:
        return Distribution(
            found.filename, urllib.parse.urlunsplit(given._replace(netloc=f"{userinfo}@{host}")), found.sha256
        )
    return found


def version_of(filename: str, name: str, kind: str) -> str:
    """The version in a file name, "" when the file is not of project `name` or not of this kind (PEP 427, PEP 625)."""
    if kind == "wheel":
        fields = filename.removesuffix(".whl").split("-")
        ok = filename.endswith(".whl") and len(fields) in (5, 6) and canonical(fields[0]) == canonical(name)
        return fields[1] if ok else ""
    for suffix in (".tar.gz", ".zip"):
        stem = filename.removesuffix(suffix)
        head, dash, version = stem.rpartition("-")
        if stem != filename and dash and canonical(head) == canonical(name):
            return version
    return ""


def select(files: list[Distribution], name: str, version: str, kind: str) -> Distribution | None:
    """The one of `files` to fetch, None when the version is not among them."""
    fitting = [f for f in files if _sortable(version_of(f.filename, name, kind)) == _sortable(version)]
    return min(fitting, key=lambda f: (not f.filename.endswith("-none-any.whl"), f.filename), default=None)


def _sortable(version: str) -> tuple[tuple[int, int, str], ...]:
    """1.10 after 1.9, and 1.0 equal to 1: enough to compare the versions of one project."""
    parts = re.findall(r"\d+|[a-z]+", version.lower())
    while len(parts) > 1 and parts[-1].strip("0") == "":
        parts.pop()
    return tuple((1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts)


def parse_json(data: bytes, base: str) -> list[Distribution]:
    """The files of a project page in the JSON form of the Simple API."""
    try:
        page = json.loads(data)
        files = page["files"]
        return [
            _checked(
                str(f["filename"]),
                urllib.parse.urljoin(base, str(f["url"])),
                str((f.get("hashes") or {}).get("sha256", "")),
            )
            for f in files
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{redacted(base)} is not a page of a package index: {error!r}") from error


class _Anchors(HTMLParser):
    def __init__(self, base: str) -> None:
        super().__init__()
        self.base, self.links = base, list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "base" and href:
            self.base = urllib.parse.urljoin(self.base, href)
        elif tag == "a" and href:
            self.links.append(href)


def parse_html(text: str, base: str) -> list[Distribution]:
    """The files of a project page in the HTML form of the Simple API."""
    parser = _Anchors(base)
    parser.feed(text)
    files = []
    for link in parser.links:
        try:
            parts = urllib.parse.urlsplit(urllib.parse.urljoin(parser.base, link))
        except ValueError:
            continue
        filename = urllib.parse.unquote(parts.path.rpartition("/")[2])
        sha256 = urllib.parse.parse_qs(parts.fragment).get("sha256", [""])[0]
        files.append(_checked(filename, urllib.parse.urlunsplit(parts._replace(fragment="")), sha256))
    return files


def _checked(filename: str, url: str, sha256: str) -> Distribution:
    if "/" in filename or "\\" in filename or filename in (".", ".."):
        filename = ""  # fits no project, and never names a file on our disk
    sha256 = sha256.lower()
    return Distribution(filename, url, sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else "")


def _is_true(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on", "y", "t")


def _pip_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Settings by their name on pip's command line; later files win, then the environment."""
    settings: dict[str, str] = {}
    for path in _pip_files(environ):
        parser: Any = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError, OSError):
            continue  # pip complains about it; whatever else is configured still counts
        for section in ("global", "download", "install"):
            if parser.has_section(section):
                settings.update({k.replace("_", "-"): v for k, v in parser.items(section)})
    for variable, value in environ.items():
        if variable.startswith("PIP_") and value:
            settings[variable[4:].lower().replace("_", "-")] = value
    return settings


def _pip_files(environ: Mapping[str, str]) -> list[Path]:
    """pip's configuration files from the least to the most specific (its documentation, "Configuration")."""
    chosen = environ.get("PIP_CONFIG_FILE", "")
    if chosen == os.devnull:
        return []
    home = Path(os.path.expanduser("~"))
    if os.name == "nt":
        name = "pip.ini"
        files = [
            Path(environ.get("PROGRAMDATA", "C:/ProgramData")) / "pip" / name,
            home / "pip" / name,
            Path(environ.get("APPDATA", str(home))) / "pip" / name,
        ]
    else:
        name = "pip.conf"
        shared = (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")
        own = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
        files = [
            *(Path(d) / "pip" / name for d in reversed(shared) if d),
            Path("/etc") / name,
            home / ".pip" / name,
            own / "pip" / name,
        ]
        if sys.platform == "darwin":
            files[:0] = [Path("/Library/Application Support/pip") / name]
            files.append(home / "Library/Application Support/pip" / name)
    files.append(Path(environ.get("VIRTUAL_ENV") or sys.prefix) / name)
    return files + ([Path(chosen)] if chosen else [])
