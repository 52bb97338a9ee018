"""Which tensor gets which type: the plan against llama-quantize's, for every type and switch (tools/make_mixes.py)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from converters import mixes
from converters.arrays import Array
from converters.recipe import Recipe, make_plan
from edgelm.arch import Config
from edgelm.errors import UnsupportedError, UsageError
from edgelm.formats import by_name

DATA: dict[str, Any] = json.loads(gzip.decompress((Path(__file__).parent / "mixes.json.gz").read_bytes()))
CHOICES: dict[str, dict[str, Any]] = {
    "pure": {"pure": True},
    "leave_output": {"leave_output": True},
    "output_type": {"output_type": "q8_0"},
    "embedding_type": {"embedding_type": "q4_0"},
    "overrides": {"overrides": (("attn_v", "q8_0"), (r"blk\.[01]\.ffn", "iq4_nl"))},
}


def sources(model: str) -> tuple[Config, dict[str, Array]]:
    """The tensors of a model of the data, without their weights."""
    data = DATA[model]
    hf = tiny.hf_config(data["variant"], data["n_layers"], **data["config"])
    config = Config.from_hf(hf)
    shapes = {name: array.shape for name, (_, array) in tiny.arrays(data["variant"], config, hf).items()}
    return config, {name: Array(name, shape, "F32", None) for name, shape in shapes.items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("model", DATA)
def test_types_are_those_of_llama_quantize(model: str) -> None:
    config, tensors = sources(model)
    for case, expected in DATA[model]["types"].items():
        type_, _, switch = case.partition(" ")
        plan = make_plan(config, tensors, Recipe(type_, **CHOICES.get(switch, {})))
        ours = {step.name: step.format.name for step in plan.steps}
        assert len(ours) == expected["n"]
        assert ours == {name: expected["others"].get(name, expected["most"]) for name in ours}, case


def test_the_plan_says_what_falls_back() -> None:
    config, tensors = sources("llama-576")
    plan = make_plan(config, tensors, Recipe("q4_k_m"))
    step = next(step for step in plan.steps if step.name == "blk.0.attn_q.weight")
    assert (step.wanted.name, step.format.name, step.is_fallback) == ("Q4_K", "Q5_0", True)
    assert step.facts()["fallback_from"] == "Q4_K"
    assert step in plan.fallbacks
    n_bits = sum(8 * s.n_weights * s.format.n_bytes / s.format.block for s in plan.steps)
    assert plan.bits_per_weight == pytest.approx(n_bits / plan.n_weights)
    with pytest.raises(UnsupportedError, match=r"rows of 192 are no whole number of Q4_K blocks.*--no-fallback"):
        make_plan(config, tensors, Recipe("q4_k", pure=True, no_fallback=True))


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        (Recipe("q9_k"), UnsupportedError),
        (Recipe("q4_0", overrides=(("attn_v", "q9_k"),)), UnsupportedError),
        (Recipe("q4_0", overrides=(("no_such_tensor", "q8_0"),)), UsageError),
        (Recipe("q4_0", overrides=(("attn_(", "q8_0"),)), UsageError),
        (Recipe("q4_0", output_type="q9_k"), UnsupportedError),
    ],
)
def test_requests_that_make_no_sense(recipe: Recipe, error: type[Exception]) -> None:
    config, tensors = sources("llama-gqa4")
    with pytest.raises(error):
        make_plan(config, tensors, recipe)


def test_weights_that_are_quantized_stay_unless_it_is_allowed() -> None:
    config, tensors = sources("qwen3")
    quantized = {
        name: Array(name, a.shape, "Q8_0" if len(a.shape) > 1 else "F32", a.rows) for name, a in tensors.items()
    }
    with pytest.raises(UsageError, match="--allow-requantize"):
        make_plan(config, quantized, Recipe("q4_0"))
    assert any(s.is_requantized for s in make_plan(config, quantized, Recipe("q4_0", allow_requantize=True)).steps)
    for harmless in ("q8_0", "f16", "f32"):  # nothing is rounded twice
        plan = make_plan(config, quantized, Recipe(harmless, pure=True))
        assert not any(step.is_requantized for step in plan.steps)


@pytest.mark.parametrize(
    ("name", "meant"), [("q4_k", "Q4_K_M"), ("Q5_K", "Q5_K_M"), ("15", "Q4_K_M"), ("7", "Q8_0"), ("iq4_xs", "IQ4_XS")]
)
def test_names_of_types(name: str, meant: str) -> None:
    assert mixes.mix(name).name == meant


def test_every_format_of_a_mix_exists() -> None:
    for mix in mixes.MIXES.values():
        assert by_name(mix.base).name == mix.base
