"""A planned conversion becomes a folder with an ONNX model: `export`, the third interpreter of the one model function.

    export(conversion, folder, ops="ort")

In the folder: model.onnx and model.onnx.data, genai_config.json, the tokenizer's files. The dialects are `onnx_ort`
(operators of onnxruntime, the default) and `onnx_standard` (operators of ai.onnx alone).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgelm import gguf
from edgelm.arch import Config
from edgelm.disk import Progress, need_disk, nothing
from edgelm.errors import UnsupportedError, UsageError
from edgelm.formats import QTensor
from edgelm.models import model_of
from edgelm.weights import Weights

from . import tokenizer_files
from .genai_config import genai_config
from .gguf_writer import Layout
from .onnx_graph import FLOAT, FLOAT16, Graph
from .onnx_nodes import OUTPUTS, B, S, Settings
from .onnx_ort import OnnxRuntime
from .onnx_standard import Standard
from .onnx_values import Value
from .onnx_weights import Tensor

if TYPE_CHECKING:
    from .conversion import Conversion
    from .recipe import Recipe

# What ONNX tools call their types: ours, and whether every matrix has it, as theirs do, or a mix decides.
TYPES = {"int4": ("q4_0", True), "int8": ("q8_0", True), "fp16": ("f16", False), "fp32": ("f32", False)}
DIALECTS: dict[str, type[Standard]] = {"ort": OnnxRuntime, "standard": Standard}


def need_packages(measured: bool) -> None:
    """Raises UnsupportedError if what writes ONNX is not installed, or what runs it, where the loss is measured."""
    for name in ("onnx", "onnxruntime") if measured else ("onnx",):
        if importlib.util.find_spec(name) is None:
            raise UnsupportedError(f"writing ONNX needs the package {name}: pip install edgelm[onnx]")


def export(
    conversion: Conversion,
    path: Path,
    measure: Callable[[Path], Mapping[str, Any]] | None = None,
    *,
    ops: str = "ort",
    settings: Settings | None = None,
    block: int = 0,
    progress: Progress = nothing,
) -> dict[str, str]:
    """Write the model of `conversion` into the folder `path`, which may not exist yet.

    Args:
        measure: what shows the loss of a GGUF file; no folder can be shown to it.
        ops: "ort" or "standard".
        settings: None: `default_settings`.
        block: weights that share a scale in Q4_0 and Q8_0: 16, 32, 64, 128 or 256, 0 for the format's own 32.

    Returns a sha256 of each tensor, by its name, over all that it became in the graph. Raises UnsupportedError for an
    operation that the operators cannot express, UsageError for a folder that exists.
    """
    if ops not in DIALECTS:
        raise UsageError(f"--onnx-ops {ops!r:.40}: there are {', '.join(DIALECTS)}")
    if block not in (0, 16, 32, 64, 128, 256):
        raise UsageError(f"a block of {block} weights: there are 16, 32, 64, 128 and 256")
    if path.exists():
        raise UsageError(f"{path} exists; name a folder that does not")
    config, plan = conversion.checkpoint.config, conversion.plan
    settings = settings or default_settings(conversion)
    settings = replace(settings, n_ctx=settings.n_ctx or config.context_length)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    need_disk(path.absolute().parent, plan.n_bytes)
    draft = path.with_name(path.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()

    def told(done: int) -> None:
        progress("write", done, plan.n_bytes)
        conversion.checkpoint.forget()

    try:
        with closing(Graph(config.arch, draft, _metadata(conversion), told)) as graph:
            build(graph, config, weights_of(conversion, block), DIALECTS[ops], settings)
            graph.save()
        _neighbours(conversion, draft, settings, ops)
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return _by_tensor(graph.hashes, [step.name for step in plan.steps])


def _by_tensor(hashes: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """One hash for each tensor, of those of its parts: codes, scales …, perhaps together with other tensors'."""
    found = {}
    for name in names:
        parts = [f"{key} {sha}\n" for key, sha in hashes.items() if any(k.startswith(name) for k in key.split("+"))]
        if parts:
            found[name] = hashlib.sha256("".join(parts).encode()).hexdigest()
    return found


