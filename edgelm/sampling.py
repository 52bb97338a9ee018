"""Which token comes next: the parameters of a user, and the sampler that applies them.

`Sampling` holds the parameters, by llama.cpp's names, defaults and order. `Sampler` composes the filters of `filters`
once, in that order, and keeps what changes from token to token: the tokens seen, the random generator, mirostat's
estimate. Knows nothing of models; text only through a function that gives the text of a token.
"""

from __future__ import annotations

import copy
import math
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import filters
from .errors import UsageError
from .filters import Candidates
from .repetition import Breakers, continuations

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
        names = list(text)
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
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        sums: dict[int, float] = {}
        for pair in bias:
            token, amount = parse_logit_bias(pair) if isinstance(pair, str) else pair
            token = _number("logit_bias", token, "int")
            sums[token] = sums.get(token, 0.0) + _number("logit_bias", amount, "float", infinite=True)
        object.__setattr__(self, "logit_bias", tuple(sums.items()))
        object.__setattr__(self, "samplers", parse_samplers(self.samplers))
        breakers = self.dry_sequence_breakers
        breakers = (breakers,) if isinstance(breakers, str) else tuple(breakers)
        object.__setattr__(self, "dry_sequence_breakers", () if breakers == ("none",) else breakers)


_INF = math.inf
_MAX_LOG = 88.7228391  # natural logarithm of the largest float32
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("seed", -1, 2**64 - 1),
    ("top_p", 0, _INF), ("min_p", 0, _INF), ("typical_p", 0, _INF),
    ("xtc_probability", 0, 1), ("xtc_threshold", 0, 1),
    ("min_keep", 0, _INF), ("dynatemp_range", 0, _INF), ("dynatemp_exponent", 0, _INF),
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
        raise UsageError(f"{name} is {value!r}; it must be {'a whole number' if kind == 'int' else 'a number'}")
    if kind == "float" and math.isinf(number) and not infinite:
        raise UsageError(f"{name} is {value!r}; it must be finite")
    return number


GREEDY = Sampling(temperature=0.0)


class _Step(NamedTuple):
    """One filter of the chain. `keeps_best`: the most probable candidate always survives it, as the best one."""

    apply: Callable[[Candidates], Candidates]
    keeps_best: bool = True


