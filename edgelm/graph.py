"""A model function, written down: `Recorder` is the `op` that makes a `Node` of an operation instead of computing it.

Nodes are values that are assigned once; following `inputs` from the result gives the whole model. Knows what operations
take and what shape they give, but neither how nor in which order they are computed: see `edgelm.lowering`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arch import Config, Rope
from .formats import QTensor, by_name

F32 = by_name("F32")
TOKENS, OUTPUTS = "tokens", "outputs"  # what the rows of a value are
_serial = itertools.count()


@dataclass(frozen=True)
class Matrix:
    """Rows [start, stop) of a weight: all of it, or the part of a fused weight that one value is made of."""

    tensor: QTensor
    start: int
    stop: int

    @classmethod
    def of(cls, tensor: QTensor) -> Matrix:
        return cls(tensor, 0, tensor.shape[0])

    def rows(self, start: int, stop: int) -> Matrix:
        return Matrix(self.tensor, self.start + start, self.start + stop)

    def slice(self) -> QTensor:
        """The rows as a tensor of their own; a view."""
        t, n = self.tensor, self.stop - self.start
        if n == t.shape[0]:
            return t
        name, rows = f"{t.name}[{self.start}:{self.stop}]", slice(self.start, self.stop)
        if len(t.shape) == 1:  # a bias: one row of blocks, of a float format
            values = np.ascontiguousarray(t.dequantize()[rows])
            return QTensor(name, F32, (n,), values.view(np.uint8).reshape(1, -1))
        return QTensor(name, t.format, (n, *t.shape[1:]), t.data[rows])


@dataclass(eq=False)
class Node:
    """The value (rows, n_cols) of an operation `kind` on `inputs`. `args`: the operation's other arguments, by name."""

    kind: str
    inputs: tuple[Node, ...]
    n_cols: int
    rows: str = TOKENS
    args: dict[str, Any] = field(default_factory=dict)
    serial: int = field(default_factory=lambda: next(_serial))

    def __add__(self, other: Node) -> Node:
        return Node("add", (self, other), self.n_cols, self.rows)

    def __mul__(self, other: Node) -> Node:
        return Node("mul", (self, other), self.n_cols, self.rows)

    def __repr__(self) -> str:
        return f"{self.kind}{self.serial}({', '.join(f'{n.kind}{n.serial}' for n in self.inputs)})"


def in_order(results: Iterable[Node]) -> list[Node]:
    """Everything `results` are made of, in the order in which it was written down."""
    found: dict[int, Node] = {}
    stack = list(results)
    while stack:
        node = stack.pop()
        if node.serial not in found:
            found[node.serial] = node
            stack.extend(node.inputs)
    return [found[serial] for serial in sorted(found)]


BY_ROW = frozenset({"linear", "rms_norm", "layer_norm", "rope", "scale", "activation", "columns"})


def for_outputs(result: Node) -> Node:
    """The same graph, in which rows are chosen as early as their values are no longer needed by other rows.

    The last attention has keys and values of all tokens, but queries of those alone that want an output: a prompt of
    many tokens, of which one does, computes its last layer's queries and attention for that one.
    """
    chosen: dict[Node, Node] = {}
    made: dict[Node, Node] = {}
    for node in in_order([result]):
        inputs = tuple(made[i] for i in node.inputs)
        if node.kind == "outputs":
            made[node] = _rows_of(inputs[0], chosen)
        else:
            made[node] = node if inputs == node.inputs else Node(node.kind, inputs, node.n_cols, node.rows, node.args)
    return made[result]


def _rows_of(x: Node, chosen: dict[Node, Node]) -> Node:
    """The rows of `x` that want an output; `chosen` remembers them."""
    if x not in chosen:
        kind, inputs, args = x.kind, x.inputs, x.args
        if kind == "attention" or kind in BY_ROW:
            inputs = (_rows_of(inputs[0], chosen), *inputs[1:])
        else:
            kind, inputs, args = "outputs", (x,), {}
        chosen[x] = Node(kind, inputs, x.n_cols, OUTPUTS, args)
    return chosen[x]


def matrices(nodes: Iterable[Node]) -> list[Matrix]:
    """Every weight matrix of a graph, once, in the order in which they are used."""
    found = (node.args.get(name) for node in nodes for name in ("matrix", "table"))
    return list(dict.fromkeys(matrix for matrix in found if isinstance(matrix, Matrix)))


