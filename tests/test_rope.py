"""Tables of angles: their properties, and figures worked out by hand. What transformers computes is in test_models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.arch import Pairing, Rope
from edgelm.errors import FormatError
from edgelm.rope import RopeTable, factors_from_hf, frequencies, magnitude, rotate


def rope(**changes: Any) -> Rope:
    return Rope(**{"dim": 8, "base": 10000.0, "pairing": Pairing.HALVES, "orig_context": 32, **changes})


def test_plain_angles() -> None:
    cos, sin = RopeTable(rope(), {}, 64).tables(5)
    angles = 3 * np.array([1, 0.1, 0.01, 0.001])
    assert np.allclose(cos[3], np.cos(angles), atol=1e-7)
    assert np.allclose(sin[3], np.sin(angles), atol=1e-7)
    assert cos.dtype == sin.dtype == np.float32
    assert cos.flags.c_contiguous


def test_angles_far_out_are_exact() -> None:
    """Computed in float64: a float32 product would be off by a whole percent of a turn at a million tokens."""
    cos, _ = RopeTable(rope(), {}, 1 << 20).tables(1_000_001)
    assert cos[1_000_000, 1] == pytest.approx(math.cos(100_000.0), abs=1e-6)


def test_tables_grow_and_old_views_stay() -> None:
    table = RopeTable(rope(), {}, 64)
    small, _ = table.tables(3)
    before = small.copy()
    large, _ = table.tables(5000)
    assert large.shape == (5000, 4)
    assert np.array_equal(small, before)
    assert np.array_equal(large[:3], before)
    with pytest.raises(ValueError, match="read-only"):
        large[0, 0] = 2


def test_linear() -> None:
    assert np.allclose(frequencies(rope(scaling="linear", factor=4.0)), frequencies(rope()) / 4)


def test_yarn_leaves_fast_pairs_and_stretches_slow_ones() -> None:
    r = rope(dim=64, scaling="yarn", factor=4.0, orig_context=4096)
    ratio = frequencies(r) / frequencies(rope(dim=64))
    assert np.allclose(ratio[:9], 1.0)
    assert np.allclose(ratio[-8:], 0.25)
    assert (np.diff(ratio) <= 0).all()
    assert magnitude(r) == pytest.approx(0.1 * math.log(4) + 1)
    assert magnitude(rope(scaling="yarn", factor=4.0, attn_factor=2.0)) == pytest.approx(2 * (0.1 * math.log(4) + 1))
    assert magnitude(rope(scaling="yarn", factor=4.0, yarn_attn_factor=1.5)) == 1.5
    without = rope(dim=64, scaling="yarn", factor=4.0, ext_factor=0.0)
    assert np.allclose(frequencies(without), frequencies(rope(dim=64)) / 4)
    assert magnitude(without) == 1.0


def test_longrope_takes_the_factors_of_its_context() -> None:
    factors = {"rope_factors_short": np.full(4, 2.0), "rope_factors_long": np.full(4, 8.0)}
    r = rope(scaling="longrope", attn_factor=1.25)
    assert np.allclose(RopeTable(r, factors, 32).frequencies, frequencies(rope()) / 2)
    assert np.allclose(RopeTable(r, factors, 33).frequencies, frequencies(rope()) / 8)
    cos, _ = RopeTable(r, factors, 33).tables(1)
    assert np.allclose(cos, 1.25)


def test_llama3_factors() -> None:
    numbers = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = factors_from_hf(numbers, 500000.0, 128)["rope_freqs"]
    # The tensor in files of Llama 3.x: ones, 35 … 39 in between, eights.
    assert (factors[:29] == 1).all()
    assert (factors[35:] == 8).all()
    assert (np.diff(factors) >= 0).all()
    assert 1 < factors[30] < 8
    assert factors_from_hf({"rope_type": "default"}, 1e4, 64) == {}


@pytest.mark.parametrize("factors", [np.ones(3), np.array([1, 1, 0, 1]), np.array([1, np.nan, 1, 1]), -np.ones(4)])
def test_refuses_factors_that_cannot_be(factors: Any) -> None:
    with pytest.raises(FormatError, match="rope_freqs"):
        RopeTable(rope(), {"rope_freqs": factors}, 64)


@given(st.sampled_from(Pairing), st.sampled_from([2, 6, 16]), st.integers(0, 500), st.integers(0, 500))
def test_rotation(pairing: Pairing, dim: int, p: int, q: int) -> None:
    """Lengths stay, what is beyond `dim` stays, and products depend on the distance alone."""
    r = rope(dim=dim, pairing=pairing)
    cos, sin = RopeTable(r, {}, 1024).tables(1024)
    rng = np.random.default_rng(p)
    a, b = rng.normal(size=(2, 1, 1, 16))

    def at(x: Any, position: int) -> Any:
        return rotate(x, cos[[position]].astype(np.float64), sin[[position]].astype(np.float64), r)

    assert np.allclose(np.linalg.norm(at(a, p)), np.linalg.norm(a))
    assert np.array_equal(at(a, p)[..., dim:], a[..., dim:])
    assert np.allclose((at(a, p) * at(b, q)).sum(), (at(a, p + 7) * at(b, q + 7)).sum(), atol=1e-4)


def test_pairings_differ_by_a_permutation() -> None:
    cos, sin = RopeTable(rope(), {}, 64).tables(10)
    x = np.random.default_rng(0).normal(size=(10, 3, 8))
    interleaved = rotate(x, cos, sin, rope(pairing=Pairing.INTERLEAVED))
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    assert np.allclose(interleaved[..., order], rotate(x[..., order], cos, sin, rope()))