def named(recipe: Recipe) -> Recipe:
    """The recipe with our name for the type."""
    type_, pure = TYPES.get(recipe.type.lower(), (recipe.type, False))
    return replace(recipe, type=type_, pure=recipe.pure or pure)


def default_settings(conversion: Conversion) -> Settings:
    """float16 where the plan is F16; the whole context window; encoders of Q8_0 round activations, too."""
    plan, is_encoder = conversion.plan, conversion.checkpoint.config.spec.family == "encoder"
    return Settings(dtype=FLOAT16 if plan.type == "F16" else FLOAT, dynamic=is_encoder and plan.type == "Q8_0")


def _neighbours(conversion: Conversion, folder: Path, settings: Settings, ops: str) -> None:
    """The files beside the model."""
    checkpoint = conversion.checkpoint
    if "tokenizer.ggml.model" not in conversion.keys:
        return
    keys = _plain(conversion.keys, folder)
    own_files = None if checkpoint.is_gguf or checkpoint.kept_tokens is not None else checkpoint.path
    tokenizer_files.write(folder, keys, own_files)
    if "pruned" in checkpoint.facts:  # of another shape than config.json says; the graph has its own description
        (folder / "config.json").unlink(missing_ok=True)
    config = checkpoint.config
    if config.spec.family == "decoder" and config.causal and settings.head == "logits":
        facts = genai_config(config, keys, settings.n_ctx, share_buffer=ops == "ort")
        (folder / "genai_config.json").write_text(json.dumps(facts, indent=4) + "\n", encoding="utf-8")


def _plain(keys: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Metadata as the reader of GGUF files gives it: some of it may be bytes of another file."""
    path = folder / "metadata.gguf"
    path.write_bytes(Layout(keys, []).header)
    try:
        return gguf.read(path).metadata
    finally:
        path.unlink()


def weights_of(conversion: Conversion, block: int = 0) -> Weights:
    """The weights as the plan has them, none of them read yet."""
    found = {}
    for step in conversion.plan.steps:
        array = conversion.checkpoint.tensors[step.name]
        ready = conversion.ready.get(step.name)
        found[step.name] = Tensor(step, array, conversion.importance.get(step.name), ready, block)
    return Weights(conversion.checkpoint.config, cast("Mapping[str, QTensor]", found))


def written(conversion: Conversion, draft: Path) -> Mapping[str, Tensor]:
    """What stands for each tensor: rounded once more, since the graph joins and turns them."""
    return cast("Mapping[str, Tensor]", weights_of(conversion, conversion.options.onnx_block).by_name)


def build(graph: Graph, config: Config, weights: Weights, dialect: type[Standard], settings: Settings) -> None:
    """Fill `graph` with a model: its function, run once, with a dialect as interpreter."""
    op = dialect(graph, config, weights, settings)
    out = op.cast(model_of(config)(op, config, weights), FLOAT)
    if op.has_cache:
        name = "hidden_states" if settings.head == "hidden" else "logits"
        graph.output(out.name, name, FLOAT, (B, OUTPUTS, out.n_cols))
    else:
        graph.output(out.name, "last_hidden_state", FLOAT, (B, S, out.n_cols))
        if config.pooling != "none":
            pooled = op.pooled(Value(op, "last_hidden_state", FLOAT, out.shape), config.pooling)
            graph.output(pooled.name, "sentence_embedding", FLOAT, (B, out.n_cols))


def _metadata(conversion: Conversion) -> dict[str, str]:
    """What edgelm knows of the model beside the graph: the hyperparameters that GGUF has keys for."""
    return {"edgelm.config": json.dumps(conversion.checkpoint.config.to_gguf())}
