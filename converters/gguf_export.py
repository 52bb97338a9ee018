"""Writes a conversion as a GGUF file: its metadata first, then one tensor at a time.

Two passes: first the vocabulary and the layout, from headers alone; then the tensors in blocks of rows, so that memory
stays in proportion to a block. What is finished is never done again (`gguf_writer`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm import gguf
from edgelm.arch import Config
from edgelm.disk import Progress, nothing
from edgelm.errors import FormatError
from edgelm.formats import QTensor
from edgelm.tokenizer import Tokenizer
from edgelm.weights import Weights

from . import tokenizer_check, vocab, vocab_prune
from .arrays import Array, Floats
from .checkpoint import Checkpoint
from .conversion import Conversion, Options
from .gguf_writer import Layout, Planned, write
from .loss import Told
from .quantizers import quantize
from .recipe import Plan, Step
from .special_tokens import Folder, sampling_keys

BLOCK_WEIGHTS = 1 << 24  # weights that are worked on at a time: 64 MB as float32
_SEAL = "edgelm.tensors.sha256"


def export(
    conversion: Conversion,
    path: Path,
    measure: Callable[[Path], Mapping[str, Any]],
    *,
    progress: Progress = nothing,
) -> dict[str, str]:
    """Write the file, prove that it loads, and return the sha256 of each tensor by name.

    measure: is shown the file when all weights are in it, before it has its name; gives metadata that takes the place
    of values of the same size (`reserved`).
    """
    checkpoint = conversion.checkpoint
    steps = {step.name: step for step in conversion.plan.steps}

    def contents(planned: Planned) -> Iterator[NDArray[np.uint8]]:
        name = planned.name
        yield from tensor_bytes(
            steps[name], checkpoint.tensors[name], conversion.importance.get(name), conversion.ready.get(name)
        )
        checkpoint.forget()

    def seal(hashes: Mapping[str, str]) -> Mapping[str, Any]:
        return {**measure(path.with_name(path.name + ".part")), _SEAL: _digest(hashes)}

    hashes = write(
        path, layout(conversion), contents, fingerprint=fingerprint(conversion), seal=seal, progress=progress
    )
    prove(path)
    return hashes


def written(conversion: Conversion, draft: Path) -> Mapping[str, QTensor]:
    """The tensors of a file, by name."""
    return gguf.read(draft).tensors


def layout(conversion: Conversion) -> Layout:
    """Where everything will lie in the file."""
    keys = {**conversion.keys, **conversion.options.overrides, **_keys_of_ours(conversion)}
    return Layout(keys, [step.planned for step in conversion.plan.steps])


def fingerprint(conversion: Conversion) -> str:
    """Changes when the contents of a tensor would."""
    digest = hashlib.sha256(conversion.checkpoint.fingerprint().encode())
    digest.update(repr((sorted(conversion.checkpoint.facts.items()), conversion.calibration)).encode())
    digest.update(repr(sorted(conversion.methods.items())).encode())
    for name in sorted(conversion.importance):
        digest.update(name.encode() + np.ascontiguousarray(conversion.importance[name]).tobytes())
    for name in sorted(conversion.ready):
        digest.update(name.encode() + hashlib.sha256(np.ascontiguousarray(conversion.ready[name]).data).digest())
    return digest.hexdigest()


def prove(path: Path) -> None:
    """That a file loads: its header, its hyperparameters, every tensor's place and shape, its vocabulary."""
    file = gguf.read(path)
    Weights.from_gguf(Config.from_gguf(file.metadata), file.tensors)
    if "tokenizer.ggml.model" in file.metadata:
        Tokenizer.from_gguf(file.metadata)


def _digest(hashes: Mapping[str, str]) -> str:
    """One sha256 over those of all tensors."""
    return hashlib.sha256("".join(f"{name} {sha}\n" for name, sha in sorted(hashes.items())).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- weights


def tensor_bytes(
    step: Step, array: Array, importance: Floats | None = None, ready: NDArray[np.uint8] | None = None
) -> Iterator[NDArray[np.uint8]]:
    """The bytes of one tensor of the output, in blocks of rows: uint8 (rows, bytes per row) each.

    ready: all of them, if they are chosen already.
    """
    per_row = step.n_weights // step.shape[0] if len(step.shape) > 1 else 1
    n_rows = max(1, BLOCK_WEIGHTS // per_row)
    if ready is not None:
        yield from (ready[at : at + n_rows] for at in range(0, len(ready), n_rows))
        return
    if (stored := array.stored_as(step.format)) is not None:
        yield from (stored.data[at : at + n_rows] for at in range(0, len(stored.data), n_rows))
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


def metadata(checkpoint: Checkpoint, plan: Plan, options: Options) -> tuple[dict[str, Any], list[str], int]:
    """Keys of the output, what a user should know about them, and on how many texts its tokenizer was compared."""
    notes, n_compared = list(checkpoint.notes), 0
    if checkpoint.is_gguf:
        keys = _keys_of_gguf(checkpoint, plan)
    else:
        folder = Folder.read(checkpoint.path, checkpoint.hf)
        words = vocab.read(folder, checkpoint.n_tokens_before, options.pre)
        if options.check_tokenizer:
            n_compared, found = tokenizer_check.compare(words, folder)
            notes += found
        notes += folder.notes
        words |= _unsaid_ends(words, folder)
        if checkpoint.kept_tokens is not None:
            words = vocab_prune.cut_keys(words, checkpoint.kept_tokens)
        keys = _keys_of_folder(checkpoint, plan, folder, options.name) | words
    if options.name:
        keys["general.name"] = options.name
    return keys, notes, n_compared


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


def _keys_of_ours(conversion: Conversion) -> dict[str, Any]:
    """How the file was made, under "edgelm."; what only the finished file tells has its room already."""
    try:
        ours = version("edgelm")
    except PackageNotFoundError:
        ours = "unknown"
    plan, calibration = conversion.plan, conversion.calibration
    keys: dict[str, Any] = {"edgelm.version": ours, "edgelm.source": conversion.checkpoint.path.resolve().name}
    keys["edgelm.bits_per_weight"] = float(plan.bits_per_weight)
    if plan.fallbacks:
        keys["edgelm.fallbacks"] = [f"{s.name}: {s.wanted.name} -> {s.format.name}" for s in plan.fallbacks]
    keys |= {f"edgelm.{name}": json.dumps(facts) for name, facts in conversion.checkpoint.facts.items()}
    if calibration is not None:
        keys["edgelm.calibration.text"] = calibration.text.name
        keys["edgelm.calibration.text_sha256"] = calibration.text.sha256
    methods = set(conversion.methods.values())
    if methods and (calibration is not None or methods != {"rtn"}):  # of a plain conversion it goes without saying
        keys["edgelm.methods"] = sorted(methods)
    return {**keys, **Told().keys(conversion), _SEAL: "0" * 64}


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
