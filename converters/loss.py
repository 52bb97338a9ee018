"""What a conversion loses: how far its predictions are from the source's, and how far each tensor is from what it was.

    told = measured(conversion, Path("model.gguf.part"), tensors)
    told.loss.figures.mean_kl, told.errors["blk.0.attn_q.weight"]

The source runs beside the result, chunk by chunk (`edgelm.evaluate`), in the reference interpreter, which reads its
weights as it goes: neither a file of logits nor the whole source is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import edgelm
from edgelm import gguf
from edgelm.cache import Batch
from edgelm.disk import Progress, nothing
from edgelm.errors import EdgelmError
from edgelm.evaluate import EvalReport, Evaluated, perplexity
from edgelm.formats import Format
from edgelm.gguf_model import GGUFModel
from edgelm.model import Settings
from edgelm.threads import default_threads
from edgelm.tokenizer import Tokenizer

from . import calibrate
from . import checkpoint as checkpoints
from .arrays import Array, Floats
from .checkpoint import Checkpoint
from .conversion import Conversion, Evaluation, Options
from .recipe import Step

SAMPLE = 1 << 20  # weights of a tensor whose error is measured: rows from all over it
_RUNS = 16  # places where those rows are taken; rows that lie together are read together
# What is told inside the file, under "edgelm.loss.": figures of `EvalReport`.
FIGURES = ("perplexity", "base_perplexity", "ppl_ratio", "mean_kl", "kl_99", "same_top", "rms_dp")


class TooMuchLost(EdgelmError):
    """A conversion loses more than its user allows."""


@dataclass(frozen=True)
class Loss:
    """The loss of a model on a text that it was not calibrated on.

    interpreter: what computed the model ("program": the kernels that users run; their own rounding is in the figures);
    the source was computed in float32.
    """

    evaluation: Evaluation
    interpreter: str
    figures: EvalReport

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        e = self.evaluation
        text = {"text": e.text.name, "text_sha256": e.text.sha256, "is_held_out": e.is_held_out}
        return {**text, "interpreter": self.interpreter, **self.figures.to_dict()}


@dataclass(frozen=True)
class Told:
    """All that was measured: the relative error of each tensor by its name, and the loss, if there was a text."""

    errors: Mapping[str, float] = field(default_factory=dict)
    loss: Loss | None = None

    def keys(self, conversion: Conversion) -> dict[str, Any]:
        """Metadata that tells it, of one size whether it is known already or not."""
        errors = [self.errors.get(step.name, math.nan) for step in conversion.plan.steps]
        keys: dict[str, Any] = {"edgelm.tensors.error": np.array(errors, np.float32)}
        if (evaluation := conversion.evaluation) is None:
            return keys
        figures = {} if self.loss is None else self.loss.figures.to_dict()
        return {
            **keys,
            "edgelm.loss.text": evaluation.text.name,
            "edgelm.loss.text_sha256": evaluation.text.sha256,
            "edgelm.loss.n_tokens": int(figures.get("n_tokens", 0)),
            **{f"edgelm.loss.{name}": float(figures.get(name, math.nan)) for name in FIGURES},
        }


class Written(Protocol):
    """What an output has in place of a tensor: rows by their numbers, float32 (n, columns)."""

    @property
    def format(self) -> type[Format]: ...

    def rows(self, indices: NDArray[np.intp]) -> Floats: ...


def why_not(checkpoint: Checkpoint, evaluation: Evaluation) -> str:
    """Why nothing can be measured; "" if it can."""
    if checkpoint.config.spec.family == "encoder":
        return f"a {checkpoint.config.arch} model is an encoder, which predicts no tokens"
    tokenizer = Tokenizer.from_gguf(calibrate.vocabulary(checkpoint))
    n = len(tokenizer.encode(evaluation.text.text, add_special=True, parse_special=False))
    if n < 2 * evaluation.n_ctx:
        return f"{evaluation.text.name} has {n} tokens, less than two chunks of {evaluation.n_ctx}; give another --eval"
    return ""


def measured(conversion: Conversion, draft: Path, after: Mapping[str, Written], progress: Progress = nothing) -> Told:
    """What a finished output loses, while it has not got its name yet. after: its tensors, by their names in GGUF.

    Raises TooMuchLost when it is more than `--max-kld` allows.
    """
    plan, options, evaluation = conversion.plan, conversion.options, conversion.evaluation
    checkpoint = conversion.checkpoint
    told = Told(of_tensors(plan.steps, checkpoint.tensors, after, conversion.importance, checkpoint.forget))
    if evaluation is None:
        return told
    source: Evaluated = calibrate.Interpreted.of(calibrate.opened(conversion.original), evaluation.n_ctx)
    if checkpoint.kept_tokens is not None:
        source = _Fewer(source, checkpoint.kept_tokens, calibrate.vocabulary(checkpoint))
    with _running(draft, options, evaluation.n_ctx, progress) as (model, interpreter):
        told = replace(told, loss=predictions(model, source, evaluation, interpreter, progress))
    mean_kl = told.loss.figures.mean_kl if told.loss is not None else None
    if options.max_kld is not None and mean_kl is not None and not mean_kl <= options.max_kld:
        raise TooMuchLost(
            f"the mean KL divergence from the source is {mean_kl:.4f}, more than the {options.max_kld:g} of --max-kld; "
            f"what was made is kept as {draft}, and the same command with another limit only measures it again"
        )
    return told


@contextmanager
def _running(draft: Path, options: Options, n_ctx: int, progress: Progress) -> Iterator[tuple[Evaluated, str]]:
    """The output as a model that runs, and what computes it."""
    if options.format == "hf":
        yield calibrate.Interpreted.of(calibrate.opened(checkpoints.read(draft)), n_ctx), "reference"
    elif options.format == "onnx":
        with edgelm.load(str(draft), ctx_size=n_ctx, progress=progress) as onnx:
            yield onnx, onnx.interpreter
    else:
        settings = Settings(ctx_size=n_ctx, packed="memory")
        with GGUFModel(gguf.read(draft), settings, progress) as model:
            yield model, model.interpreter


class _Fewer:
    """A source whose vocabulary was cut: what it says of the tokens that are left, under their new numbers."""

    def __init__(self, source: Evaluated, kept: NDArray[np.intp], keys: Mapping[str, Any]) -> None:
        self.tokenizer, self.vocab_size, self._source, self._kept = Tokenizer.from_gguf(keys), len(kept), source, kept
        self.runner, self.max_tokens = self, source.runner.max_tokens
        self.new_cache, self.require_logits = source.new_cache, source.require_logits

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        old = replace(batch, tokens=self._kept[batch.tokens].astype(np.int32))
        return self._source.runner.forward(old)[:, self._kept]


def predictions(
    model: Evaluated, source: Evaluated, evaluation: Evaluation, interpreter: str, progress: Progress = nothing
) -> Loss:
    """The loss of a model against its source on a text; raises what `edgelm.evaluate.perplexity` raises."""
    e = evaluation
    return Loss(e, interpreter, perplexity(model, e.text.text, e.n_ctx, e.chunks, source, progress))


def of_tensors(
    steps: Iterable[Step],
    before: Mapping[str, Array],
    after: Mapping[str, Written],
    importance: Mapping[str, Floats],
    forget: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Of each tensor: root of the mean squared error over that of its weights, each column counting as it matters.

    Measured on a sample of rows. 0 for tensors that are as they were. forget: called after each, gives memory back.
    """
    steps = [step for step in steps if step.name in after]

    def error(step: Step) -> float:
        found = _error(before[step.name], after[step.name], importance.get(step.name))
        forget()
        return found

    with ThreadPoolExecutor(default_threads()) as pool:
        found = pool.map(error, steps)
        return {step.name: error for step, error in zip(steps, found, strict=True)}


