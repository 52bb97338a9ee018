"""What stays of a model, and the model that it leaves: a smaller Config, cut tensors, cut metadata.

    cut = Cut(config, layers=(0, 1, 3), of_layer=({"ffn_dim": channels}, …))
    checkpoint = cut.applied(checkpoint, {"blk.0.ffn_down.weight": refitted})

Driven by the tables of `edgelm.arch`: shapes name the sizes that they depend on, so whoever says which channels or
heads stay has said what becomes of every tensor. Tensors stay lazy. It decides nothing; see `prune` for who does.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm import gguf
from edgelm.arch import Config, TensorSpec
from edgelm.tensors import COMPOSED
from edgelm.weights import SCALES

from .arrays import Array, Floats
from .checkpoint import Checkpoint
from .gguf_writer import Typed

Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Cut:
    """What stays, by old numbers, ascending.

    config: of the model before. layers: that stay. shared: by the size's name ("dim", "vocab_size"), what stays in the
    whole model. of_layer: for each layer that stays, what stays of "ffn_dim", "n_heads" and "n_kv_heads" in it; as many
    in every layer. A size that is not named stays whole.
    """

    config: Config
    layers: tuple[int, ...]
    shared: Mapping[str, Indices] = field(default_factory=dict)
    of_layer: tuple[Mapping[str, Indices], ...] = ()

    def after(self) -> Config:
        """The shape of the model that is left."""
        changed: dict[str, Any] = {"n_layers": len(self.layers)}
        for stay in (self.shared, self.of_layer[0] if self.of_layer else {}):
            changed |= {name: len(stays) for name, stays in stay.items()}
        changed |= {name: tuple(getattr(self.config, name)[i] for i in self.layers) for name in _LAYER_FIELDS}
        after = dataclasses.replace(self.config, **changed)
        key = f"{after.arch}.attention.scale"
        if key in self.config.to_gguf() or key not in after.to_gguf():
            return after
        derived = Config.from_gguf({name: value for name, value in after.to_gguf().items() if name != key})
        return dataclasses.replace(after, attention_scale=derived.attention_scale)  # see _scales

    def stays(self, size: str | int, layer: int | None) -> Indices | None:
        """Indices that stay along a dimension of this size in the new layer `layer` (None: of no layer).

        None if all of them stay.
        """
        if isinstance(size, int):
            return None
        own = self.of_layer[layer] if layer is not None and self.of_layer else {}
        start, parts, is_cut = 0, [], False
        for name, width_name in COMPOSED.get(size, ((size, ""),)):
            n = getattr(self.config, name)
            width = getattr(self.config, width_name) if width_name else 1
            stays = own.get(name, self.shared.get(name))
            is_cut |= stays is not None
            units = np.arange(n) if stays is None else stays
            parts.append((start + units[:, None] * width + np.arange(width)).reshape(-1))
            start += n * width
        return np.concatenate(parts) if is_cut else None

    def specs(self) -> list[tuple[TensorSpec, TensorSpec, int | None]]:
        """(tensor as it was, as it will be, its new layer) of everything that stays, layer by layer."""
        of_layer = [spec for spec in self.config.spec.tensors if "{i}" in spec.gguf]
        rest = [(spec, spec, None) for spec in self.config.spec.tensors if "{i}" not in spec.gguf]
        layers = enumerate(self.layers)
        return [*rest, *((spec.at(old), spec.at(new), new) for new, old in layers for spec in of_layer)]

    def applied(self, checkpoint: Checkpoint, changed: Mapping[str, Floats] | None = None) -> Checkpoint:
        """The checkpoint that is left.

        changed: float32 arrays, by old GGUF name, in place of what would be left; cut already along some dimensions.
        """
        changed = changed or {}
        after, arrays = self.after(), dict[str, Array]()
        scales = _scales(self.config, after, checkpoint.tensors)
        for old, new, layer in self.specs():
            if old.gguf not in checkpoint.tensors:
                continue
            array = checkpoint.tensors[old.gguf]
            stays = [self.stays(size, layer) for size in old.shape]
            if old.gguf in changed:
                array = given(array.name, changed[old.gguf], array.kind)
                stays = [None if s is None or len(s) == n else s for s, n in zip(stays, array.shape, strict=True)]
            array = cut_array(array, stays)
            factor = scales.get(re.sub(r"^blk\.\d+\.", "blk.{i}.", new.gguf), 1.0)
            arrays[new.gguf] = array if factor == 1.0 else changed_rows(array, partial(np.multiply, np.float32(factor)))
            for suffix in SCALES:  # one number each, whatever was cut
                names = [spec.gguf.removesuffix(".weight") + suffix for spec in (old, new)]
                if names[0] in checkpoint.tensors:
                    arrays[names[1]] = checkpoint.tensors[names[0]]
        return dataclasses.replace(checkpoint, config=after, tensors=arrays, metadata=self.metadata(checkpoint))

    def metadata(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """A GGUF file's keys with the new sizes; lists with an entry for each layer are cut."""
        if not checkpoint.is_gguf:
            return {}
        keys: dict[str, Any] = {k: value for k, value in checkpoint.metadata.items() if k not in _OF_THE_SIZE}
        changed = {name: value for name, value in keys.items() if not isinstance(value, Typed)}
        for name, value in {**gguf.read(checkpoint.path).metadata, **changed}.items():
            is_ours = name.startswith(f"{self.config.arch}.")
            if is_ours and isinstance(value, np.ndarray | list) and len(value) == self.config.n_layers:
                keys[name] = [value[i] for i in self.layers] if isinstance(value, list) else value[list(self.layers)]
        before, after = self.config.to_gguf(), self.after().to_gguf()
        for name in before.keys() | after.keys():
            if name in after and (before.get(name) != after[name] or name not in keys):
                keys[name] = after[name]
            elif name not in after:
                keys.pop(name, None)
        return keys


