"""Rotary position embeddings: every kind of them is two tables, the cosines and sines that a rotation multiplies with.

Position p turns pair i of a head by p * frequency_i and stretches it by a magnitude: "linear", "yarn", "longrope" and
"llama3" differ in the frequencies and the magnitude alone (RoFormer, arXiv 2104.09864; YaRN, arXiv 2309.00071;
LongRoPE, arXiv 2402.13753). It knows no kernel and no model.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arch import Rope
from .errors import FormatError

Floats = NDArray[np.float32]


class RopeTable:
    """Cosines and sines of one `Rope`, for as many positions as were ever asked for.

    factors: divisors of the frequencies by name, as `Weights.factors` gives them; n_ctx: tokens of the context
    window, which decides between LongRoPE's short and long factors.
    Raises FormatError when the factors do not fit or are not positive.
    """

    def __init__(self, rope: Rope, factors: Mapping[str, NDArray[Any]], n_ctx: int) -> None:
        self.rope = rope
        self.magnitude = magnitude(rope)
        self.frequencies = frequencies(rope, _choose(rope, factors, n_ctx))
        self._cos = self._sin = np.empty((0, rope.dim // 2), np.float32)

    def tables(self, n_positions: int) -> tuple[Floats, Floats]:
        """Cosines and sines of positions 0 … n_positions - 1: float32 (n_positions, dim / 2), magnitude folded in.

        Contiguous and read-only views of tables that double when they grow; views given before stay valid.
        """
        if n_positions > len(self._cos):
            size = max(n_positions, 2 * len(self._cos), 256)
            angles = np.arange(size, dtype=np.float64)[:, None] * self.frequencies
            self._cos = (np.cos(angles) * self.magnitude).astype(np.float32)
            self._sin = (np.sin(angles) * self.magnitude).astype(np.float32)
            self._cos.flags.writeable = self._sin.flags.writeable = False
        return self._cos[:n_positions], self._sin[:n_positions]


def factors_that_apply(rope: Rope, names: Container[str], n_ctx: int) -> str:
    """Which of the factors that a model may have: its fixed ones, or LongRoPE's for a context up to or beyond the
    original one."""
    if "rope_freqs" in names:
        return "rope_freqs"
    return "rope_factors_long" if n_ctx > rope.orig_context else "rope_factors_short"


def _choose(rope: Rope, factors: Mapping[str, NDArray[Any]], n_ctx: int) -> NDArray[np.float64]:
    """The divisors that apply."""
    name = factors_that_apply(rope, factors, n_ctx)
    chosen = np.asarray(factors.get(name, np.ones(rope.dim // 2)), np.float64)
    if chosen.shape != (rope.dim // 2,):
        raise FormatError(
            f"{name}.weight has shape {chosen.shape}; {rope.dim} rotating dimensions need {rope.dim // 2}"
        )
    if not (np.isfinite(chosen) & (chosen > 0)).all():
        raise FormatError(f"{name}.weight must be finite and positive: it divides frequencies")
    return chosen


def frequencies(rope: Rope, factors: NDArray[np.float64] | float = 1.0) -> NDArray[np.float64]:
    """Radians per position of each pair: float64 (dim / 2,)."""
    pairs = np.arange(rope.dim // 2, dtype=np.float64)
    plain = rope.base ** (-2.0 * pairs / rope.dim) / factors
    if rope.scaling != "yarn":
        return plain / rope.factor
    # YaRN: fast pairs keep their frequency, slow ones are interpolated, a ramp lies between.
    low = max(0.0, math.floor(_pair_that_turns(rope, rope.beta_fast)))
    high = min(rope.dim - 1.0, math.ceil(_pair_that_turns(rope, rope.beta_slow)))
    keep = rope.ext_factor * (1.0 - np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0))
    return plain * keep + plain / rope.factor * (1.0 - keep)


def _pair_that_turns(rope: Rope, turns: float) -> float:
    """The pair (as a real number) that makes so many full turns over the original context."""
    if rope.base <= 1.0:
        return 0.0
    return rope.dim * math.log(rope.orig_context / (turns * 2.0 * math.pi)) / (2.0 * math.log(rope.base))


def magnitude(rope: Rope) -> float:
    """What cosines and sines are multiplied with."""
    if rope.scaling != "yarn":
        return rope.attn_factor
    by_itself = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1.0 and rope.ext_factor else 1.0
    return rope.attn_factor * (rope.yarn_attn_factor or by_itself)


def factors_from_hf(rope_parameters: Mapping[str, Any], base: float, dim: int) -> dict[str, Floats]:
    """The factor tensors that GGUF keeps for what config.json's `rope_parameters` (or `rope_scaling`) say.

    "llama3": `rope_freqs`, from four numbers. "longrope": two lists, as they are. Others need none.
    Raises ArithmeticError, KeyError, TypeError or ValueError for what gives no factors.
    """
    kind = rope_parameters.get("rope_type", rope_parameters.get("type"))
    if kind in ("longrope", "su"):
        made = {f"rope_factors_{n}": np.asarray(rope_parameters[f"{n}_factor"], np.float32) for n in ("long", "short")}
    elif kind == "llama3":
        made = {"rope_freqs": _llama3_factors(rope_parameters, base, dim)}
    else:
        made = {}
    if wrong := [name for name, factors in made.items() if not np.all((factors > 0) & np.isfinite(factors))]:
        raise ValueError(f"{wrong[0]} has a factor that is no positive number")
    return made


def _llama3_factors(rope_parameters: Mapping[str, Any], base: float, dim: int) -> Floats:
    """What each pair's frequency is divided by, float32 (dim / 2,), as Llama 3.1 defines it."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, context = (np.float32(rope_parameters[name]) for name in names)
    one, pairs = np.float32(1.0), np.arange(0, dim, 2, dtype=np.float32)  # in float32, as every loader computes it
    frequencies = one / np.power(np.float32(base), pairs / np.float32(dim))
    turns = context / (np.float32(math.tau) / frequencies)
    with np.errstate(all="ignore"):  # whoever calls looks at what came out
        # 0: a slow pair, stretched in full; 1: a fast one, kept
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        factors: Floats = (one / ((one - smooth) / factor + smooth)).astype(np.float32)
    return factors


def rotate(x: NDArray[Any], cos: NDArray[Any], sin: NDArray[Any], rope: Rope) -> NDArray[Any]:
    """Rotate the first `rope.dim` dimensions of heads x (T, H, D) by angles cos, sin (T, dim / 2): the definition."""
    first, second = _pairs(rope)
    a, b = x[..., first], x[..., second]
    cos, sin = cos[:, None, :], sin[:, None, :]
    out = x.copy()
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


def _pairs(rope: Rope) -> tuple[Sequence[int] | slice, Sequence[int] | slice]:
    half = rope.dim // 2
    if rope.pairing.value == "interleaved":
        return slice(0, rope.dim, 2), slice(1, rope.dim, 2)
    return slice(0, half), slice(half, rope.dim)
