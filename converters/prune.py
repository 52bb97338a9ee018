"""Pruning: a checkpoint becomes a smaller one that loads everywhere, and is mended by least squares, without training.

    smaller = pruned(checkpoint, PruneSpec.parse("depth=25%,ffn=20%"), calibration_text)

Everything that is cut is cut alike in every layer, so that the result is an ordinary model of its architecture. What is
cut: whole layers (depth), channels of the feed-forward networks (ffn), heads of keys and values with their queries
(heads), queries of each such group (queries), channels of the residual stream (hidden), tokens (vocab), and single
weights, which become zero (sparse). Scores and fits come from running the model on a text (`prune_fit`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.arch import Config, Role, tensors
from edgelm.architectures import SQUARE_ATTENTION
from edgelm.disk import Progress, nothing
from edgelm.errors import UnsupportedError, UsageError

from . import calibrate, prune_depth, prune_scores, vocab_prune
from .arrays import Array
from .checkpoint import Checkpoint
from .chunks import Source, chunked
from .finished import Finished, made_of
from .fits import Fits
from .prune_cut import Cut, changed_rows, given
from .prune_fit import Goal, Result, fitted
from .prune_scores import LAYER_CHOICES, least_influence
from .sparse import Pattern, thinned, thinned_model
from .streams import layer_of

N_CTX = 512  # tokens of a chunk of calibration text
SCORE_CHUNKS = 8  # of them, for what is decided beforehand
FIT_BYTES = 256 << 20  # of the widest activations, float32 and of both models together; a few such are alive
DEPTH_METHOD = "loss"  # of decoders: docs/LOG.md
_KINDS = ("depth", "ffn", "heads", "queries", "hidden", "vocab", "sparse", "refit", "experts")
_EXAMPLE = "depth=25%,ffn=20%,heads=1,hidden=10%,vocab=FILE,sparse=2:4"


@dataclass(frozen=True)
class Amount:
    """How much of something goes: a share of it (0 to 1), or a number of them; and how they are chosen ("" = usual)."""

    share: float = 0.0
    number: int = 0
    method: str = ""

    def of(self, n: int, what: str, unit: int = 1) -> int:
        """How many of n go; a share is rounded to whole units, a number is taken as it is.

        Raises UsageError when nothing would be left.
        """
        gone = self.number or round(self.share * n / unit) * unit
        if self.share and not gone and n > unit:
            gone = unit
        if gone >= n:
            raise UsageError(f"--prune {what}: of {n} at least one must stay, and {gone} were to go")
        return gone

    def __bool__(self) -> bool:
        return bool(self.share or self.number)

    def __str__(self) -> str:
        text = f"{self.share:.4%}".rstrip("0").rstrip(".") if self.share else str(self.number)
        text = re.sub(r"\.?0*%$", "%", text)
        return f"{text}:{self.method}" if self.method else text


_NONE = Amount()


@dataclass(frozen=True)
class PruneSpec:
    """What --prune asks for. vocab: a text, or the name of a file with it; sparse: a share or N:M of weights.

    refit: whether what stays is fitted to make up for what goes (refit=no: it is left as it is).
    """

    depth: Amount = _NONE
    ffn: Amount = _NONE
    heads: Amount = _NONE
    queries: Amount = _NONE
    hidden: Amount = _NONE
    vocab: str = ""
    sparse: str = ""
    refit: bool = True

    @classmethod
    def parse(cls, text: str) -> PruneSpec:
        """KEY=AMOUNT[:METHOD],… as `--prune` takes it. UsageError for what makes no sense."""
        found: dict[str, Any] = {}
        for part in re.split(rf",(?=(?:{'|'.join(_KINDS)})\s*=)", text):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not value or name not in _KINDS:
                raise UsageError(f"--prune {part!r:.60}: not of the form {_EXAMPLE}")
            if name in found:
                raise UsageError(f"--prune says {name} twice")
            if name == "experts":
                raise UnsupportedError("--prune experts: edgelm has no architecture with experts yet")
            found[name] = _value(name, value)
        if found.get("heads") and found.get("queries"):
            raise UsageError("--prune heads and queries: heads take their queries along; choose one of them")
        return cls(**found)

    def __str__(self) -> str:
        parts = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        text = ",".join(f"{name}={value}" for name, value in parts if value and name != "refit")
        return text if self.refit else f"{text},refit=no"

    @property
    def is_structured(self) -> bool:
        return bool(self.depth or self.ffn or self.heads or self.queries or self.hidden)


def _value(name: str, text: str) -> Any:
    if name == "vocab":
        return text
    if name == "sparse":
        Pattern.parse(text)
        return text
    if name == "refit":
        if text not in ("yes", "no"):
            raise UsageError(f"--prune refit={text:.30}: yes or no")
        return text == "yes"
    return _amount(name, text)


def _amount(name: str, text: str) -> Amount:
    value, _, method = text.partition(":")
    methods = ("loss", *LAYER_CHOICES) if name == "depth" else ()
    if method and method not in methods:
        known = f"; there are {', '.join(methods)}" if methods else ", which has no choice of methods"
        raise UsageError(f"--prune {name}: no method {method!r:.30}{known}")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", value)
    if match and match[2]:
        share = float(match[1]) / 100
        if share < 1:
            return Amount(share=share, method=method)
    elif match and match[1].isdecimal() and int(match[1]) < 1 << 24:
        return Amount(number=int(match[1]), method=method)
    raise UsageError(f"--prune {name}={text:.30}: how much goes is a share from 0% to below 100%, or a whole number")


# ---------------------------------------------------------------------------------------------------------- the whole


def pruned(
    checkpoint: Checkpoint,
    spec: PruneSpec,
    calibration: str | Sequence[int] = "",
    *,
    n_ctx: int = N_CTX,
    chunks: int | None = None,
    progress: Progress = nothing,
    folder: Path | None = None,
) -> Checkpoint:
    """The checkpoint without what `spec` says, fitted on a calibration text (or its tokens).

    Args:
        n_ctx, chunks: the text is read in chunks of n_ctx tokens, so many of them at most (None: as FIT_BYTES allows).
        folder: where fitted matrices lie until they are written, which must have room for them; the next call takes
            what is there already. None: a temporary one.

    Raises UsageError for what cannot be cut so, or a text that is too short; FormatError for a model that computes no
    numbers; UnsupportedError for what no runtime of ours can run.
    """
    before = checkpoint
    if spec.is_structured:
        checkpoint = _structured(checkpoint, spec, calibration, n_ctx, chunks, progress, folder)
    if spec.sparse:
        pattern = Pattern.parse(spec.sparse)
        checkpoint = _sparse(checkpoint, pattern, calibration, n_ctx, chunks, progress, folder)
    if spec.vocab:
        checkpoint = _fewer_tokens(checkpoint, vocab_prune.text_of(spec.vocab))
    n_before, n_after = n_parameters(before.tensors), n_parameters(checkpoint.tensors)
    facts = {
        "spec": str(spec), "refit": spec.refit, "parameters_before": n_before, "parameters_after": n_after,
        **checkpoint.facts.get("pruned", {}),
    }  # fmt: skip
    notes = [f"pruned ({spec}): {n_before / 1e6:.1f} M -> {n_after / 1e6:.1f} M parameters"]
    after = checkpoint.config
    if after.arch in SQUARE_ATTENTION and after.q_dim != after.dim:
        notes.append(f"llama.cpp loads no {after.arch} model whose heads are not as wide as its stream; edgelm does")
    return dataclasses.replace(
        checkpoint, notes=(*checkpoint.notes, *notes), facts={**checkpoint.facts, "pruned": facts}
    )


def n_parameters(arrays: Mapping[str, Array]) -> int:
    """Weights of all tensors."""
    return sum(math.prod(array.shape) for array in arrays.values())


def _structured(
    checkpoint: Checkpoint, spec: PruneSpec, text: str | Sequence[int], n_ctx: int, chunks: int | None,
    progress: Progress, folder: Path | None,
) -> Checkpoint:  # fmt: skip
    c = checkpoint.config
    n_gone = _sizes(c, spec)
    n_layers_gone = spec.depth.of(c.n_layers, "depth")
    source, tokens = _text(checkpoint, text, n_ctx, chunks)
    kept = None if folder is None else Finished(folder / "choice", _identity(checkpoint, tokens, spec))
    goal = _goal(source, tokens[:SCORE_CHUNKS], spec, n_layers_gone, n_gone, kept, progress)
    result = Result()
    if spec.refit or n_gone:
        result = fitted(source, tokens, goal, _fits(folder, "fits", checkpoint, tokens, spec), progress)
    layers = tuple(i for i in range(c.n_layers) if i not in goal.gone)
    shared = {} if goal.dim is None else {"dim": goal.dim}
    of_layer = tuple(result.stays[i] for i in layers) if n_gone else ()
    cut = Cut(c, layers, shared, of_layer)
    checkpoint = cut.applied(checkpoint, result.changed)
    return dataclasses.replace(checkpoint, facts={**checkpoint.facts, "pruned": _facts(cut, goal, result, tokens)})


def _sparse(
    checkpoint: Checkpoint, pattern: Pattern, text: str | Sequence[int], n_ctx: int, chunks: int | None,
    progress: Progress, folder: Path | None,
) -> Checkpoint:  # fmt: skip
    """The checkpoint with zeros in the matrices of its layers."""
    arrays, errors = dict(checkpoint.tensors), dict[str, float]()
    if pattern.method == "magnitude":
        for spec in tensors(checkpoint.config):
            if spec.gguf in arrays and spec.role is Role.MATMUL and layer_of(spec.gguf) is not None:
                arrays[spec.gguf] = changed_rows(arrays[spec.gguf], lambda w: thinned(w, None, pattern))
    else:
        source, tokens = _text(checkpoint, text, n_ctx, chunks)
        found = thinned_model(source, tokens, pattern, _fits(folder, "sparse", checkpoint, tokens, pattern), progress)
        arrays |= {name: given(name, fit.w, arrays[name].kind) for name, fit in found.items()}
        errors = {name: fit.errors[1] for name, fit in found.items()}
    facts = {"share": pattern.share, "of": pattern.of, "method": pattern.method, "errors": errors}
    facts = {**checkpoint.facts.get("pruned", {}), "sparse": facts}
    return dataclasses.replace(checkpoint, tensors=arrays, facts={**checkpoint.facts, "pruned": facts})


def _text(
    checkpoint: Checkpoint, text: str | Sequence[int], n_ctx: int, chunks: int | None
) -> tuple[Source, NDArray[np.int32]]:
    """The model to run, and the tokens to run it on: (chunks, n_ctx), as many as FIT_BYTES allows."""
    if not text:
        raise UsageError("--prune needs a text to run the model on: --calibrate FILE")
    c, source = checkpoint.config, calibrate.opened(checkpoint)
    n_ctx = min(n_ctx, c.max_position or n_ctx)
    affordable = max(1, FIT_BYTES // (2 * 4 * n_ctx * max(c.ffn_dim, c.q_dim, c.dim)))
    return source, chunked(source, text, n_ctx, min(chunks or affordable, affordable))


def _fits(
    folder: Path | None, name: str, checkpoint: Checkpoint, tokens: NDArray[np.int32], asked: PruneSpec | Pattern
) -> Fits:
    """What an earlier call has finished of the same, and room for the rest."""
    return Fits(None if folder is None else folder / name, _identity(checkpoint, tokens, asked))


def _identity(checkpoint: Checkpoint, tokens: NDArray[np.int32], asked: PruneSpec | Pattern) -> str:
    return f"{made_of(checkpoint, tokens)} {asked}"


def _fewer_tokens(checkpoint: Checkpoint, text: str) -> Checkpoint:
    """The checkpoint with the tokens that a text needs; the keys of a GGUF file follow."""
    keys = calibrate.vocabulary(checkpoint)
    kept = vocab_prune.kept_tokens(keys, text)
    cut = Cut(checkpoint.config, tuple(range(checkpoint.config.n_layers)), {"vocab_size": kept})
    after, metadata = cut.applied(checkpoint), dict[str, Any]()
    if checkpoint.is_gguf:
        words = {key: value for key, value in keys.items() if key.startswith("tokenizer.")}
        changed = vocab_prune.cut_keys(words, kept)
        metadata = {key: value for key, value in after.metadata.items() if key in changed or key not in words}
        metadata |= {key: value for key, value in changed.items() if value is not words[key]}
    sizes = {"before": checkpoint.config.vocab_size, "after": len(kept)}
    facts = {**checkpoint.facts, "pruned": {**checkpoint.facts.get("pruned", {}), "tokens": sizes}}
    return dataclasses.replace(after, metadata=metadata, kept_tokens=kept, facts=facts)


def _sizes(c: Config, spec: PruneSpec) -> dict[str, int]:
    """How many of each size every layer loses (of "n_heads": every group of queries)."""
    found = {}
    if spec.ffn:
        found["ffn_dim"] = spec.ffn.of(c.ffn_dim, "ffn", _unit(c.ffn_dim))
    if spec.heads:
        found["n_kv_heads"] = spec.heads.of(c.n_kv_heads, "heads")
    if spec.queries:
        found["n_heads"] = spec.queries.of(c.n_heads // c.n_kv_heads, "queries")
    return {name: n for name, n in found.items() if n}


def _unit(n: int) -> int:
    """A share of n is rounded to this: the largest block of a weight format that divides n and is no large part."""
    return next((unit for unit in (256, 128, 64, 32) if n % unit == 0 and unit * 20 <= n), 1)


def _goal(
    source: Source, tokens: NDArray[np.int32], spec: PruneSpec, n_layers_gone: int, n_gone: Mapping[str, int],
    kept: Finished | None, progress: Progress,
) -> Goal:  # fmt: skip
    """What is decided before anything is fitted: layers and channels of the stream. An earlier call's choice stands."""
    if not (spec.depth or spec.hidden):
        return Goal(n_gone=n_gone, refit=spec.refit)
    if kept is not None and "channels" in kept:
        gone, channels = kept["layers"][0], kept["channels"][0]
    else:
        gone, channels = _chosen(source, tokens, spec, n_layers_gone, progress)
        if kept is not None:
            kept.put("layers", gone[None].view(np.uint8))
            kept.put("channels", channels[None].view(np.uint8))
    dim = np.flatnonzero(channels) if spec.hidden else None
    return Goal(frozenset(np.flatnonzero(gone).tolist()), n_gone, dim, spec.refit)


