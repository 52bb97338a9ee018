"""How good a model is: perplexity of a text, and how far one model's predictions are from another's.

The text is cut and scored as llama-perplexity does it, so that figures compare: chunks of n_ctx tokens, each on its
own, the first token replaced by BOS where the model wants one, and only the tokens of the second half scored. A
reference model runs in lock step, chunk by chunk, so no file of logits is needed.

Knows models only by what `Evaluated` says: a tokenizer, a runner and its cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .cache import Batch, SequenceCache
from .errors import FormatError, UsageError
from .tokenizer import Tokenizer

_MAX_LOGIT_BYTES = 64 << 20  # of one forward pass, per model
_BLOCK = 1 << 16  # logits scored at once: what stays in a core's cache, and is not fetched anew from the system
_ROWS = 8


class Runner(Protocol):
    """What computes logits; see `edgelm.reference` and `edgelm.program`."""

    max_tokens: int

    def forward(self, batch: Batch) -> NDArray[np.float32]: ...


class Evaluated(Protocol):
    """What `perplexity` needs of a model."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def runner(self) -> Runner: ...
    @property
    def vocab_size(self) -> int: ...

    def require_logits(self) -> None:
        """Raises UsageError for an encoder."""

    def new_cache(self) -> SequenceCache: ...


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """What an evaluation found; the fields from `base_perplexity` on are None without a reference model.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the scored tokens.
        stderr: standard error of the perplexity.
        n_tokens: tokens scored.
        n_chunks: chunks they lie in.
        n_ctx: tokens in a chunk.
        base_perplexity: perplexity of the reference model.
        ppl_ratio: perplexity / base_perplexity.
        ppl_ratio_stderr: its standard error (both models see the same text: much smaller than those of the two).
        mean_kl: mean Kullback-Leibler divergence of the model's prediction from the reference's, in nats.
        mean_kl_stderr: its standard error.
        kl_median, kl_99, kl_max: its median, 99th percentile and maximum.
        same_top: share of tokens (0 to 1) for which both models find the same token most probable.
        mean_dp: mean change of the probability of the right token (-1 to 1).
        rms_dp: root of its mean square (0 to 1).
    """

    perplexity: float
    stderr: float
    n_tokens: int
    n_chunks: int
    n_ctx: int
    base_perplexity: float | None = None
    ppl_ratio: float | None = None
    ppl_ratio_stderr: float | None = None
    mean_kl: float | None = None
    mean_kl_stderr: float | None = None
    kl_median: float | None = None
    kl_99: float | None = None
    kl_max: float | None = None
    same_top: float | None = None
    mean_dp: float | None = None
    rms_dp: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, without those that were not measured."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Scores:
    """What is kept of each scored token, float64 (n,); the last three are empty without a reference model."""

    nll: NDArray[np.float64]  # -log of the probability of the right token
    base_nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    same_top: NDArray[np.float64]


