"""`Config` -> config.json, as Hugging Face's transformers reads it: the way back of `Config.from_hf`.

The keys are those of the table of `edgelm.arch`. Whether the file says what it should is not believed: it is read back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from edgelm.arch import REQUIRED, Config
from edgelm.errors import UnsupportedError

_ACTIVATIONS = {"gelu": "gelu_pytorch_tanh", "gelu_erf": "gelu"}  # the others have the same name there
_SOFTCAPS = ("attn_softcap", "final_softcap")
_POOLINGS = ("none", "mean", "cls", "last", "rank")  # in GGUF's order, which from_hf reads


def config_json(config: Config, start: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a model: `start`, an earlier one, with what has to be said otherwise; or a new one.

    Raises UnsupportedError for a hyperparameter that such a file cannot express.
    """
    out = dict(start or _new(config))
    was = None if start is None else Config.from_hf(dict(start))
    if was is None or (was.n_heads, was.n_kv_heads) != (config.n_heads, config.n_kv_heads):  # alone they make no sense
        names = ("n_heads", "n_kv_heads", "head_dim") if config.q_dim != config.dim else ("n_heads", "n_kv_heads")
        for name in names:
            _say(out, config, name)
    for _ in dataclasses.fields(config):
        different = _difference(config, Config.from_hf(out))
        if not different:
            return out
        _say(out, config, different)  # what follows from it may be right then
    raise UnsupportedError(
        f"config.json of a {config.arch} model cannot say {different} = {getattr(config, different)}, as this one has"
    )


def _difference(wanted: Config, found: Config) -> str:
    """The first field in which two models differ, "" for none; windows that no layer has do not matter."""
    for f in dataclasses.fields(wanted)[1:]:
        if f.name == "windowed" and not wanted.sliding_window and not found.sliding_window:
            continue
        if getattr(wanted, f.name) != getattr(found, f.name):
            return f.name
    return ""


def _new(config: Config) -> dict[str, Any]:
    """A file with the class, what every file has to say, and where transformers' defaults are not ours."""
    windowed = [n for n in config.spec.hf if n == "MistralForCausalLM"] if config.sliding_window else []
    name = (windowed or list(config.spec.hf))[0]
    out: dict[str, Any] = {"architectures": [name], "model_type": config.spec.hf_types.get(name, config.arch)}
    always = {"n_kv_heads", "activation", *({"attention_scale", *_SOFTCAPS} & config.spec.defaults.keys())}
    for f in dataclasses.fields(config)[1:]:
        if f.metadata["default"] is REQUIRED or f.name in always:
            _say(out, config, f.name)
    return out


def _say(out: dict[str, Any], config: Config, name: str) -> None:
    """Puts a field into a config.json, under the key that it has there already."""
    f = next(f for f in dataclasses.fields(config) if f.name == name)
    names = f.metadata["hf"].split("|")
    key = next((n for n in names if n in out), config.spec.hf_keys.get(name, names[0]))
    value = getattr(config, name)
    if name == "activation":
        value = _ACTIVATIONS.get(value, value)
    elif name == "windowed":
        key, value = "layer_types", ["sliding_attention" if w else "full_attention" for w in value]
    elif name == "attention_scale":
        exact = round(value**-2)
        value = exact if exact**-0.5 == value else value**-2
    elif name == "pooling":
        value = _POOLINGS.index(value)
    elif name == "rope_dim":
        key, value = "partial_rotary_factor", value / config.head_dim
    if not key.startswith("rope."):
        out[key] = value
    elif key == "rope.rope_theta":
        out["rope_theta"] = value
    else:
        scaling = out.get("rope_scaling") or {"rope_type": config.rope_scaling}
        out["rope_scaling"] = {**scaling, key.removeprefix("rope."): value}