_OF_THE_SIZE = ("general.size_label", "general.parameter_count")
_LAYER_FIELDS = tuple(f.name for f in dataclasses.fields(Config) if str(f.type).startswith("tuple["))


def _scales(before: Config, after: Config, there: Mapping[str, Array]) -> dict[str, float]:
    """Factors of tensors (names with "{i}") that keep what an architecture derives from its sizes as it was.

    Some scale attention by the width per head, or the embedding by the root of the width: runtimes will derive that
    from the new sizes, and files cannot say otherwise.
    """
    scales: dict[str, float] = {}
    if after.attention_scale != before.attention_scale:
        query = "attn_q_norm" if "blk.0.attn_q_norm.weight" in there else "attn_q"
        scales[f"blk.{{i}}.{query}.weight"] = before.attention_scale / after.attention_scale
    if before.spec.scaled_embedding and after.dim != before.dim:
        ratio = (before.dim / after.dim) ** 0.5
        scales["token_embd.weight"] = ratio
        if "output.weight" not in there:
            scales["output_norm.weight"] = 1 / ratio
    return scales


# ------------------------------------------------------------------------------------------------------------ arrays


def given(name: str, values: Floats, kind: str = "F32") -> Array:
    """An array that was computed. kind: of the one that it takes the place of."""

    def rows(start: int, stop: int) -> Floats:
        return np.ascontiguousarray(values[start:stop], np.float32)

    return Array(name, values.shape, kind, rows)


def changed_rows(array: Array, change: Callable[[Floats], Floats]) -> Array:
    """An array whose rows are changed, each on its own, when they are read."""
    return Array(array.name, array.shape, array.kind, lambda a, b: change(array.rows(a, b)), source=array.source)


def cut_array(array: Array, stays: Sequence[Indices | None]) -> Array:
    """The part of an array that stays along each of its dimensions (None: all of it)."""
    if all(s is None for s in stays):
        return array
    shape = tuple(n if s is None else len(s) for n, s in zip(array.shape, stays, strict=True))
    order = stays[0]

    def picked(read: Callable[[int, int], NDArray[Any]], start: int, stop: int) -> NDArray[Any]:
        """Rows start … stop of what stays, read in runs that lie together."""
        if order is None:
            return read(start, stop)
        wanted = order[start:stop]
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        runs = np.split(wanted, breaks) if len(wanted) else []
        parts = [read(int(run[0]), int(run[-1]) + 1) for run in runs]
        return np.concatenate(parts) if parts else read(0, 0)

    def rows(start: int, stop: int) -> Floats:
        found = picked(array.rows, start, stop)
        for axis, s in enumerate(stays):
            if axis and s is not None:
                found = np.take(found, s, axis)
        return found

    if any(s is not None for s in stays[1:]):  # blocks are cut
        return Array(array.name, shape, array.kind, rows, source=array.source)
    kept = {}
    for name, read in {**array.kept, **_own_bytes(array)}.items():
        kept[name] = lambda start, stop, read=read: picked(read, start, stop)
    return Array(array.name, shape, array.kind, rows, kept=kept, source=array.source)


def _own_bytes(array: Array) -> dict[str, Callable[[int, int], NDArray[np.uint8]]]:
    """The rows of a GGUF file's matrix as they lie in it."""
    tensor = array.as_is
    if tensor is None or len(tensor.shape) != 2:
        return {}
    return {tensor.format.name: lambda start, stop: tensor.data[start:stop]}
