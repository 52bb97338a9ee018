"""A model from a folder with an ONNX graph, computed by onnxruntime."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import json_tokenizer, onnx_folder
from .errors import UnsupportedError, UsageError
from .memory import Memory
from .model import Model, Runner, Settings
from .onnx_cache import bytes_per_position
from .onnx_folder import OnnxFolder, read_object, read_text
from .onnx_runner import OnnxRunner

if TYPE_CHECKING:
    from .chat import ChatTemplate

MAX_TEMPLATE_BYTES = 1 << 20
DEFAULT_CONTEXT = 2048  # of a folder that does not say
_KV_TYPES = {"float32": "f32", "float16": "f16"}


class OnnxModel(Model):
    """See `Model`. folder: what it was loaded from."""

    def __init__(self, path: Path, settings: Settings) -> None:
        interpreter, packed, kv_type = settings.interpreter, settings.packed, settings.kv_type
        if interpreter not in ("auto", "onnxruntime"):
            raise UsageError(f"interpreter is {interpreter!r}; an ONNX model is computed by onnxruntime, or auto")
        if packed not in ("auto", "memory"):
            raise UsageError(f"packed is {packed!r}; only the weights of GGUF files can be packed")
        self.folder = folder = onnx_folder.read(path)
        self.path, self.interpreter = folder.graph.path, "onnxruntime"
        self.kv_type = _KV_TYPES[folder.cache[0].dtype] if folder.cache else "f32"
        if kv_type not in (None, self.kv_type, f"{self.kv_type}/{self.kv_type}"):
            raise UsageError(f"kv_type is {kv_type!r}, but keys and values of this graph are {self.kv_type}")
        self.n_ctx = _window(folder, settings.ctx_size)
        self.tokenizer = json_tokenizer.read(folder)
        self._chat_template = settings.chat_template
        if settings.chat_template is not None:
            _ = self.template  # a wrong one is said now
        n_threads = settings.threads or settings.threads_batch
        self.runner = OnnxRunner(folder, n_ctx=self.n_ctx, n_threads=n_threads, max_tokens=settings.max_tokens_per_run)
        self._cache = self.runner.new_cache()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def architecture(self) -> str:
        return self.folder.architecture

    @property
    def licence(self) -> str:
        said = self.folder.config.get("license")
        return said if isinstance(said, str) else ""

    @property
    def vocab_size(self) -> int:
        return self.folder.vocab_size

    @property
    def dim(self) -> int:
        return self.folder.dim

    @property
    def is_encoder(self) -> bool:
        return self.folder.is_encoder

    @property
    def pooling(self) -> str:
        return self.folder.pooling

    @cached_property
    def system(self) -> str | None:
        return None

    @cached_property
    def fingerprint(self) -> str:
        """By the bytes of the graph, and the sizes of the files with its weights."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        for path in self.folder.graph.data:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
        return digest.hexdigest()

    def info(self) -> dict[str, Any]:
        facts = describe(self.folder, self.n_ctx)
        facts |= {"interpreter": self.interpreter, "threads": self.n_threads, "context_window": self.n_ctx}
        if self.template is not None:
            facts["chat_template"] = self.template.origin
        return facts

    def bytes_per_token(self, n_cached: float) -> float:
        """The constants of the graph but tables that are looked up, and what is cached."""
        return _read_bytes(self.folder) + n_cached * bytes_per_position(self.folder.cache)

    def memory(self, n_tokens: int) -> Memory:
        return _memory(self.folder, n_tokens)

    def _own_template(self) -> ChatTemplate | None:
        from .chat import ChatTemplate

        source = template_of(self.folder)
        if source is None:
            return None
        bos, eos = (
            "" if token is None else self.tokenizer.token_bytes(token).decode("utf-8", "replace")
            for token in (self.tokenizer.bos_id, self.tokenizer.eos_id)
        )
        return ChatTemplate(source, bos_token=bos, eos_token=eos, origin="folder")

    @cached_property
    def hidden_runner(self) -> Runner:
        if self.is_encoder:
            return self.runner
        raise UnsupportedError(
            f"{self.name} gives logits and no hidden states, so it cannot embed; export an encoder, or use a GGUF file"
        )


def template_of(folder: OnnxFolder) -> str | None:
    """The chat template of a folder: chat_template.jinja, else that of tokenizer_config.json or chat_template.json."""
    text = read_text(folder.path, "chat_template.jinja", MAX_TEMPLATE_BYTES)
    said = folder.tokenizer_config.get("chat_template")
    if text is None and said is None:
        said = (read_object(folder.path, "chat_template.json") or {}).get("chat_template")
    if text is None and isinstance(said, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in said if isinstance(entry, dict)}
        said = named.get("default")
    return text if text is not None else said if isinstance(said, str) else None


