"""Sources on a model hub: a repository on a server of the test's own, and which of its files is meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from package_index import MODEL
from server import Server

from edgelm import hub, huggingface
from edgelm.errors import SourceError


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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
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