def _error(before: Array, after: Written, importance: Floats | None) -> float:
    if before.stored_as(after.format) is not None:
        return 0.0
    shape = before.shape or (1,)
    n_rows = 1 if len(shape) == 1 else math.prod(shape[1:-1])  # of the file, for each index of the outermost dimension
    weights = np.ones(shape[-1], np.float32) if importance is None else importance
    errors = squares = 0.0
    for start, stop in _sample(1 if len(shape) == 1 else shape[0], n_rows * shape[-1]):
        w = (before.read() if len(shape) == 1 else before.rows(start, stop)).reshape(-1, shape[-1])
        e = after.rows(np.arange(start * n_rows, stop * n_rows)) - w
        errors += float(np.einsum("ij,ij,j->", e, e, weights, dtype=np.float64))
        squares += float(np.einsum("ij,ij,j->", w, w, weights, dtype=np.float64))
    return math.sqrt(errors / squares) if squares else 0.0


def _sample(n_rows: int, n_cols: int) -> list[tuple[int, int]]:
    """Where rows are read: runs from all over a tensor, all of it if it is small."""
    if n_rows * n_cols <= SAMPLE:
        return [(0, n_rows)]
    length = max(1, SAMPLE // (_RUNS * n_cols))
    starts = np.unique(np.linspace(0, n_rows - length, _RUNS).astype(int))
    return [(int(start), int(start) + length) for start in starts]
