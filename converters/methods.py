"""How weights are rounded: `rounded` measures what its method needs, and quantizes what cannot wait for the writer.

| method | what it does | what it gives |
|---|---|---|
| rtn | each weight to the nearest, with the best scales | nothing: the writer quantizes |
| imatrix | scales for the columns that a text drives most | importances |
| gptq | errors are made up for by the weights that are still to come (`calibrated`) | finished tensors |
| awq | columns that matter are scaled up, and what feeds them down (`awq`) | another checkpoint, importances |
| auto | gptq if there is a text to read, and a type of less than 8 bits to be rounded to; else rtn | |

GPTQ lost least wherever all were measured; at 8 bits next to nothing is lost without it (docs/LOG.md).

A calibration that was stopped goes on where it stopped: what is finished lies in a work folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelm.disk import Progress, nothing
from edgelm.errors import UsageError
from edgelm.formats import by_name

from . import awq, calibrate, calibrated, imatrix, structure
from .arrays import Floats
from .calibrated import Choices
from .checkpoint import Checkpoint
from .chunks import Source, chunked
from .conversion import METHODS, Calibration
from .finished import Finished, made_of
from .imatrix import Imatrix
from .quantizers import SEARCHED
from .recipe import Plan

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Rounded:
    """What a method gives to whoever writes a model.

    checkpoint: what is written; importance: of columns, float32 (columns,), by tensor; ready: rows of blocks of tensors
    that are quantized already, uint8 (rows, bytes of a row), mapped from the work folder; methods: by tensor; imatrix:
    what was measured, for the metadata.
    """

    checkpoint: Checkpoint
    importance: Mapping[str, Floats] = field(default_factory=dict)
    ready: Mapping[str, Bytes] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)
    imatrix: Imatrix | None = None


def rounded(
    checkpoint: Checkpoint,
    plan: Plan,
    method: str,
    calibration: Calibration | None,
    work: Path,
    progress: Progress = nothing,
    choices: Choices | None = None,
    given: Imatrix | None = None,
) -> Rounded:
    """What the method `method` makes of a checkpoint for the types of a plan.

    work: a folder for what is finished; whoever has written the model removes it. given: an imatrix that was measured
    elsewhere, for the method "imatrix", which is then the automatic one.

    Raises UsageError for a method that does not exist, or that needs a text and has none; else what running the model
    raises (`imatrix.collect`), and OSError for a disk that is full.
    """
    if method not in METHODS:
        raise UsageError(f"method {method!r:.40}: there are {', '.join(METHODS)}")
    if method == "auto":
        measures = calibration is not None and _gains(checkpoint, plan)
        method = "imatrix" if given is not None else "gptq" if measures else "rtn"
    if method == "rtn":
        return Rounded(checkpoint, methods=dict.fromkeys(quantized(checkpoint, plan), "rtn"))
    if given is not None and method == "imatrix":
        return _weighed(checkpoint, plan, given)
    if calibration is None:
        raise UsageError(f"the method {method} has to read a text")
    source = calibrate.opened(checkpoint)
    tokens = chunks_of(source, calibration)
    identity = made_of(checkpoint, tokens)
    if method in ("imatrix", "awq"):
        measured = _imatrix(source, tokens, calibration, work, identity, progress)
        made = _weighed(checkpoint, plan, measured)
        return made if method == "imatrix" else _awq(made, plan, source, tokens, work, identity, progress)
    return _gptq(checkpoint, plan, source, tokens, work, identity, progress, choices or Choices())


def chunks_of(source: Source, calibration: Calibration) -> NDArray[np.int32]:
    """The chunks that are calibrated on, int32 (chunks, n_ctx): from all over the text, for texts change on the way."""
    tokens = chunked(source, calibration.text.text, calibration.n_ctx, None)
    n = len(tokens) if calibration.chunks is None else min(calibration.chunks, len(tokens))
    chosen: NDArray[np.int32] = tokens[np.linspace(0, len(tokens) - 1, n).astype(int)]
    return chosen


def _weighed(checkpoint: Checkpoint, plan: Plan, measured: Imatrix) -> Rounded:
    types = quantized(checkpoint, plan)
    importance = {name: values for name in types if (values := measured.importance(name)) is not None}
    for name, values in importance.items():
        if values.shape != (n_cols := checkpoint.tensors[name].shape[-1:]):
            raise UsageError(f"the imatrix is of another model: rows of {name} are {n_cols[0]} weights long")
    if types and not importance:
        raise UsageError("the imatrix is of another model: it knows none of the tensors")
    methods = {name: "imatrix" if name in importance else "rtn" for name in types}
    return Rounded(checkpoint, importance, {}, methods, measured)


def _awq(
    made: Rounded, plan: Plan, source: Source, tokens: NDArray[np.int32], work: Path, identity: str, progress: Progress
) -> Rounded:
    """Scales folded into the checkpoint; the importances become those of the scaled columns."""
    types = quantized(made.checkpoint, plan)
    folds = structure.folds(source.config, structure.recorded(source.config, source.weights))
    store = Finished(work / "awq", hashlib.sha256(f"{identity} {list(types.items())}".encode()).hexdigest())

    def give(number: int, s: Floats) -> None:
        store.put(str(number), s[None].view(np.uint8))

    awq.searched(source, tokens, folds, types, give, progress, [int(name) for name in store])
    scales = {int(name): store[name].view(np.float32)[0] for name in sorted(store, key=int)}
    importance, methods = dict(made.importance), dict(made.methods)
    for number, s in scales.items():
        for name in folds[number].readers:
            if name in importance:
                importance[name] = importance[name] / s[folds[number].channels] ** 2
                methods[name] = "awq"
    return Rounded(awq.folded(made.checkpoint, folds, scales), importance, {}, methods, made.imatrix)


def _gptq(
    checkpoint: Checkpoint, plan: Plan, source: Source, tokens: NDArray[np.int32], work: Path, identity: str,
    progress: Progress, choices: Choices,
) -> Rounded:  # fmt: skip
    types = quantized(checkpoint, plan)
    layers = structure.linears(structure.recorded(source.config, source.weights))
    wanted = {name: types[name] for name in layers if name in types}
    name = hashlib.sha256(f"{identity} {choices} {list(wanted.items())}".encode()).hexdigest()
    finished, weighed = Finished(work / "gptq", name), Finished(work / "importance", name)

    def give(name: str, data: Bytes, importance: Floats) -> None:
        weighed.put(name, np.ascontiguousarray(importance, np.float32)[None].view(np.uint8))
        finished.put(name, data)

    if not wanted.keys() <= finished.keys():
        calibrated.quantize_model(source, tokens, wanted, give, progress, choices, finished.get)
    methods = {name: "gptq" if name in wanted else "rtn" for name in types}
    return Rounded(checkpoint, {name: weighed[name].view(np.float32)[0] for name in wanted}, finished, methods)


def _gains(checkpoint: Checkpoint, plan: Plan) -> bool:
    """Whether there is a type that a calibration makes any better: one of less than 8 bits."""
    return any(by_name(type).bits_per_weight() < 8 for type in quantized(checkpoint, plan).values())


def quantized(checkpoint: Checkpoint, plan: Plan) -> dict[str, str]:
    """The format of each tensor that has to be quantized, by name."""
    found = {}
    for step in plan.steps:
        stored = checkpoint.tensors[step.name].stored_as(step.format)
        if step.format.name in SEARCHED and not step.is_kept and stored is None:
            found[step.name] = step.format.name
    return found


def _imatrix(
    source: Source, tokens: NDArray[np.int32], calibration: Calibration, work: Path, identity: str, progress: Progress
) -> Imatrix:
    """The imatrix of a text; that of an earlier run, if it measured the same."""
    path = work / f"imatrix-{identity[:16]}.gguf"
    if not path.exists():
        measured = imatrix.collect(
            source, tokens.reshape(-1).tolist(), tokens.shape[1], None, progress, dataset=calibration.text.name
        )
        work.mkdir(parents=True, exist_ok=True)
        imatrix.save(path, measured)
    return imatrix.read(path)  # the same numbers, whether this run measured them or an earlier one
