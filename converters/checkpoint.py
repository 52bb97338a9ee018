"""A trained model, wherever it comes from -> `Checkpoint`: its shape, and its tensors as GGUF arranges them.

    checkpoint = read(path)             a Hugging Face folder, or a GGUF file
    checkpoint.tensors["blk.0.attn_q.weight"].rows(0, 64)

Nothing is read before it is asked for, and nothing in a checkpoint is executed. Names, shapes and the rearrangement of
each tensor come from the table of `edgelm.architectures`; a tensor that it does not know is an error.
"""

from __future__ import annotations

import fnmatch
import mmap
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm import gguf
from edgelm.arch import Config, Role, TensorSpec, tensors
from edgelm.errors import FormatError, SourceError, UnsupportedError, UsageError
from edgelm.formats import QTensor
from edgelm.rope import factors_from_hf

from . import quantized_checkpoint, safetensors_file, torch_zip
from .arrays import Array, Floats
from .gguf_metadata import typed
from .gguf_writer import Typed
from .safetensors_file import read_json


@dataclass(frozen=True)
class Checkpoint:
    """A model to convert.

    path: its folder or file; config: its shape; tensors: by GGUF name, in the order of the source, values as GGUF has
    them; hf: config.json, for folders; metadata: every key of a GGUF file, in its own bytes; notes: what was left out;
    facts: what was done to it since, for the report, by transformation ("lora", "pruned", …): values of JSON;
    kept_tokens: if tokens were cut, the old ids of those that are left (the keys of a GGUF file say so already, a
    folder's tokenizer does not).
    """

    path: Path
    config: Config
    tensors: Mapping[str, Array]
    hf: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Typed] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    forget: Callable[[], None] = lambda: None
    kept_tokens: NDArray[np.intp] | None = None

    @property
    def is_gguf(self) -> bool:
        return bool(self.metadata)

    @property
    def n_tokens_before(self) -> int:
        """Size of the vocabulary that the folder's tokenizer has, which that of the model may no longer be."""
        is_whole = self.kept_tokens is None
        return self.config.vocab_size if is_whole else Config.from_hf(dict(self.hf)).vocab_size

    def fingerprint(self) -> str:
        """Changes when a file of the source is another one: names, sizes and times."""
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        return repr((str(self.path.resolve()), facts))


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder of Hugging Face's kind, or in a GGUF file.

    Raises SourceError for what is not there, FormatError for what is broken, UnsupportedError for architectures,
    hyperparameters and types of numbers that are not known.
    """
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() == ".gguf":
        return _gguf(path)
    if path.suffix.lower() in (".safetensors", ".bin", ".pth", ".pt") and path.exists():
        raise UsageError(f"{path}: give the folder that it lies in, with config.json and the tokenizer's files")
    raise SourceError(f"{path}: neither a folder with a Hugging Face checkpoint nor a .gguf file")


# ------------------------------------------------------------------------------------------------------------- GGUF


def _gguf(path: Path) -> Checkpoint:
    file = gguf.read(path)
    config = Config.from_gguf(file.metadata)
    arrays = {name: _stored(tensor) for name, tensor in file.tensors.items()}
    metadata = {key: value for part in file.paths[:1] for key, value in typed(part).items()}
    return Checkpoint(path, config, arrays, metadata=metadata, files=file.paths, forget=file.forget)


def _stored(tensor: QTensor) -> Array:
    per_row = len(tensor.data) // tensor.shape[0] if len(tensor.shape) > 1 else 1

    def rows(start: int, stop: int) -> Floats:
        if len(tensor.shape) == 1:
            return tensor.dequantize()[start:stop]
        shape = (stop - start, *tensor.shape[1:])
        data = tensor.data[start * per_row : stop * per_row]
        return QTensor(tensor.name, tensor.format, shape, data).dequantize()

    return Array(tensor.name, tensor.shape, tensor.format.name, rows, tensor)


# ----------------------------------------------------------------------------------------------------- Hugging Face


def _folder(path: Path) -> Checkpoint:
    if not (path / "config.json").exists():
        inside = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; it holds GGUF files, one of which can be a source: {', '.join(inside[:8])}" if inside else ""
        raise SourceError(f"{path} has no config.json, so it is no Hugging Face checkpoint{hint}")
    hf = _object(path / "config.json")
    if not isinstance(hf.get("architectures"), list) or not hf["architectures"]:
        raise FormatError(f"{path / 'config.json'}: it does not say which architecture this is")
    config = Config.from_hf({**hf, **_pooling(path)})
    arrays, files, forget = _arrays(path)
    arrays = quantized_checkpoint.as_floats(hf.get("quantization_config") or {}, arrays)
    found, notes = _arranged(config, _renamed(config, arrays), tied=hf.get("tie_word_embeddings"))
    return Checkpoint(path, config, {**_factors(config, hf), **found}, hf, notes=notes, files=files, forget=forget)


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise FormatError(f"{path}: no JSON object")
    return value


def _pooling(path: Path) -> dict[str, int]:
    """How token vectors become one, as sentence-transformers writes it: {"pooling_type": GGUF's number}, or nothing."""
    if not (path / "modules.json").exists():
        return {}
    modules = read_json(path / "modules.json")
    for module in modules if isinstance(modules, list) else ():
        if isinstance(module, dict) and str(module.get("type", "")).endswith("Pooling"):
            how = _object(path / _plain(path, module.get("path")) / "config.json")
            for number, name in ((1, "mean_tokens"), (2, "cls_token"), (3, "lasttoken")):
                if how.get(f"pooling_mode_{name}") or how.get("pooling_mode") == name.split("_")[0]:
                    return {"pooling_type": number}
            raise UnsupportedError(f"{path}: a pooling that is neither mean, cls nor lasttoken")
    return {}


def _plain(folder: Path, name: Any) -> str:
    """A name that stays inside its folder."""
    if not isinstance(name, str) or not name or name in (".", "..") or re.search(r"[/\\:\0]", name):
        raise FormatError(f"{folder}: {name!r:.80} is no plain name of a file")
    return name


def _arrays(path: Path) -> tuple[dict[str, Array], tuple[Path, ...], Callable[[], None]]:
    """All tensors of a folder by their names in it, the files they are in, and what gives their memory back."""
    for single, read_file in (("model.safetensors", safetensors_file.read), ("pytorch_model.bin", torch_zip.read)):
        index = path / f"{single}.index.json"
        names = _shards(index) if index.exists() else {single: None} if (path / single).exists() else {}
        if not names:
            continue
        arrays: dict[str, Array] = {}
        for name, expected in names.items():
            found = read_file(path / name)
            if expected is not None and found.keys() != expected:
                odd = sorted(found.keys() ^ expected)[0]
                raise FormatError(f"{path / name}: it and {index.name} differ about the tensor {odd!r:.80}")
            arrays.update(found)
        files = tuple(path / name for name in names)
        return arrays, files, _forgetting(arrays)
    raise SourceError(f"{path}: no model.safetensors and no pytorch_model.bin, whole or in parts")


def _shards(index: Path) -> dict[str, set[str] | None]:
    """The files of a checkpoint in parts, in order, and the tensors that each must hold."""
    places = _object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FormatError(f"{index}: it has no weight_map")
    names = sorted(set(map(str, places.values())))
    files: dict[str, set[str] | None] = {_plain(index.parent, name): set() for name in names}
    for tensor, name in places.items():
        holds = files.get(name) if isinstance(name, str) else None
        if holds is None:
            raise FormatError(f"{index}: the tensor {tensor!r:.80} lies in {name!r:.80}, which is no name")
        holds.add(tensor)
    for name in files:
        if not (index.parent / name).exists():
            raise SourceError(f"{index.parent / name}: this part of the checkpoint is missing")
    return files


def _forgetting(arrays: Mapping[str, Array]) -> Callable[[], None]:
    maps = {id(a.source): a.source for a in arrays.values() if isinstance(a.source, mmap.mmap)}

    def forget() -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            for data in maps.values():
                data.madvise(mmap.MADV_DONTNEED)

    return forget


def _renamed(config: Config, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors under the names of the table; without those that nothing needs."""
    out: dict[str, Array] = {}
    for name, array in arrays.items():
        new = name
        for pattern, replacement in config.spec.hf_renamed:
            new = re.sub(pattern, replacement, new)
        if any(fnmatch.fnmatchcase(new, pattern) for pattern in config.spec.hf_ignored):
            continue
        if new in out:
            raise FormatError(f"the checkpoint has {new!r:.80} twice: as {out[new].name!r:.80} and as {name!r:.80}")
        out[new] = array
    return out


def _arranged(config: Config, arrays: dict[str, Array], tied: Any) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Every tensor of the model as GGUF has it, by GGUF name, proven to be all and of the right shape."""
    specs = {spec.hf: spec for spec in tensors(config) if spec.hf}
    if unknown := [name for name in arrays if name not in specs]:
        raise FormatError(
            f"{len(unknown)} tensors of the checkpoint are no part of a {config.arch} model with {config.n_layers} "
            f"layers, the first is {unknown[0]!r:.100}"
        )
    notes: tuple[str, ...] = ()
    head = next((spec for spec in specs.values() if spec.gguf == "output.weight"), None)
    if head is not None and head.hf in arrays and tied:
        del arrays[head.hf]
        notes = (f"{head.hf} left out: config.json says that it is the embedding",)
    if head is not None and head.hf not in arrays and tied is False:
        raise FormatError(f"config.json says that {head.hf} is not the embedding, and the checkpoint lacks it")
    for spec in specs.values():
        instead = next((s.hf for s in specs.values() if s.gguf == spec.unless), "")
        if spec.required and spec.hf not in arrays and instead not in arrays:
            raise FormatError(f"the checkpoint lacks the tensor {spec.hf} of a {config.arch} model")
    return {specs[name].gguf: arranged(specs[name], array, config) for name, array in arrays.items()}, notes


def arranged(spec: TensorSpec, array: Array, config: Config) -> Array:
    """An array of a Hugging Face checkpoint as GGUF has it; FormatError when its shape is wrong."""
    shape = spec.shape_for(config)
    if array.shape != (shape[::-1] if spec.transpose else shape):
        raise FormatError(f"{array.name} has shape {array.shape}; this {config.arch} model needs {shape}")
    if spec.transpose:  # read as a whole: no row of the result lies in one place
        return replace(
            array, shape=shape, kept={}, rows=lambda start, stop: spec.from_hf(array.read(), config)[start:stop]
        )
    return rearranged_rows(spec, array, config) if spec.permute or spec.offset else array


def rearranged_rows(spec: TensorSpec, array: Array, config: Config) -> Array:
    """Rows of a tensor, or of a factor of it that has as many, in GGUF's order, and with what GGUF adds to them."""
    order = np.arange(array.shape[0])
    if spec.permute:
        order = replace(spec, transpose=False, offset=0.0).from_hf(order, config)  # where each row comes from

    def reordered(read: Callable[[int, int], NDArray[Any]], start: int, stop: int) -> NDArray[Any]:
        wanted = order[start:stop]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        found: NDArray[Any] = read(low, high)[wanted - low]
        return found

    def rows(start: int, stop: int) -> Floats:
        found: Floats = reordered(array.rows, start, stop)
        return found + np.float32(spec.offset) if spec.offset else found

    kept = {} if spec.offset else {name: partial(reordered, read) for name, read in array.kept.items()}
    return replace(array, rows=rows, kept=kept)


def _factors(config: Config, hf: Mapping[str, Any]) -> dict[str, Array]:
    """The divisors of RoPE frequencies, which config.json has and GGUF keeps as tensors."""
    hf = {**hf, **(hf.get("text_config") or {})}
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)
    try:
        rope = {"original_max_position_embeddings": hf.get("original_max_position_embeddings"), **rope}
        made = factors_from_hf(rope, config.rope_base, config.rope_dim)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"config.json garbles its scaling of RoPE: {error!r:.80}") from None
    specs = {spec.gguf: spec for spec in tensors(config) if spec.role is Role.VECTOR}
    out = {}
    for name, factors in made.items():
        gguf_name = f"{name}.weight"
        if gguf_name not in specs or factors.shape != specs[gguf_name].shape_for(config):
            raise UnsupportedError(f"RoPE of a {config.arch} model scaled by {factors.shape} factors ({name})")
        out[gguf_name] = Array("config.json", factors.shape, "F32", partial(_slice, factors))
    return out


def _slice(values: Floats, start: int, stop: int) -> Floats:
    return values[start:stop]
