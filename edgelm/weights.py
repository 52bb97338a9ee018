"""The weights of one model under their own names: `w.blk[3].attn_q.weight` is the tensor `blk.3.attn_q.weight`.

Before anything may run, `Weights.from_gguf` proves that the file has every tensor its architecture needs, none that
it does not know, and each in the shape that the hyperparameters say. It computes nothing and copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .arch import ARCHS, Config, Role, TensorSpec, tensors
from .errors import FormatError
from .formats import QTensor

_FLOATS = frozenset({"F32", "F16", "BF16"})
SCALES = (".scale", ".input_scale")  # one number each, beside weights of formats such as NVFP4


class Layer:
    """What stands under one name: `weight`, `bias` and `scale`, each a QTensor or None."""

    __slots__ = ("bias", "scale", "weight")

    def __init__(self, weight: QTensor, bias: QTensor | None, scale: QTensor | None) -> None:
        self.weight, self.bias, self.scale = weight, bias, scale


class _Names:
    """Attributes by name, each a Layer; None if only other files have it, AttributeError if none has."""

    def __init__(self, layers: Mapping[str, Layer], known: frozenset[str], prefix: str) -> None:
        self._layers, self._known, self._prefix = layers, known, prefix

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._known:
            raise AttributeError(f"no architecture has a tensor {self._prefix}{name}")
        return self._layers.get(self._prefix + name)


# Everything any table names, so that a function over weights may ask for what only some architectures have.
_GGUF_NAMES = {spec.gguf.rpartition(".")[0] for arch in ARCHS.values() for spec in arch.tensors}
_BLOCK_NAMES = frozenset(name.removeprefix("blk.{i}.") for name in _GGUF_NAMES if "{i}" in name)
_MODEL_NAMES = frozenset(name for name in _GGUF_NAMES if "{i}" not in name)


class Weights(_Names):
    """All tensors of a model, proven against its architecture; read-only and shareable.

    blk: one group of names per layer; by_name: every tensor by its GGUF name; n_bytes: of all of them in the file.
    """

    def __init__(self, config: Config, by_name: Mapping[str, QTensor]) -> None:
        layers: dict[str, Layer] = {}
        for name, tensor in by_name.items():
            stem, _, last = name.rpartition(".")
            if last == "weight":
                layers[stem] = Layer(tensor, by_name.get(f"{stem}.bias"), by_name.get(f"{stem}.scale"))
        super().__init__(layers, _MODEL_NAMES, "")
        self.by_name = by_name
        self.n_bytes = sum(t.n_bytes for t in by_name.values())
        self.blk = tuple(_Names(layers, _BLOCK_NAMES, f"blk.{i}.") for i in range(config.n_layers))

    @classmethod
    def from_gguf(cls, config: Config, file_tensors: Mapping[str, QTensor]) -> Weights:
        """Weights of the model `config` from a file's tensors.

        Raises FormatError for a tensor that is missing, unknown, of the wrong shape, or of a type its role cannot have.
        """
        left = dict(file_tensors)
        for spec in tensors(config):
            if spec.unless and spec.unless in file_tensors:
                if spec.gguf in file_tensors:
                    raise FormatError(f"the file has both {spec.gguf} and {spec.unless}, which say the same")
                continue
            tensor = left.pop(spec.gguf, None)
            if tensor is None:
                if spec.required:
                    raise FormatError(f"the tensor {spec.gguf} of this {config.arch} model is missing from the file")
                continue
            _prove(config, spec, tensor)
            if spec.role is Role.MATMUL:
                for suffix in SCALES:
                    name = spec.gguf.removesuffix(".weight") + suffix
                    if (scale := left.pop(name, None)) is not None:
                        _prove(config, TensorSpec(name, "", (1,), Role.VECTOR), scale)
        for name in file_tensors:
            if name.endswith(".bias") and name.removesuffix("bias") + "weight" not in file_tensors:
                raise FormatError(f"the file has {name!r:.80} but not the weight that it belongs to")
        for name in left:
            raise FormatError(
                f"{len(left)} tensors of the file are no part of a {config.arch} model with {config.n_layers} layers, "
                f"the first is {name!r:.80}"
            )
        return cls(config, dict(file_tensors))

    def factors(self) -> dict[str, Any]:
        """The divisors of RoPE frequencies that this file has, by tensor name without ".weight": float32 (pairs,)."""
        names = ("rope_freqs", "rope_factors_long", "rope_factors_short")
        return {n: layer.weight.dequantize() for n in names if (layer := getattr(self, n)) is not None}

    def __iter__(self) -> Iterator[QTensor]:
        return iter(self.by_name.values())


def _prove(config: Config, spec: TensorSpec, tensor: QTensor) -> None:
    shape = spec.shape_for(config)
    if tensor.shape != shape:
        raise FormatError(f"{spec.gguf} has shape {tensor.shape}; this {config.arch} model needs {shape}")
    if spec.role is Role.VECTOR and tensor.format.name not in _FLOATS:
        raise FormatError(f"{spec.gguf} is {tensor.format.name}; it must be F32, F16 or BF16")
