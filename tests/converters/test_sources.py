"""`hf:` sources: a repository on a small server that speaks like the hub; what is fetched of it, and what is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hf_folder
import pytest
from server import Server, serve

from edgelm import gguf


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as state:
        yield state


def edgelm(server: Server, tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads its settings once."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "EDGELM_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-W", "ignore", "-m", "edgelm", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)


def publish(server: Server, folder: Path, **more: bytes) -> None:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    server.repositories["org/repo"] = {**files, **more}


def test_a_repository_is_converted(server: Server, tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path / "source", "bert-cls", shards=2)
    others = dict.fromkeys(
        ("modeling.py", "pytorch_model.bin", "onnx/model.onnx", "../x.json", "a.gguf"), b"not needed"
    )
    publish(server, folder, **others)
    done = edgelm(server, tmp_path, "convert", "hf:org/repo", "out.gguf", "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    assert edgelm(server, tmp_path, "convert", folder, "local.gguf", "--type", "q8_0").returncode == 0
    fetched, local = gguf.read(tmp_path / "out.gguf"), gguf.read(tmp_path / "local.gguf")
    assert fetched.metadata["bert.pooling_type"] == 2
    for name, tensor in local.tensors.items():
        assert (fetched.tensors[name].data == tensor.data).all()
    assert not [r.path for r in server.requests if r.path.rpartition("/main/")[2] in others]

    count = len(server.requests)
    done = edgelm(server, tmp_path, "convert", "hf:org/repo", "again.gguf", "--type", "q8_0", "--offline")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()
    assert len(server.requests) == count


def test_pickles_where_there_is_nothing_else(server: Server, tmp_path: Path) -> None:
    publish(server, hf_folder.write(tmp_path / "source", "qwen2", weights="torch"))
    done = edgelm(server, tmp_path, "convert", "hf:org/repo", "out.gguf", "--type", "f16")
    assert done.returncode == 0, done.stderr
    assert len(gguf.read(tmp_path / "out.gguf").tensors) == 27


def test_what_is_no_checkpoint(server: Server, tmp_path: Path) -> None:
    server.repositories["org/repo"] = {"README.md": b"hello", "config.json": b"{}"}
    done = edgelm(server, tmp_path, "convert", "hf:org/repo", "out.gguf")
    assert done.returncode == 2
    assert done.stderr.startswith("edgelm: hf:org/repo holds no checkpoint: README.md, config.json")
