"""A conversion from end to end: `convert` takes a source and leaves a model that loads, with a report beside it.

    report = convert("models/SmolLM2", "smollm2.gguf", Recipe("q4_k_m"), Options(calibrate=Path("text.txt")))

Each stage takes a checkpoint and gives another one, whose tensors are still read only when they are needed:

    read ► merge adapters ► prune ► plan the types ► round by the chosen method ► write ► measure the loss

`prepare` goes as far as the plan, `run` does the rest. Give the same call again after any failure: it goes on where it
stopped. What is written down on the way lies in OUT.part, OUT.part.journal and the folder OUT.work.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgelm import gguf
from edgelm.disk import Progress, need_folder_of, need_place, nothing
from edgelm.errors import UsageError

from . import checkpoint as checkpoints
from . import gguf_export, loss, methods
from . import imatrix as imatrices
from .checkpoint import Checkpoint
from .chunks import chunked
from .conversion import Calibration, Conversion, Evaluation, Options, texts
from .mixes import MIXES, is_quantizable
from .quantizers import need_writable, writable
from .recipe import PLAIN, Plan, Recipe, exactly, make_plan
from .report import Report
from .sources import resolve

ALLOCATE_CHUNKS = 8  # of the text, for the importances that types are chosen by
PLAIN_TYPES = ("auto", "copy", "f32", "f16", "bf16")  # that quantize nothing
# What writes a format: `export(conversion, out, measure, progress)` gives the sha256 of each tensor, and
# `written(conversion, draft)` what stands in their place.
WRITERS = {"gguf": "gguf_export", "hf": "hf_export", "onnx": "onnx_export"}


def convert(
    source: str | Path,
    out: str | Path | None,
    recipe: Recipe,
    options: Options | None = None,
    *,
    progress: Progress = nothing,
) -> Report:
    """Convert `source` into `out`, prove that it loads, measure what was lost, and write a report beside it.

    Args:
        source: a Hugging Face folder, a GGUF file, or hf:ORG/REPO.
        out: a file, or a folder for formats that are folders. None names it after the source and the type, in the
            current folder.

    Raises the errors of `edgelm.errors` for what is wrong with the source or the request, OSError for a disk that is
    full or broken. What was there before is replaced at the very end, or not at all.
    """
    work = None if out is None else work_folder(Path(out))
    conversion = prepare(source, recipe, options, work=work, progress=progress)
    return run(conversion, default_out(conversion) if out is None else Path(out), progress=progress)


def work_folder(out: Path) -> Path:
    """Where a conversion keeps what it has measured, until it is done."""
    return out.with_name(out.name + ".work")


def prepare(
    source: str | Path,
    recipe: Recipe,
    options: Options | None = None,
    *,
    work: Path | None = None,
    progress: Progress = nothing,
) -> Conversion:
    """The plan of a conversion and all metadata of its output.

    Reads weights only if a text has to tell what is to be pruned, or which types cost least; writes nothing but what
    that has measured, into the folder `work` if there is one, so that the next call need not measure it again.
    """
    options = options or Options()
    if work is not None:
        need_folder_of(work)
    if options.html is not None:
        need_place(options.html)
    if options.format == "onnx":
        from .onnx_export import named, need_packages

        need_packages(measured=(options.evaluate or options.calibrate) is not None)
        recipe = named(recipe)
    original = checkpoints.read(resolve(source, options.offline, progress))
    most = original.config.max_position or options.n_ctx
    calibration, evaluation = texts(replace(options, n_ctx=min(options.n_ctx, most)))
    for folder, scale in options.lora:
        from . import lora

        original = lora.merged(original, folder, scale)
    checkpoint = original
    if options.prune or options.target_params is not None:
        checkpoint = _pruned(original, options, calibration, work, progress)
    recipe = _told(checkpoint, recipe, options)
    plan = make_plan(checkpoint.config, checkpoint.tensors, recipe)
    for step in plan.steps:
        if not step.is_kept and checkpoint.tensors[step.name].stored_as(step.format) is None:
            need_writable(step.format)
    keys: dict[str, Any] = {}
    notes, n_compared = list(checkpoint.notes), 0
    if options.format != "hf":  # a Hugging Face folder keeps the tokenizer's own files
        keys, notes, n_compared = gguf_export.metadata(checkpoint, plan, options)
    if requantized := [step for step in plan.steps if step.is_requantized]:
        notes.append(
            f"{len(requantized)} tensors were quantized already ({requantized[0].kind}) and lose more than from the "
            "original weights"
        )
    evaluation = _measurable(checkpoint, evaluation, options, notes)
    made = Conversion(
        checkpoint, original, recipe, options, plan, keys, tuple(notes), n_compared, calibration, evaluation
    )
    return _allocated(made, work, progress) if options.has_target else made


def _told(checkpoint: Checkpoint, recipe: Recipe, options: Options) -> Recipe:
    """The recipe with what the source and the options say of it: the type, and whether weights have importances."""
    if options.has_target and recipe.type.lower() in PLAIN_TYPES:
        recipe = replace(recipe, type="q4_k_m")  # only which tensors are quantized is taken from it
    elif recipe.type.lower() == "auto":
        recipe = _own_types(checkpoint, recipe)
    weighed = options.imatrix is not None or (options.calibrate is not None and options.method != "rtn")
    return replace(recipe, has_imatrix=recipe.has_imatrix or weighed)


def _measurable(
    checkpoint: Checkpoint, evaluation: Evaluation | None, options: Options, notes: list[str]
) -> Evaluation | None:
    """The text to measure the loss on, None with a note if it cannot be; UsageError if somebody insists on it."""
    if evaluation is None or not (why := loss.why_not(checkpoint, evaluation)):
        return evaluation
    if not evaluation.is_held_out or options.max_kld is not None:
        raise UsageError(f"the loss cannot be measured: {why}")
    notes.append(f"the loss was not measured: {why}")
    return None


def _allocated(conversion: Conversion, work: Path | None, progress: Progress) -> Conversion:
    """The conversion with the types that cost least for the size that is asked for; those that the user chose stay."""
    from . import allocate, calibrate

    checkpoint, plan, recipe, calibration = (
        conversion.checkpoint, conversion.plan, conversion.recipe, conversion.calibration,
    )  # fmt: skip
    assert calibration is not None  # `Options` insists on it
    source = calibrate.opened(checkpoint)
    tokens = chunked(source, calibration.text.text, calibration.n_ctx, calibration.chunks)
    some = tokens[np.linspace(0, len(tokens) - 1, min(ALLOCATE_CHUNKS, len(tokens))).astype(int)]
    asked = _asked(plan, recipe)
    facts = (checkpoint.fingerprint(), sorted(checkpoint.facts.items()), allocate.subject(plan, asked), some.tobytes())
    kept = None if work is None else work / f"costs-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json"
    costs = allocate.Costs.read(kept)
    if costs is None:
        text = some.reshape(-1).tolist()
        driven = imatrices.collect(source, text, calibration.n_ctx, None, progress, process_output=True)
        importance = {name: values for name in checkpoint.tensors if (values := driven.importance(name)) is not None}
        costs = allocate.measured(source, checkpoint.tensors, plan, asked, some, importance, progress)
        costs.save(kept)
    n_header = len(gguf_export.layout(conversion).header)
    types = allocate.chosen(costs, allocate.budget(plan, conversion.options, n_header))
    recipe = replace(recipe, overrides=(*recipe.overrides, *exactly(types)))
    plan = allocate.named(make_plan(checkpoint.config, checkpoint.tensors, recipe))
    keys = {**conversion.keys, **({} if plan.file_type is None else {"general.file_type": plan.file_type})}
    return replace(conversion, recipe=recipe, plan=plan, keys=keys)


def _asked(plan: Plan, recipe: Recipe) -> set[str]:
    """Tensors whose type the user has chosen."""
    names = {step.name for step in plan.steps if any(re.search(pattern, step.name) for pattern, _ in recipe.overrides)}
    names |= {"token_embd.weight"} if recipe.embedding_type else set()
    return names | ({"output.weight"} if recipe.output_type or recipe.leave_output else set())


def run(conversion: Conversion, path: Path, *, progress: Progress = nothing) -> Report:
    """Carry out a conversion that was prepared; see `convert`."""
    _need_other_place(conversion, path)
    work = work_folder(path)
    conversion = rounded(conversion, work, progress)
    told = loss.Told()
    writer = importlib.import_module(f".{WRITERS[conversion.options.format]}", __package__)

    def measure(draft: Path) -> Mapping[str, Any]:
        nonlocal told
        told = loss.measured(conversion, draft, writer.written(conversion, draft), progress)
        return told.keys(conversion)

    hashes = writer.export(conversion, path, measure, progress=progress, **_own_options(conversion.options))
    if conversion.options.format == "onnx":
        measure(path)  # onnxruntime insists on the name that the folder will have
    report = Report.of(conversion, path, hashes, told)
    report.write(conversion.options.html)
    shutil.rmtree(work, ignore_errors=True)
    return report


def _own_options(options: Options) -> dict[str, Any]:
    """What only one writer knows."""
    return {"ops": options.onnx_ops, "block": options.onnx_block} if options.format == "onnx" else {}


def default_out(conversion: Conversion) -> Path:
    """NAME-TYPE.gguf, or the folder NAME-TYPE, in the current folder."""
    path, is_file = conversion.checkpoint.path, conversion.options.format == "gguf"
    name = path.stem if conversion.checkpoint.is_gguf else path.resolve().name
    return Path(f"{name}-{conversion.plan.type}{'.gguf' if is_file else ''}")


def _need_other_place(conversion: Conversion, path: Path) -> None:
    if conversion.options.format == "gguf":
        need_place(path)
    if any(path.exists() and path.samefile(file) for file in conversion.checkpoint.files):
        raise UsageError(f"{path} is the source itself; choose another name")


def _own_types(checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    """The recipe with the types that lose nothing or little: of a GGUF file its own, else what most weights are in.

    A GGUF model that was changed (pruned, merged) has the types that its tensors had, F16 for those that are only read.
    """
    if checkpoint.is_gguf and not checkpoint.facts:
        return replace(recipe, type="copy")
    sizes: dict[str, int] = {}
    for array in checkpoint.tensors.values():
        sizes[array.kind] = sizes.get(array.kind, 0) + int(np.prod(array.shape, dtype=object))
    kind = max(sizes, key=lambda kind: sizes[kind])
    if not checkpoint.is_gguf or kind in PLAIN:
        return replace(recipe, type="f16" if kind == "F32" or kind not in MIXES else kind)
    number = gguf.read(checkpoint.path).metadata.get("general.file_type")
    names = [mix.name for mix in MIXES.values() if mix.file_type == number or (number is None and mix.base == kind)]
    kinds = {
        name: array.kind if array.kind in writable() else "F16"
        for name, array in checkpoint.tensors.items()
        if is_quantizable(name, len(array.shape))
    }
    return replace(recipe, type=(*names, "f16")[0], overrides=(*recipe.overrides, *exactly(kinds)))


# ---------------------------------------------------------------------------------------------------- how to round


def rounded(conversion: Conversion, work: Path, progress: Progress = nothing) -> Conversion:
    """The conversion with everything that its method measures: importances, bytes that are chosen already."""
    options, calibration = conversion.options, conversion.calibration
    given = None if options.imatrix is None else imatrices.read(options.imatrix)
    found = methods.rounded(
        conversion.checkpoint, conversion.plan, options.method, calibration, work, progress, given=given
    )
    notes, keys = list(conversion.notes), dict(conversion.keys)
    if found.imatrix is not None:
        text = "" if calibration is None else calibration.text.name
        is_given = options.imatrix is not None and found.imatrix is given
        keys |= _keys_of_imatrix(Path(options.imatrix or "").name if is_given else text, found.imatrix)
        if missing := [name for name, method in found.methods.items() if method == "rtn"]:
            notes.append(f"{len(missing)} tensors are not in the imatrix ({missing[0]}): quantized without")
    return replace(
        conversion, checkpoint=found.checkpoint, importance=found.importance, ready=found.ready, methods=found.methods,
        notes=tuple(notes), keys=keys,
    )  # fmt: skip


def _pruned(
    checkpoint: Checkpoint, options: Options, calibration: Calibration | None, work: Path | None, progress: Progress
) -> Checkpoint:
    from . import prune, prune_target

    asked = ",".join(options.prune)
    if options.target_params is not None:
        if any(f"{name}=" in asked for name in ("depth", "ffn")):
            raise UsageError("--target-params says how many layers and channels go; so --prune cannot say it, too")
        asked = ",".join(filter(None, (asked, prune_target.amounts(checkpoint, options.target_params))))
    if not asked:
        return checkpoint
    spec, text = prune.PruneSpec.parse(asked), "" if calibration is None else calibration.text.text
    chunks = None if calibration is None else calibration.chunks
    n_ctx = options.n_ctx if calibration is None else calibration.n_ctx
    return prune.pruned(checkpoint, spec, text, n_ctx=n_ctx, chunks=chunks, progress=progress, folder=work)


def _keys_of_imatrix(name: str, measured: imatrices.Imatrix) -> dict[str, Any]:
    """As llama-quantize writes them."""
    keys: dict[str, Any] = {"quantize.imatrix.file": name}
    if measured.datasets:
        keys["quantize.imatrix.dataset"] = measured.datasets[0]
    keys["quantize.imatrix.entries_count"] = len(measured.entries)
    return {**keys, "quantize.imatrix.chunks_count": measured.n_chunks}