def gated(mul: Node) -> Iterator[tuple[Node, Node]]:
    """(activation, up), if a product is activation(gate(x)) * up(x) of two linear layers; either way round."""
    for activation, up in (mul.inputs, mul.inputs[::-1]):
        if activation.kind == "activation" and up.kind == "linear":
            gate = activation.inputs[0]
            if gate.kind == "linear" and gate.inputs == up.inputs:
                yield activation, up


def gates(nodes: Iterable[Node], among: Sequence[Matrix]) -> list[tuple[int, int]]:
    """(gate, up), as places in `among`, of the products that are `gated`."""
    places = {matrix: i for i, matrix in enumerate(among)}
    found = [(a.inputs[0].args["matrix"], up.args["matrix"]) for n in nodes if n.kind == "mul" for a, up in gated(n)]
    return [(places[gate], places[up]) for gate, up in found if gate in places and up in places]


class Recorder:
    """The operations of `edgelm.models`, recorded. `head` is "logits" or "hidden"."""

    def __init__(self, config: Config, head: str) -> None:
        self.config, self.head = config, head

    def embed(self, table: QTensor) -> Node:
        return Node("embed", (), table.shape[1], args={"table": Matrix.of(table), "by": "tokens", "offset": 0})

    def embed_positions(self, table: QTensor, offset: int = 0) -> Node:
        return Node("embed", (), table.shape[1], args={"table": Matrix.of(table), "by": "positions", "offset": offset})

    def row(self, table: QTensor, index: int) -> Node:
        return Node("row", (), table.shape[1], args={"table": table, "index": index})

    def rms_norm(self, x: Node, weight: QTensor | None, eps: float, heads: int = 0) -> Node:
        return self._on(x, "rms_norm", weight=weight, eps=eps, heads=heads)

    def layer_norm(self, x: Node, weight: QTensor, bias: QTensor | None, eps: float) -> Node:
        return self._on(x, "layer_norm", weight=weight, bias=bias, eps=eps)

    def linear(self, x: Node, layer: Any) -> Node:
        matrix = Matrix.of(layer.weight)
        bias = None if layer.bias is None else Matrix.of(layer.bias)
        return Node("linear", (x,), matrix.stop, x.rows, {"matrix": matrix, "bias": bias})

    def split(self, x: Node, sizes: tuple[int, ...]) -> tuple[Node, ...]:
        """Columns of x. Those of a linear layer are linear layers of their own: nobody needs them side by side."""
        parts, start = [], 0
        for size in sizes:
            stop = start + size
            if x.kind == "linear":
                matrix, bias = x.args["matrix"], x.args["bias"]
                args = {"matrix": matrix.rows(start, stop), "bias": bias and bias.rows(start, stop)}
                parts.append(Node("linear", x.inputs, size, x.rows, args))
            else:
                parts.append(Node("columns", (x,), size, x.rows, {"start": start}))
            start = stop
        return tuple(parts)

    def rope(self, x: Node, rope: Rope, heads: int) -> Node:
        return self._on(x, "rope", rope=rope, heads=heads)

    def attention(
        self, q: Node, k: Node, v: Node, layer: int, scale: float, softcap: float = 0.0, causal: bool = True
    ) -> Node:
        n_cols = self.config.n_heads * self.config.v_head_dim
        args = {"layer": layer, "scale": scale, "softcap": softcap, "causal": causal}
        return Node("attention", (q, k, v), n_cols, q.rows, args)

    def scale(self, x: Node, s: float) -> Node:
        if x.kind == "embed":  # done while looking up
            return Node("embed", (), x.n_cols, x.rows, {**x.args, "scale": x.args.get("scale", 1.0) * s})
        return self._on(x, "scale", factor=s)

    def softcap(self, x: Node, cap: float) -> Node:
        return self._on(x, "softcap", cap=cap)

    def silu(self, x: Node) -> Node:
        return self._on(x, "activation", function="silu")

    def gelu(self, x: Node) -> Node:
        return self._on(x, "activation", function="gelu")

    def gelu_erf(self, x: Node) -> Node:
        return self._on(x, "activation", function="gelu_erf")

    def relu(self, x: Node) -> Node:
        return self._on(x, "activation", function="relu")

    def outputs(self, x: Node) -> Node:
        return Node("outputs", (x,), x.n_cols, OUTPUTS)

    @staticmethod
    def _on(x: Node, kind: str, **args: Any) -> Node:
        return Node(kind, (x,), x.n_cols, x.rows, args)
