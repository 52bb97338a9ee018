"""Which token comes next: the sampler that applies a user's parameters to rows of logits.

`Sampler` composes the filters of `filters` once, in the user's order, and keeps what changes from token to token: the
tokens said, the random bits, mirostat's estimate. The usual chains run as one call of machine code where the process
has such code anyway, for a model. Knows nothing of models; text only through a function that gives the text of a token.
"""

from __future__ import annotations

import copy
import math
import secrets
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from . import filters
from .errors import UsageError
from .filters import Candidates
from .repetition import Breakers, Find, continuations
from .sampling_parameters import DEFAULT_ORDER, GREEDY, Sampling, parse_logit_bias, parse_samplers

if TYPE_CHECKING:
    from .kernels.sampling import Chooser

__all__ = [
    "DEFAULT_ORDER",
    "GREEDY",
    "Sampler",
    "Sampling",
    "logprobs",
    "parse_logit_bias",
    "parse_samplers",
]

_LARGEST = float(np.finfo(np.float32).max)
_MAX_LOG = 88.7228391  # its natural logarithm


class _Step(NamedTuple):
    """One filter of the chain.

    Attributes:
        apply: the filter.
        keeps_best: the most probable candidate always survives it, as the best one.
        name, parameters: the same for `kernels.sampling`, if that can do it.
        changes: what it does to which tokens, if it changes logits one by one.
    """

    apply: Callable[[Candidates], Candidates]
    keeps_best: bool = True
    name: str = ""
    parameters: tuple[float, ...] = ()
    changes: Callable[[], Mapping[int, float]] | None = None


