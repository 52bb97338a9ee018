"""What a user can say about how tokens are chosen: llama.cpp's names, defaults and order, checked.

Knows nothing of logits: `sampling` applies the parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import UsageError

DEFAULT_ORDER = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
_LETTERS = dict(zip("edskypmxta", (*DEFAULT_ORDER, "adaptive_p"), strict=True))
_ALIASES = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p", "typical": "typ_p", "typical_p": "typ_p"}


def parse_samplers(text: str | Iterable[str]) -> tuple[str, ...]:
    """The order of the samplers from "top_k;top_p;temperature", from letters ("kpt") or from names.

    Raises:
        UsageError: a name or a letter means no sampler.
    """
    known = set(_LETTERS.values())
    plain = {name.replace("_", ""): name for name in known}
    if isinstance(text, str):
        names = [name.strip() for name in text.split(";") if name.strip()]
    else:
        names = list(texts("samplers", text))
    order = []
    for name in names:
        key = name.lower().replace("-", "_")
        key = _ALIASES.get(key, plain.get(key, key))
        if key in known:
            order.append(key)
        elif isinstance(text, str) and len(names) == 1 and set(name) <= set(_LETTERS):
            order.extend(_LETTERS[letter] for letter in name)
        else:
            raise UsageError(
                f"samplers: there is no sampler {name!r}; known are {', '.join(_LETTERS.values())}, "
                f"or letters in a row such as {''.join(_LETTERS)[:-1]!r}"
            )
    return tuple(order)


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A text, or several, as several; UsageError for anything else."""
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(text, str) for text in found):
        raise UsageError(f"{name} takes texts, not {value!r:.60}")
    return found


