"""An adapter of peft's becomes a GGUF adapter, which llama.cpp and its kin load beside the model.

    write_adapter(Path("adapter"), base="models/SmolLM2", out=Path("adapter.gguf"))

The file has the two factors of each tensor, `NAME.lora_a` (r, in) and `NAME.lora_b` (out, r), and one alpha; a runtime
adds alpha / r * b a. Where an adapter scales otherwise (rslora, another alpha for some tensors), b is scaled instead.
The embedding is looked up by row, so its a is stored as (vocabulary, r).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.disk import Progress, file_sha256, nothing
from edgelm.errors import UnsupportedError, UsageError
from edgelm.formats import by_name

from . import checkpoint as checkpoints
from .arrays import Floats
from .gguf_writer import Layout, Planned, write
from .lora import Adapter, Delta, read
from .quantizers import quantize
from .sources import resolve

TYPES = ("F32", "F16", "BF16", "Q8_0")
_EMBEDDING = "token_embd.weight"


def is_adapter(source: str | Path) -> bool:
    """Whether a source is a folder with an adapter and no model."""
    folder = Path(source)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists()


def write_adapter(
    folder: Path, base: str | Path, out: Path, type_: str = "f32", offline: bool = False, progress: Progress = nothing
) -> dict[str, Any]:
    """Write the adapter in `folder`, made for the model `base`, as a GGUF file; facts of what is in it.

    Raises UsageError for a type that adapters do not have, UnsupportedError for what no runtime could add, and what
    `lora.merged` raises.
    """
    name = "F32" if type_.lower() == "auto" else type_.upper()
    if name not in TYPES:
        raise UsageError(f"--type {type_!r:.40}: an adapter can be {', '.join(TYPES).lower()}")
    checkpoint = checkpoints.read(resolve(base, offline, progress))
    adapter = read(folder, checkpoint.config)
    _prove(adapter, set(checkpoint.tensors))
    factors = {f"{tensor}.lora_{half}": value for tensor, half, value in _factors(adapter)}
    planned = [Planned(key, value.shape, _format(name, value)) for key, value in factors.items()]

    def contents(tensor: Planned) -> Iterator[NDArray[np.uint8]]:
        yield quantize(tensor.format.name, factors[tensor.name])

    keys = {
        "general.architecture": checkpoint.config.arch,
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": folder.resolve().name,
        "adapter.lora.alpha": float(adapter.alpha),
        "general.quantization_version": 2,
    }
    write(out, Layout(keys, planned), contents, fingerprint=file_sha256(adapter.file), progress=progress)
    return {
        "source": str(folder),
        "out": str(out),
        "type": name,
        "architecture": checkpoint.config.arch,
        "alpha": adapter.alpha,
        "n_bytes": out.stat().st_size,
        "tensors": [{"tensor": t.name, "shape": list(t.shape), "to": t.format.name} for t in planned],
    }


def _format(name: str, value: Floats) -> Any:
    """The format asked for; F16 where its blocks do not divide a row (the rank is often 8 or 16)."""
    return by_name(name) if value.shape[-1] % by_name(name).block == 0 else by_name("F16")


def _prove(adapter: Adapter, there: set[str]) -> None:
    if adapter.whole:
        name = next(iter(adapter.whole))
        raise UnsupportedError(f"{adapter.path}: it has {name} in full, which no runtime adds; merge it with --lora")
    if missing := adapter.deltas.keys() - there:
        raise UnsupportedError(
            f"{adapter.path}: it changes {min(missing)}, no tensor of its own in the model; merge it with --lora"
        )
    if not adapter.alpha:
        raise UnsupportedError(f"{adapter.path}: lora_alpha is 0, which runtimes take for no scaling at all")


def _factors(adapter: Adapter) -> Iterator[tuple[str, str, Floats]]:
    """(tensor, "a" or "b", values) of all factors."""
    for name, delta in adapter.deltas.items():
        left, right = delta.left.read(), delta.right.read()
        left = left * np.float32(_correction(adapter, delta))
        if name == _EMBEDDING:  # rows of `left` are those of tokens, and are looked up
            yield name, "a", left
            yield name, "b", np.ascontiguousarray(right.T)
        else:
            yield name, "a", right
            yield name, "b", left


def _correction(adapter: Adapter, delta: Delta) -> float:
    """What is left of a tensor's scale when a runtime has multiplied by alpha / r."""
    return delta.scale / (adapter.alpha / delta.rank)