class Sampler:
    """Chooses tokens, one for each row of logits; not to be shared between generations.

    `accept` every token of the prompt and every token chosen, so that penalties and DRY know what was said.

    Args:
        params: what the user wants.
        vocab_size: length of a row of logits.
        eog_ids: tokens that end the generation; `ignore_eos` excludes them.
        token_text: text of a token, for DRY's sequence breakers; without it there are none.
        encode: tokens of a text, for sequence breakers that need more than one token.
        compiled: use machine code for the chains it can do; None: if this process has a model that is compiled.

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
        compiled: bool | None = None,
    ) -> None:
        self.params, self.vocab_size = params, vocab_size
        self._bias: dict[int, float] = dict(params.logit_bias)  # type: ignore[arg-type]  # pairs by now
        for token in self._bias:
            if not 0 <= token < vocab_size:
                raise UsageError(f"logit_bias: there is no token {token}; the vocabulary has {vocab_size}")
        if params.ignore_eos:
            self._bias.update(dict.fromkeys((i for i in eog_ids if 0 <= i < vocab_size), -math.inf))
        self._breakers = Breakers(params.dry_sequence_breakers, token_text, encode)
        p = params
        strengths = (p.repeat_penalty, p.frequency_penalty, p.presence_penalty)
        self._penalises = p.repeat_last_n != 0 and strengths != (1, 0, 0)
        self._dries = p.dry_penalty_last_n != 0 and p.dry_multiplier > 0 and p.dry_base >= 1
        look_back = (p.repeat_last_n * self._penalises, p.dry_penalty_last_n * self._dries)
        self._remembers = sys.maxsize if -1 in look_back else max(look_back)  # tokens
        self._greedy = p.temperature <= 0 and p.dynatemp_range == 0
        self._adapts = "adaptive_p" in p.samplers and p.adaptive_target >= 0
        self._draws = not (p.mirostat or self._adapts)  # from what the filters leave, by its probability
        self._compiled = "edgelm.kernels.executor" in sys.modules if compiled is None else compiled
        self._mu = 2 * p.mirostat_tau
        self._xtc_uniform: float | None = None  # of this token, if it is drawn already
        self._chain = self._compose()
        self._chooser = self._compile()
        self.reset()

    def reset(self) -> None:
        """Back to the beginning: nothing was said, and the random numbers start anew (others, if the seed is -1)."""
        p = self.params
        self.seed = secrets.randbits(32) if p.seed == -1 else p.seed
        self._bits = np.random.PCG64(self.seed)
        self._xtc_bits = np.random.PCG64((self.seed, 1))  # of its own, so that each has one draw per token
        self._said = array("q")  # tokens, the latest last; older ones than are needed go now and then
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
        other._chooser = other._compile()
        return other

    def accept(self, token: int) -> None:
        """Takes note of a token that was said.

        Raises:
            UsageError: the vocabulary has no such token.
        """
        if not 0 <= token < self.vocab_size:
            raise UsageError(f"there is no token {token}; the vocabulary has {self.vocab_size}")
        p = self.params
        if self._remembers:
            self._said.append(token)
        if self._penalises:
            self._counts[token] = self._counts.get(token, 0) + 1
            if 0 < p.repeat_last_n < len(self._said):
                forgotten = self._said[-p.repeat_last_n - 1]
                self._counts[forgotten] -= 1
                if not self._counts[forgotten]:
                    del self._counts[forgotten]
        if len(self._said) > 2 * self._remembers + 1000:
            del self._said[: -self._remembers - 1]
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
        row = np.ascontiguousarray(logits, dtype=np.float32)
        uniform = 0.0 if self._greedy else _uniform(self._bits)
        c, steps = Candidates(None, row), self._chain
        self._xtc_uniform = None
        if self._chooser:
            changes = [change() for change in self._changes]
            if self._chooser.wide or (not self._uncompiled and self._draws):
                token = self._drawn(self._chooser, row, changes, uniform)
                if token is not None:
                    return token
            elif found := self._chooser.candidates(row, changes):
                c, steps = Candidates(*found, ranked=True), self._uncompiled
        for step in steps:
            c = step.apply(c)
        return self._choose(c, uniform)

    def _drawn(
        self, chooser: Chooser, row: npt.NDArray[np.float32], changes: list[Mapping[int, float]], uniform: float
    ) -> int | None:
        """A token drawn by machine code; None: the filters have to explain what is wrong."""
        p = self.params
        if "xtc" in chooser.steps:
            self._xtc_uniform = _uniform(self._xtc_bits)
            chooser.set("xtc", p.xtc_threshold, self._xtc_uniform < p.xtc_probability)
        if p.mirostat and chooser.wide:
            chooser.set(f"mirostat_{p.mirostat}", self._mu)
        token = chooser.token(row, changes, uniform)
        if token is not None and p.mirostat:
            self._mu -= p.mirostat_eta * (-math.log2(chooser.probability) - p.mirostat_tau)
        return token

    def _choose(self, c: Candidates, uniform: float) -> int:
        p = self.params
        if self._greedy:
            return c.token(filters.greedy(c))
        if p.mirostat:
            c = filters.mirostat_1(c, self._mu, self.vocab_size) if p.mirostat == 1 else filters.mirostat_2(c, self._mu)
            index = filters.draw(c, uniform)
            self._mu -= p.mirostat_eta * (-math.log2(filters.softmax(c)[index]) - p.mirostat_tau)
        elif self._adapts:
            target = 2 * p.adaptive_target - self._adapted / self._adapted_weight
            index = filters.draw(filters.near(c, target), uniform)
            self._pending = c.token(index), float(filters.softmax(c)[index])
        else:
            index = filters.draw(c, uniform)
        return c.token(index)

    def _compile(self) -> Chooser | None:
        """As many steps of the chain as machine code can do from its beginning; the others are `_uncompiled`."""
        self._uncompiled, p = self._chain, self.params
        self._changes: tuple[Callable[[], Mapping[int, float]], ...] = ()
        self._repeated: Find | None = None
        steps = [(step.name, step.parameters) for step in self._chain]
        if self._greedy and steps and all(step.changes for step in self._chain):
            steps.append(("top_k", (1,)))
        if not self._compiled:
            return None
        try:
            from .kernels.sampling import Chooser, compiled_repetitions

            self._repeated = compiled_repetitions() if self._dries else None
            n = Chooser.knows(steps)
            whole = [*steps, (f"mirostat_{p.mirostat}", (self._mu,))] if p.mirostat else steps
            wide = (n < len(whole) or not whole) and not (self._greedy or self._adapts) and Chooser.knows_all(whole)
            if wide:
                n = len(self._chain)
            elif not n:
                return None
            chooser = Chooser(self.vocab_size, whole if wide else steps[:n], p.min_keep, wide)
        except ImportError:  # no Numba
            return None
        self._changes = tuple(step.changes for step in self._chain[:n] if step.changes)
        self._uncompiled = self._chain[n:]
        return chooser

    def _compose(self) -> tuple[_Step, ...]:
        """The filters that do something, in the user's order."""
        steps = []
        if self._bias:
            bias = self._bias
            steps.append(_Step(partial(filters.add, bias=bias), keeps_best=False, name="add", changes=lambda: bias))
        for name in ("temperature",) if self.params.mirostat else self.params.samplers:
            step = self._step(name)
            if step:
                steps.append(step)
        while self._greedy and steps and steps[-1].keeps_best:
            steps.pop()  # the best candidate is the same without it
        return tuple(steps)

    def _step(self, name: str) -> _Step | None:
        p, keep = self.params, self.params.min_keep
        match name:
            case "penalties" if self._penalises:
                strengths = (p.repeat_penalty, p.frequency_penalty, p.presence_penalty)
                return _Step(lambda c: filters.penalties(c, self._counts, *strengths), keeps_best=False,
                             name="penalise", parameters=strengths, changes=lambda: self._counts)  # fmt: skip
            case "dry" if self._dries:
                return _Step(lambda c: filters.add(c, self._repetitions()), keeps_best=False,
                             name="add", changes=self._repetitions)  # fmt: skip
            case "top_n_sigma" if p.top_n_sigma > 0:
                return _Step(partial(filters.top_n_sigma, n=p.top_n_sigma), name=name, parameters=(p.top_n_sigma,))
            case "top_k" if p.top_k > 0:
                return _Step(partial(filters.top_k, k=p.top_k), name="top_k", parameters=(p.top_k,))
            case "typ_p" if p.typical_p < 1:
                return _Step(partial(filters.typical, p=p.typical_p, min_keep=keep), keeps_best=False,
                             name="typical", parameters=(p.typical_p,))  # fmt: skip
            case "top_p" if p.top_p < 1:
                return _Step(partial(filters.top_p, p=p.top_p, min_keep=keep), name="top_p", parameters=(p.top_p,))
            case "min_p" if p.min_p > 0:
                return _Step(partial(filters.min_p, p=p.min_p, min_keep=keep), name="min_p", parameters=(p.min_p,))
            case "xtc" if p.xtc_probability > 0 and p.xtc_threshold <= 0.5:
                return _Step(self._xtc, keeps_best=False, name="xtc", parameters=(p.xtc_threshold, 0))
            case "temperature" if p.dynatemp_range > 0 and not p.mirostat:
                t, span, exponent = p.temperature, p.dynatemp_range, p.dynatemp_exponent
                return _Step(partial(filters.dynamic_temperature, t=t, span=span, exponent=exponent),
                             name="dynamic", parameters=(t, span, exponent))  # fmt: skip
            case "temperature" if p.temperature != 1:
                by = (p.temperature,)
                return _Step(partial(filters.temperature, t=p.temperature), name="temperature", parameters=by)
        return None

    def _repetitions(self) -> dict[int, float]:
        """What DRY adds to the logits of tokens that would continue a repetition."""
        p = self.params
        n, base, allowed = p.dry_penalty_last_n, p.dry_base, p.dry_allowed_length
        history = np.frombuffer(self._said, np.int64)[-n if n > 0 else 0 :]
        grows = max(1, int(_MAX_LOG / math.log(base))) if base > 1.000001 else 0  # no power beyond float32
        found = continuations(history, self._breakers, allowed, allowed + grows, self._repeated)
        return {i: -min(p.dry_multiplier * base ** (length - allowed), _LARGEST) for i, length in found.items()}

    def _xtc(self, c: Candidates) -> Candidates:
        p = self.params
        uniform = _uniform(self._xtc_bits) if self._xtc_uniform is None else self._xtc_uniform
        return filters.xtc(c, p.xtc_threshold, p.min_keep) if uniform < p.xtc_probability else c


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
