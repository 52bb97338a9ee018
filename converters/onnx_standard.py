"""The operations of a model as nodes of ONNX, with operators of ai.onnx alone: an interpreter for `edgelm.models`.

`edgelm.reference` says what each operation means. Values are (batch, sequence, columns); a text of the batch may be
padded on either side, which `attention_mask` says: its 1s count the positions. Keys and values of earlier tokens come
in as `past_key_values.{i}.key|value` (batch, kv_heads, past, head) and leave as `present.{i}.key|value`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.arch import Config, Rope
from edgelm.errors import UnsupportedError
from edgelm.formats import BF16
from edgelm.rope import RopeTable
from edgelm.weights import Layer, Weights

from .onnx_graph import BFLOAT16, BOOL, FLOAT, FLOAT16, INT4, INT8, INT32, Graph
from .onnx_nodes import NUMPY, PAST, TOTAL, B, Operations, S, Settings, stem
from .onnx_values import Rotated, Value
from .onnx_weights import Tensor, by_rows, packed


class Standard(Operations):
    """The interpreter `op` that a model function is handed."""

    def __init__(self, graph: Graph, config: Config, weights: Weights, settings: Settings) -> None:
        super().__init__(graph, config, weights, settings)
        self._ropes: dict[Rope, tuple[str, str]] = {}
        self._visible: dict[tuple[int, bool], str] = {}
        self._floats: dict[str, str] = {}

    # -------------------------------------------------------------------------------------------------- vocabulary

    def embed(self, table: Tensor) -> Value:
        # The stream of residuals stays float32, whatever the rest is: it outgrows float16 in large models.
        return self.cast(self.looked_up(table, self.ids), FLOAT)

    def embed_positions(self, table: Tensor, offset: int = 0) -> Value:
        at = self.positions
        if offset:
            at = self.node("Add", at, self.graph.constant(offset))
        return self.cast(self.looked_up(table, at), FLOAT)

    def looked_up(self, table: Tensor, at: str) -> Value:
        shape = (B, S, table.shape[1])
        if table.is_blocked:
            return self.value("Gather", self.dequantized(table), at, shape=shape, label=stem(table.name))
        name, dtype = self.stored_floats(table)
        return self.cast(self.value("Gather", name, at, shape=shape, dtype=dtype, label=stem(table.name)), self.dtype)

    def row(self, table: Tensor, index: int) -> Value:
        [row] = table.array.rows(index, index + 1)
        return Value(self, self.array(f"{table.name}[{index}]", row.astype(np.float32)), FLOAT, row.shape)

    # ---------------------------------------------------------------------------------------------------- matrices

    def linear(self, x: Value, layer: Layer) -> Value:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        x = self.cast(x, self.dtype)
        y = self.product(x, weight)
        if layer.bias is None:
            return y
        bias = self.vector(layer.bias, self.dtype)  # type: ignore[arg-type]
        return self.value("Add", y, bias, shape=y.shape, label=stem(weight.name))

    def product(self, x: Value, weight: Tensor) -> Value:
        """x times weight transposed."""
        shape = (*x.shape[:-1], weight.shape[0])
        label = stem(weight.name)
        if self.is_dynamic(weight):
            return self.dynamic_product(x, weight)
        if weight.is_blocked or self.is_table(weight):
            table = self.dequantized(weight) if weight.is_blocked else self.casted_floats(weight)
            turned = self.node("Transpose", table, label=label, perm=[1, 0])
            return self.value("MatMul", x, turned, shape=shape, label=label)
        return self.value("MatMul", x, self.casted_floats(weight, turned=True), shape=shape, label=label)

    def is_dynamic(self, weight: Tensor) -> bool:
        """Whether activations are rounded to int8 with one scale for all of them.

        The way down of a feed-forward network has outliers that leave too little for the rest: it keeps its blocks.
        """
        return self.settings.dynamic and weight.is_blocked and "ffn_down" not in weight.name

    def is_table(self, weight: Tensor) -> bool:
        """Whether rows of this matrix are looked up, too: it is stored row by row."""
        return weight is self.weights.token_embd.weight

    def stored_floats(self, tensor: Tensor, turned: bool = False) -> tuple[str, int]:
        """A matrix of floats as the plan has it, and its type; turned: (in, out)."""
        dtype = {"F16": FLOAT16, "BF16": BFLOAT16}.get(tensor.format.name, FLOAT)
        rows: Iterable[NDArray[Any]] = (_as_type(part, dtype) for part in tensor.floats())
        if not turned:
            return self.graph.store(tensor.name, dtype, tensor.shape, rows), dtype
        whole = (np.ascontiguousarray(np.concatenate(list(rows)).T) for _ in range(1))
        return self.graph.store(f"{tensor.name}.T", dtype, tensor.shape[::-1], whole), dtype

    def casted_floats(self, tensor: Tensor, turned: bool = False) -> str:
        name, dtype = self.stored_floats(tensor, turned)
        return name if dtype == self.dtype else self.node("Cast", name, label=stem(tensor.name), to=self.dtype)

    def dequantized(self, tensor: Tensor) -> str:
        """A matrix (out, in) from its integers: INT4 or INT8, a scale for each block along the rows."""
        if tensor.name not in self._floats:
            self._floats[tensor.name] = self._dequantized(tensor)
        return self._floats[tensor.name]

    def _dequantized(self, tensor: Tensor) -> str:
        blocked, label = tensor.blocked(), stem(tensor.name)
        if blocked.codes[0].size != tensor.shape[1]:
            raise UnsupportedError(
                f"DequantizeLinear: rows of {tensor.shape[1]} weights are no whole number of blocks of {blocked.block} "
                f"({tensor.name})"
            )
        dtype = INT4 if blocked.bits == 4 else INT8
        by_block = blocked.scales.shape
        inputs = [
            self.graph.store(f"{tensor.name}.codes", dtype, tensor.shape, [_signed(blocked.codes, blocked.bits)]),
            self.array(f"{tensor.name}.scales", blocked.scales.astype(NUMPY[self.dtype])),
        ]
        if blocked.zeros is not None and blocked.zeros.dtype == np.uint8:
            zeros = _signed(blocked.zeros, blocked.bits)
            inputs.append(self.graph.store(f"{tensor.name}.zeros", dtype, by_block, [zeros]))
        y = self.node("DequantizeLinear", *inputs, label=label, axis=1, block_size=blocked.block)
        if blocked.offsets is None:
            return y
        offset = self.array(f"{tensor.name}.offsets", blocked.offsets[..., None].astype(NUMPY[self.dtype]))
        apart = self.node("Reshape", y, self.graph.constant((*by_block, blocked.block)), label=label)
        moved = self.node("Add", apart, offset, label=label)
        return self.node("Reshape", moved, self.graph.constant(tensor.shape), label=label)

    def dynamic_product(self, x: Value, weight: Tensor) -> Value:
        """x rounded to uint8 when it comes, times int8 with one scale for each output; sums are exact."""
        label, shape = stem(weight.name), (*x.shape[:-1], weight.shape[0])
        codes, scales = self.columns(weight)
        x = self.cast(x, FLOAT)
        x8, scale, zero = self.graph.emit("DynamicQuantizeLinear", x.name, label=label, outputs=("",) * 3)
        sums = self.value("MatMulInteger", x8, codes, zero, shape=shape, dtype=INT32, label=label)
        both = self.node("Mul", scale, scales, label=label)
        y = self.value("Mul", self.cast(sums, FLOAT), both, shape=shape, dtype=FLOAT, label=label)
        return self.cast(y, self.dtype)

    def columns(self, weight: Tensor) -> tuple[str, str]:
        """A matrix as int8 (in, out) with a float32 scale for each output."""
        name = f"{weight.name}.int8"
        if name not in self.graph.stored:
            codes, scales = by_rows(np.concatenate(list(weight.trained())))
            self.graph.store(name, INT8, codes.shape[::-1], [np.ascontiguousarray(codes.T)])
            self.array(f"{weight.name}.scales", scales)
        return name, f"{weight.name}.scales"

    # --------------------------------------------------------------------------------------------------- attention

    def rope_tables(self, rope: Rope) -> tuple[str, str]:
        """Cosines and sines (positions, pairs) of every position there can be."""
        if rope not in self._ropes:
            table = RopeTable(rope, self.weights.factors(), self.settings.n_ctx)
            number = len(self._ropes)
            cos, sin = (
                self.array(f"rope.{number}.{name}", values.astype(NUMPY[self.dtype]))
                for name, values in zip(("cos", "sin"), table.tables(self.settings.n_ctx), strict=True)
            )
            self._ropes[rope] = cos, sin
        return self._ropes[rope]

    def rope(self, x: Value, rope: Rope, heads: int) -> Value:
        cos, sin = self.rope_tables(rope)
        x = self.cast(x, self.dtype)

        def make() -> str:
            return self.node(
                "RotaryEmbedding",
                x.name,
                cos,
                sin,
                self.positions,
                num_heads=heads,
                rotary_embedding_dim=rope.dim if rope.dim < self.config.head_dim else None,
                interleaved=int(rope.pairing.value == "interleaved"),
            )

        return Rotated(x, rope, make)

    def visible(self, window: int, causal: bool) -> str:
        """Which keys a query sees: bool (batch, 1, sequence, total)."""
        key = (window, causal)
        if key not in self._visible:
            keys = self.node("Unsqueeze", self.all_positions, self.graph.constant([1, 2]))
            real = self.node("Cast", self.node("Unsqueeze", self.mask, self.graph.constant([1, 2])), to=BOOL)
            queries = self.node("Unsqueeze", self.positions, self.graph.constant([1, 3]))
            back = self.node("Sub", queries, keys)
            if causal:
                seen = self.node("And", real, self.node("GreaterOrEqual", back, self.graph.constant(0)))
            else:  # each of them sees all that is real
                seen = self.node("And", real, self.node("Equal", back, back))
            if window:
                near = self.node("Less", self.node("Abs", back), self.graph.constant(window))
                seen = self.node("And", seen, near)
            self._visible[key] = seen
        return self._visible[key]

    def past(self, layer: int) -> tuple[str, str]:
        """The inputs with the keys and values of earlier tokens."""
        c = self.config
        key, value = (
            self.graph.input(f"past_key_values.{layer}.{kind}", self.dtype, (B, c.n_kv_heads, PAST, size))
            for kind, size in (("key", c.head_dim), ("value", c.v_head_dim))
        )
        return key, value

    def present(self, layer: int, key: str, value: str) -> None:
        c = self.config
        for kind, name, size in (("key", key, c.head_dim), ("value", value, c.v_head_dim)):
            self.graph.output(name, f"present.{layer}.{kind}", self.dtype, (B, c.n_kv_heads, TOTAL, size))

    def attention(
        self, q: Value, k: Value, v: Value, layer: int, scale: float, softcap: float = 0.0, causal: bool = True
    ) -> Value:
        c = self.config
        q, k, v = (self.cast(a, self.dtype) for a in (q, k, v))
        past = self.past(layer) if self.has_cache else ("", "")
        names = ["", *(f"present.{layer}.{kind}" for kind in ("key", "value") if self.has_cache)]
        mask = self.visible(c.window(layer), causal)
        inputs = [q.name, k.name, v.name, mask, *(past if self.has_cache else ())]
        y, *_ = self.graph.emit(
            "Attention",
            *inputs,
            label=f"blk.{layer}",
            outputs=names,
            q_num_heads=c.n_heads,
            kv_num_heads=c.n_kv_heads,
            scale=scale,
            softcap=softcap or None,
        )
        if self.has_cache:
            self.present(layer, *names[1:])
        return Value(self, y, self.dtype, (B, S, c.attn_dim))


def _as_type(values: NDArray[Any], dtype: int) -> NDArray[Any]:
    if dtype == BFLOAT16:
        return BF16.quantize(values.reshape(-1, 1))["x"].reshape(values.shape)
    return values.astype(NUMPY[dtype], copy=False)


def _signed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes around zero, in two's complement, as INT4 (two to a byte) or INT8."""
    around = codes ^ np.uint8(1 << (bits - 1))  # less the middle: its bit is the sign
    return packed(around.reshape(-1) if bits == 4 else around, bits)
