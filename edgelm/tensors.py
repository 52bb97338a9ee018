"""How an architecture's table names its tensors: one `TensorSpec` each, and the groups that recur from table to table.

It knows no architecture (see `edgelm.arch`) and reads no file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

# Sizes that are made of others: what lies side by side along such a dimension, each as (Config field that counts,
# field with the width of one; "" for 1). Who cuts a field (heads, channels) knows from here what else to cut.
COMPOSED: dict[str, tuple[tuple[str, str], ...]] = {
    "q_dim": (("n_heads", "head_dim"),),
    "k_dim": (("n_kv_heads", "head_dim"),),
    "v_dim": (("n_kv_heads", "v_head_dim"),),
    "qkv_dim": (("n_heads", "head_dim"), ("n_kv_heads", "head_dim"), ("n_kv_heads", "v_head_dim")),
    "attn_dim": (("n_heads", "v_head_dim"),),
    "gate_up_dim": (("ffn_dim", ""), ("ffn_dim", "")),
}


def composed(config: Any, size: str) -> int:
    """A size of COMPOSED in the model `config`."""
    return sum(getattr(config, n) * (getattr(config, width) if width else 1) for n, width in COMPOSED[size])


class Role(Enum):
    """What a tensor is for; decides whether it may be quantized or pruned."""

    EMBED = "embed"  # looked up by row
    MATMUL = "matmul"  # multiplied: the only role that quantizers and pruners touch by default
    VECTOR = "vector"  # norms, biases, factors: always a float format


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an architecture.

    Attributes:
        gguf: name in the file and, dot for dot, attribute path in `Weights`; "{i}" is the layer.
        hf: name in the Hugging Face checkpoint; "" if it has none.
        shape: numbers or names of Config fields and properties, outermost first.
        required: False if a file may lack it.
        unless: another tensor (gguf name) that may take the place of this one; a file never has both.
        permute: Config field with the number of heads whose rows GGUF keeps in interleaved order.
        transpose: Hugging Face keeps it (in, out).
        offset: what GGUF adds to Hugging Face's values.
    """

    gguf: str
    hf: str
    shape: tuple[str | int, ...]
    role: Role = Role.MATMUL
    required: bool = True
    unless: str = ""
    permute: str = ""
    transpose: bool = False
    offset: float = 0.0

    def at(self, i: int) -> TensorSpec:
        """This tensor in layer `i`."""
        return dataclasses.replace(
            self, gguf=self.gguf.format(i=i), hf=self.hf.format(i=i), unless=self.unless.format(i=i)
        )

    def shape_for(self, config: Any) -> tuple[int, ...]:
        """Its shape, outermost first, in the model `config` (an `edgelm.arch.Config`)."""
        return tuple(s if isinstance(s, int) else getattr(config, s) for s in self.shape)

    def from_hf(self, array: np.ndarray, config: Any) -> np.ndarray:
        """A Hugging Face checkpoint's array of this tensor -> the array that GGUF holds."""
        if self.transpose:
            array = array.T
        if self.permute:  # rows (half, pair) of each head -> (pair, half)
            heads = getattr(config, self.permute)
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array + np.float32(self.offset) if self.offset else array

    def to_hf(self, array: np.ndarray, config: Any) -> np.ndarray:
        """The array that GGUF holds -> that of a Hugging Face checkpoint; undoes `from_hf`.

        An offset is taken away in float64 and rounded once, so that it undoes the addition wherever that was exact.
        """
        if self.offset:
            array = (array.astype(np.float64) - self.offset).astype(np.float32)
        if self.permute:  # rows (pair, half) of each head -> (half, pair)
            heads = getattr(config, self.permute)
            array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array.T if self.transpose else array


def norm(gguf: str, hf: str, size: str = "dim", *, bias: bool = False, offset: float = 0.0) -> tuple[TensorSpec, ...]:
    """The weight of a normalisation, and its bias if it has one."""
    weight = TensorSpec(f"{gguf}.weight", f"{hf}.weight", (size,), Role.VECTOR, offset=offset)
    return (weight, TensorSpec(f"{gguf}.bias", f"{hf}.bias", (size,), Role.VECTOR)) if bias else (weight,)


def linear(
    gguf: str,
    hf: str,
    out: str,
    inp: str,
    *,
    bias: bool | None = False,
    unless: str = "",
    permute: str = "",
    transpose: bool = False,
) -> tuple[TensorSpec, ...]:
    """A linear layer: weight (out, inp) and its bias (out,), if it has one (None: a file may have it)."""
    hf_weight, hf_bias = (f"{hf}.weight", f"{hf}.bias") if hf else ("", "")
    weight = TensorSpec(f"{gguf}.weight", hf_weight, (out, inp), unless=unless, permute=permute, transpose=transpose)
    if bias is False:
        return (weight,)
    return (
        weight,
        TensorSpec(f"{gguf}.bias", hf_bias, (out,), Role.VECTOR, bias is True, unless=unless, permute=permute),
    )


def qkv(
    q: str = "",
    k: str = "",
    v: str = "",
    fused: str = "",
    *,
    bias: bool | None = False,
    permute: bool = False,
    transpose: bool = False,
) -> tuple[TensorSpec, ...]:
    """The projections to queries, keys and values: three layers or one, a file has either."""
    one, three = "blk.{i}.attn_qkv", "blk.{i}.attn_"
    rest: dict[str, Any] = {"bias": bias, "unless": f"{one}.weight"}
    return (
        *linear(three + "q", q, "q_dim", "dim", permute="n_heads" if permute else "", **rest),
        *linear(three + "k", k, "k_dim", "dim", permute="n_kv_heads" if permute else "", **rest),
        *linear(three + "v", v, "v_dim", "dim", **rest),
        *linear(one, fused, "qkv_dim", "dim", bias=bias, unless=three + "q.weight", transpose=transpose),
    )


def ffn(gate: str, up: str, down: str, *, bias: bool | None = False, transpose: bool = False) -> tuple[TensorSpec, ...]:
    """A feed-forward network: down(act(gate x) * up x), or down(act(up x)) without `gate`."""
    return (
        *(linear("blk.{i}.ffn_gate", gate, "ffn_dim", "dim", bias=bias) if gate else ()),
        *linear("blk.{i}.ffn_up", up, "ffn_dim", "dim", bias=bias, transpose=transpose),
        *linear("blk.{i}.ffn_down", down, "dim", "ffn_dim", bias=bias, transpose=transpose),
    )
