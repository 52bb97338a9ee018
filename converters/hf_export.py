"""Writes a conversion as a Hugging Face folder: config.json, safetensors, the tokenizer's files.

For people who go on training a pruned model, or run it elsewhere. What GGUF arranges differently (order of rows,
transposed matrices, offsets of norms) is undone by the table of `edgelm.architectures`. Weights are plain floats of one
type. The folder is called OUT.part until it is whole; one tensor is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.arch import Role, TensorSpec, tensors
from edgelm.disk import Progress, nothing
from edgelm.errors import UnsupportedError, UsageError
from edgelm.formats import QTensor
from edgelm.tensors import COMPOSED
from edgelm.weights import SCALES

from . import calibrate, hf_tokenizer
from . import checkpoint as checkpoints
from .arrays import Array, Floats
from .checkpoint import Checkpoint
from .conversion import Conversion
from .hf_config import config_json

SHARD_BYTES = 5_000_000_000  # a larger model lies in several files, as the library cuts it
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BLOCK_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class Planned:
    """A tensor of the folder: its name and shape there, and what gives its values as float32."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Iterator[Floats]]
    source: str

    def n_bytes(self, kind: str) -> int:
        return int(np.prod(self.shape, dtype=object)) * (4 if kind == "F32" else 2)


def export(
    conversion: Conversion, path: Path, measure: Callable[[Path], Mapping[str, Any]], *, progress: Progress = nothing
) -> dict[str, str]:
    """Write the folder, read it back, and return the sha256 of each tensor by its name in the conversion.

    measure: is shown the folder when it is whole, before it has its name.

    Raises UsageError for types of weights that safetensors cannot hold, UnsupportedError for what transformers has no
    place for.
    """
    checkpoint, kind = conversion.checkpoint, _kind(conversion)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists and is no empty folder; name a new one")
    config = _config(checkpoint, kind)
    planned = list(plan(checkpoint))
    draft = path.with_name(path.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    hashes = _write_weights(draft, planned, kind, checkpoint.forget, progress)
    _write_json(draft / "config.json", config)
    for name, text in hf_tokenizer.files(checkpoint).items():
        (draft / name).parent.mkdir(exist_ok=True)
        (draft / name).write_bytes(text)
    checkpoints.read(draft)
    measure(draft)
    if path.exists():
        path.rmdir()
    os.replace(draft, path)
    return hashes


def written(conversion: Conversion, draft: Path) -> Mapping[str, QTensor]:
    """The tensors of a folder as GGUF has them, by their names there."""
    return calibrate.opened(checkpoints.read(draft)).weights.by_name


def _kind(conversion: Conversion) -> str:
    """The type of all weights: what the recipe says, or what most of them are."""
    kind = conversion.plan.type.upper()
    if kind == "COPY":
        sizes: dict[str, int] = {}
        for step in conversion.plan.steps:
            sizes[step.kind] = sizes.get(step.kind, 0) + step.n_weights
        kind = max(sizes, key=lambda name: sizes[name])
    if kind not in _DTYPES:
        raise UsageError(f"--format hf holds floats and no {kind}: choose --type f32, f16 or bf16")
    return kind


# ----------------------------------------------------------------------------------------------------------- the plan


def plan(checkpoint: Checkpoint) -> Iterator[Planned]:
    """Every tensor of the folder, in order.

    Raises UnsupportedError for a tensor that such checkpoints have no name for.
    """
    specs = {spec.gguf: spec for spec in tensors(checkpoint.config)}
    raw = {} if checkpoint.is_gguf else _with_offsets(checkpoint, specs)
    for name, array in checkpoint.tensors.items():
        if name.endswith(SCALES):
            continue
        spec = specs[name]
        if spec.hf:
            yield Planned(spec.hf, _shape(spec, array), _values(checkpoint, spec, array, raw.get(name)), name)
        elif spec.unless:
            yield from _unfused(checkpoint, spec, specs, array)
        elif spec.role is not Role.VECTOR or checkpoint.is_gguf:
            raise UnsupportedError(f"{name}: checkpoints for transformers say this in another way, which is not known")
        # else: factors of RoPE, which config.json says


def _shape(spec: TensorSpec, array: Array) -> tuple[int, ...]:
    return array.shape[::-1] if spec.transpose else array.shape


def _values(
    checkpoint: Checkpoint, spec: TensorSpec, array: Array, raw: Array | None = None
) -> Callable[[], Iterator[Floats]]:
    """What reads a tensor as the folder has it, in blocks of rows.

    raw: the same tensor in the source's own folder; its very values are written if nothing has changed them (to add an
    offset and to take it away again may round).
    """
    scale = next((s for s in SCALES[:1] if spec.gguf.removesuffix(".weight") + s in checkpoint.tensors), None)

    def whole() -> Floats:
        values = array.read()
        if scale is not None:
            values = values * checkpoint.tensors[spec.gguf.removesuffix(".weight") + scale].read()
        if raw is not None and raw.shape == array.shape:
            theirs = raw.read()
            if np.array_equal(spec.from_hf(theirs, checkpoint.config), values):
                return theirs
        found: Floats = np.ascontiguousarray(spec.to_hf(values, checkpoint.config))
        return found

    def read() -> Iterator[Floats]:
        if spec.transpose or spec.permute or spec.offset or scale is not None or len(array.shape) < 2:
            yield whole()
            return
        n_rows = max(1, _BLOCK_WEIGHTS // array.shape[1])
        yield from (array.rows(at, min(at + n_rows, array.shape[0])) for at in range(0, array.shape[0], n_rows))

    return read


def _with_offsets(checkpoint: Checkpoint, specs: Mapping[str, TensorSpec]) -> dict[str, Array]:
    """The source's own vectors to which GGUF adds something, by GGUF name."""
    if not any(spec.offset for spec in specs.values()):
        return {}
    arrays, _, _ = checkpoints._arrays(checkpoint.path)
    named = checkpoints._renamed(checkpoint.config, arrays)
    return {spec.gguf: named[spec.hf] for spec in specs.values() if spec.offset and spec.hf in named}


def _unfused(
    checkpoint: Checkpoint, fused: TensorSpec, specs: Mapping[str, TensorSpec], array: Array
) -> Iterator[Planned]:
    """Queries, keys and values that only GGUF keeps in one tensor."""
    c, start = checkpoint.config, 0
    stem, last = fused.gguf.split("attn_qkv")
    for letter, (name, width) in zip("qkv", COMPOSED["qkv_dim"], strict=True):
        spec = specs[f"{stem}attn_{letter}{last}"]
        n = getattr(c, name) * getattr(c, width)
        part = Array(array.name, (n, *array.shape[1:]), array.kind, _rows_from(array, start))
        yield Planned(spec.hf, part.shape, _values(checkpoint, spec, part), fused.gguf)
        start += n


def _rows_from(array: Array, start: int) -> Callable[[int, int], Floats]:
    return lambda first, last: array.rows(start + first, start + last)


# ------------------------------------------------------------------------------------------------------- config.json


def _config(checkpoint: Checkpoint, kind: str) -> dict[str, Any]:
    """config.json: the source's with what has changed, or a new one; no trace of how it was quantized."""
    c, there = checkpoint.config, checkpoint.tensors
    if c.head_dim != c.v_head_dim or (c.spec.hf_keys.get("dim") == "n_embd" and c.attn_dim != c.dim):
        raise UnsupportedError(f"transformers has no {c.arch} model with heads of {c.head_dim} in a width of {c.dim}")
    start = None
    said = {} if checkpoint.is_gguf else checkpoints._pooling(checkpoint.path)  # in modules.json, not here
    if checkpoint.hf and "text_config" not in checkpoint.hf:
        start = {**{key: value for key, value in checkpoint.hf.items() if key != "quantization_config"}, **said}
    out = {key: value for key, value in config_json(c, start).items() if key not in said}
    if start is None:
        out |= {"tie_word_embeddings": "output.weight" not in there}
        out |= {"attention_bias": True} if c.arch == "llama" and "blk.0.attn_q.bias" in there else {}
        out |= {"mlp_bias": True} if c.arch == "llama" and "blk.0.ffn_up.bias" in there else {}
    out |= hf_tokenizer.token_ids(checkpoint, out)
    out.pop("dtype", None)
    return {**out, "torch_dtype": _DTYPES[kind]}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- weights


def _write_weights(
    folder: Path, planned: list[Planned], kind: str, forget: Callable[[], None], progress: Progress
) -> dict[str, str]:
    """model.safetensors, or its parts and their index; sha256 of each tensor."""
    shards: list[list[Planned]] = [[]]
    sizes = [0]
    for tensor in planned:
        if shards[-1] and sizes[-1] + tensor.n_bytes(kind) > SHARD_BYTES:
            shards.append([])
            sizes.append(0)
        shards[-1].append(tensor)
        sizes[-1] += tensor.n_bytes(kind)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        places = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)
    digests: dict[str, Any] = {}
    done = 0
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(shard, kind))
            for tensor in shard:
                digest = digests.setdefault(tensor.source, hashlib.sha256())
                for values in tensor.read():
                    data = to_bytes(values, kind)
                    digest.update(data)
                    file.write(data)
                    done += len(data)
                    progress("write", done, sum(sizes))
                forget()
            os.fsync(file.fileno())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _header(tensors: list[Planned], kind: str) -> bytes:
    """The beginning of a safetensors file: the length of a JSON object, and the object, padded to eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        end = at + tensor.n_bytes(kind)
        entries[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def to_bytes(values: Floats, kind: str) -> bytes:
    """float32 as a type of safetensors, little-endian, rounded to the nearest."""
    if kind == "F32":
        return values.astype("<f4", copy=False).tobytes()
    if kind == "F16":
        return values.astype("<f2").tobytes()
    bits: NDArray[np.uint32] = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # half to even
    rounded = np.where(np.isnan(values), bits | np.uint32(0x400000), rounded)
    return (rounded >> np.uint32(16)).astype("<u2").tobytes()
