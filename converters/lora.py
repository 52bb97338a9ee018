"""Low-rank adapters (Hu et al., 2106.09685) as peft saves them: read, and merged into the model they were made for.

    checkpoint = merged(checkpoint, Path("adapter"), scale=1.0)

An adapter adds s B A to a matrix of shape (out, in), where A is (r, in), B is (out, r), and s = alpha / r, or alpha /
sqrt(r) ("rslora", 2312.03732). Peft names a matrix as the Hugging Face checkpoint does; the table of
`edgelm.architectures` says which tensor of ours that is and where its rows lie. Layers that peft calls transposed
(`fan_in_fan_out`) are (out, in) here, as all others are. Sums are formed in float32, when rows are asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.arch import Config, Role, TensorSpec, tensors
from edgelm.disk import file_sha256
from edgelm.errors import FormatError, SourceError, UnsupportedError, UsageError

from . import safetensors_file, torch_zip
from .arrays import Array, Floats
from .checkpoint import Checkpoint, arranged, rearranged_rows
from .safetensors_file import read_json

MAX_RANK = 1 << 14
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(\.default)?(\.weight)?")
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)\.")
# Settings that change what an adapter means, and the values under which they do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "layer_replication": (None, []),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
}


@dataclass(frozen=True)
class Delta:
    """What is added to a tensor of shape (out, in): scale * left (out, r) @ right (r, in).

    alpha: as adapter_config.json has it for this tensor.
    """

    left: Array
    right: Array
    scale: float
    alpha: float

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    def rows(self, start: int, stop: int) -> Floats:
        """Rows of it: float32 (stop - start, in)."""
        product: Floats = self.left.rows(start, stop) @ self.right.read()
        return product * np.float32(self.scale)


@dataclass(frozen=True)
class Adapter:
    """An adapter in GGUF's names and arrangement.

    deltas: what is added, by tensor; whole: tensors that it has in full, in place of the model's; file: its weights;
    alpha: of most tensors.
    """

    path: Path
    file: Path
    alpha: float
    deltas: Mapping[str, Delta]
    whole: Mapping[str, Array] = field(default_factory=dict)


def merged(checkpoint: Checkpoint, folder: Path, scale: float = 1.0) -> Checkpoint:
    """The model with an adapter merged into it, `scale` times as strongly as it was trained.

    Where the output matrix is the embedding and only one of them is changed, they are two tensors from then on.

    Raises SourceError for what is not there, FormatError for what is broken or was made for another model,
    UnsupportedError for adapters that add something else than a product of two matrices.
    """
    if not math.isfinite(scale):
        raise UsageError(f"an adapter cannot be merged {scale} times")
    adapter = read(folder, checkpoint.config)
    arrays, notes, hf = dict(checkpoint.tensors), list(checkpoint.notes), dict(checkpoint.hf)
    if _parts_from_embedding(checkpoint, adapter):
        arrays["output.weight"] = replace(arrays["token_embd.weight"])
        hf["tie_word_embeddings"] = False
        notes.append(f"{folder.name}: the output matrix is no longer the embedding, the adapter changes one of them")
    for name, array in adapter.whole.items():
        if name in arrays and arrays[name].shape != array.shape:
            raise FormatError(f"{array.name}: shape {array.shape}, and the model's is {arrays[name].shape}")
        arrays[name] = array
    for name, delta in adapter.deltas.items():
        if name not in arrays:
            raise FormatError(f"{folder}: it changes {name}, which this checkpoint does not have")
        arrays[name] = _sum(arrays[name], replace(delta, scale=delta.scale * scale))
    fact = {
        "adapter": folder.resolve().name,
        "sha256": file_sha256(adapter.file),
        "scale": scale,
        "rank": max((delta.rank for delta in adapter.deltas.values()), default=0),
        "tensors": len(adapter.deltas) + len(adapter.whole),
    }
    facts = {**checkpoint.facts, "lora": [*checkpoint.facts.get("lora", []), fact]}
    files = (*checkpoint.files, adapter.file, folder / "adapter_config.json")
    return replace(checkpoint, tensors=arrays, notes=tuple(notes), hf=hf, facts=facts, files=files)


def _sum(base: Array, delta: Delta) -> Array:
    def rows(start: int, stop: int) -> Floats:
        return base.rows(start, stop) + delta.rows(start, stop)

    return replace(base, rows=rows, as_is=None, kept={}, numbers=None)


def _parts_from_embedding(checkpoint: Checkpoint, adapter: Adapter) -> bool:
    """Whether the output matrix, so far the embedding, becomes another one."""
    if "output.weight" in checkpoint.tensors or checkpoint.config.spec.family == "encoder":
        return False
    changed = {"token_embd.weight", "output.weight"} & {*adapter.deltas, *adapter.whole}
    if changed == {"token_embd.weight"} and not adapter.deltas.get("token_embd.weight"):
        table = checkpoint.tensors["token_embd.weight"]
        if _same(table, adapter.whole["token_embd.weight"]):  # saved with the adapter, and never trained
            return False
    if changed and not any(spec.gguf == "output.weight" for spec in tensors(checkpoint.config)):
        raise UnsupportedError(
            f"{adapter.path}: it changes the embedding but not the output, or the other way round; in a "
            f"{checkpoint.config.arch} model they are one"
        )
    return bool(changed)


def _same(one: Array, other: Array, n_rows: int = 4096) -> bool:
    if one.shape != other.shape:
        return False
    extents = ((start, min(start + n_rows, one.shape[0])) for start in range(0, one.shape[0], n_rows))
    return all(np.array_equal(one.rows(*extent), other.rows(*extent)) for extent in extents)


# ---------------------------------------------------------------------------------------------------------- reading


def read(folder: Path, config: Config) -> Adapter:
    """The adapter in a folder of peft's, made for a model of the shape `config`; raises what `merged` raises."""
    settings = _settings(folder)
    arrays, file = _arrays(folder)
    names = _Names(config, folder)
    halves: dict[str, dict[str, Array]] = {}
    whole: dict[str, Array] = {}
    for name, array in arrays.items():
        if "lora_magnitude_vector" in name:
            raise UnsupportedError(f"{folder}: {name!r:.100} makes it a DoRA adapter, which also scales columns")
        if name.endswith(".base_layer.weight"):
            continue  # the model's own
        if match := _PART.fullmatch(name):
            pair = halves.setdefault(match["module"], {})
            if match["part"] in pair:
                raise FormatError(f"{file}: {name!r:.100} is there twice")
            pair[match["part"]] = array
        elif ".lora_" in name:
            raise UnsupportedError(f"{folder}: {name!r:.100} is no factor of a low-rank product")
        else:
            spec = names.spec(_WRAPPERS.sub(".", name))
            whole[spec.gguf] = arranged(spec, array, config)
    deltas = {}
    for module, pair in halves.items():
        spec = names.spec(f"{module}.weight")
        if spec.gguf in deltas or spec.gguf in whole:
            raise FormatError(f"{file}: it says twice what becomes of {spec.hf}")
        deltas[spec.gguf] = _delta(file, module, pair, spec, config, settings)
    if not deltas and not whole:
        raise FormatError(f"{file}: it holds nothing that changes a model")
    return Adapter(folder, file, settings.alpha, deltas, whole)