def perplexity(
    model: Evaluated,
    text: str | Sequence[int],
    n_ctx: int = 512,
    chunks: int | None = None,
    against: Evaluated | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> EvalReport:
    """Perplexity of a text, or of tokens, and the divergence from a reference model.

    One newline at the end of a text is dropped, as llama-perplexity drops it from a file.

    Args:
        model: what is evaluated.
        text: what it should predict; text of control tokens in it is ordinary text.
        n_ctx: tokens in a chunk.
        chunks: how many chunks to score; None for all.
        against: the reference: the same model in a better format.
        progress: called with ("evaluate", chunks done, chunks).

    Raises:
        UsageError: the text is shorter than two chunks, the two models have different vocabularies, or one is an
            encoder, which predicts nothing.
        ContextFull: n_ctx is more than a model can do.
        FormatError: a model computes something that is not a number.
    """
    for each in (model, against):
        if each is not None:
            each.require_logits()
    if n_ctx < 4:
        raise UsageError(f"n_ctx is {n_ctx}; a chunk needs at least 4 tokens")
    if chunks is not None and chunks < 1:
        raise UsageError(f"chunks is {chunks}; at least one must be scored")
    if against is not None and against.vocab_size != model.vocab_size:
        raise UsageError(
            f"the models have different vocabularies ({model.vocab_size} and {against.vocab_size} tokens); "
            "a reference must be the same model in another format"
        )
    tokens = np.array(_tokens(model, text), np.int64)
    if len(tokens) < 2 * n_ctx:
        raise UsageError(f"the text has {len(tokens)} tokens; with chunks of {n_ctx} it needs at least {2 * n_ctx}")
    n_chunks = min(len(tokens) // n_ctx, chunks or len(tokens))
    parts: list[Scores] = []
    for i in range(n_chunks):
        if progress:
            progress("evaluate", i, n_chunks)
        parts += _chunk_scores(tokens[i * n_ctx : (i + 1) * n_ctx], model, against)
    if progress:
        progress("evaluate", n_chunks, n_chunks)
    columns = [np.concatenate([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(Scores)]
    return summarise(Scores(*columns), n_chunks, n_ctx)


def _tokens(model: Evaluated, text: str | Sequence[int]) -> Sequence[int]:
    if not isinstance(text, str):
        return text
    return model.tokenizer.encode(text.removesuffix("\n"), add_special=True, parse_special=False)


def _chunk_scores(chunk: NDArray[np.int64], model: Evaluated, against: Evaluated | None) -> Iterator[Scores]:
    """Scores of the tokens in the second half of a chunk, a few rows at a time."""
    first = len(chunk) // 2
    step = _rows_at_once(model) if against is None else min(_rows_at_once(model), _rows_at_once(against))
    rows = _logits(model, chunk, first, step)
    base_rows = _logits(against, chunk, first, step) if against is not None else None
    for start in range(first, len(chunk) - 1, step):
        logits = next(rows)
        base = None if base_rows is None else next(base_rows)
        targets = chunk[start + 1 : start + 1 + len(logits)]
        for at in range(0, len(logits), _ROWS):
            rows_here = slice(at, at + _ROWS)
            yield score(logits[rows_here], targets[rows_here], None if base is None else base[rows_here])


def _rows_at_once(model: Evaluated) -> int:
    return max(1, min(model.runner.max_tokens, _MAX_LOGIT_BYTES // (4 * model.vocab_size)))


def _logits(model: Evaluated, chunk: NDArray[np.int64], first: int, step: int) -> Iterator[NDArray[np.float32]]:
    """Logits at the positions from `first` to the last but one of a chunk, (up to `step`, vocabulary) at a time."""
    tokens = chunk.astype(np.int32)
    tokenizer = model.tokenizer
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        tokens[0] = tokenizer.bos_id
    sequence = model.new_cache().new_sequence()
    try:
        for start in range(0, first, model.runner.max_tokens):
            part = tokens[start : min(start + model.runner.max_tokens, first)]
            model.runner.forward(Batch.of([(sequence, part, "none")]))
        for start in range(first, len(tokens) - 1, step):
            part = tokens[start : min(start + step, len(tokens) - 1)]
            yield model.runner.forward(Batch.of([(sequence, part, "all")]))
    finally:
        sequence.release()


@np.errstate(invalid="ignore")
def score(logits: NDArray[np.float32], targets: NDArray[np.int64], base: NDArray[np.float32] | None = None) -> Scores:
    """Scores of some rows: exponentials in float32, everything that is summed in float64.

    Args:
        logits: (n, vocabulary) of the model.
        targets: (n,) the tokens that came.
        base: (n, vocabulary) of the reference model.

    Raises:
        FormatError: a model computed NaN.
    """
    n, at = len(logits), (np.arange(len(logits)), targets)
    top = logits.max(axis=1, keepdims=True)
    base_top = None if base is None else base.max(axis=1, keepdims=True)
    sums, base_sums, products = np.zeros(n), np.zeros(n), np.zeros(n)
    width = max(1, _BLOCK // n)
    for begin in range(0, logits.shape[1], width):
        columns = slice(begin, begin + width)
        x = logits[:, columns] - top
        sums += np.exp(x).sum(axis=1, dtype=np.float64)
        if base is not None and base_top is not None:
            base_x = base[:, columns] - base_top
            p = np.exp(base_x)
            base_sums += p.sum(axis=1, dtype=np.float64)
            x = base_x - x  # KL = sum p (log p - log q), and but for two constants log p - log q is this
            x *= p
            products += (x if x.min() > -math.inf else np.where(p > 0, x, 0)).sum(axis=1, dtype=np.float64)
    nll = np.log(sums) - (logits[at] - top[:, 0])
    if base is None or base_top is None:
        return _checked(Scores(nll, *np.zeros((3, 0))))
    base_nll = np.log(base_sums) - (base[at] - base_top[:, 0])
    kl = products / base_sums + np.log(sums) - np.log(base_sums)
    same = logits.argmax(axis=1) == base.argmax(axis=1)
    return _checked(Scores(nll, base_nll, kl, same.astype(np.float64)))


def _checked(scores: Scores) -> Scores:
    if any(np.isnan(getattr(scores, field.name)).any() for field in dataclasses.fields(scores)):
        raise FormatError("the model computed a logit that is not a number; its file is probably damaged")
    return scores


@np.errstate(over="ignore", invalid="ignore")
def summarise(scores: Scores, n_chunks: int, n_ctx: int) -> EvalReport:
    """The report of all scored tokens."""
    nll, stderr = _mean(scores.nll)
    own = EvalReport(
        perplexity=_exp(nll),
        stderr=_exp(nll) * stderr,
        n_tokens=len(scores.nll),
        n_chunks=n_chunks,
        n_ctx=n_ctx,
    )
    if not len(scores.kl):
        return own
    ratio, ratio_stderr = _mean(scores.nll - scores.base_nll)
    kl, kl_stderr = _mean(scores.kl)
    dp = np.exp(-scores.nll) - np.exp(-scores.base_nll)
    return dataclasses.replace(
        own,
        base_perplexity=_exp(_mean(scores.base_nll)[0]),
        ppl_ratio=_exp(ratio),
        ppl_ratio_stderr=_exp(ratio) * ratio_stderr,
        mean_kl=kl,
        mean_kl_stderr=kl_stderr,
        kl_median=float(np.median(scores.kl)),
        kl_99=float(np.quantile(scores.kl, 0.99)),
        kl_max=float(scores.kl.max()),
        same_top=float(scores.same_top.mean()),
        mean_dp=float(dp.mean()),
        rms_dp=math.sqrt(float(np.mean(dp * dp))),
    )


def _mean(x: NDArray[np.float64]) -> tuple[float, float]:
    """(mean, standard error of the mean)."""
    return float(x.mean()), float(x.std()) / math.sqrt(max(len(x) - 1, 1))


def _exp(x: float) -> float:
    return float(np.exp(x))
