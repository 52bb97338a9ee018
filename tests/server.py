"""A web server of one test: files with ranges, a package index in both forms, the part of a model hub that is needed.

It listens on the loopback address, remembers what it was asked, and can misbehave on request.
"""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Server:
    """What is served (`pages`, `repositories`), how badly, and what was asked."""

    url: str = ""
    pages: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # path -> (content type, body)
    redirects: dict[str, str] = field(default_factory=dict)
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)  # "org/repo" -> {file name: content}
    break_after: list[int] = field(default_factory=list)  # the next long bodies stop after so many bytes
    knows_ranges: bool = True
    garble: bool = False  # the first byte of a repository's file is changed on its way
    password: str = ""  # "user:password" that every request must show
    requests: list[Request] = field(default_factory=list)

    def asked(self, path: str, method: str = "GET") -> list[Request]:
        return [r for r in self.requests if r.path == path and r.method == method]

    def add_package(self, name: str, *files: tuple[str, bytes], form: str = "html", hashes: bool = True) -> None:
        """A project page at /simple/NAME/ and its files below /files/."""
        rows = []
        for filename, content in files:
            self.pages[f"/files/{filename}"] = ("application/octet-stream", content)
            rows.append((filename, f"../../files/{filename}", hashlib.sha256(content).hexdigest() if hashes else ""))
        if form == "json":
            page = {
                "meta": {"api-version": "1.1"},
                "name": name,
                "files": [{"filename": f, "url": u, "hashes": {"sha256": h} if h else {}} for f, u, h in rows],
            }
            self.pages[f"/simple/{name}/"] = ("application/vnd.pypi.simple.v1+json", json.dumps(page).encode())
        else:
            links = "".join(f'<a href="{u}{"#sha256=" + h if h else ""}">{f}</a><br/>\n' for f, u, h in rows)
            self.pages[f"/simple/{name}/"] = ("text/html", f"<!DOCTYPE html><html><body>{links}</body></html>".encode())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        state: Server = self.server.state
        target = urllib.parse.urlsplit(self.path)  # with a host when this server is used as a proxy
        path = urllib.parse.unquote(target.path)
        state.requests.append(Request(self.command, path, dict(self.headers.items())))
        if state.password:
            import base64

            expected = "Basic " + base64.b64encode(state.password.encode()).decode()
            if self.headers.get("Authorization") != expected:
                return self.send(401, "text/plain", b"who are you?")
        if path in state.redirects:
            self.send_response(302)
            self.send_header("Location", state.redirects[path])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if path in state.pages:
            return self.send_file(*state.pages[path])
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path)
        if found and (files := state.repositories.get(found[1])):
            facts = {"id": found[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.send(200, "application/json", json.dumps(facts).encode())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = state.repositories.get(found[1], {}).get(found[2])
            if content is not None:
                digest = hashlib.sha256(content).hexdigest()
                content = b"?" + content[1:] if state.garble else content
                return self.send_file(
                    "application/octet-stream",
                    content,
                    {
                        "ETag": f'"{digest}"',
                        "X-Linked-Etag": f'"{digest}"',
                        "X-Repo-Commit": COMMIT,
                        "X-Linked-Size": str(len(content)),
                    },
                )
        extra = {"X-Error-Code": "RepoNotFound"} if path.startswith("/api/models") else {}
        return self.send(404, "text/plain", b"nothing here", extra)

    def send(self, status: int, kind: str, body: bytes, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, kind: str, body: bytes, extra: dict[str, str] | None = None) -> None:
        state: Server = self.server.state
        headers, status, start = {"Accept-Ranges": "bytes", **(extra or {})}, 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if state.knows_ranges else None
        if wanted:
            start, end = int(wanted[1]), int(wanted[2] or len(body) - 1)
            if start >= len(body):
                return self.send(416, "text/plain", b"", {"Content-Range": f"bytes */{len(body)}"})
            status, headers["Content-Range"] = 206, f"bytes {start}-{end}/{len(body)}"
            body = body[start : end + 1]
        if self.command == "GET" and len(body) > 1000 and state.break_after:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: state.break_after.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            return None
        return self.send(status, kind, body, headers)


@contextmanager
def serve(context: ssl.SSLContext | None = None) -> Iterator[Server]:
    """A running server, stopped when the block ends; with `context`, over TLS."""
    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    if context is not None:
        listener.socket = context.wrap_socket(listener.socket, server_side=True)
    host, port = listener.server_address[:2]
    state = Server(url=f"{'https' if context else 'http'}://{host!s}:{port}")
    listener.state = state  # type: ignore[attr-defined]
    listener.handle_error = lambda *args: None  # type: ignore[method-assign]
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