@dataclass(frozen=True)
class _Settings:
    """What adapter_config.json says: alpha, and how it scales; patterns: another alpha for modules of these names."""

    alpha: float
    is_rslora: bool
    patterns: Mapping[str, float]

    def alpha_of(self, module: str) -> float:
        """As peft finds it: the first pattern that is the module's name, or its end after a point."""
        fitting = (p for p in self.patterns if module == p.removeprefix("^") or module.endswith(f".{p}"))
        return next((self.patterns[p] for p in fitting), self.alpha)


def _settings(folder: Path) -> _Settings:
    path = folder / "adapter_config.json"
    config = read_json(path, limit=1 << 20)
    if not isinstance(config, dict):
        raise FormatError(f"{path}: no JSON object")
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path}: an adapter of the kind {config.get('peft_type')!r:.40}; only LORA is known")
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise UnsupportedError(f"{path}: {name} is {config[name]!r:.60}, which is more than a low-rank product")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"{path}: alpha_pattern is no JSON object")
    if odd := [p for p in patterns if not re.fullmatch(r"\^?[\w.]+", p)]:
        raise UnsupportedError(f"{path}: alpha_pattern {odd[0]!r:.60} is a regular expression; only names are read")
    alphas = {pattern: _number(path, "alpha_pattern", alpha) for pattern, alpha in patterns.items()}
    return _Settings(_number(path, "lora_alpha", config.get("lora_alpha")), bool(config.get("use_rslora")), alphas)


def _number(path: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e6:
        raise FormatError(f"{path}: {name} is {value!r:.40}, and has to be a number")
    return float(value)


def _arrays(folder: Path) -> tuple[dict[str, Array], Path]:
    for suffix, read_file in (("safetensors", safetensors_file.read), ("bin", torch_zip.read)):
        if (file := folder / f"adapter_model.{suffix}").exists():
            return read_file(file), file
    raise SourceError(f"{folder}: no adapter_model.safetensors and no adapter_model.bin")


class _Names:
    """Finds the tensor that a name of peft's means."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._specs = {spec.hf: spec for spec in tensors(config) if spec.hf}

    def spec(self, name: str) -> TensorSpec:
        """Of "base_model.model.model.layers.0.self_attn.q_proj.weight"; FormatError for what no table has."""
        bare = _bare(name)
        for pattern, replacement in self._config.spec.hf_renamed:
            bare = re.sub(pattern, replacement, bare)
        if bare not in self._specs:
            raise FormatError(f"{self._folder}: {name!r:.100} is no tensor of a {self._config.arch} model")
        return self._specs[bare]


def _bare(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _delta(
    file: Path, module: str, pair: Mapping[str, Array], spec: TensorSpec, config: Config, settings: _Settings
) -> Delta:
    """The two factors of a tensor, proven to fit it, as GGUF arranges it."""
    shape = spec.shape_for(config)
    if pair.keys() == {"A", "B"} and len(shape) == 2:
        left, right = pair["B"], pair["A"]
    elif pair.keys() == {"embedding_A", "embedding_B"} and spec.role is Role.EMBED:
        left, right = _transposed(pair["embedding_A"]), _transposed(pair["embedding_B"])
    else:
        raise FormatError(f"{file}: {module!r:.100} has {', '.join(sorted(pair))}: no product for {spec.hf}")
    rank = right.shape[0] if len(right.shape) == 2 else 0
    if not 0 < rank <= MAX_RANK or left.shape != (shape[0], rank) or right.shape != (rank, shape[1]):
        raise FormatError(
            f"{file}: {module!r:.100} has factors of shape {left.shape} and {right.shape}; the product must be {shape}"
        )
    alpha = settings.alpha_of(_bare(module))
    scale = alpha / (math.sqrt(rank) if settings.is_rslora else rank)
    return Delta(rearranged_rows(spec, left, config), right, scale, alpha)


def _transposed(array: Array) -> Array:
    def rows(start: int, stop: int) -> Floats:
        return np.ascontiguousarray(array.read().T[start:stop])

    return replace(array, shape=array.shape[::-1], rows=rows, numbers=None)
