"""Operations that every dialect of ONNX has: an interpreter for `edgelm.models`, but for matrices and attention.

`edgelm.reference` says what each operation means. Values are (batch, sequence, columns); a text of the batch may be
padded, which `attention_mask` says: its 1s count the positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.arch import Config
from edgelm.weights import Weights

from .onnx_graph import BOOL, FLOAT, FLOAT16, INT64, Graph
from .onnx_values import Shape, Sum, Value
from .onnx_weights import Tensor

B, S, TOTAL, PAST = "batch_size", "sequence_length", "total_sequence_length", "past_sequence_length"
END = np.iinfo(np.int64).max
OUTPUTS = "output_length"
NUMPY = {FLOAT: "float32", FLOAT16: "float16"}
TYPES = {name: dtype for dtype, name in NUMPY.items()}


@dataclass(frozen=True)
class Settings:
    """What the user chose beside the plan.

    dtype: of activations, FLOAT or FLOAT16; n_ctx: positions that rotations have tables for; accuracy_level: of
    MatMulNBits, 4 = activations are rounded to int8; head: "logits" or "hidden"; dynamic: quantized matrices become
    int8 with one scale for each output, and activations are rounded when they come.
    """

    dtype: int = FLOAT
    n_ctx: int = 0
    accuracy_level: int = 4
    head: str = "logits"
    dynamic: bool = False


class Operations:
    """What the dialects share; see `onnx_standard` and `onnx_ort`."""

    def __init__(self, graph: Graph, config: Config, weights: Weights, settings: Settings) -> None:
        self.graph, self.config, self.weights, self.settings = graph, config, weights, settings
        self.has_cache = config.spec.family == "decoder" and config.causal
        self.head = settings.head if self.has_cache else "hidden"
        self.dtype = settings.dtype
        self.ids = graph.input("input_ids", INT64, (B, S))
        self.mask = graph.input("attention_mask", INT64, (B, TOTAL if self.has_cache else S))

    # ------------------------------------------------------------------------------------------------- small things

    def value(self, op_type: str, *inputs: Value | str, shape: Shape, dtype: int = 0, **rest: Any) -> Value:
        """Append a node with one output."""
        names = [i if isinstance(i, str) else i.name for i in inputs]
        [name] = self.graph.emit(op_type, *names, **rest)
        return Value(self, name, dtype or self.dtype, shape)

    def node(self, op_type: str, *inputs: str, **rest: Any) -> str:
        """Append a node with one output; its name."""
        [name] = self.graph.emit(op_type, *inputs, **rest)
        return name

    def number(self, x: float, dtype: int) -> str:
        return self.graph.constant(x, NUMPY[dtype])

    def cast(self, x: Value, dtype: int) -> Value:
        if x.dtype == dtype:
            return x
        return self.value("Cast", x, shape=x.shape, dtype=dtype, to=dtype)

    def alike(self, a: Value, b: Value) -> tuple[Value, Value]:
        """Both in the wider of their types."""
        dtype = FLOAT if FLOAT in (a.dtype, b.dtype) else a.dtype
        return self.cast(a, dtype), self.cast(b, dtype)

    def add(self, a: Value, b: Value) -> Value:
        a, b = self.alike(a, b)
        shape = a.shape if len(a.shape) >= len(b.shape) else b.shape
        return Sum(self, a.dtype, shape, (a, b), lambda: self.node("Add", a.name, b.name))

    def multiply(self, a: Value, b: Value) -> Value:
        a, b = self.alike(a, b)
        return self.value("Mul", a, b, shape=a.shape, dtype=a.dtype)

    # ------------------------------------------------------------------------------------------------------- norms

    def rms_norm(self, x: Value, weight: Tensor | None, eps: float, heads: int = 0) -> Value:
        n = x.n_cols // (heads or 1)
        scale = self.vector(weight, x.dtype) if weight is not None else self.ones(n, x.dtype)
        label = stem(weight.name) if weight is not None else ""
        if not heads:
            y = self.value(
                "RMSNormalization", x, scale, shape=x.shape, dtype=x.dtype, label=label, axis=-1, epsilon=eps
            )
            return self.cast(y, self.dtype)
        apart = self.reshaped(x, (0, 0, heads, n))
        y = self.value(
            "RMSNormalization", apart, scale, shape=apart.shape, dtype=x.dtype, label=label, axis=-1, epsilon=eps
        )
        return self.reshaped(y, (0, 0, heads * n))

    def layer_norm(self, x: Value, weight: Tensor, bias: Tensor | None, eps: float) -> Value:
        inputs = [self.vector(weight, x.dtype), *([self.vector(bias, x.dtype)] if bias is not None else [])]
        label, rest = stem(weight.name), {"axis": -1, "epsilon": eps}
        y = self.value("LayerNormalization", x, *inputs, shape=x.shape, dtype=x.dtype, label=label, **rest)
        return y if self.config.spec.family == "encoder" else self.cast(y, self.dtype)

    def reshaped(self, x: Value, sizes: tuple[int, ...]) -> Value:
        """0: as it was."""
        shape = tuple(x.shape[i] if size == 0 else size for i, size in enumerate(sizes))
        return self.value("Reshape", x, self.graph.constant(sizes), shape=shape, dtype=x.dtype)

    def vector(self, tensor: Tensor, dtype: int) -> str:
        """A norm or a bias, in the type of what it meets."""
        name = tensor.name if dtype == FLOAT else f"{tensor.name}.{NUMPY[dtype]}"
        return self.graph.store(name, dtype, tensor.shape, (part.astype(NUMPY[dtype]) for part in tensor.floats()))

    def array(self, name: str, values: NDArray[Any]) -> str:
        return self.graph.store(name, TYPES[values.dtype.name], values.shape, [values])

    def ones(self, n: int, dtype: int) -> str:
        return self.array(f"ones.{n}.{NUMPY[dtype]}", np.ones(n, NUMPY[dtype]))

    # --------------------------------------------------------------------------------------------------- positions

    @cached_property
    def counts(self) -> str:
        """For each key, cached ones included, how many of its text there are up to it: int64 (batch, total)."""
        return self.node("CumSum", self.mask, self.graph.constant(1))

    @cached_property
    def all_positions(self) -> str:
        """Positions of all keys; those of padding are those of a neighbour."""
        return self.node("Max", self.node("Sub", self.counts, self.graph.constant(1)), self.graph.constant(0))

    @cached_property
    def positions(self) -> str:
        """Positions of the tokens that are new: int64 (batch, sequence)."""
        if not self.has_cache:
            return self.all_positions
        n_new = self.node("Shape", self.ids, start=1, end=2)
        end = self.graph.constant([END])
        return self.node("Slice", self.all_positions, self.node("Neg", n_new), end, self.graph.constant([1]))

    # ----------------------------------------------------------------------------------------------------- pooling

    def pooled(self, x: Value, pooling: str) -> Value:
        """One vector of length one for each text: the mean of its tokens, its first token or its last one."""
        wanted = self.node("Cast", self.mask, to=BOOL)
        if pooling != "mean":
            end = self.node("ReduceSum", self.mask, self.graph.constant([1])) if pooling == "last" else ""
            place = self.node("Equal", self.counts, end or self.graph.constant(1))
            wanted = self.node("And", wanted, place)
        weights = self.node("Cast", self.node("Unsqueeze", wanted, self.graph.constant([1])), to=FLOAT)
        n = self.node("ReduceSum", weights, self.graph.constant([2]))
        mean = self.node("Squeeze", self.node("Div", self.node("MatMul", weights, x.name), n), self.graph.constant([1]))
        length = self.node("Max", self.node("ReduceL2", mean, self.graph.constant([1])), self.number(1e-12, FLOAT))
        return self.value("Div", mean, length, shape=(B, x.n_cols), dtype=FLOAT)

    # ------------------------------------------------------------------------------------------------- elementwise

    def split(self, x: Value, sizes: tuple[int, ...]) -> tuple[Value, ...]:
        names = self.graph.emit("Split", x.name, self.graph.constant(sizes), axis=-1, outputs=("",) * len(sizes))
        return tuple(Value(self, name, x.dtype, (*x.shape[:-1], size)) for name, size in zip(names, sizes, strict=True))

    def scale(self, x: Value, s: float) -> Value:
        return self.value("Mul", x, self.number(s, x.dtype), shape=x.shape, dtype=x.dtype)

    def softcap(self, x: Value, cap: float) -> Value:
        small = self.value("Div", x, self.number(cap, x.dtype), shape=x.shape, dtype=x.dtype)
        bent = self.value("Tanh", small, shape=x.shape, dtype=x.dtype)
        return self.scale(bent, cap)

    def silu(self, x: Value) -> Value:
        return self.multiply(x, self.value("Sigmoid", x, shape=x.shape, dtype=x.dtype))

    def gelu(self, x: Value) -> Value:
        return self.value("Gelu", x, shape=x.shape, dtype=x.dtype, approximate="tanh")

    def gelu_erf(self, x: Value) -> Value:
        return self.value("Gelu", x, shape=x.shape, dtype=x.dtype)

    def relu(self, x: Value) -> Value:
        return self.value("Relu", x, shape=x.shape, dtype=x.dtype)

    def outputs(self, x: Value) -> Value:
        """All rows; of a decoder those from `outputs_from` on, an input that may be left out."""
        if not self.has_cache:
            return x
        ends, axes = self.graph.constant([END]), self.graph.constant([1])
        shape = (B, OUTPUTS, x.n_cols)
        return self.value("Slice", x, self.outputs_from, ends, axes, shape=shape, dtype=x.dtype)

    @cached_property
    def outputs_from(self) -> str:
        """The first row whose output is wanted; negative ones count from the end, -1 is the last row alone."""
        return self.graph.input("outputs_from", INT64, (1,), default=np.zeros(1, np.int64))


def stem(name: str) -> str:
    """A tensor's name without what kind of tensor it is."""
    return name.rpartition(".")[0]
