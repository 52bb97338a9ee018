"""An ONNX file without its weights, proven: what goes in and out, which operators, where the weights lie and how long.

onnxruntime reads the model itself; this looks at the same bytes first, as if an enemy had written them, because
onnxruntime believes some of what is refused here: files outside the model's folder, loops that never end, functions
that call themselves. Weights are not read, so a file of gigabytes takes milliseconds.
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto)
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from .errors import FormatError, SourceError, UnsupportedError
from .protobuf import Message

MAX_DEPTH = 8  # graphs inside nodes of graphs
MAX_NODES = 1 << 18
MAX_DIMS = 16

# TensorProto.DataType: name and bits of a number.
DTYPES = {
    1: ("float32", 32), 2: ("uint8", 8), 3: ("int8", 8), 4: ("uint16", 16), 5: ("int16", 16), 6: ("int32", 32),
    7: ("int64", 64), 8: ("string", 0), 9: ("bool", 8), 10: ("float16", 16), 11: ("float64", 64), 12: ("uint32", 32),
    13: ("uint64", 64), 14: ("complex64", 64), 15: ("complex128", 128), 16: ("bfloat16", 16), 17: ("float8e4m3fn", 8),
    18: ("float8e4m3fnuz", 8), 19: ("float8e5m2", 8), 20: ("float8e5m2fnuz", 8), 21: ("uint4", 4), 22: ("int4", 4),
    23: ("float4e2m1", 4), 24: ("float8e8m0", 8), 25: ("uint2", 2), 26: ("int2", 2),
}  # fmt: skip
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})  # whose operators onnxruntime itself has
# What no language model needs, and what could run without an end, or run something else.
REFUSED = frozenset({"Loop", "Scan", "PythonOp", "ATen", "EPContext"})


@dataclass(frozen=True)
class Value:
    """An input or output of the graph. dims: a number, or the name of what is known only at run time, or "" for that;
    None if the file does not say at all."""

    name: str
    dtype: str
    dims: tuple[int | str, ...] | None


@dataclass(frozen=True)
class Tensor:
    """A constant: its bytes in memory are `n_bytes`. place: the file and offset where they lie; two constants may share
    one. ("", 0) for those in the model's own file."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    n_bytes: int
    place: tuple[str, int] = ("", 0)


@dataclass(frozen=True)
class Node:
    """An operation of the main graph. ints: its attributes that are single numbers."""

    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ints: dict[str, int]


@dataclass
class OnnxFile:
    """What a file holds.

    Attributes:
        path: the file; data: files beside it that hold weights.
        inputs, outputs: by name, in order; defaults: inputs with a constant of the same name, which may be left out.
        nodes: the operations of the main graph, in order; tensors: its constants by name.
        operators: (domain, name) of every operation, also of those in inner graphs and functions.
        opsets: version of each operator set.
        metadata: what the exporter wrote beside the graph, texts by name.
        n_bytes: of the file and of those with weights.
    """

    path: Path
    ir_version: int = 0
    producer: str = ""
    opsets: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Value] = field(default_factory=dict)
    defaults: dict[str, Value] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    operators: set[tuple[str, str]] = field(default_factory=set)
    metadata: dict[str, str] = field(default_factory=dict)
    data: tuple[Path, ...] = ()
    n_bytes: int = 0


def read(path: Path) -> OnnxFile:
    """Reads a file and proves what it says.

    Raises:
        SourceError: it cannot be opened.
        FormatError: it is damaged, contradicts itself, or names files that are missing, too short, or not its own.
        UnsupportedError: it needs operators of others, or a feature that no language model needs.
    """
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise FormatError(f"{path} is empty")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error
    return _Reader(path).model(Message(data, str(path)), len(data))


