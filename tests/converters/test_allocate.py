"""Types by what they cost: the choice against trying everything, the measurements against what they predict."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import hf_folder
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_pipeline import asked

from converters import allocate
from converters.allocate import Cost, Costs
from converters.conversion import Options
from converters.pipeline import convert, prepare
from converters.recipe import Recipe
from edgelm import gguf
from edgelm.errors import UsageError

SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 1000)), min_size=1, max_size=4)


@given(st.lists(SIZES, min_size=1, max_size=4), st.integers(0, 120), st.integers(0, 5))
def test_the_choice_fits_and_is_nearly_the_best(tensors: list[list[tuple[int, int]]], room: int, n_fixed: int) -> None:
    """Never larger than asked; as good as the best of all choices, but for one step of one tensor."""
    costs = Costs(n_fixed=n_fixed)
    for i, found in enumerate(tensors):
        costs.tensors[f"t{i}"] = [Cost(f"F{j}", n, float(loss)) for j, (n, loss) in enumerate(found)]
    everything = list(itertools.product(*costs.tensors.values()))
    fitting = [c for c in everything if sum(x.n_bytes for x in c) + n_fixed <= room]
    if not fitting:
        with pytest.raises(UsageError, match="as small as"):
            allocate.chosen(costs, room)
        return
    names = allocate.chosen(costs, room)
    taken = [next(c for c in costs.tensors[name] if c.format == format) for name, format in sorted(names.items())]
    assert sum(c.n_bytes for c in taken) + n_fixed <= room
    best = min(sum(x.loss for x in c) for c in fitting)
    hulls = [allocate.hull(found) for found in costs.tensors.values()]
    step = max((a.loss - b.loss for h in hulls for a, b in itertools.pairwise(h)), default=0.0)
    assert sum(c.loss for c in taken) <= best + step * len(hulls) + 1e-9
    assert names == allocate.chosen(Costs(dict(reversed(costs.tensors.items())), {}, n_fixed), room)


def test_a_hull_is_convex() -> None:
    points = [(8, 1.0), (2, 10.0), (4, 9.5), (4, 5.0), (6, 4.9), (9, 1.0), (3, 12.0), (16, 0.0)]
    found = allocate.hull([Cost(f"F{n}", n, loss) for n, loss in points])
    assert [(c.n_bytes, c.loss) for c in found] == [(2, 10.0), (4, 5.0), (8, 1.0), (16, 0.0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("allocate")
    return hf_folder.write(where, "llama-gqa", hidden_size=256, num_attention_heads=8, intermediate_size=256)


@pytest.mark.parametrize("target", [{"target_bpw": 4.0}, {"target_bpw": 6.5}, {"target_bytes": 900_000}])
def test_a_target_is_met(target: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    options = asked(tmp_path, method="imatrix", **target)
    recipe = Recipe("q4_k_m", overrides=(("attn_v", "q8_0"),))
    report = convert(folder, tmp_path / "out.gguf", recipe, options)
    found = {t["tensor"]: t["to"] for t in report.tensors}
    assert found["blk.0.attn_v.weight"] == "Q8_0", "what the user chose stays"
    assert not report.fallbacks and report.type.endswith("bpw")
    if "target_bpw" in target:
        assert 0.9 * target["target_bpw"] < report.bits_per_weight <= target["target_bpw"]
    else:
        assert 0.9 * target["target_bytes"] < report.n_bytes <= target["target_bytes"]
    assert report.loss is not None and np.isfinite(report.loss["mean_kl"])
    again = prepare(folder, recipe, options)
    assert {step.name: step.format.name for step in again.plan.steps} == found, "the same choice each time"
    assert gguf.read(tmp_path / "out.gguf").metadata["general.file_type"] == again.plan.file_type


def test_more_bits_lose_less(folder: Path, tmp_path: Path) -> None:
    losses = []
    for bpw in (3.5, 8.0):
        report = convert(folder, tmp_path / "o.gguf", Recipe("f16"), asked(tmp_path, target_bpw=bpw, method="imatrix"))
        assert report.loss is not None
        losses.append(report.loss["mean_kl"])
    assert losses == sorted(losses, reverse=True) and losses[0] > 4 * losses[1]


def test_what_was_measured_is_not_measured_again(folder: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    plans = []
    for bpw, mix in ((4.0, "auto"), (4.0, "q3_k_s"), (6.0, "auto")):  # another target, or mix, needs the same costs
        stages.append("next")
        made = prepare(
            folder, Recipe(mix), asked(tmp_path, target_bpw=bpw), work=tmp_path / "work",
            progress=lambda stage, done, total: stages.append(stage),
        )  # fmt: skip
        plans.append([(step.name, step.format.name) for step in made.plan.steps])
    assert plans[0] == plans[1] != plans[2]
    assert stages[-2:] == ["next", "next"] and "measure sensitivity" in stages


def test_what_cannot_be_so_small(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be as small"):
        prepare(folder, Recipe("q4_k_m"), asked(tmp_path, target_bytes=1000))
    with pytest.raises(UsageError, match="--calibrate"):
        Options(target_bpw=4.0)
