"""A trained checkpoint becomes a GGUF file: `convert` is the whole conversion, from a source to a file that loads.

    report = convert("models/SmolLM2", "smollm2.gguf", Recipe("q4_k_m"))

Two passes: first the plan, the vocabulary and the layout, from headers alone; then one tensor at a time, in blocks of
rows, so that memory stays in proportion to a block. Give the same call again after any failure: it goes on where it
stopped (`gguf_writer`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm import gguf
from edgelm.arch import Config
from edgelm.disk import Progress, nothing
from edgelm.errors import FormatError, UsageError
from edgelm.tokenizer import Tokenizer
from edgelm.weights import Weights

from . import checkpoint as checkpoints
from . import imatrix as imatrices
from . import tokenizer_check, vocab
from .arrays import Array, Floats
from .checkpoint import Checkpoint
from .gguf_writer import Layout, Planned, write
from .quantizers import quantize
from .recipe import Plan, Recipe, Step, make_plan
from .report import Report
from .sources import resolve
from .special_tokens import Folder, sampling_keys

BLOCK_WEIGHTS = 1 << 24  # weights that are worked on at a time: 64 MB as float32
_SEAL = "edgelm.tensors.sha256"


@dataclass(frozen=True)
class Conversion:
    """A conversion that is planned: everything is known but the bytes of the weights.

    keys: metadata of the output; notes: what a user should know; n_compared: texts on which its tokenizer was compared
    with the source's; importance: of the columns of tensors, by GGUF name, float32 (columns,).
    """

    checkpoint: Checkpoint
    recipe: Recipe
    plan: Plan
    keys: Mapping[str, Any]
    notes: tuple[str, ...]
    n_compared: int
    importance: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return Layout(self.keys, [step.planned for step in self.plan.steps])


def prepare(
    source: str | Path,
    recipe: Recipe,
    *,
    name: str = "",
    pre: str = "",
    check_tokenizer: bool = True,
    overrides: Mapping[str, Any] | None = None,
    imatrix: str | Path | None = None,
    offline: bool = False,
    progress: Progress = nothing,
) -> Conversion:
    """The plan of a conversion and all metadata of its output; reads no weights and writes nothing.

    Args:
        source: a Hugging Face folder, a GGUF file, or hf:ORG/REPO.
        name: `general.name`, instead of the source's. pre: the pre-tokenizer, instead of what tokenizer.json defines.
        check_tokenizer: compare the new tokenizer with the source's. overrides: metadata to add or to change.
        imatrix: a file that tells which columns of the weights matter, and how much (`edgelm imatrix` makes it).
    """
    checkpoint = checkpoints.read(resolve(source, offline, progress))
    measured = None if imatrix is None else imatrices.read(imatrix)
    recipe = replace(recipe, has_imatrix=recipe.has_imatrix or measured is not None)
    if recipe.type.lower() == "auto":
        recipe = replace(recipe, type=_own_type(checkpoint))
    plan = make_plan(checkpoint.config, checkpoint.tensors, recipe)
    notes, n_compared = list(checkpoint.notes), 0
    if checkpoint.is_gguf:
        keys = _keys_of_gguf(checkpoint, plan)
    else:
        folder = Folder.read(checkpoint.path, checkpoint.hf)
        words = vocab.read(folder, checkpoint.config.vocab_size, pre)
        if check_tokenizer:
            n_compared, found = tokenizer_check.compare(words, folder)
            notes += found
        notes += folder.notes
        words |= _unsaid_ends(words, folder)
        keys = _keys_of_folder(checkpoint, plan, folder, name) | words
    if name:
        keys["general.name"] = name
    if requantized := [step for step in plan.steps if step.is_requantized]:
        notes.append(
            f"{len(requantized)} tensors were quantized already ({requantized[0].kind}) and lose more than from the "
            "original weights"
        )
    importance: dict[str, Floats] = {}
    if measured is not None:
        importance, unmeasured = _importance(plan, measured)
        keys |= _keys_of_imatrix(Path(str(imatrix)), measured)
        if unmeasured:
            notes.append(f"{len(unmeasured)} tensors are not in the imatrix ({unmeasured[0]}): quantized without")
    keys |= dict(overrides or {}) | _keys_of_ours(checkpoint, plan)
    return Conversion(checkpoint, recipe, plan, keys, tuple(notes), n_compared, importance)


def _importance(plan: Plan, measured: imatrices.Imatrix) -> tuple[dict[str, Floats], list[str]]:
    """The importance of each tensor that will be quantized, and the names of those that were not measured."""
    found: dict[str, Floats] = {}
    missing = []
    for step in plan.steps:
        if step.format.block == 1 or step.is_kept:
            continue
        values = measured.importance(step.name)
        if values is None:
            missing.append(step.name)
        elif values.shape != step.shape[-1:]:
            raise UsageError(f"the imatrix is of another model: rows of {step.name} are {step.shape[-1]} weights long")
        else:
            found[step.name] = values
    if not found and missing:
        raise UsageError("the imatrix is of another model: it knows none of the tensors")
    return found, missing


def convert(
    source: str | Path,
    out: str | Path | None,
    recipe: Recipe,
    *,
    progress: Progress = nothing,
    **options: Any,
) -> Report:
    """Convert `source` into the GGUF file `out`, prove that it loads, and write a report beside it.

    Args:
        out: None names it after the source and the type, in the current folder.
        options: of `prepare`.

    Raises the errors of `edgelm.errors` for what is wrong with the source or the request, OSError for a disk that is
    full or broken. A file that was there before is replaced at the very end, or not at all.
    """
    conversion = prepare(source, recipe, progress=progress, **options)
    path = Path(out) if out is not None else default_out(conversion)
    return run(conversion, path, progress=progress)


def run(conversion: Conversion, path: Path, *, progress: Progress = nothing) -> Report:
    """Carry out a conversion that was prepared; see `convert`."""
    checkpoint = conversion.checkpoint
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the file to write")
    if any(path.exists() and path.samefile(file) for file in checkpoint.files):
        raise UsageError(f"{path} is the source itself; choose another name")
    steps = {step.name: step for step in conversion.plan.steps}
    weighed = conversion.importance

    def contents(planned: Planned) -> Iterator[NDArray[np.uint8]]:
        yield from tensor_bytes(steps[planned.name], checkpoint.tensors[planned.name], weighed.get(planned.name))
        checkpoint.forget()

    fingerprint = hashlib.sha256(checkpoint.fingerprint().encode())
    for name in sorted(weighed):
        fingerprint.update(name.encode() + np.ascontiguousarray(weighed[name]).tobytes())
    hashes = write(
        path,
        conversion.layout,
        contents,
        fingerprint=fingerprint.hexdigest(),
        seal=lambda hashes: {_SEAL: _digest(hashes)},
        progress=progress,
    )
    prove(path)
    report = Report.of(conversion, path, hashes)
    report.write()
    return report


def prove(path: Path) -> None:
    """That a file loads: its header, its hyperparameters, every tensor's place and shape, its vocabulary."""
    file = gguf.read(path)
    Weights.from_gguf(Config.from_gguf(file.metadata), file.tensors)
    if "tokenizer.ggml.model" in file.metadata:
        Tokenizer.from_gguf(file.metadata)


