"""Tiny models, each computed by both interpreters, and what a runner of theirs computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny

import edgelm
from edgelm.cache import Batch
from edgelm.model import Model


@pytest.fixture(scope="module", params=["reference", "program"])
def interpreter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, interpreter: str) -> Iterator[Callable[..., Model]]:
    """Tiny models by name, each made and loaded once."""
    folder, loaded = tmp_path_factory.mktemp("models"), dict[Any, Model]()

    def load(name: str = "llama-gqa", **options: Any) -> Model:
        key = (name, *sorted(options.items()))
        if key not in loaded:
            path = tiny.tiny(name, fmt="Q8_0", folder=folder)
            loaded[key] = edgelm.load(path, interpreter=interpreter, **options)
        return loaded[key]

    yield load
    for model in loaded.values():
        model.close()


@pytest.fixture
def model(load: Callable[..., Model]) -> Model:
    return load()


@pytest.fixture
def computed(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how many tokens each call of the runner computes."""
    counts: list[int] = []
    forward = model.runner.forward

    def counting(batch: Batch) -> Any:
        counts.append(len(batch.tokens))
        return forward(batch)

    monkeypatch.setattr(model.runner, "forward", counting)
    return counts
