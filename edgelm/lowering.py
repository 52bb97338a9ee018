"""From a recorded graph to the rows of an op table: which operations become one, and which row does their work.

`Lowering` turns nodes into steps, fusing what one kernel can do; `plan` has them scheduled and placed, the kernels
compiled, and the table written. Knows the row builders of `edgelm.kernels`, but no kernel's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arch import Config, Pairing, Rope
from .errors import UnsupportedError
from .formats import QTensor
from .graph import OUTPUTS, TOKENS, Matrix, Node, for_outputs, gated, in_order
from .kernels.abi import Env, Row
from .kernels.matrix_unit import ROWS
from .kernels.records import FRAGILE, LIMIT, PRODUCT_LIMIT
from .pages import GroupLayout
from .placement import ALIGN, Step, Value, allocate, schedule
from .threads import processes

Floats = NDArray[np.float32]
COUNTS = {TOKENS: int(Env.N_TOKENS), OUTPUTS: int(Env.N_OUTPUTS)}


@dataclass
class Plan:
    """What a program runs.

    Attributes:
        table: int64 (rows, Row.SIZE).
        steps: what each row is, for people.
        workspace_bytes: of all values, for the number of tokens that was planned for.
        cap: a table of one row that caps the logits where they lie, if they must be; its workspace is the logits, its
            outputs are `cap_pieces` to each row of them, so that threads can share one.
        hidden: offset and stride of the result, when it is not logits.
    """

    table: NDArray[np.int64]
    steps: list[Step]
    workspace_bytes: int
    cap: NDArray[np.int64] | None
    cap_pieces: int
    hidden: tuple[int, int] | None


@dataclass
class Resources:
    """What rows point to, besides the workspace. Shared by all plans of a program; keeps it alive."""

    config: Config
    packed: Mapping[Matrix, Any]
    n_ctx: int
    packing: Any = None  # of all of `packed`, in that order, while it may still be under way
    matrix_unit: bool = True  # whether many tokens go through it, if there is one
    ropes: list[Rope] = field(default_factory=list)  # the index is that of Env.COS and Env.SIN
    constants: dict[Any, Floats] = field(default_factory=dict)

    def address(self, key: Any, make: Callable[[], Floats]) -> int:
        """Address of float32 values, 64-byte aligned and followed by zeros up to a whole vector."""
        found = self.constants.get(key)
        if found is None:
            values = make().reshape(-1)
            memory = np.zeros(-(-len(values) // 16) * 16 + 16, np.float32)
            at = -memory.ctypes.data % ALIGN // 4
            found = self.constants[key] = memory[at:]
            found[: len(values)] = values
        return int(found.ctypes.data)

    def vector(self, tensor: QTensor | None) -> int:
        return 0 if tensor is None else self.address(tensor, tensor.dequantize)

    def bias(self, matrix: Matrix | None) -> int:
        return 0 if matrix is None else self.address(matrix, lambda: matrix.slice().dequantize())

    def rope(self, rope: Rope) -> int:
        if rope not in self.ropes:
            self.ropes.append(rope)
        return self.ropes.index(rope)


class Lowering:
    """Nodes to steps, in the order of the graph."""

    def __init__(self, nodes: list[Node], resources: Resources, layouts: tuple[GroupLayout, ...]) -> None:
        from .kernels import attention, elementwise, linear

        self._attention, self._elementwise, self._linear = attention, elementwise, linear
        self._resources, self._layouts = resources, layouts
        self._users: dict[Node, list[Node]] = {node: [] for node in nodes}
        for node in nodes:
            for i in node.inputs:
                self._users[i].append(node)
        self._floats: dict[Node, Value] = {}
        self._records: dict[tuple[Node, str], Value] = {}  # by kind
        self.steps: list[Step] = []
        self.softcap = 0.0
        self._result = nodes[-1]  # what makes the result, but for the cap
        if self._result.kind == "softcap" and self._sole(self._result.inputs[0], "linear"):
            self.softcap = self._result.args["cap"]
            self._result = self._result.inputs[0]
        self._fragile = any(n.kind == "linear" and n.args["matrix"].tensor.format.coarse for n in nodes)
        self._absorbed = {n for node in nodes for n in self._absorbs(node)}
        for node in nodes:
            if node not in self._absorbed and node not in self._floats:
                getattr(self, f"on_{node.kind}")(node)

    @property
    def n_cols(self) -> int:
        return self._result.n_cols

    @property
    def hidden(self) -> Value | None:
        """Where the result lies, unless it is logits."""
        return self._floats.get(self._result)

    # --- what becomes part of something else ---

    def _sole(self, node: Node, kind: str) -> bool:
        """Is this an operation of that kind which a single other one uses?"""
        return node.kind == kind and len(self._users[node]) == 1

    def _absorbs(self, node: Node) -> tuple[Node, ...]:
        """Nodes that get no row of their own because `node`'s row does their work."""
        if node.kind == "softcap" and self.softcap and node.inputs[0] is self._result:
            return (node,)
        if node.kind == "add":
            if (branch := self._branch(node)) is not None:
                return (branch,)
            return tuple(n for n in node.inputs if n.kind == "row")
        if node.kind == "mul" and (gate := self._gate(node)) is not None:
            activation, up = gate
            return activation, activation.inputs[0], up
        if node.kind == "attention":
            return tuple(n for n in node.inputs[:2] if self._sole(n, "rope"))
        return ()

    def _branch(self, add: Node) -> Node | None:
        """The linear layer that can add the other operand itself."""
        for node in reversed(add.inputs):
            if self._sole(node, "linear") and add.inputs[0] is not add.inputs[1]:
                return node
        return None

    def _gate(self, mul: Node) -> tuple[Node, Node] | None:
        """(activation, up) of a product that is `gated`, if one row can compute it and nothing else needs its parts."""
        for activation, up in gated(mul):
            gate = activation.inputs[0]
            sole = self._sole(activation, "activation") and self._sole(up, "linear") and self._sole(gate, "linear")
            if not sole or gate.n_cols != up.n_cols:
                continue
            known = activation.args["function"] in self._linear.ACTIVATIONS
            plain = gate.args["bias"] is None and up.args["bias"] is None
            if known and plain and self._linear.can_gate(self._packed(gate), self._packed(up)):
                return activation, up
        return None

    def _read(self, *linears: Node) -> tuple[str, int]:
        """What is told about the weights of a step."""
        names = (node.args["matrix"].tensor.name for node in linears)
        return " ".join(names), sum(self._packed(node).n_bytes for node in linears)

    # --- values ---

    def _packed(self, linear: Node) -> Any:
        return self._resources.packed[linear.args["matrix"]]

    def _new(self, node: Node) -> Value:
        value = self._floats[node] = Value(node.rows, -(-node.n_cols // 16) * ALIGN)
        return value

    def _new_record(self, node: Node, kind: str) -> Value:
        value = self._records[node, kind] = Value(node.rows, self._linear.record_bytes(kind, node.n_cols))
        return value

    def _limit(self, node: Node) -> float:
        """How exact records of a value are made, as `kernels.records` says it: those that logits come from, in full."""
        if self._result.kind == "linear" and self._result in self._users[node]:
            return 0.0
        return (FRAGILE if self._fragile else 1.0) * (PRODUCT_LIMIT if node.kind == "mul" else LIMIT)

    def _record_wanted(self, node: Node) -> bool:
        """Whether a record of int8, which norms can write themselves, is needed."""
        return any(user.kind == "linear" and self._record_kind(user) == "int8" for user in self._users[node])

    def _record_kind(self, linear: Node) -> str:
        return self._linear.record_kind(self._packed(linear).format)

    def _input(self, linear: Node) -> Value:
        """What a linear layer reads: its input itself, or the record of it, which is made once."""
        x, kind = linear.inputs[0], self._record_kind(linear)
        if kind == "float32":
            return self._floats[x]
        if (x, kind) not in self._records:
            value, record = self._floats[x], self._new_record(x, kind)
            build = partial(self._linear.row_quantize, kind=kind, limit=self._limit(x))
            row = partial(_quantize, build, value, record, x.n_cols)
            self.steps.append(Step("quantize", (value,), (record,), row))
        return self._records[x, kind]

    def _step(
        self, node: Node, reads: Iterable[Value], row: Callable[..., list[int]], *, reuses: Value | None = None,
        name: str = "", also: tuple[Value, ...] = (), weights: tuple[str, int] = ("", 0),
    ) -> Value:
        """Appends the step that makes `node`'s value; `row` is called with that value."""
        y = self._new(node)
        self.steps.append(Step(name or node.kind, tuple(reads), (y, *also), partial(row, y), reuses, weights))
        return y

    # --- one method for each kind of node ---

    def on_embed(self, node: Node) -> None:
        packed, a = self._resources.packed[node.args["table"]], node.args
        self._step(node, (), lambda y: self._linear.row_embed(
            packed, y.offset, y.stride, by=a["by"], offset=a["offset"], scale=a.get("scale", 1.0)
        ))

    def on_row(self, node: Node) -> None:
        raise UnsupportedError("a constant row can only be added to something")

    def _norm(self, node: Node, build: Callable[..., list[int]], *arguments: Any, **options: Any) -> None:
        x = self._floats[node.inputs[0]]
        record = self._new_record(node, "int8") if self._record_wanted(node) else None
        self._step(node, (x,), lambda y: build(
            x.offset, x.stride, y.offset, y.stride, node.n_cols, *arguments, **options,
            quantized_off=-1 if record is None else record.offset, limit=self._limit(node), count=COUNTS[node.rows],
        ), also=() if record is None else (record,))

    def on_rms_norm(self, node: Node) -> None:
        weight = self._resources.vector(node.args["weight"])
        self._norm(node, self._elementwise.row_rms_norm, weight, node.args["eps"], heads=node.args["heads"])

    def on_layer_norm(self, node: Node) -> None:
        weight, bias = (self._resources.vector(node.args[name]) for name in ("weight", "bias"))
        self._norm(node, self._elementwise.row_layer_norm, weight, bias, node.args["eps"])

    def _linear_row(self, node: Node, linear: Node, residual: Value | None) -> None:
        """The value of `node`: that of a linear layer, plus the residual if there is one."""
        packed, bias, x = self._packed(linear), self._resources.bias(linear.args["bias"]), self._input(linear)
        options = {"bias_address": bias, "count": COUNTS[linear.rows], "by_unit": self._resources.matrix_unit}
        if linear is self._result:
            none = Value(OUTPUTS, 0, 0)  # logits are not in the workspace
            row = lambda: self._linear.row_linear(packed, x.offset, x.stride, 0, 0, **options, to_logits=True)  # noqa: E731
            self.steps.append(Step("logits", (x,), (none,), row, weights=self._read(linear)))
            return
        reads = (x,) if residual is None else (x, residual)
        self._step(node, reads, lambda y: self._linear.row_linear(
            packed, x.offset, x.stride, y.offset, y.stride, **options,
            **({} if residual is None else {"residual_off": residual.offset, "residual_stride": residual.stride}),
        ), reuses=residual, name="linear", weights=self._read(linear))

    def on_linear(self, node: Node) -> None:
        self._linear_row(node, node, None)

    def on_add(self, node: Node) -> None:
        if (branch := self._branch(node)) is not None:
            other = node.inputs[0] if branch is node.inputs[1] else node.inputs[1]
            self._linear_row(node, branch, self._floats[other])
            return
        for constant, other in (node.inputs, node.inputs[::-1]):
            if constant.kind == "row":
                self._add_constant(node, self._floats[other], constant.args["table"], constant.args["index"])
                return
        self._combine(node, self._elementwise.row_add)

    def _add_constant(self, node: Node, x: Value, table: QTensor, index: int) -> None:
        address = self._resources.address((table, index), lambda: table.rows([index])[0])
        self._step(node, (x,), lambda y: self._elementwise.row_add_constant(
            x.offset, x.stride, address, y.offset, y.stride, node.n_cols, count=COUNTS[node.rows]
        ), reuses=x)

    def on_mul(self, node: Node) -> None:
        if (gated := self._gate(node)) is None:
            self._combine(node, self._elementwise.row_mul)
            return
        activation, up = gated
        gate, x = activation.inputs[0], self._input(up)
        self._step(node, (x,), lambda y: self._linear.row_gated(
            self._packed(gate), self._packed(up), x.offset, x.stride, y.offset, y.stride,
            activation=activation.args["function"], count=COUNTS[node.rows], by_unit=self._resources.matrix_unit,
        ), name="gated", weights=self._read(gate, up))

    def _combine(self, node: Node, build: Callable[..., list[int]]) -> None:
        a, b = (self._floats[i] for i in node.inputs)
        self._step(node, (a, b), lambda y: build(
            a.offset, a.stride, b.offset, b.stride, y.offset, y.stride, node.n_cols, count=COUNTS[node.rows]
        ), reuses=a)

    def _each(self, node: Node, build: Callable[..., list[int]], *arguments: Any) -> None:
        x = self._floats[node.inputs[0]]
        self._step(node, (x,), lambda y: build(
            x.offset, x.stride, y.offset, y.stride, node.n_cols, *arguments, count=COUNTS[node.rows]
        ), reuses=x)

    def on_scale(self, node: Node) -> None:
        self._each(node, self._elementwise.row_scale, node.args["factor"])

    def on_softcap(self, node: Node) -> None:
        self._each(node, self._elementwise.row_softcap, node.args["cap"])

    def on_activation(self, node: Node) -> None:
        self._each(node, partial(self._elementwise.row_activation, node.args["function"]))

    def on_columns(self, node: Node) -> None:
        x, start = self._floats[node.inputs[0]], 4 * node.args["start"]
        self._step(node, (x,), lambda y: self._elementwise.row_copy(
            x.offset + start, x.stride, y.offset, y.stride, node.n_cols, count=COUNTS[node.rows]
        ))

    def on_outputs(self, node: Node) -> None:
        x = self._floats[node.inputs[0]]
        self._step(node, (x,), lambda y: self._elementwise.row_outputs(
            x.offset, x.stride, y.offset, y.stride, node.n_cols
        ))

    def on_rope(self, node: Node) -> None:
        x, heads, options = self._floats[node.inputs[0]], node.args["heads"], self._rotation(node)
        self._step(node, (x,), lambda y: self._elementwise.row_rope(
            x.offset, x.stride, y.offset, y.stride, heads, node.n_cols // heads, **options, count=COUNTS[node.rows]
        ), reuses=x)

    def _rotation(self, node: Node) -> dict[str, Any]:
        rope = node.args["rope"]
        return {
            "rope": self._resources.rope(rope), "rope_dim": rope.dim, "halves": rope.pairing is Pairing.HALVES,
        }

    def _unrotated(self, node: Node) -> tuple[Value, dict[str, Any]]:
        """A value that attention reads, and how it has still to rotate it."""
        if node in self._absorbed:
            return self._floats[node.inputs[0]], self._rotation(node)
        return self._floats[node], {}

    def on_attention(self, node: Node) -> None:
        (q, q_rope), (k, k_rope) = (self._unrotated(n) for n in node.inputs[:2])
        v, a, config, kernels = self._floats[node.inputs[2]], node.args, self._resources.config, self._attention
        group = next(i for i, layout in enumerate(self._layouts) if a["layer"] in layout.group.layers)
        layout, n_heads = self._layouts[group], config.n_heads
        index = layout.group.layers.index(a["layer"])
        n_scratch = kernels.scratch_bytes(layout, n_heads, self._resources.n_ctx)
        scratch = Value(TOKENS, n_scratch, single=True)
        self.steps.append(Step("store_kv", (k, v), (scratch,), lambda: kernels.row_store_kv(
            layout, group, index, k.offset, k.stride, v.offset, v.stride, scratch_off=scratch.offset, **k_rope
        )))
        self._step(node, (q, scratch), lambda y: kernels.row_attention(
            layout, group, index, n_heads, q.offset, q.stride, y.offset, y.stride, scale=a["scale"],
            softcap=a["softcap"], causal=a["causal"], scratch_off=scratch.offset, n_scratch=n_scratch, **q_rope,
            count=COUNTS[node.rows],
        ))


def _quantize(build: Callable[..., list[int]], value: Value, record: Value, n_cols: int) -> list[int]:
    return build(value.offset, value.stride, n_cols, record.offset, count=COUNTS[value.rows])


def plan(
    nodes: list[Node], resources: Resources, layouts: tuple[GroupLayout, ...], n_rows: int,
    progress: Callable[[str, int, int], None],
) -> Plan:
    """The op table of a graph, in order, for at most `n_rows` tokens at a time. Compiles the kernels it needs, with
    those of a packing that is not under way yet, and starts this."""
    from .kernels import compiler, executor, sampling

    lowering = Lowering(in_order([for_outputs(nodes[-1])]), resources, layouts)
    steps = schedule(lowering.steps)
    lowering.steps.clear()  # they know it: a cycle would hold the weights until somebody looks for cycles
    hidden = lowering.hidden
    n_bytes = allocate(steps, -(-n_rows // ROWS) * ROWS, hidden)
    with compiler.only_wanted() as wanted:
        for step in steps:
            step.row()
        _cap(lowering)
    kernels = [*executor.KERNELS, *wanted, *([sampling.KERNEL] if hidden is None else [])]  # logits will be sampled
    packing = resources.packing
    if packing is not None:  # together, so that no core has nothing to compile
        kernels = [*packing.kernels, *kernels]
    compiler.compile_all(kernels, progress, lambda: processes(compiler.PROCESS_BYTES))
    if packing is not None:
        packing.start()
    compiler.forget_llvm()
    table = np.array([step.row() for step in steps], np.int64).reshape(len(steps), Row.SIZE)
    levels = np.array([step.level for step in steps])
    table[:, Row.BARRIER] = np.append(levels[1:] != levels[:-1], True)
    place = None if hidden is None else (hidden.offset, hidden.stride)
    return Plan(table, steps, n_bytes, *_cap(lowering), place)


def _cap(lowering: Lowering) -> tuple[NDArray[np.int64] | None, int]:
    if not lowering.softcap:
        return None, 1
    from .kernels import elementwise

    pieces = max(n for n in range(1, 65) if lowering.n_cols % n == 0)
    n = lowering.n_cols // pieces
    row = elementwise.row_softcap(0, 4 * n, 0, 4 * n, n, lowering.softcap, count=COUNTS[OUTPUTS])
    return np.array([row], np.int64), pieces