def default_out(conversion: Conversion) -> Path:
    """NAME-TYPE.gguf in the current folder."""
    path = conversion.checkpoint.path
    return Path(f"{path.stem if conversion.checkpoint.is_gguf else path.resolve().name}-{conversion.plan.type}.gguf")


def _digest(hashes: Mapping[str, str]) -> str:
    """One sha256 over those of all tensors."""
    return hashlib.sha256("".join(f"{name} {sha}\n" for name, sha in sorted(hashes.items())).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- weights


def tensor_bytes(step: Step, array: Array, importance: Floats | None = None) -> Iterator[NDArray[np.uint8]]:
    """The bytes of one tensor of the output, in blocks of rows: uint8 (rows, bytes per row) each."""
    per_row = step.n_weights // step.shape[0] if len(step.shape) > 1 else 1
    n_rows = max(1, BLOCK_WEIGHTS // per_row)
    if array.as_is is not None and array.as_is.format is step.format:
        yield from (array.as_is.data[at : at + n_rows] for at in range(0, len(array.as_is.data), n_rows))
        return
    if len(step.shape) == 1:
        n_rows = step.shape[0]  # blocks must not be cut
    for at in range(0, step.shape[0], n_rows):
        stop = min(at + n_rows, step.shape[0])
        if step.is_kept:
            yield array.kept[step.format.name](at, stop)
            continue
        rows = array.rows(at, stop).reshape(-1, step.shape[-1])
        try:
            yield quantize(step.format.name, rows, importance)
        except FormatError as error:
            raise FormatError(f"{step.name}, from row {at} on: {error}") from None


# --------------------------------------------------------------------------------------------------------- metadata


def _own_type(checkpoint: Checkpoint) -> str:
    """The type that loses nothing or little: what most of the weights are in; a GGUF file stays what it is."""
    if checkpoint.is_gguf:
        return "copy"
    sizes: dict[str, int] = {}
    for array in checkpoint.tensors.values():
        sizes[array.kind] = sizes.get(array.kind, 0) + int(np.prod(array.shape, dtype=object))
    kind = max(sizes, key=lambda kind: sizes[kind])
    return "bf16" if kind == "BF16" else "f16"


def _keys_of_folder(checkpoint: Checkpoint, plan: Plan, folder: Folder, name: str) -> dict[str, Any]:
    keys = checkpoint.config.to_gguf()
    return {
        "general.architecture": keys.pop("general.architecture"),
        "general.type": "model",
        **sampling_keys(folder.generation),
        "general.name": name or checkpoint.path.resolve().name,
        "general.size_label": _size_label(plan.n_weights),
        **keys,
        "general.file_type": plan.file_type or 0,
        "general.quantization_version": 2,
    }


def _keys_of_gguf(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    keys: dict[str, Any] = dict(checkpoint.metadata)
    for gone in [key for key in keys if key.startswith(("split.", "edgelm."))]:
        del keys[gone]
    keys.pop("general.alignment", None)
    keys["general.quantization_version"] = 2
    if plan.file_type is not None:
        keys["general.file_type"] = plan.file_type
    return keys


def _keys_of_imatrix(path: Path, measured: imatrices.Imatrix) -> dict[str, Any]:
    """As llama-quantize writes them."""
    keys: dict[str, Any] = {"quantize.imatrix.file": path.name}
    if measured.datasets:
        keys["quantize.imatrix.dataset"] = measured.datasets[0]
    keys["quantize.imatrix.entries_count"] = len(measured.entries)
    return {**keys, "quantize.imatrix.chunks_count": measured.n_chunks}


def _keys_of_ours(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    try:
        ours = version("edgelm")
    except PackageNotFoundError:
        ours = "unknown"
    keys: dict[str, Any] = {"edgelm.version": ours, "edgelm.source": checkpoint.path.resolve().name}
    keys["edgelm.bits_per_weight"] = float(plan.bits_per_weight)
    if plan.fallbacks:
        keys["edgelm.fallbacks"] = [f"{s.name}: {s.wanted.name} -> {s.format.name}" for s in plan.fallbacks]
    return {**keys, _SEAL: "0" * 64}


def _size_label(n_weights: int) -> str:
    """135M, 1.2B: as gguf's size_label writes it."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n_weights > size or unit == "K":
            value = n_weights / size
            digits = max(2 - len(str(round(value)).lstrip("0")), 0)
            return f"{value:.{digits}f}{unit}"
    raise AssertionError


def _unsaid_ends(words: Mapping[str, Any], folder: Folder) -> dict[str, Any]:
    """An end of generation that generation_config.json names and no runtime would know by its text."""
    ends = folder.generation.get("eos_token_id")
    known, n = Tokenizer.from_gguf(words).eog_ids, len(words["tokenizer.ggml.tokens"])
    for token in ends if isinstance(ends, list) else [ends]:
        if type(token) is int and 0 <= token < n and token not in known:
            return {"tokenizer.ggml.eot_token_id": token}
    return {}


def parse_override(text: str) -> tuple[str, Any]:
    """KEY=TYPE:VALUE, as llama-quantize takes it; types are int, float, bool and str."""
    match = re.fullmatch(r"([^=]+)=(int|float|bool|str):(.*)", text, re.DOTALL)
    if not match:
        raise UsageError(f"--override-kv {text}: not of the form KEY=TYPE:VALUE with TYPE int, float, bool or str")
    key, kind, value = match.groups()
    try:
        if kind == "bool":
            return key, {"true": True, "false": False}[value]
        return key, {"int": int, "float": float, "str": str}[kind](value)
    except (KeyError, ValueError):
        raise UsageError(f"--override-kv {key}: {value!r:.40} is no {kind}") from None