def describe(folder: OnnxFolder, ctx_size: int = 0, *, metadata: bool = False, tensors: bool = False) -> dict[str, Any]:
    """What `edgelm info` says about a folder; nothing of it is run. See `edgelm.describe.describe`."""
    graph = folder.graph
    counts: Counter[str] = Counter()
    for tensor in graph.tensors.values():
        counts[tensor.dtype] += 1
    n_parameters, n_weight_bytes = _parameters(folder)
    facts: dict[str, Any] = {
        "name": folder.name,
        "path": str(graph.path),
        "files": 1 + len(graph.data),
        "architecture": folder.architecture,
        "n_parameters": n_parameters,
        "n_bytes": graph.n_bytes,
        "type": _type(folder),
        "types": dict(counts.most_common()),
        "bits_per_weight": 8 * n_weight_bytes / n_parameters if n_parameters else 0.0,
        "onnx_opsets": {domain or "ai.onnx": version for domain, version in graph.opsets.items()},
        "onnx_producer": graph.producer,
        "operators": len(graph.nodes),
        "context_length": folder.context_length,
        "vocabulary": folder.vocab_size,
        "output": folder.output.name,
        "interpreter": "onnxruntime",
    }
    if folder.cache:
        first = folder.cache[0]
        facts |= {"layers": len(folder.cache) // 2, "kv_heads": first.heads, "head_dim": first.dim}
        facts["kv_cache"] = "shared by past and present" if folder.shares_buffers else "past and present take turns"
    if folder.is_encoder:
        facts |= {"embedding_length": folder.dim, "pooling": folder.pooling}
    n_ctx = _window(folder, ctx_size)
    need = _memory(folder, n_ctx)
    facts["memory"] = {
        "context": n_ctx,
        "kv_type": _KV_TYPES[folder.cache[0].dtype] if folder.cache else "none",
        "weights": need.weights, "kv_cache": need.kv_cache, "workspace": need.workspace, "total": need.total,
    }  # fmt: skip
    facts["chat_template"] = "folder" if template_of(folder) is not None else "none"
    if metadata:
        facts["metadata"] = {"genai_config": folder.genai, "config": folder.config, "generation": folder.generation}
    if tensors:
        facts["tensors"] = [
            {"name": t.name, "type": t.dtype, "shape": "x".join(map(str, t.dims)), "n_bytes": t.n_bytes}
            for t in graph.tensors.values()
        ]
    return facts


def _window(folder: OnnxFolder, ctx_size: int) -> int:
    if ctx_size < 0:
        raise UsageError(f"ctx_size is {ctx_size}; it must be a number of tokens, or 0 for that of the model")
    longest = folder.max_position or (folder.context_length if folder.is_encoder else 0)
    if longest and ctx_size > longest:
        raise UsageError(f"ctx_size is {ctx_size}; this model has a table of {longest} positions, no more")
    return ctx_size or folder.context_length or DEFAULT_CONTEXT


def _parameters(folder: OnnxFolder) -> tuple[int, int]:
    """Weights, and the bytes they take; matrices of blocks count by their real size."""
    graph = folder.graph
    packed: dict[str, int] = {}  # codes -> weights; scales and zero points -> 0
    for node in graph.nodes:
        if node.op == "MatMulNBits":
            sizes = (node.ints.get("K", 0) * node.ints.get("N", 0), 0, 0)
            packed |= dict(zip(node.inputs[1:4], sizes, strict=False))
        elif node.op == "GatherBlockQuantized" and (codes := graph.tensors.get(node.inputs[0])) is not None:
            per_byte = 8 // node.ints.get("bits", 4) if codes.dtype == "uint8" else 1
            packed.setdefault(codes.name, int(np.prod(codes.dims, dtype=np.float64)) * per_byte)
            packed |= {name: 0 for name in node.inputs[2:4] if name not in packed}
    tensors = [t for t in folder.weights if t.dims and t.dtype not in ("int64", "string", "bool")]
    n = sum(packed.get(t.name, int(np.prod(t.dims, dtype=np.float64))) for t in tensors)
    return n, sum(t.n_bytes for t in tensors)


def _type(folder: OnnxFolder) -> str:
    """What most weights are stored as, by the names of `edgelm convert --type`."""
    sizes: Counter[str] = Counter()
    bits = {node.inputs[1]: node.ints.get("bits", 4) for node in folder.graph.nodes if node.op == "MatMulNBits"}
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "int8", "uint4": "int4"}
    for t in folder.weights:
        sizes[f"int{bits[t.name]}" if t.name in bits else names.get(t.dtype, t.dtype)] += t.n_bytes
    return sizes.most_common(1)[0][0] if sizes else ""


def _read_bytes(folder: OnnxFolder) -> int:
    """Bytes of constants that a token reads: all but those that are only looked up, row by row."""
    looked_up: set[str] = set()
    others: set[str] = set()
    for node in folder.graph.nodes:
        tables = {"Gather": (0,), "GatherBlockQuantized": (0, 2, 3), "GroupQueryAttention": (7, 8)}.get(node.op, ())
        for at, name in enumerate(node.inputs):
            (looked_up if at in tables else others).add(name)
    read = {t.place for t in folder.graph.tensors.values() if t.name in others or t.name not in looked_up}
    return sum(t.n_bytes for t in folder.weights if t.place in read)


def _memory(folder: OnnxFolder, n_tokens: int) -> Memory:
    """Weights as they are in the file, of which onnxruntime may keep another copy in an order of its own."""
    n_cols = folder.dim if folder.is_encoder else folder.vocab_size
    rows = min(n_tokens, 512)
    return Memory(
        weights=sum(t.n_bytes for t in folder.weights),
        kv_cache=n_tokens * bytes_per_position(folder.cache) * (1 if folder.shares_buffers else 2),
        workspace=min(4 * n_cols * rows, 64 << 20),
    )
