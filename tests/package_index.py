"""A package of a test's own for `server` to offer, and what is in it."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

MODEL = bytes(range(256)) * 2000  # 512 kB that no compression makes trivial to get right by accident

SOURCE = "pypi:some-model==1.0/some_model/m.gguf"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(**members: bytes) -> bytes:
    return archive({name.replace("__", "/").replace("_gguf", ".gguf"): data for name, data in members.items()})


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
