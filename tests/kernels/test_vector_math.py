"""exp, tanh, erf and activations against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numba import njit
from numba.core.registry import cpu_target

from edgelm.kernels import vector_math
from edgelm.kernels.emit import fuses
from edgelm.kernels.simd import load_f32x16, store


def erf(x):
    return np.array([math.erf(v) for v in x])


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    return x / 2 * (1 + erf(x / math.sqrt(2)))


FUSES = fuses(cpu_target.target_context)  # what is rounded twice is off by more
# name, exact function, range, largest error in units in the last place of |result| + floor
CASES = [
    ("exp", np.exp, (-87.3, 88.7), 1.0, 0.0),
    ("exp", np.exp, (-104, -87.3), 1.0, 2.0**-126),
    ("exp_negative", np.exp, (-87.3, 0), 1.0, 0.0),
    ("exp2_negative", np.exp2, (-125.9, 0), 1.0 if FUSES else 1.13, 0.0),
    ("exp2_rough", np.exp2, (-125.9, 0), 3.1e-6 * 2**24, 0.0),
    ("exp2_rougher", np.exp2, (-125.9, 0), 7.6e-5 * 2**24, 0.0),
    ("tanh", np.tanh, (-0.7, 0.7), 2.0, 0.0),
    ("tanh", np.tanh, (-20, 20), 2.0, 0.0),
    ("erf", erf, (-1.1, 1.1), 2.0, 0.0),
    ("erf", erf, (-5, 5), 2.0, 0.0),
    ("silu", silu, (-80, 80), 3.0, 0.0),
    ("gelu", gelu, (-12, 12), 3.0, 1.0),
    ("gelu_erf", gelu_erf, (-12, 12), 3.0, 1.0),
]


def compiled(name):
    function = getattr(vector_math, f"{name}_f32")

    @njit
    def over(x, y, n):
        for i in range(0, n, 16):
            store(y + 4 * i, function(load_f32x16(x + 4 * i)))

    def apply(x):
        n = len(x)
        padded = np.zeros(-(-n // 16) * 16, np.float32)
        padded[:n] = x
        y = np.empty_like(padded)
        over(padded.ctypes.data, y.ctypes.data, len(padded))
        return y[:n]

    return apply


FUNCTIONS = {name: compiled(name) for name in dict.fromkeys([case[0] for case in CASES] + ["relu"])}


@pytest.mark.parametrize(("name", "exact", "bounds", "ulps", "floor"), CASES)
def test_accuracy(name, exact, bounds, ulps, floor):
    x = np.random.default_rng(1).uniform(*bounds, 100_000).astype(np.float32)
    y, want = FUNCTIONS[name](x), exact(x.astype(np.float64))
    unit = np.spacing((np.abs(want) + floor).astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(y - want) / unit) <= ulps + 0.01


def test_edges():
    nan, inf = np.nan, np.inf
    x = np.array([0.0, -0.0, inf, -inf, nan, 1e-30, 200.0, -200.0, -104.5], np.float32)
    want = {
        "exp": [1, 1, inf, 0, nan, 1, inf, 0, 0],
        "tanh": [0, -0.0, 1, -1, nan, 1e-30, 1, -1, -1],
        "erf": [0, -0.0, 1, -1, nan, 1.1283792e-30, 1, -1, -1],
        "relu": [0, 0, inf, 0, nan, 1e-30, 200, 0, 0],
        "silu": [0, -0.0, inf, nan, nan, 5e-31, 200, 0, 0],
    }
    for name, values in want.items():
        np.testing.assert_allclose(FUNCTIONS[name](x), np.array(values, np.float32), rtol=2e-7, err_msg=name)
    for name, low, error in (("exp_negative", -90.0, 0), ("exp2_negative", -126.5, 0), ("exp2_rough", -126.5, 0),
                             ("exp2_rougher", -126.5, 7.6e-5)):
        y = FUNCTIONS[name](np.array([0.0, -inf, low, -1e30], np.float32))
        if "rough" in name:  # what is subnormal becomes 0 with its rounding to bfloat16
            y[y < 2.0**-126] = 0
        np.testing.assert_allclose(y, [1, 0, 0, 0], rtol=error)
        assert np.isnan(FUNCTIONS[name](np.array([nan], np.float32)))
    assert np.array_equal(np.signbit(FUNCTIONS["tanh"](x[:2])), [False, True])


def test_every_lane_gives_the_same_bits():
    x = np.random.default_rng(2).uniform(-9, 9, 64).astype(np.float32)
    for name, function in FUNCTIONS.items():
        one_by_one = np.array([function(np.array([v]))[0] for v in x])
        shifted = function(np.concatenate([np.ones(5, np.float32), x]))[5:]
        np.testing.assert_array_equal(one_by_one, shifted, err_msg=name)
