"""Quantizers: the bytes of `gguf.quants` where it has some, errors at most llama.cpp's where it has none, and edges."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer_cases import CASES, FIGURES, decode, relative_error

from converters import quantizers
from converters.quantizers import ROUNDED, SEARCHED, quantize, writable
from edgelm.errors import FormatError, UnsupportedError, UsageError
from edgelm.formats import QTensor, by_name

FIGURES_OF_LLAMA_CPP: dict[str, dict[str, float]] = json.loads(FIGURES.read_text())
BLOCKS = [name for name in writable() if by_name(name).block > 1]
LEVELS = {"Q4_0": 8, "Q4_1": 8, "Q5_0": 16, "Q5_1": 16, "Q8_0": 127, "IQ4_NL": 6, "IQ4_XS": 6, "Q2_K": 1.5, "Q3_K": 4,
          "Q4_K": 8, "Q5_K": 16, "Q6_K": 32, "MXFP4": 2}  # fmt: skip


def matrix(seed: int, n_rows: int = 5, n_cols: int = 512, scale: float = 0.05) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (n_rows, n_cols)).astype(np.float32)


@pytest.mark.parametrize("name", [*quantizers.PLAIN, *ROUNDED])
@given(seed=st.integers(0, 1 << 30), exponent=st.integers(-6, 3))
@settings(max_examples=20)
def test_rounding_writes_the_bytes_of_gguf_quants(name: str, seed: int, exponent: int) -> None:
    x = matrix(seed, scale=10.0**exponent)
    x[0, :64] = np.repeat([0, x[0, 0]], 32)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
    assert np.array_equal(quantize(name, x), expected.view(np.uint8).reshape(len(x), -1))


@pytest.mark.parametrize("case", [case + suffix for case in CASES for suffix in ("", " weighted")])
@pytest.mark.parametrize("name", SEARCHED)
def test_error_is_at_most_that_of_llama_cpp(name: str, case: str) -> None:
    x, importance = CASES[case.removesuffix(" weighted")]()
    weights = importance if case.endswith(" weighted") else None
    data = quantize(name, x, weights, search=True)
    assert relative_error(name, x, data, weights) <= FIGURES_OF_LLAMA_CPP[name][case]


@pytest.mark.parametrize("name", sorted(set(SEARCHED) & set(ROUNDED)))
def test_search_is_better_than_rounding(name: str) -> None:
    x, importance = CASES["heavy tails"]()
    rounded = relative_error(name, x, quantize(name, x), importance)
    assert relative_error(name, x, quantize(name, x, importance), importance) < rounded


@pytest.mark.parametrize("name", SEARCHED)
def test_neither_threads_nor_neighbours_change_a_block(name: str) -> None:
    x, importance = matrix(1, n_rows=37), matrix(2)[0] ** 2
    whole = quantize(name, x, importance, n_threads=1)
    assert np.array_equal(whole, quantize(name, x, importance, n_threads=3))
    for rows in (slice(3, 4), slice(5, 22)):
        assert np.array_equal(whole[rows], quantize(name, x[rows], importance))


@pytest.mark.parametrize("name", BLOCKS)
@given(seed=st.integers(0, 1 << 30), exponent=st.integers(-3, 3))
@settings(max_examples=10)
def test_errors_are_bounded(name: str, seed: int, exponent: int) -> None:
    """No weight is further off than its block is wide, times what an uneven table and 6-bit scales may add."""
    x = matrix(seed, n_cols=256, scale=10.0**exponent)
    error = np.abs(decode(name, quantize(name, x, search=None)) - x).max(axis=1)
    assert (error <= 1.5 * np.abs(x).max(axis=1) / LEVELS[name]).all()


@pytest.mark.parametrize("name", SEARCHED)
def test_what_a_format_holds_is_kept(name: str) -> None:
    """Quantizing decoded blocks again loses next to nothing."""
    x = decode(name, quantize(name, matrix(3), search=True))
    again = decode(name, quantize(name, x, search=True))
    assert ((again - x) ** 2).sum() <= 0.05 * ((x - matrix(3)) ** 2).sum()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("search", [None, True])
def test_zeros_constants_and_denormals(name: str, search: bool | None) -> None:
    x = np.zeros((4, 512), np.float32)
    x[1], x[2], x[3] = 0.25, -0.25, 1e-40
    decoded = decode(name, quantize(name, x, search=search))
    assert np.isfinite(decoded).all() and not decoded[0].any()
    assert np.abs(decoded[1:3] - x[1:3]).max() <= 0.25 * 0.26  # MXFP4 has 0.25
    assert np.abs(decoded[3]).max() < 1e-6


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("search", [None, True])
def test_one_huge_weight_spoils_only_its_block(name: str, search: bool | None) -> None:
    x = matrix(5)
    x[2, 300] = 60000
    decoded = decode(name, quantize(name, x, search=search))
    assert np.isfinite(decoded).all()
    assert abs(decoded[2, 300] - 60000) < 60000 * 0.3
    others = np.ones(x.shape, bool)
    others[2, 256:] = False
    assert np.array_equal(decoded[others], decode(name, quantize(name, matrix(5), search=search))[others])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", writable())
def test_what_is_no_number_is_an_error_that_says_where(name: str, bad: float) -> None:
    x = matrix(6, n_rows=3)
    x[1, 77] = bad
    with pytest.raises(FormatError, match="row 1, column 77"):
        quantize(name, x, search=True)


@pytest.mark.parametrize("name", ["F16", *BLOCKS])
def test_what_is_too_large_is_an_error(name: str) -> None:
    x = matrix(6)
    x[4, 5] = 70000
    with pytest.raises(FormatError, match="row 4, column 5"):
        quantize(name, x)


@pytest.mark.parametrize(
    ("importance", "message"),
    [(np.ones(511), "511 importances"), (np.full(512, -1.0), "column 0"), (np.full(512, np.nan), "column 0")],
)
def test_importances_that_cannot_be(importance: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize("Q4_K", matrix(1), importance)


def test_unimportant_columns_still_count() -> None:
    importance = np.zeros(512, np.float32)
    assert np.array_equal(quantize("Q4_K", matrix(1), importance), quantize("Q4_K", matrix(1)))
    importance[0] = 1
    assert relative_error("Q4_K", matrix(1), quantize("Q4_K", matrix(1), importance), None) < 0.1


def test_rows_must_be_whole_blocks_of_a_known_format() -> None:
    with pytest.raises(FormatError, match="no whole number"):
        quantize("Q4_K", matrix(1, n_cols=300))
    with pytest.raises(UnsupportedError, match="can only be read"):
        quantize("IQ2_XXS", matrix(1))
    assert quantize("Q4_K", np.empty((0, 256), np.float32)).shape == (0, 144)


def test_decoding_by_edgelm_and_by_gguf_agree() -> None:
    for name in BLOCKS:
        data = quantize(name, matrix(9), search=True)
        ours = QTensor(name, by_name(name), (5, 512), data).dequantize()
        assert np.array_equal(ours, decode(name, data))


def test_the_module_imports_no_numba() -> None:
    code = "import sys, converters.quantizers; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_kernels_have_the_room_that_they_write_to() -> None:
    """Nothing checks it when they run; the number stands twice, so that `quantizers` need not import Numba."""
    from converters import quantizer_kernels

    assert quantizers._ROOM == quantizer_kernels.ROOM + quantizer_kernels.LINE