def _chosen(
    source: Source, tokens: NDArray[np.int32], spec: PruneSpec, n_layers_gone: int, progress: Progress
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which layers go (layers,), and which channels of the stream stay (dim,), by what a text says."""
    c, is_encoder = source.config, source.config.spec.family == "encoder"
    method = spec.depth.method or ("influence" if is_encoder else DEPTH_METHOD)
    if method == "loss" and is_encoder:
        raise UsageError(f"--prune depth={spec.depth}: an encoder predicts nothing; choose by influence or angular")
    cosines, angles, carried = prune_scores.watched(source, tokens, progress)
    layers = LAYER_CHOICES.get(method, least_influence)(angles if method == "angular" else cosines, n_layers_gone)
    if spec.depth and method == "loss":
        layers = prune_depth.chosen(source, tokens, n_layers_gone, layers, progress)
    n_channels = c.dim - (spec.hidden.of(c.dim, "hidden", _unit(c.dim)) if spec.hidden else 0)
    channels = np.argsort(-carried, kind="stable")[:n_channels]
    return np.isin(np.arange(c.n_layers), layers), np.isin(np.arange(c.dim), channels)


def _facts(cut: Cut, goal: Goal, result: Result, tokens: NDArray[np.int32]) -> dict[str, Any]:
    """For the report: what went, and how far each matrix was from what it should give, before and after its fit."""
    before, after = cut.config, cut.after()
    sizes = ("n_layers", "dim", "ffn_dim", "n_heads", "n_kv_heads")
    changed = {s: (getattr(before, s), getattr(after, s)) for s in sizes if getattr(before, s) != getattr(after, s)}
    return {
        "layers_removed": sorted(goal.gone),
        "sizes": {name: {"before": old, "after": new} for name, (old, new) in changed.items()},
        "calibration_tokens": int(tokens.size),
        "errors": {
            name: {"before": round(start, 6), "after": round(end, 6)} for name, (start, end) in result.errors.items()
        },
    }
