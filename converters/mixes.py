"""Which tensor gets which type: llama.cpp's mixes, rule by rule. Knows names of tensors and counts of layers, no bytes.

A mix has a type for most matrices and spends more bits on some: on the output matrix, on the values of attention and
on the way down of the feed-forward network, in all layers or in those where errors grow most. The rules, the numbers
of the file types and the names are llama.cpp's (`src/llama-quant.cpp`), so that a file of a name has a known size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

from edgelm.arch import Config
from edgelm.errors import UnsupportedError
from edgelm.formats import Format, by_name


@dataclass(frozen=True)
class Mix:
    """name: as llama.cpp writes it; base: type of most matrices; file_type: its number in `general.file_type`."""

    name: str
    base: str
    file_type: int


MIXES: dict[str, Mix] = {
    name: Mix(name, base, number)
    for name, base, number in (
        ("F32", "F32", 0), ("F16", "F16", 1), ("BF16", "BF16", 32), ("Q8_0", "Q8_0", 7),
        ("Q4_0", "Q4_0", 2), ("Q4_1", "Q4_1", 3), ("Q5_0", "Q5_0", 8), ("Q5_1", "Q5_1", 9),
        ("Q2_K", "Q2_K", 10), ("Q2_K_S", "Q2_K", 21), ("Q3_K_S", "Q3_K", 11), ("Q3_K_M", "Q3_K", 12),
        ("Q3_K_L", "Q3_K", 13), ("Q4_K_S", "Q4_K", 14), ("Q4_K_M", "Q4_K", 15), ("Q5_K_S", "Q5_K", 16),
        ("Q5_K_M", "Q5_K", 17), ("Q6_K", "Q6_K", 18), ("IQ4_NL", "IQ4_NL", 25), ("IQ4_XS", "IQ4_XS", 30),
        ("TQ1_0", "TQ1_0", 36), ("TQ2_0", "TQ2_0", 37), ("MXFP4", "MXFP4", 38),
    )
}  # fmt: skip
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# What takes the place of a type whose blocks do not divide a row; F16 where that does not, either.
_FALLBACKS = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ2_S": "IQ4_NL", "IQ2_XS": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL", "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL",
}  # fmt: skip
# Small tables that are read by row: kept exact, as in every GGUF file.
_EXACT = ("position_embd.weight", "token_types.weight")


def mix(name: str) -> Mix:
    """The mix of a name (any case), of an alias, or of a file type's number, as llama-quantize takes them."""
    found = MIXES.get(_ALIASES.get(name.upper(), name.upper()))
    if found is None and name.isdecimal():
        found = next((m for m in MIXES.values() if m.file_type == int(name)), None)
    if found is None:
        raise UnsupportedError(f"no type is called {name!r:.40}; there are {', '.join(MIXES).lower()}")
    return found


def is_quantizable(name: str, n_dims: int) -> bool:
    """Whether a tensor takes the type that was asked for; others stay as they are (F32 from a checkpoint)."""
    return n_dims >= 2 and name.endswith("weight") and "_norm.weight" not in name and name not in _EXACT


def fallback(format: type[Format], n_cols: int) -> type[Format]:
    """The format itself if its blocks divide a row of `n_cols` weights, else what takes its place."""
    if n_cols % format.block == 0:
        return format
    other = by_name(_FALLBACKS.get(format.name, "F16"))
    return other if n_cols % other.block == 0 else by_name("F16")


def layer_order(names: Iterable[str]) -> list[str]:
    """Names in the order in which llama.cpp counts tensors: outside of layers first, then layer by layer."""
    return sorted(names, key=lambda name: (_layer(name), name))


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