def parse_logit_bias(text: str) -> tuple[int, float]:
    """(token id, bias) from "15043+1", "15043-1.5" or "15043-inf".

    Raises:
        UsageError: the text has another form.
    """
    match = re.fullmatch(r"\s*(\d+)\s*([+-])\s*(inf|(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*", text, re.IGNORECASE)
    if not match:
        raise UsageError(f"logit bias {text!r}: write a token id, + or -, and a number, such as 15043+1 or 2-inf")
    return int(match[1]), float(match[2] + match[3])


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose a token. llama.cpp's defaults; in brackets the value that turns a sampler off.

    Attributes:
        seed: of the random generator; -1 takes another one each time.
        temperature: logits are divided by it; 0 or less always takes the most probable token, in whatever order.
        dynatemp_range: [0] the temperature varies by this much with the uncertainty of the model.
        dynatemp_exponent: how the uncertainty maps to the temperature.
        top_k: [0] keep the k most probable tokens.
        top_p: [1] keep the most probable tokens that together have this probability.
        min_p: [0] keep tokens at least this probable, relative to the best one.
        typical_p: [1] keep the tokens of typical surprise that together have this probability.
        top_n_sigma: [-1] keep tokens within n standard deviations of the best logit.
        xtc_probability: [0] how often the best tokens are removed; only the least probable of those that
            reach xtc_threshold is left. A threshold above 0.5 turns it off as well.
        xtc_threshold: see xtc_probability.
        min_keep: [0] top_p, min_p, typical_p and xtc leave at least so many tokens.
        repeat_last_n: [0] how many tokens back the penalties look; -1 for all.
        repeat_penalty: [1] divides the logits of tokens seen (multiplies negative ones).
        frequency_penalty: [0] subtracted from a logit for each time the token was seen.
        presence_penalty: [0] subtracted once if the token was seen.
        dry_multiplier: [0] strength of DRY, which penalises tokens that would continue a repetition of a sequence:
            multiplier * base ** (length of the sequence - allowed length).
        dry_base: see dry_multiplier; less than 1 turns DRY off.
        dry_allowed_length: sequences shorter than this may repeat.
        dry_penalty_last_n: [0] how many tokens back DRY looks; -1 for all.
        dry_sequence_breakers: texts over which no repetition is followed; ("none",) or () for no such texts.
        adaptive_target: [-1] for the sampler `adaptive_p`: prefer tokens near this probability.
        adaptive_decay: how slowly adaptive_p forgets, 0 to 0.99.
        mirostat: [0] 1 or 2 replaces all samplers but the temperature by Mirostat 1 or 2.
        mirostat_tau: the surprise, in bits, that mirostat aims at.
        mirostat_eta: mirostat's learning rate.
        logit_bias: {token id: number added to its logit}, or pairs, or texts like "15043+1"; -inf excludes a token.
        ignore_eos: never choose a token that ends the generation.
        samplers: the order, as a tuple of names, as "top_k;top_p", or as letters ("edskypmxt").

    Raises:
        UsageError: a value that cannot be meant.
    """

    seed: int = -1
    temperature: float = 0.8
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    min_keep: int = 0
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: Mapping[int, float] | tuple[tuple[int, float] | str, ...] = ()
    ignore_eos: bool = False
    samplers: str | tuple[str, ...] = DEFAULT_ORDER

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type in ("int", "float"):
                object.__setattr__(self, field.name, _number(field.name, getattr(self, field.name), field.type))
        for name, low, high in _RANGES:
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} is {getattr(self, name):g}; it must be between {low:g} and {high:g}")
        if not self.repeat_penalty > 1e-38:
            raise UsageError(f"repeat_penalty is {self.repeat_penalty:g}; it must be greater than 0 (1 turns it off)")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "samplers", parse_samplers(self.samplers))
        breakers = texts("dry_sequence_breakers", self.dry_sequence_breakers)
        object.__setattr__(self, "dry_sequence_breakers", () if breakers == ("none",) else breakers)


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """What is added to the logit of each token, from a mapping, pairs, or texts like "15043+1"."""
    sums: dict[int, float] = {}
    try:
        for pair in given.items() if isinstance(given, Mapping) else given:
            token, amount = parse_logit_bias(pair) if isinstance(pair, str) else pair
            token = _number("logit_bias", token, "int")
            sums[token] = sums.get(token, 0.0) + _number("logit_bias", amount, "float", infinite=True)
    except (TypeError, ValueError):
        raise UsageError(f"logit_bias is {given!r:.60}; it must be {{token id: number}}, or pairs of these") from None
    return tuple(sums.items())


_INF = math.inf
_LARGEST = 1e30  # of all numbers: what is computed with them in float32 stays finite
_MOST_TOKENS = 2**31 - 1
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("seed", -1, 2**64 - 1),
    ("top_p", 0, _INF), ("min_p", 0, _INF), ("typical_p", 0, _INF),
    ("xtc_probability", 0, 1), ("xtc_threshold", 0, 1),
    ("top_k", -_MOST_TOKENS, _MOST_TOKENS), ("min_keep", 0, _MOST_TOKENS),
    ("dynatemp_range", 0, _INF), ("dynatemp_exponent", 0, _INF),
    ("repeat_last_n", -1, _INF), ("dry_penalty_last_n", -1, _INF),
    ("dry_multiplier", 0, _INF), ("dry_base", 0, _INF), ("dry_allowed_length", 0, _INF),
    ("adaptive_target", -1, 1), ("adaptive_decay", 0, 0.99),
    ("mirostat", 0, 2), ("mirostat_tau", 0, _INF), ("mirostat_eta", 0, 1),
)  # fmt: skip


def _number(name: str, value: Any, kind: str, infinite: bool = False) -> Any:
    """`value` as an int or a finite float (infinite, where that is meant)."""
    try:
        number = int(value) if kind == "int" else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number != value or isinstance(value, str | bool):
        raise UsageError(f"{name} is {_shown(value)}; it must be {'a whole number' if kind == 'int' else 'a number'}")
    if abs(number) > _LARGEST and not (infinite and math.isinf(number)):
        raise UsageError(f"{name} is {_shown(value)}; it must be finite, and at most {_LARGEST:g}")
    return number


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except ValueError:  # more digits than Python writes
        return "too large"


GREEDY = Sampling(temperature=0.0)
