"""Matrices to quantize, and the error of what came out; tools/check_quantizers.py wrote llama.cpp's errors down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
FIGURES = Path(__file__).with_name("data") / "llama_cpp_errors.json"
SHAPE = (24, 1024)


def _importance(rng: np.random.Generator) -> Floats:
    return rng.lognormal(0, 1.5, SHAPE[1]).astype(np.float32)


def normal() -> tuple[Floats, Floats]:
    rng = np.random.default_rng(1)
    return rng.normal(0, 0.02, SHAPE).astype(np.float32), _importance(rng)


def heavy_tails() -> tuple[Floats, Floats]:
    rng = np.random.default_rng(2)
    return (0.03 * rng.standard_t(4, SHAPE)).astype(np.float32), _importance(rng)


def shifted() -> tuple[Floats, Floats]:
    """Rows with means of their own, as matrices have that were folded into norms."""
    rng = np.random.default_rng(3)
    return (rng.normal(0, 0.02, SHAPE) + rng.normal(0, 0.01, (SHAPE[0], 1))).astype(np.float32), _importance(rng)


def outlier_columns() -> tuple[Floats, Floats]:
    """A few columns of large weights, and others of large inputs."""
    rng = np.random.default_rng(4)
    x, importance = rng.normal(0, 0.02, SHAPE), _importance(rng)
    x[:, rng.integers(0, SHAPE[1], 20)] *= 8
    importance[rng.integers(0, SHAPE[1], 8)] *= 100
    return x.astype(np.float32), importance


CASES: dict[str, Callable[[], tuple[Floats, Floats]]] = {
    "normal": normal, "heavy tails": heavy_tails, "shifted": shifted, "outlier columns": outlier_columns,
}  # fmt: skip


def decode(name: str, data: NDArray[np.uint8]) -> Floats:
    decoded: Floats = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    return decoded


def relative_error(name: str, x: Floats, data: NDArray[np.uint8], importance: Floats | None) -> float:
    """Weighted squared error over the weighted squares."""
    weights = np.ones(x.shape[1]) if importance is None else importance.astype(np.float64)
    error = (decode(name, data).astype(np.float64) - x) ** 2 @ weights
    return float(error.sum() / (x.astype(np.float64) ** 2 @ weights).sum())
