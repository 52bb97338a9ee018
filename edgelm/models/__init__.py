"""The mathematics of each model family, written once over named operations (`edgelm.reference`: what they mean)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..arch import Config
from .decoder import decoder
from .encoder import encoder

__all__ = ["decoder", "encoder", "model_of"]


def model_of(config: Config) -> Callable[..., Any]:
    """The function that computes models of this architecture."""
    return {"decoder": decoder, "encoder": encoder}[config.spec.family]