class _Reader:
    """Collects what one file says."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, OnnxFile(path)
        self.external: dict[str, tuple[Path, int]] = {}  # location -> file and its size
        self.functions: dict[tuple[str, str], set[tuple[str, str]]] = {}  # and what each of them calls
        self.n_nodes = 0

    def model(self, message: Message, n_bytes: int) -> OnnxFile:
        file, graph, functions = self.file, None, []
        for number, value in message.fields():
            match number:
                case 1 if isinstance(value, int):
                    file.ir_version = value
                case 2:
                    file.producer = message.text(value)
                case 7:
                    graph = message.message(value)
                case 8:
                    domain, version = self._opset(message.message(value))
                    file.opsets[domain] = version
                case 14:
                    key, said = self._entry(message.message(value))
                    file.metadata[key] = said
                case 20:
                    raise UnsupportedError(f"{self.path}: a model for training; export it for inference")
                case 25:
                    functions.append(message.message(value))
        if graph is None or not file.opsets:
            raise FormatError(f"{self.path}: no graph in it; the file is damaged, or no ONNX model")
        for function in functions:
            self._function(function)
        self._graph(graph, 0)
        self._prove_operators()
        file.data = tuple(dict.fromkeys(path for path, _ in self.external.values()))
        file.n_bytes = n_bytes + sum(dict(self.external.values()).values())
        return file

    def _opset(self, message: Message) -> tuple[str, int]:
        domain, version = "", 0
        for number, value in message.fields():
            if number == 1:
                domain = message.text(value)
            elif number == 2 and isinstance(value, int):
                version = value
        return domain, version

    # ------------------------------------------------------------------------------------------- graphs and operations

    def _graph(self, message: Message, depth: int) -> set[tuple[str, str]]:
        """Reads a graph and gives what it calls; of the main one (depth 0) everything is kept."""
        if depth > MAX_DEPTH:
            raise FormatError(f"{self.path}: graphs nested more than {MAX_DEPTH} deep")
        file, calls = self.file, set[tuple[str, str]]()
        inputs: list[Value] = []
        for number, value in message.fields():
            match number:
                case 1:
                    node, inner = self._node(message.message(value), depth)
                    calls |= {(node.domain, node.op)} | inner
                    if depth == 0:
                        file.nodes.append(node)
                case 5:
                    tensor = self._tensor(message.message(value))
                    if depth == 0:
                        file.tensors[tensor.name] = tensor
                case 11 if depth == 0:
                    inputs.append(self._value(message.message(value)))
                case 12 if depth == 0:
                    output = self._value(message.message(value))
                    file.outputs[output.name] = output
                case 15:
                    raise UnsupportedError(f"{self.path}: sparse weights")
        for each in inputs:
            (file.defaults if each.name in file.tensors else file.inputs)[each.name] = each
        file.operators |= calls
        return calls

    def _node(self, message: Message, depth: int) -> tuple[Node, set[tuple[str, str]]]:
        self.n_nodes += 1
        if self.n_nodes > MAX_NODES:
            raise FormatError(f"{self.path}: more than {MAX_NODES} operations")
        inputs, outputs, ints = [], [], dict[str, int]()
        op = domain = ""
        inner: set[tuple[str, str]] = set()
        for number, value in message.fields():
            match number:
                case 1:
                    inputs.append(message.text(value))
                case 2:
                    outputs.append(message.text(value))
                case 4:
                    op = message.text(value)
                case 5:
                    inner |= self._attribute(message.message(value), ints, depth)
                case 7:
                    domain = message.text(value)
        return Node(op, "" if domain == "ai.onnx" else domain, tuple(inputs), tuple(outputs), ints), inner

    def _attribute(self, message: Message, ints: dict[str, int], depth: int) -> set[tuple[str, str]]:
        """Keeps a single number, proves tensors, and gives what inner graphs call."""
        name, calls = "", set[tuple[str, str]]()
        for number, value in message.fields():
            match number:
                case 1:
                    name = message.text(value)
                case 3:
                    ints[name] = message.numbers(value)[-1]
                case 5 | 10:
                    self._tensor(message.message(value))
                case 6 | 11:
                    calls |= self._graph(message.message(value), depth + 1)
                case 22 | 23:
                    raise UnsupportedError(f"{self.path}: sparse weights")
        return calls

    def _function(self, message: Message) -> None:
        name = domain = ""
        calls: set[tuple[str, str]] = set()
        for number, value in message.fields():
            match number:
                case 1:
                    name = message.text(value)
                case 7:
                    node, inner = self._node(message.message(value), 0)
                    calls |= {(node.domain, node.op)} | inner
                case 10:
                    domain = message.text(value)
        self.functions[domain, name] = calls
        self.file.operators |= calls

    def _prove_operators(self) -> None:
        self._prove_functions()
        for domain, op in sorted(self.file.operators):
            if op in REFUSED and (domain, op) not in self.functions:
                raise UnsupportedError(f"{self.path}: the operator {op}, which no model that edgelm runs needs")
            if domain not in DOMAINS and (domain, op) not in self.functions:
                raise UnsupportedError(
                    f"{self.path}: the operator {op} of the domain {domain!r}, which onnxruntime itself does not have; "
                    "edgelm loads no libraries of operators: export the model without them"
                )

    def _prove_functions(self) -> None:
        """No function calls itself, not even through others: onnxruntime would put it in place of itself for ever."""
        left = {name: calls & self.functions.keys() for name, calls in self.functions.items()}
        while left:
            done = {name for name, calls in left.items() if not calls & left.keys()}
            if not done:
                raise FormatError(f"{self.path}: the function {min(left)[1]!r} calls itself")
            left = {name: calls for name, calls in left.items() if name not in done}

    # --------------------------------------------------------------------------------------------- values and weights

    def _value(self, message: Message) -> Value:
        name, dtype, dims = "", "", None
        for number, value in message.fields():
            if number == 1:
                name = message.text(value)
            elif number == 2:
                for kind, inner in message.message(value).fields():
                    if kind != 1:
                        continue
                    for what, of in message.message(inner).fields():
                        if what == 1:
                            dtype = DTYPES.get(message.numbers(of)[-1], ("", 0))[0]
                        elif what == 2:
                            dims = self._shape(message.message(of))
        return Value(name, dtype, dims)

    def _shape(self, message: Message) -> tuple[int | str, ...]:
        dims: list[int | str] = []
        for number, value in message.fields():
            if number != 1:
                continue
            dim: int | str = ""
            for kind, said in message.message(value).fields():
                if kind == 1:
                    dim = message.numbers(said)[-1]
                elif kind == 2:
                    dim = message.text(said)
            dims.append(dim)
            if len(dims) > MAX_DIMS:
                raise FormatError(f"{self.path}: a shape of more than {MAX_DIMS} dimensions")
        return tuple(dims)

    def _tensor(self, message: Message) -> Tensor:
        """A constant, its length proven."""
        name, dtype, dims = "", 0, list[int]()
        raw: int | None = None
        place: dict[str, str] = {}
        is_external = False
        for number, value in message.fields():
            match number:
                case 1:
                    dims += message.numbers(value)
                case 2 if isinstance(value, int):
                    dtype = value
                case 8:
                    name = message.text(value)
                case 9 if not isinstance(value, int):
                    raw = len(value)
                case 13:
                    key, said = self._entry(message.message(value))
                    place[key] = said
                case 14:
                    is_external = value == 1
        what = f"{self.path}: the weight {name[:80]!r}"
        if dtype not in DTYPES:
            raise FormatError(f"{what} is of the unknown type {dtype}")
        if len(dims) > MAX_DIMS or any(d < 0 for d in dims):
            raise FormatError(f"{what} has the shape {dims[: MAX_DIMS + 1]}")
        kind, bits = DTYPES[dtype]
        n_bytes = -(-math.prod(dims) * bits // 8)
        at = ("", 0)
        if is_external or place:
            at = self._prove_external(what, place, n_bytes)
        elif raw is not None and raw != n_bytes and bits:
            raise FormatError(f"{what} of shape {dims} takes {n_bytes} bytes, the file has {raw}")
        return Tensor(name, kind, tuple(dims), n_bytes, at)

    def _entry(self, message: Message) -> tuple[str, str]:
        found = {number: message.text(value) for number, value in message.fields()}
        return found.get(1, ""), found.get(2, "")

    def _prove_external(self, what: str, place: dict[str, str], n_bytes: int) -> tuple[str, int]:
        """Where a weight in another file lies: one in this folder, as long as it says."""
        location = place.get("location", "")
        if location not in self.external:
            target = inside(self.path.parent, location, what)
            try:
                self.external[location] = target, target.stat().st_size
            except OSError:
                raise FormatError(f"{what} lies in {location[:200]!r}, which is not there; fetch it as well") from None
        size = self.external[location][1]
        try:
            offset, length = (int(place.get(key) or default) for key, default in (("offset", 0), ("length", n_bytes)))
        except ValueError:
            raise FormatError(f"{what} lies in {location!r} at a place that is no number") from None
        if length != n_bytes or offset < 0 or offset + length > size:
            raise FormatError(
                f"{what} takes {n_bytes} bytes; given are {length} from {offset} on in {location!r} of {size} bytes: "
                "it is truncated, or of another model"
            )
        return location, offset


def inside(folder: Path, name: str, what: str) -> Path:
    """The file `name` of a folder, which must lie in it when every link is followed.

    Links of the cache that huggingface_hub keeps, from a snapshot to the blobs beside it, stay in that cache.

    Raises:
        FormatError: it does not, or is no plain file.
    """
    pure = PurePosixPath(name)
    leaves = pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or PureWindowsPath(name).drive
    if not name or leaves:
        raise FormatError(f"{what} lies in {name[:200]!r}, which leaves the folder of the model")
    target = folder / pure
    real, home = Path(os.path.realpath(target)), Path(os.path.realpath(folder))
    caches = [p.parent for p in home.parents if p.name == "snapshots" and (p.parent / "refs").is_dir()]
    homes = [home, *(cache / "blobs" for cache in caches)]
    if not any(real.is_relative_to(each) for each in homes):
        raise FormatError(f"{what} lies in {name[:200]!r}, a link that leaves the folder of the model; copy the file")
    if real.exists() and not real.is_file():
        raise FormatError(f"{what} lies in {name[:200]!r}, which is no file")
    return target
