"""Bytes from a URL to a file on disk: resumed, verified, renamed into place only when whole.

Knows HTTP; knows nothing of models, packages or hubs.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .disk import CHUNK, PART, Progress, file_sha256, need_disk, nothing
from .errors import SourceError

ATTEMPTS = 5  # tries in a row that bring no new byte before a download is given up


class _SameSecurity(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to something that anybody on the way may change."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise SourceError(f"{redacted(req.full_url)} redirects to {redacted(newurl)}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@dataclass(frozen=True)
class Client:
    """How to reach servers: proxies come from the environment (HTTPS_PROXY, NO_PROXY) unless `proxy` is given."""

    certificates: str = ""  # PEM file or folder to trust besides the system's own
    trusted_hosts: frozenset[str] = field(default_factory=frozenset)  # "host" or "host:port", not verified
    proxy: str = ""
    timeout_s: float = 60.0

    def open(self, url: str, headers: Mapping[str, str]) -> Any:
        """The response for `url`. Credentials written in the URL are sent to that host, and to no other."""
        parts = urllib.parse.urlsplit(url)
        request = urllib.request.Request(_without_credentials(url), headers=dict(headers))
        if parts.username:
            import base64

            pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
        handlers: list[urllib.request.BaseHandler] = [_SameSecurity()]
        if self.proxy:
            handlers.append(urllib.request.ProxyHandler({"http": self.proxy, "https": self.proxy}))
        if parts.scheme == "https":
            handlers.append(urllib.request.HTTPSHandler(context=self._tls(parts)))
        return urllib.request.build_opener(*handlers).open(request, timeout=self.timeout_s)

    def _tls(self, parts: urllib.parse.SplitResult) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if {parts.hostname or "", f"{parts.hostname}:{parts.port or 443}"} & self.trusted_hosts:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        elif self.certificates:
            folder = os.path.isdir(self.certificates)
            try:
                context.load_verify_locations(**{"capath" if folder else "cafile": self.certificates})
            except (OSError, ssl.SSLError) as error:
                raise SourceError(f"cannot read the certificates in {self.certificates}: {error}") from error
        elif not context.cert_store_stats()["x509_ca"] and not ssl.get_default_verify_paths().capath:
            with contextlib.suppress(ImportError):  # Python of python.org on macOS comes without any
                import certifi

                context.load_verify_locations(cafile=certifi.where())
        return context


def _without_credentials(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def redacted(url: str) -> str:
    """`url` as it may be shown: without a user name, a password, or a signed query."""
    return urllib.parse.urlunsplit(urllib.parse.urlsplit(_without_credentials(url))._replace(query="", fragment=""))


def read_page(client: Client, url: str, headers: Mapping[str, str], limit: int = 64 << 20) -> tuple[bytes, str, str]:
    """A whole small document: (bytes, content type, the URL it came from in the end).

    Raises:
        FileNotFoundError: the server has no such document (404, 410).
        SourceError: any other failure, or more than `limit` bytes.
    """
    try:
        with client.open(url, {"Accept-Encoding": "identity", **headers}) as response:
            data = response.read(limit + 1)
            kind, final = response.headers.get("Content-Type", ""), response.geturl()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise FileNotFoundError(url) from None
        raise SourceError(f"{redacted(url)} answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SourceError(f"cannot reach {redacted(url)}: {_reason(error)}") from error
    if len(data) > limit:
        raise SourceError(f"{redacted(url)} sent more than {limit >> 20} MB where a short page was expected")
    return data, kind, final


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None)
    return str(inner if isinstance(inner, BaseException) else error) or type(error).__name__


def download(
    client: Client,
    url: str,
    target: Path,
    *,
    sha256: str = "",
    progress: Progress = nothing,
    stage: str = "",
) -> str:
    """Fetches `url` into `target`, whose folder exists; returns the sha256 of what came, in hexadecimal.

    What an earlier, interrupted attempt left in `target` + PART is continued where it stopped, provided that
    `sha256` is given: without it nobody could tell whether the two halves belong together.

    Raises:
        SourceError: unreachable, incomplete, no space left on the disk, or not what `sha256` promises.
    """
    part = target.with_name(target.name + PART)
    stage = stage or f"download {target.name}"
    if not sha256:
        part.unlink(missing_ok=True)
    if sha256 and target.exists() and file_sha256(target, progress, f"verify {target.name}") == sha256.lower():
        return sha256.lower()
    failures = 0
    resumed = part.exists()
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_rest(client, url, part, before, progress, stage)
        except _Interrupted as problem:
            now = part.stat().st_size if part.exists() else 0
            failures = 0 if now > before else failures + 1
            if failures >= ATTEMPTS or not problem.worth_retrying:
                raise SourceError(f"cannot download {redacted(url)}: {problem}") from problem
            time.sleep(min(0.2 * 2**failures, 5.0))
            continue
        digest = file_sha256(part, progress, f"verify {target.name}")
        if sha256 and digest != sha256.lower():
            part.unlink()
            if resumed:  # the first half may be of another file, or damaged
                resumed = False
                continue
            raise SourceError(f"{redacted(url)} has sha256 {digest}, expected {sha256}: not the file that was meant")
        os.replace(part, target)
        return digest


class _Interrupted(Exception):
    def __init__(self, message: str, worth_retrying: bool = True) -> None:
        super().__init__(message)
        self.worth_retrying = worth_retrying


def _fetch_rest(client: Client, url: str, part: Path, start: int, progress: Progress, stage: str) -> None:
    """Appends to `part` all that follows its first `start` bytes, or raises _Interrupted."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with client.open(url, headers) as response:
            if start and response.status != 206:
                start = 0  # the server knows no ranges: from the beginning
            length = response.headers.get("Content-Length")
            total = start + int(length) if length is not None and length.isdigit() else 0
            if start and not str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
                raise _Interrupted("the server sent another range than the one asked for", worth_retrying=False)
            need_disk(part.parent, total - start)
            done = start
            with open(part, "ab" if start else "wb") as file:
                progress(stage, done, total)
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    progress(stage, done, total)
            if total and done < total:
                raise _Interrupted(f"the connection broke after {done} of {total} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing follows: complete, or longer than the file. The checksum tells.
            if start and (error.headers.get("Content-Range") or "").endswith(f"/{start}"):
                return
            part.unlink(missing_ok=True)
        raise _Interrupted(
            f"the server answered {error.code} {error.reason}", error.code in (408, 416, 425, 429) or error.code >= 500
        ) from error
    except urllib.error.URLError as error:
        permanent = isinstance(error.reason, ssl.SSLCertVerificationError)
        raise _Interrupted(_reason(error), worth_retrying=not permanent) from error
    except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise _Interrupted(_reason(error)) from error
    except ValueError as error:  # a port or a name that cannot be, letters beyond ASCII
        raise _Interrupted(_reason(error), worth_retrying=False) from error
    except OSError as error:
        raise SourceError(f"cannot write {part}: {error}") from error
