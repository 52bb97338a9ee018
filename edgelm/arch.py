"""The shape of a model: `Config`, each hyperparameter with its GGUF key, its Hugging Face key and its range.

With the table ARCHS of `edgelm.architectures` this is all that edgelm knows by name. The runtime reads both from GGUF
to the attributes of `Config` and `Weights`, a converter reads them from Hugging Face to GGUF, so the two cannot
disagree. It knows nothing of bytes, of arithmetic or of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .architectures import ARCHS, Arch, Pairing, arch_of_hf
from .errors import FormatError, UnsupportedError
from .hf_config import normalised, refuse_unknown
from .tensors import Role, TensorSpec, composed

__all__ = ["ARCHS", "Arch", "CacheGroup", "Config", "Pairing", "Role", "Rope", "TensorSpec", "tensors"]

REQUIRED = dataclasses.MISSING


@dataclass(frozen=True)
class Rope:
    """One rotary embedding: everything that decides its angles but the factor tensors (see `edgelm.rope`).

    Attributes:
        dim: leading dimensions of a head that rotate; even.
        base: theta.
        scaling: "none", "linear", "yarn" or "longrope" (which lives in factor tensors, as Llama 3's way does).
        factor: how many times the context was stretched.
        orig_context: context length of the model before it was stretched, in tokens.
        attn_factor: magnitude of the rotation beyond what YaRN adds by itself.
        yarn_attn_factor: if positive, YaRN's magnitude, instead of 0.1 ln(factor) + 1.
    """

    dim: int
    base: float
    pairing: Pairing
    scaling: str = "none"
    factor: float = 1.0
    orig_context: int = 0
    attn_factor: float = 1.0
    yarn_attn_factor: float = 0.0
    ext_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose keys and values have the same shape and the same life time, so that they share pages."""

    layers: tuple[int, ...]
    n_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int  # positions a query sees, itself included; 0 = all of them


def key(
    gguf: str,
    hf: str = "",
    *,
    default: Any = REQUIRED,
    low: float | None = None,
    high: float | None = None,
    parse: Callable[[Any, Mapping[str, Any]], Any] | None = None,
) -> Any:
    """A hyperparameter: its GGUF key (after "{arch}."), its config.json key, its default and its range, inclusive.

    "a|b" means a, else b; a dot in a Hugging Face key descends. A default may be a function of the fields above it;
    `parse` is one of a value and of them.
    """
    return dataclasses.field(
        metadata={"gguf": gguf, "hf": hf, "default": default, "low": low, "high": high, "parse": parse}
    )


def _pattern(value: Any, c: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which layers have the window: a period (the last of each n layers has none; 0: all have it) or a list."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value <= MAX_LAYERS:
            raise FormatError(f"{c['arch']}: a sliding window pattern of {value} layers makes no sense")
        return tuple(value == 0 or i % value < value - 1 for i in range(c["n_layers"]))
    if isinstance(value, list | tuple | np.ndarray) and len(value) == c["n_layers"]:
        return tuple(bool(v == "sliding_attention" if isinstance(v, str) else v) for v in value)
    raise FormatError(
        f"{c['arch']}: the sliding window pattern is neither a number nor a list of {c['n_layers']} layers"
    )


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_erf",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "swiglu": "silu",  # whether there is a gate is the table's matter
}  # Hugging Face's names -> the names of our operations
_POOLING = ("none", "mean", "cls", "last", "rank")  # GGUF numbers them
_SCALINGS = {"default": "none", "su": "longrope"}  # other names of the same thing


def _activation(value: Any, c: Mapping[str, Any]) -> Any:
    if value not in _ACTIVATIONS:
        raise UnsupportedError(f"{c['arch']}: the activation {value!r} is not supported")
    return _ACTIVATIONS[value]


def _pooling(value: Any, c: Mapping[str, Any]) -> Any:
    if not isinstance(value, int) or value not in range(len(_POOLING)):
        raise FormatError(f"{c['arch']}.pooling_type is {value!r}, which is no kind of pooling")
    return _POOLING[value]


MAX_LAYERS = 1024


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of one model, proven: every number is in its range and no two contradict each other.

    Field order matters: a default may use the fields above it.
    Raises FormatError or UnsupportedError when it is made of numbers that cannot be a model.
    """

    arch: str
    n_layers: int = key("block_count", "num_hidden_layers|n_layer", low=1, high=MAX_LAYERS)
    dim: int = key("embedding_length", "hidden_size|n_embd", low=1, high=1 << 17)
    vocab_size: int = key("vocab_size", "vocab_size", low=1, high=1 << 24)
    context_length: int = key("context_length", "max_position_embeddings|n_positions|n_ctx", low=1, high=1 << 30)
    n_heads: int = key("attention.head_count", "num_attention_heads|n_head", low=1, high=4096)
    n_kv_heads: int = key(
        "attention.head_count_kv", "num_key_value_heads", default=lambda c: c["n_heads"], low=1, high=4096
    )
    head_dim: int = key(
        "attention.key_length", "head_dim", default=lambda c: c["dim"] // c["n_heads"], low=1, high=4096
    )
    v_head_dim: int = key(
        "attention.value_length", "v_head_dim|head_dim", default=lambda c: c["dim"] // c["n_heads"], low=1, high=4096
    )
    ffn_dim: int = key("feed_forward_length", "intermediate_size|n_inner", low=1, high=1 << 22)
    norm_eps: float = key(
        "attention.layer_norm_rms_epsilon|attention.layer_norm_epsilon",
        "rms_norm_eps|layer_norm_eps|layer_norm_epsilon",
        low=1e-30,
        high=1.0,
    )
    activation: str = key(
        "hidden_activation", "hidden_activation|hidden_act|activation_function", default="silu", parse=_activation
    )
    causal: bool = key("attention.causal", "is_causal", default=True)
    pooling: str = key("pooling_type", "pooling_type", default="none", parse=_pooling)
    n_token_types: int = key("tokenizer.ggml.token_type_count", "type_vocab_size", default=0, low=0, high=1 << 16)
    attention_scale: float = key(
        "attention.scale",
        "query_pre_attn_scalar",
        default=lambda c: c["head_dim"] ** -0.5,
        low=1e-6,
        high=1e6,
    )
    attn_softcap: float = key("attn_logit_softcapping", "attn_logit_softcapping", default=0.0, low=0.0, high=1e6)
    final_softcap: float = key("final_logit_softcapping", "final_logit_softcapping", default=0.0, low=0.0, high=1e6)
    sliding_window: int = key("attention.sliding_window", "sliding_window", default=0, low=0, high=1 << 30)
    windowed: tuple[bool, ...] = key(
        "attention.sliding_window_pattern", "layer_types|sliding_window_pattern", default=0, parse=_pattern
    )
    rope_dim: int = key("rope.dimension_count", "rope.dim", default=lambda c: c["head_dim"], low=2, high=4096)
    rope_base: float = key("rope.freq_base", "rope.rope_theta", default=1e4, low=1.0, high=1e12)
    rope_base_local: float = key(
        "rope.freq_base_swa",
        "rope_local_base_freq",
        default=lambda c: c["rope_base"],
        low=1.0,
        high=1e12,
    )
    rope_scaling: str = key(
        "rope.scaling.type",
        "rope.rope_type|rope.type",
        default="linear",
        parse=lambda value, c: _SCALINGS.get(value, value),
    )
    rope_factor: float = key(
        "rope.scaling.factor|rope.scale_linear",
        "rope.factor",
        default=1.0,
        parse=lambda value, c: value or 1.0,
        low=1e-3,
        high=1e6,
    )
    rope_orig_context: int = key(
        "rope.scaling.original_context_length",
        "rope.original_max_position_embeddings",
        default=lambda c: c["context_length"],
        low=1,
        high=1 << 30,
    )
    rope_attn_factor: float = key("rope.scaling.attn_factor", "rope.magnitude", default=1.0, low=1e-3, high=1e3)
    rope_yarn_attn_factor: float = key(
        "rope.scaling.yarn_attn_factor", "rope.attention_factor|rope.attn_factor", default=0.0, low=0.0, high=1e3
    )
    rope_ext_factor: float = key(
        "rope.scaling.yarn_ext_factor", "rope.extrapolation_factor", default=1.0, low=0.0, high=1e3
    )
    rope_beta_fast: float = key("rope.scaling.yarn_beta_fast", "rope.beta_fast", default=32.0, low=1e-3, high=1e6)
    rope_beta_slow: float = key("rope.scaling.yarn_beta_slow", "rope.beta_slow", default=1.0, low=1e-3, high=1e6)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self)[1:]:
            _prove_field(self.arch, f, getattr(self, f.name))
        if self.n_heads % self.n_kv_heads:
            raise FormatError(
                f"{self.arch}.attention.head_count {self.n_heads} is no multiple of head_count_kv {self.n_kv_heads}"
            )
        if len(self.windowed) != self.n_layers:
            raise FormatError(f"{self.arch}: {len(self.windowed)} entries of a window pattern, {self.n_layers} layers")
        if self.spec.pairing is not None and (self.rope_dim % 2 or self.rope_dim > self.head_dim):
            raise FormatError(
                f"{self.arch}.rope.dimension_count {self.rope_dim} must be even and at most the head's {self.head_dim}"
            )
        if self.rope_scaling not in ("none", "linear", "yarn", "longrope"):
            raise UnsupportedError(f"{self.arch}.rope.scaling.type {self.rope_scaling!r} is not supported")
        if self.pooling == "rank":
            raise UnsupportedError(f"{self.arch}: reranking models (pooling_type rank) are not supported")

    # Sizes that shapes are made of, beside the fields (`tensors.COMPOSED`).

    @property
    def q_dim(self) -> int:
        return composed(self, "q_dim")

    @property
    def k_dim(self) -> int:
        return composed(self, "k_dim")

    @property
    def v_dim(self) -> int:
        return composed(self, "v_dim")

    @property
    def qkv_dim(self) -> int:
        return composed(self, "qkv_dim")

    @property
    def attn_dim(self) -> int:
        """Columns of what attention gives."""
        return composed(self, "attn_dim")

    @property
    def gate_up_dim(self) -> int:
        return composed(self, "gate_up_dim")

    @property
    def n_rope_pairs(self) -> int:
        return self.rope_dim // 2

    @property
    def spec(self) -> Arch:
        return ARCHS[self.arch]

    @property
    def max_position(self) -> int:
        """Number of positions the model has at all: bounded where they are a table, else 0 for no bound."""
        return self.context_length if any(t.gguf == "position_embd.weight" for t in self.spec.tensors) else 0

    def window(self, layer: int) -> int:
        """Positions a query of `layer` sees, itself included; 0 = all."""
        return self.sliding_window if self.windowed[layer] else 0

    def rope(self, layer: int) -> Rope | None:
        """The rotation of queries and keys in `layer`; None for architectures that have none."""
        if self.spec.pairing is None:
            return None
        if self.window(layer):
            if not self.spec.local_scaling:
                return Rope(self.rope_dim, self.rope_base_local, self.spec.pairing)
            base = self.rope_base_local
        else:
            base = self.rope_base
        scaling = "none" if self.rope_scaling == "linear" and self.rope_factor == 1.0 else self.rope_scaling
        return Rope(
            dim=self.rope_dim,
            base=base,
            pairing=self.spec.pairing,
            scaling=scaling,
            factor=1.0 if scaling == "none" else self.rope_factor,
            orig_context=self.rope_orig_context,
            attn_factor=self.rope_attn_factor,
            yarn_attn_factor=self.rope_yarn_attn_factor,
            ext_factor=self.rope_ext_factor,
            beta_fast=self.rope_beta_fast,
            beta_slow=self.rope_beta_slow,
        )

    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """The layers, grouped by the shape and life time of their keys and values; in order of first use."""
        groups: dict[int, list[int]] = {}
        for i in range(self.n_layers):
            groups.setdefault(self.window(i), []).append(i)
        return tuple(
            CacheGroup(tuple(layers), self.n_kv_heads, self.head_dim, self.v_head_dim, window)
            for window, layers in groups.items()
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Config:
        """The shape of the model in a GGUF file with this metadata.

        Raises UnsupportedError for an architecture or a hyperparameter that edgelm does not know, FormatError for one
        that is missing, of the wrong type or out of its range.
        """
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str):
            raise FormatError("general.architecture is missing: this file does not say what model it holds")
        if arch not in ARCHS:
            raise UnsupportedError(
                f"the architecture {arch!r:.60} is not supported; edgelm runs {', '.join(sorted(ARCHS))}"
            )
        _refuse_unknown_keys(arch, metadata)

        def find(f: dataclasses.Field[Any]) -> Any:
            for name in _gguf_keys(arch, f):
                if name in metadata:
                    return metadata[name]
            return None

        tokens = metadata.get("tokenizer.ggml.tokens")
        fixed = {"vocab_size": len(tokens)} if isinstance(tokens, list) and tokens else {}
        return cls._read(arch, find, "gguf", fixed)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """The shape of the model that a Hugging Face config.json describes; raises as `from_gguf` does."""
        classes = config.get("architectures")
        arch = arch_of_hf(classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else None)

        def find(f: dataclasses.Field[Any]) -> Any:
            for path in _names(arch, f, "hf"):
                value: Any = config
                for step in path.split("."):
                    value = value.get(step) if isinstance(value, Mapping) else None
                if value is not None:
                    return value
            return None

        try:
            config = normalised(config, ARCHS[arch].hf_defaults)
            known = (name for f in dataclasses.fields(cls)[1:] for name in _names(arch, f, "hf"))
            refuse_unknown(config, (name.split(".")[0] for name in known))
            return cls._read(arch, find, "hf", {})
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"config.json of this {arch} model lacks or garbles {error}") from None

    @classmethod
    def _read(
        cls, arch: str, find: Callable[[dataclasses.Field[Any]], Any], source: str, fixed: Mapping[str, Any]
    ) -> Config:
        values: dict[str, Any] = {"arch": arch}
        for f in dataclasses.fields(cls)[1:]:
            value = fixed[f.name] if f.name in fixed else find(f)
            if value is None:
                value = _default(arch, f, values)
                if value is REQUIRED:
                    name = _gguf_keys(arch, f)[0] if source == "gguf" else _names(arch, f, source)[0]
                    raise FormatError(f"{name} is missing from the description of this {arch} model")
            elif f.metadata["parse"] is not None:
                if f.name != "windowed":
                    _refuse_lists(arch, f, value)
                value = f.metadata["parse"](value, values)
            _prove_field(arch, f, value)
            values[f.name] = float(value) if f.type == "float" else value
        return cls(**values)

    def to_gguf(self) -> dict[str, Any]:
        """The metadata that `from_gguf` turns into this very Config (tokenizer and general keys apart).

        What is a default of GGUF is left out, so that other loaders meet nothing that they do not know; what only we
        have a default for is not.
        """
        kv: dict[str, Any] = {"general.architecture": self.arch}
        values: dict[str, Any] = {"arch": self.arch}
        for f in dataclasses.fields(self)[1:]:
            value = getattr(self, f.name)
            default = _default(self.arch, f, values)
            values[f.name] = value
            only_ours = f.name in ("causal", "pooling") and value != f.metadata["default"]  # not other loaders' default
            if f.metadata["default"] is not REQUIRED and value == default and not only_ours:
                continue
            if f.name == "activation":
                value = next(name for name, ours in _ACTIVATIONS.items() if ours == value)
            elif f.name == "pooling":
                value = _POOLING.index(value)
            elif f.name == "windowed":
                value = list(value)
            kv[_gguf_keys(self.arch, f)[0]] = value
        return kv


def _default(arch: str, f: dataclasses.Field[Any], values: Mapping[str, Any]) -> Any:
    """The value of a field that nothing sets, REQUIRED if there is none; `values` are the fields above it."""
    value = ARCHS[arch].defaults.get(f.name, f.metadata["default"])
    if callable(value) and value is not REQUIRED:
        value = value(values)
    return _pattern(value, values) if f.name == "windowed" else value


def _names(arch: str, f: dataclasses.Field[Any], source: str) -> list[str]:
    """The keys of a hyperparameter in one of the two worlds, the one to look for first first."""
    names: list[str] = f.metadata[source].split("|")
    if f.name == "norm_eps" and ARCHS[arch].norm == "layer":
        names.reverse()  # each kind of norm has a key of its own
    return names


def _gguf_keys(arch: str, f: dataclasses.Field[Any]) -> list[str]:
    return [k if k.startswith("tokenizer.") else f"{arch}.{k}" for k in _names(arch, f, "gguf")]


def _refuse_lists(arch: str, f: dataclasses.Field[Any], value: Any) -> None:
    if isinstance(value, np.ndarray | list):
        raise UnsupportedError(f"{_gguf_keys(arch, f)[0]} differs from layer to layer, which is not supported")


def _prove_field(arch: str, f: dataclasses.Field[Any], value: Any) -> None:
    """Type and range of one hyperparameter."""
    name = _gguf_keys(arch, f)[0]
    _refuse_lists(arch, f, value)
    kinds = {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,), "tuple[bool, ...]": (tuple,)}[
        str(f.type)
    ]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise FormatError(f"{name} must be of type {f.type}, not {value!r:.60}")
    low, high = f.metadata["low"], f.metadata["high"]
    if low is not None and not low <= value <= high:  # also catches NaN
        raise FormatError(f"{name} is {value}; a model has {low} to {high}")


# Keys that change nothing we compute.
IGNORED_KEYS = frozenset(
    {"rope.scaling.finetuned", "tensor_data_layout", "use_parallel_residual", "mm.tokens_per_image"}
)
# Keys of features that edgelm does not have; harmless when zero.
UNSUPPORTED_KEYS = {
    "expert_count": "mixture of experts",
    "expert_used_count": "mixture of experts",
    "expert_feed_forward_length": "mixture of experts",
    "nextn_predict_layers": "multi-token prediction",
    "attention.max_alibi_bias": "ALiBi",
    "attention.clamp_kqv": "clamped queries and keys",
    "rope.scaling.yarn_log_multiplier": "YaRN with a log multiplier",
    "logit_scale": "scaled logits",
    "residual_scale": "scaled residuals",
    "embedding_scale": "scaled embeddings",
}


def _refuse_unknown_keys(arch: str, metadata: Mapping[str, Any]) -> None:
    known = {name for f in dataclasses.fields(Config)[1:] for name in _gguf_keys(arch, f)}
    for name, value in metadata.items():
        suffix = name.removeprefix(f"{arch}.")
        if suffix == name or name in known or suffix in IGNORED_KEYS:
            continue
        if suffix in UNSUPPORTED_KEYS:
            if np.any(value):
                raise UnsupportedError(f"{UNSUPPORTED_KEYS[suffix]} is not supported ({name} = {value!r:.40})")
            continue
        raise UnsupportedError(f"{name!r:.100} is a hyperparameter that this version of edgelm does not know")


def tensors(c: Config) -> Iterator[TensorSpec]:
    """Every tensor that a file of the model `c` may have, layer by layer."""
    layer = [spec for spec in c.spec.tensors if "{i}" in spec.gguf]
    yield from (spec for spec in c.spec.tensors if "{i}" not in spec.gguf)
    for i in range(c.n_layers):
        yield from (spec.at(i) for spec in layer)
