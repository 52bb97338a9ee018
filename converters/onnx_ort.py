"""The operations of a model in onnxruntime's own operators: attention with its cache and rotation inside, matrices of
4 and 8 bits that stay so in memory, sums and normalisations in one.

Where there is none for an operation, the node is that of `onnx_standard`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from edgelm.errors import UnsupportedError
from edgelm.weights import Layer

from .onnx_graph import FLOAT, INT32, MICROSOFT, UINT8
from .onnx_nodes import NUMPY, B, S, stem
from .onnx_standard import Standard
from .onnx_values import Product, Rotated, Shape, Sum, Value
from .onnx_weights import Tensor, joined, packed


@dataclass(frozen=True)
class Blocks:
    """Where the parts of a matrix of integers are: names in the graph, "" for what it does not have.

    shape: of the codes: (out, blocks, bytes of a block).
    """

    bits: int
    block: int
    shape: tuple[int, ...]
    codes: str
    scales: str
    zeros: str
    offsets: str


class OnnxRuntime(Standard):
    """See the module."""

    def own(self, op_type: str, *inputs: Value | str, shape: Shape, dtype: int, label: str = "", **rest: Any) -> Value:
        """A node of onnxruntime's with one output, whose shape nobody else can infer."""
        y = self.value(op_type, *inputs, shape=shape, dtype=dtype, label=label, domain=MICROSOFT, **rest)
        self.graph.describe(y.name, dtype, shape)
        return y

    # ------------------------------------------------------------------------------------- residuals and their norms

    def rms_norm(self, x: Value, weight: Tensor | None, eps: float, heads: int = 0) -> Value:
        if heads or weight is None or not _is_plain_sum(x):
            return super().rms_norm(x, weight, eps, heads)
        return self._skip("SkipSimplifiedLayerNormalization", x, [self.vector(weight, x.dtype)], stem(weight.name), eps)

    def layer_norm(self, x: Value, weight: Tensor, bias: Tensor | None, eps: float) -> Value:
        if not _is_plain_sum(x):
            return super().layer_norm(x, weight, bias, eps)
        inputs = [self.vector(weight, x.dtype), *([self.vector(bias, x.dtype)] if bias is not None else [])]
        return self._skip("SkipLayerNormalization", x, inputs, stem(weight.name), eps)

    def _skip(self, op_type: str, x: Value, weights: list[str], label: str, eps: float) -> Value:
        """The norm of a sum, and the sum itself."""
        assert isinstance(x, Sum)
        a, b = x.parts
        y, total = self.graph.emit(
            op_type, a.name, b.name, *weights, label=label, domain=MICROSOFT, outputs=("", "-", "-", ""), epsilon=eps
        )[::3]
        for name in (y, total):
            self.graph.describe(name, x.dtype, x.shape)
        x.given(total)
        normed = Value(self, y, x.dtype, x.shape)
        return normed if self.config.spec.family == "encoder" else self.cast(normed, self.dtype)

    # ---------------------------------------------------------------------------------------------------- matrices

    def linear(self, x: Value, layer: Layer) -> Value:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if not self.in_blocks(weight):
            return super().linear(x, layer)
        shape = (*x.shape[:-1], weight.shape[0])
        return Product(self, self.dtype, shape, (x, layer), lambda: self.products(x, [layer]).name)

    def in_blocks(self, weight: Tensor) -> bool:
        return weight.is_blocked and not self.is_dynamic(weight)

    def products(self, x: Value, layers: Sequence[Layer]) -> Value:
        """The results of linear layers of the same value, side by side, in one node."""
        x = self.cast(x, self.dtype)
        weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
        blocks, label = self.blocks(weights), "+".join(stem(weight.name) for weight in weights)
        n_rows = blocks.shape[0]
        y = self.own(
            "MatMulNBits",
            *(x, blocks.codes, blocks.scales, blocks.zeros, "", self.biases(layers)),
            shape=(*x.shape[:-1], n_rows),
            dtype=x.dtype,
            label=label,
            K=x.n_cols,
            N=n_rows,
            bits=blocks.bits,
            block_size=blocks.block,
            accuracy_level=self.settings.accuracy_level or None,
        )
        return y if not blocks.offsets else self.with_offsets(x, y, blocks, label)

    def biases(self, layers: Sequence[Layer]) -> str:
        """Their biases, one after the other; "" if they have none."""
        found: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]  # type: ignore[misc]
        if len(found) < 2:
            return self.vector(found[0], self.dtype) if found else ""
        name = "+".join(bias.name for bias in found)
        return self.array(name, np.concatenate([bias.dequantize() for bias in found]).astype(NUMPY[self.dtype]))

    def product(self, x: Value, weight: Tensor) -> Value:
        label, shape = stem(weight.name), (*x.shape[:-1], weight.shape[0])
        if not weight.is_blocked and self.is_table(weight):
            table = self.casted_floats(weight)
            return self.own("FusedMatMul", x, table, shape=shape, dtype=x.dtype, label=label, transB=1)
        return super().product(x, weight)

    def with_offsets(self, x: Value, y: Value, blocks: Blocks, label: str) -> Value:
        """The product with each block's offset is that of the sums of x over the blocks: a 32nd of the work.

        MatMulNBits knows zero points of float too, but then it is eighty times slower, and only for 4 bits.
        """
        sums = self.block_sums(x, blocks.block)
        shape = y.shape
        rest = self.own("FusedMatMul", sums, blocks.offsets, shape=shape, dtype=x.dtype, label=label, transB=1)
        return self.value("Add", y, rest, shape=shape, dtype=x.dtype, label=label)

    def block_sums(self, x: Value, block: int) -> str:
        key = x.name, block
        if key not in self._sums:
            apart = self.node("Reshape", x.name, self.graph.constant((0, 0, x.n_cols // block, block)))
            self._sums[key] = self.node("ReduceSum", apart, self.graph.constant([3]), keepdims=0)
        return self._sums[key]

    @cached_property
    def _sums(self) -> dict[tuple[str, int], str]:
        return {}

    def blocks(self, weights: Sequence[Tensor]) -> Blocks:
        """Matrices on top of each other, as MatMulNBits and GatherBlockQuantized take them, in the data file."""
        name = "+".join(weight.name for weight in weights)
        if name not in self._blocks:
            blocked = joined([weight.blocked() for weight in weights])
            codes = packed(blocked.codes, blocked.bits)
            zeros = offsets = ""
            stored = self.graph.store(f"{name}.codes", UINT8, codes.shape, [codes])
            scales = self.array(f"{name}.scales", blocked.scales.astype(NUMPY[self.dtype]))
            if blocked.offsets is not None:
                offsets = self.array(f"{name}.offsets", blocked.offsets.astype(NUMPY[self.dtype]))
            elif blocked.zeros is not None:
                points = packed(blocked.zeros, blocked.bits)
                zeros = self.graph.store(f"{name}.zeros", UINT8, points.shape, [points])
            self._blocks[name] = Blocks(blocked.bits, blocked.block, codes.shape, stored, scales, zeros, offsets)
        return self._blocks[name]

    @cached_property
    def _blocks(self) -> dict[str, Blocks]:
        return {}

    def dynamic_product(self, x: Value, weight: Tensor) -> Value:
        codes, scales = self.columns(weight)
        shape = (*x.shape[:-1], weight.shape[0])
        return self.own("DynamicQuantizeMatMul", x, codes, scales, shape=shape, dtype=FLOAT, label=stem(weight.name))

    def looked_up(self, table: Tensor, at: str) -> Value:
        if not table.is_blocked:
            return super().looked_up(table, at)
        blocks, label = self.blocks([table]), stem(table.name)
        n_rows, n_blocks, n_bytes = blocks.shape
        flat = self.graph.view(f"{table.name}.rows", blocks.codes, (n_rows, n_blocks * n_bytes))
        y = self.own(
            "GatherBlockQuantized",
            *(flat, at, blocks.scales, blocks.zeros),
            shape=(B, S, table.shape[1]),
            dtype=self.dtype,
            label=label,
            bits=blocks.bits,
            block_size=blocks.block,
            gather_axis=0,
            quantize_axis=1,
        )
        if not blocks.offsets:
            return y
        offsets = self.node("Unsqueeze", self.node("Gather", blocks.offsets, at, label=label), self.graph.constant([3]))
        moved = self.node("Add", self.reshaped(y, (0, 0, n_blocks, blocks.block)).name, offsets, label=label)
        return self.value("Reshape", moved, self.graph.constant((0, 0, table.shape[1])), shape=y.shape, dtype=y.dtype)

    # --------------------------------------------------------------------------------------------------- attention

    @cached_property
    def lengths(self) -> tuple[str, str]:
        """For GroupQueryAttention: keys of each text less one, int32 (batch,), and of the longest text, int32 ()."""
        n_keys = self.node("ReduceSum", self.mask, self.graph.constant([1]), keepdims=0)
        last = self.node("Cast", self.node("Sub", n_keys, self.graph.constant(1)), to=INT32)
        longest = self.node("Squeeze", self.node("Shape", self.mask, start=1, end=2))
        return last, self.node("Cast", longest, to=INT32)

    def attention(
        self, q: Value, k: Value, v: Value, layer: int, scale: float, softcap: float = 0.0, causal: bool = True
    ) -> Value:
        c = self.config
        if not causal and (c.window(layer) or c.n_kv_heads != c.n_heads or softcap):
            return super().attention(q, k, v, layer, scale, softcap, causal)
        if not causal:
            return self.whole_attention(q, k, v, layer, scale)
        if c.head_dim != c.v_head_dim:
            raise UnsupportedError(
                f"GroupQueryAttention: keys have {c.head_dim} dimensions and values {c.v_head_dim}; they must be alike"
            )
        rope, tables = None, ("", "")
        if isinstance(q, Rotated) and isinstance(k, Rotated) and q.rope.dim % 16 == 0:  # it wants whole vectors
            rope = q.rope
            q, k, tables = q.parts[0], k.parts[0], self.rope_tables(rope)
        inputs = (
            [self.packed(q, k, v), "", ""]
            if self.can_pack(q, k, v)
            else [self.cast(a, self.dtype).name for a in (q, k, v)]
        )
        names = ("", f"present.{layer}.key", f"present.{layer}.value")
        [y, *_] = self.graph.emit(
            "GroupQueryAttention",
            *(*inputs, *self.past(layer), *self.lengths),
            *(tables if rope is not None else ()),
            label=f"blk.{layer}",
            domain=MICROSOFT,
            outputs=names,
            num_heads=c.n_heads,
            kv_num_heads=c.n_kv_heads,
            scale=scale,
            softcap=softcap or None,
            local_window_size=c.window(layer) or None,
            do_rotary=1 if rope is not None else None,
            rotary_interleaved=1 if rope is not None and rope.pairing.value == "interleaved" else None,
        )
        self.present(layer, names[1], names[2])
        shape = (B, S, c.attn_dim)
        self.graph.describe(y, self.dtype, shape)
        return Value(self, y, self.dtype, shape)

    def can_pack(self, *values: Value) -> bool:
        """Whether these are linear layers of the same value that one node can compute: alike, and not there yet."""
        if not all(isinstance(value, Product) and not value.is_made for value in values):
            return False
        sources, layers = zip(*(value.parts for value in values if isinstance(value, Product)), strict=True)
        kinds = {(layer.weight.format, layer.bias is None) for layer in layers}
        return len(kinds) == 1 and all(source is sources[0] for source in sources)

    def packed(self, *values: Value) -> str:
        """Queries, keys and values side by side."""
        parts = [value.parts for value in values if isinstance(value, Product)]
        return self.products(parts[0][0], [layer for _, layer in parts]).name

    def whole_attention(self, q: Value, k: Value, v: Value, layer: int, scale: float) -> Value:
        """Attention of tokens that all see each other."""
        shape = (B, S, self.config.attn_dim)
        names = [self.cast(a, self.dtype).name for a in (q, k, v)]
        inputs, n_heads, label = (*names, "", self.mask32), self.config.n_heads, f"blk.{layer}"
        rest: dict[str, Any] = {"shape": shape, "dtype": self.dtype, "num_heads": n_heads, "scale": scale}
        return self.own("MultiHeadAttention", *inputs, label=label, **rest)

    @cached_property
    def mask32(self) -> str:
        return self.node("Cast", self.mask, to=INT32)

    def silu(self, x: Value) -> Value:
        return self.own("QuickGelu", x, shape=x.shape, dtype=x.dtype, alpha=1.0)


def _is_plain_sum(x: Value) -> bool:
    """A sum that is not computed yet, of two values of the same shape."""
    return isinstance(x, Sum) and not x.is_made and x.parts[0].shape == x.parts[1].shape
