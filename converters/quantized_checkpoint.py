"""Checkpoints whose matrices somebody has quantized already (FP8, GPTQ, AWQ) -> float arrays, lazily. Knows no file.

Each method keeps a matrix as several tensors; here they become one again, row by row, under the name that the model's
own checkpoint would have. The arithmetic is that of the methods' own loaders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelm.errors import UnsupportedError

from .arrays import Array


def as_floats(quantization: Mapping[str, Any], arrays: dict[str, Array]) -> dict[str, Array]:
    """The tensors of a checkpoint with plain matrices in place of quantized ones.

    quantization: config.json's `quantization_config`, or nothing. UnsupportedError for methods that are not known.
    """
    if not quantization:
        return arrays
    method = quantization.get("quant_method")
    raise UnsupportedError(f"a checkpoint quantized by {method!r:.40}; convert the model's original checkpoint instead")
