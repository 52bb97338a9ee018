"""Every tiny model, by every interpreter: against `transformers`, and against itself cut into batches in other ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.arch import ARCHS, Config
from edgelm.cache import Batch
from edgelm.errors import ContextFull, UsageError
from edgelm.formats import QTensor, by_name
from edgelm.models import model_of
from edgelm.reference import Reference
from edgelm.weights import Weights

GOLDEN = Path(__file__).parent / "golden"


def model(name: str) -> tuple[Config, Weights]:
    """A tiny model in float32, without a file in between."""
    hf = tiny.hf_config(name)
    config = Config.from_hf(hf)
    f32 = by_name("F32")
    named = {key: QTensor.from_array(key, array, f32) for key, (_, array) in tiny.arrays(name, config, hf).items()}
    return config, Weights.from_gguf(config, named)


def reference(config: Config, weights: Weights, n_ctx: int, **options: Any) -> Reference:
    return Reference(model_of(config), config, weights, n_ctx=n_ctx, **options)


RUNNERS: dict[str, Callable[..., Any]] = {"reference": reference}


def nmse(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    return float(np.sum((ours - theirs) ** 2) / np.sum(theirs**2))


def run(runner: Any, tokens: NDArray[np.int32], cuts: tuple[int, ...] = (), cache: Any = None) -> NDArray[np.float32]:
    """All outputs of a text, given to the runner in pieces that end at `cuts`."""
    sequence = (cache or runner.new_cache("f32")).new_sequence()
    pieces = np.split(tokens, sorted(cuts))
    return np.concatenate([runner.forward(Batch.of([(sequence, piece, "all")])) for piece in pieces if len(piece)])


def test_every_architecture_has_a_tiny_model() -> None:
    assert {variant.arch for variant in tiny.VARIANTS.values()} == set(ARCHS)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", tiny.ALL)
def test_gives_what_transformers_gives(name: str, runner: str) -> None:
    config, weights = model(name)
    with np.load(GOLDEN / f"{name}.npz") as file:
        tokens, positions, outputs = file["tokens"], file["positions"], file["outputs"]
    r = RUNNERS[runner](config, weights, tiny.VARIANTS[name].n_ctx)
    assert nmse(run(r, tokens)[positions], outputs) < 1e-10
    if config.causal:
        stepwise = run(r, tokens, (20, *range(33, 40)))
        assert nmse(stepwise[positions], outputs) < 1e-10