# ------------------------------------------------------------------------------------------------------- the rules


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands: what it is for, the how-manieth of its kind it is, and of how many layers."""

    role: str
    i: int
    n: int
    gqa: int
    has_imatrix: bool

    @property
    def more_bits(self) -> bool:
        """An eighth of the layers at each end, and every third between them."""
        eighth = self.n // 8
        return self.i < eighth or self.i >= 7 * self.n // 8 or (self.i - eighth) % 3 == 2


_Rule = Callable[[_Place], str | None]

_VALUES: dict[str, _Rule] = {  # attn_v, and attn_qkv where the three are one
    "Q2_K": lambda p: "Q4_K" if p.gqa >= 4 else "Q3_K",
    "Q2_K_S": lambda p: "Q4_K" if p.gqa >= 4 else None,
    "Q3_K_M": lambda p: "Q5_K" if p.i < 2 else "Q4_K",
    "Q3_K_L": lambda p: "Q5_K",
    "Q4_K_S": lambda p: "Q5_K" if p.i < 4 else None,
    "Q4_K_M": lambda p: "Q6_K" if p.more_bits else None,
    "Q5_K_M": lambda p: "Q6_K" if p.more_bits else None,
    "IQ4_NL": lambda p: "Q5_K" if p.gqa >= 4 else None,
    "IQ4_XS": lambda p: "Q5_K" if p.gqa >= 4 else None,
}
_DOWN: dict[str, _Rule] = {
    "Q2_K": lambda p: "Q3_K",
    "Q2_K_S": lambda p: "Q4_K" if p.i < p.n // 8 else None,
    "Q3_K_M": lambda p: "Q5_K" if p.i < p.n // 16 else "Q4_K",
    "Q3_K_L": lambda p: "Q5_K",
    "Q4_K_S": lambda p: "Q5_K" if p.i < p.n // 8 else None,
    "Q4_K_M": lambda p: "Q6_K" if p.more_bits else None,
    "Q5_K_M": lambda p: "Q6_K" if p.more_bits else None,
    "IQ4_NL": lambda p: "Q5_K" if p.i < p.n // 8 and not p.has_imatrix else None,
    "IQ4_XS": lambda p: "Q5_K" if p.i < p.n // 8 and not p.has_imatrix else None,
    "Q4_0": lambda p: "Q4_1" if p.i < p.n // 8 and p.has_imatrix else None,
    "Q5_0": lambda p: "Q5_1" if p.i < p.n // 8 and p.has_imatrix else None,
}
_ATTENTION_OUTPUT: dict[str, _Rule] = {
    "Q2_K": lambda p: "Q3_K",
    "Q3_K_M": lambda p: "Q4_K",
    "Q3_K_L": lambda p: "Q5_K",
}
_EMBEDDING: dict[str, _Rule] = {"TQ1_0": lambda p: "Q4_K", "TQ2_0": lambda p: "Q4_K"}
_RULES = {"value": _VALUES, "down": _DOWN, "attention output": _ATTENTION_OUTPUT, "embedding": _EMBEDDING}


def _role(name: str, tied: bool) -> str:
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "output"
    if name == "token_embd.weight":
        return "embedding"
    parts = {"attn_qkv.weight": "value", "attn_v.weight": "value", "attn_output.weight": "attention output"}
    return next((parts[part] for part in parts if part in name), "down" if "ffn_down" in name else "other")


def assign(
    mix: Mix, config: Config, shapes: Mapping[str, tuple[int, ...]], has_imatrix: bool, decided: Container[str] = ()
) -> dict[str, str]:
    """The type of every quantizable tensor of a model in a mix, before any fallback.

    shapes: of all its tensors, outermost first, by GGUF name; decided: tensors whose type is given otherwise, which
    llama.cpp does not count when it looks which layer another one is in.
    """
    tied = "output.weight" not in shapes
    counts = {"value": 0, "down": 0}
    totals = {"value": sum(_role(name, tied) == "value" for name in shapes)}
    found: dict[str, str] = {}
    for name in layer_order(shapes):
        if name in decided or not is_quantizable(name, len(shapes[name])):
            continue
        role = _role(name, tied)
        if by_name(mix.base).block == 1:
            found[name] = mix.base
            continue
        n, gqa = totals.get(role, config.n_layers), config.n_heads // config.n_kv_heads
        place = _Place(role, counts.get(role, 0), n, gqa, has_imatrix)
        found[name] = _choose(mix, config, place, shapes[name][-1])
        if role in counts:
            counts[role] += 1
    return found


def _choose(mix: Mix, config: Config, place: _Place, n_cols: int) -> str:
    if place.role == "output":
        if mix.base == "MXFP4" or n_cols % by_name(mix.base).block:
            return "Q8_0"
        return "Q8_0" if mix.base == "Q8_0" else "Q6_K"
    rule = _RULES.get(place.role, {}).get(mix.name)
    chosen = (rule(place) if rule is not None else None) or mix.base
    # Where eight heads share these values, bits are cheap.
    shared = config.arch == "qwen2" or (config.arch == "llama" and config.n_heads != config.n_kv_heads)
    if place.role == "value" and shared and config.n_layers == 80 and chosen in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return chosen