class Sampler:
    """Chooses tokens, one for each row of logits; not to be shared between generations.

    `accept` every token of the prompt and every token chosen, so that penalties and DRY know what was said.

    Args:
        params: what the user wants.
        vocab_size: length of a row of logits.
        eog_ids: tokens that end the generation; `ignore_eos` excludes them.
        token_text: text of a token, for DRY's sequence breakers; without it there are none.
        encode: tokens of a text, for sequence breakers that need more than one token.

    Attributes:
        seed: the seed in use, also when the parameters ask for a random one.

    Raises:
        UsageError: a token in `logit_bias` that the vocabulary does not have.
    """

    def __init__(
        self,
        params: Sampling,
        vocab_size: int,
        *,
        eog_ids: Iterable[int] = (),
        token_text: Callable[[int], str] | None = None,
        encode: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        self.params, self.vocab_size = params, vocab_size
        self._bias: dict[int, float] = dict(params.logit_bias)  # type: ignore[arg-type]  # pairs by now
        for token in self._bias:
            if not 0 <= token < vocab_size:
                raise UsageError(f"logit_bias: there is no token {token}; the vocabulary has {vocab_size}")
        if params.ignore_eos:
            self._bias.update(dict.fromkeys((i for i in eog_ids if 0 <= i < vocab_size), -math.inf))
        self._breakers = Breakers(params.dry_sequence_breakers, token_text, encode)
        self._greedy = params.temperature <= 0 and params.dynatemp_range == 0
        self._chain = self._compose()
        self.reset()

    def reset(self) -> None:
        """Back to the beginning: nothing was said, and the random numbers start anew (others, if the seed is -1)."""
        p = self.params
        self.seed = secrets.randbits(32) if p.seed == -1 else p.seed
        self._bits = np.random.PCG64(self.seed)
        self._xtc_bits = np.random.PCG64((self.seed, 1))  # of its own, so that each has one draw per token
        look_back = (p.repeat_last_n * self._penalises, p.dry_penalty_last_n * self._dries)
        self._said: deque[int] = deque(maxlen=None if -1 in look_back else max(look_back) + 1)
        self._counts: dict[int, int] = {}
        self._mu = 2 * p.mirostat_tau
        self._adapted, self._adapted_weight = p.adaptive_target / (1 - p.adaptive_decay), 1 / (1 - p.adaptive_decay)
        self._pending: tuple[int, float] | None = None

    def clone(self) -> Sampler:
        """A second sampler in the same state; from here on both choose alike, on their own."""
        other = copy.copy(self)
        for name in ("_bits", "_xtc_bits", "_said", "_counts"):
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        other._chain = other._compose()
        return other

    def accept(self, token: int) -> None:
        """Takes note of a token that was said."""
        p = self.params
        if self._penalises or self._dries:
            self._said.append(token)
        if self._penalises:
            self._counts[token] = self._counts.get(token, 0) + 1
            if 0 < p.repeat_last_n < len(self._said):
                forgotten = self._said[-p.repeat_last_n - 1]
                self._counts[forgotten] -= 1
                if not self._counts[forgotten]:
                    del self._counts[forgotten]
        if self._pending and self._pending[0] == token:
            self._adapted = self._adapted * p.adaptive_decay + self._pending[1]
            self._adapted_weight = self._adapted_weight * p.adaptive_decay + 1
        self._pending = None

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The token chosen by a row of logits, (vocab_size,).

        Raises:
            FormatError: a logit is NaN.
            UsageError: every token is excluded, or the row has another length.
        """
        if logits.shape != (self.vocab_size,):
            raise UsageError(f"logits have the shape {logits.shape}; the sampler was made for ({self.vocab_size},)")
        c = Candidates(None, np.ascontiguousarray(logits, dtype=np.float32))
        for step in self._chain:
            c = step.apply(c)
        return self._choose(c)

    def _choose(self, c: Candidates) -> int:
        p = self.params
        if self._greedy:
            return c.token(filters.greedy(c))
        uniform = _uniform(self._bits)
        if p.mirostat:
            mu, vocab = self._mu, self.vocab_size
            c = filters.mirostat_1(c, mu, vocab) if p.mirostat == 1 else filters.mirostat_2(c, mu)
            index = filters.draw(c, uniform)
            self._mu -= p.mirostat_eta * (-math.log2(filters.softmax(c)[index]) - p.mirostat_tau)
            return c.token(index)
        if "adaptive_p" in p.samplers and p.adaptive_target >= 0:
            target = 2 * p.adaptive_target - self._adapted / self._adapted_weight
            index = filters.draw(filters.near(c, target), uniform)
            self._pending = c.token(index), float(filters.softmax(c)[index])
            return c.token(index)
        return c.token(filters.draw(c, uniform))

    def _compose(self) -> tuple[_Step, ...]:
        """The filters that do something, in the user's order."""
        steps = []
        if self._bias:
            steps.append(_Step(partial(filters.add, bias=self._bias), keeps_best=False))
        for name in ("temperature",) if self.params.mirostat else self.params.samplers:
            step = self._step(name)
            if step:
                steps.append(step)
        while self._greedy and steps and steps[-1].keeps_best:
            steps.pop()  # the best candidate is the same without it
        return tuple(steps)

    def _step(self, name: str) -> _Step | None:
        p = self.params
        match name:
            case "penalties" if self._penalises:
                return _Step(self._penalise, keeps_best=False)
            case "dry" if self._dries:
                return _Step(self._dry, keeps_best=False)
            case "top_n_sigma" if p.top_n_sigma > 0:
                return _Step(partial(filters.top_n_sigma, n=p.top_n_sigma))
            case "top_k" if p.top_k > 0:
                return _Step(partial(filters.top_k, k=p.top_k))
            case "typ_p" if p.typical_p < 1:
                return _Step(partial(filters.typical, p=p.typical_p, min_keep=p.min_keep), keeps_best=False)
            case "top_p" if p.top_p < 1:
                return _Step(partial(filters.top_p, p=p.top_p, min_keep=p.min_keep))
            case "min_p" if p.min_p > 0:
                return _Step(partial(filters.min_p, p=p.min_p, min_keep=p.min_keep))
            case "xtc" if p.xtc_probability > 0 and p.xtc_threshold <= 0.5:
                return _Step(self._xtc, keeps_best=False)
            case "temperature" if p.dynatemp_range > 0 and not p.mirostat:
                return _Step(partial(filters.dynamic_temperature, t=p.temperature, span=p.dynatemp_range,
                                     exponent=p.dynatemp_exponent))  # fmt: skip
            case "temperature" if p.temperature != 1:
                return _Step(partial(filters.temperature, t=p.temperature))
        return None

    @property
    def _penalises(self) -> bool:
        p = self.params
        return p.repeat_last_n != 0 and (p.repeat_penalty, p.frequency_penalty, p.presence_penalty) != (1, 0, 0)

    @property
    def _dries(self) -> bool:
        p = self.params
        return p.dry_penalty_last_n != 0 and p.dry_multiplier > 0 and p.dry_base >= 1

    def _penalise(self, c: Candidates) -> Candidates:
        p = self.params
        return filters.penalties(c, self._counts, p.repeat_penalty, p.frequency_penalty, p.presence_penalty)

    def _dry(self, c: Candidates) -> Candidates:
        p = self.params
        n, base, allowed = p.dry_penalty_last_n, p.dry_base, p.dry_allowed_length
        history = list(self._said) if n == -1 else list(self._said)[-n:]
        grows = max(1, int(_MAX_LOG / math.log(base))) if base > 1.000001 else 0  # no penalty beyond float32
        found = continuations(history, self._breakers, allowed, allowed + grows)
        return filters.add(c, {i: -p.dry_multiplier * base ** (length - allowed) for i, length in found.items()})

    def _xtc(self, c: Candidates) -> Candidates:
        p = self.params
        return filters.xtc(c, p.xtc_threshold, p.min_keep) if _uniform(self._xtc_bits) < p.xtc_probability else c


def _uniform(bits: np.random.PCG64) -> float:
    """A number in [0, 1). NumPy promises that the bits of PCG64 never change; what Generator makes of them may."""
    return int(bits.random_raw() >> 11) * 2.0**-53


def logprobs(logits: npt.NDArray[np.float32], token: int, n_alternatives: int) -> tuple[float, list[tuple[int, float]]]:
    """How probable a token was before any sampler: natural logarithms of the softmax of raw logits.

    Args:
        logits: (vocab,) as the model gave them.
        token: the one that was chosen.
        n_alternatives: how many of the most probable tokens to report, the best first.

    Raises:
        FormatError: a logit is NaN.
    """
    c = Candidates(None, np.ascontiguousarray(logits, dtype=np.float32))
    log_sum = filters.peak(c) + math.log(float(filters.weights(c).sum(dtype=np.float64)))
    best = filters.top_k(c, n_alternatives) if n_alternatives > 0 else c.take(slice(0), True)
    alternatives = [(best.token(i), float(x) - log_sum) for i, x in enumerate(best.logits)]
    return float(logits[token]) - log_sum, alternatives
