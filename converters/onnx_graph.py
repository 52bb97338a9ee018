"""An ONNX graph while it grows: nodes, small constants, weights, inputs and outputs.

    graph = Graph("example", folder)
    x = graph.input("x", FLOAT, ("batch_size", 64))
    w = graph.store("w", FLOAT, (64, 32), [array])       # written to model.onnx.data at once, and forgotten
    [y] = graph.emit("MatMul", x, w)
    graph.output(y, "y", FLOAT, ("batch_size", 32))
    graph.save()                                         # model.onnx

It knows no model and no dialect.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

MODEL, DATA = "model.onnx", "model.onnx.data"
MICROSOFT = "com.microsoft"
# Numbers of onnx.TensorProto.DataType.
FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, BFLOAT16, INT4 = 1, 2, 3, 6, 7, 9, 10, 16, 22
BITS = {FLOAT: 32, UINT8: 8, INT8: 8, INT32: 32, INT64: 64, BOOL: 8, FLOAT16: 16, BFLOAT16: 16, INT4: 4}
# Operators by the opset that first had the meaning we rely on; those before the lowest one need no row.
LOWEST_OPSET = 17
SINCE = {
    "Gelu": 20,
    "DequantizeLinear": 21,
    "RMSNormalization": 23,
    "RotaryEmbedding": 23,
    "Attention": 23,
    "ReduceL2": 18,
}

_ALIGNMENT = 4096  # of a page: weights are mapped, not read
_LARGE, _LARGE_ALIGNMENT = 1 << 20, 1 << 16  # Windows maps in steps of 64 KB

Shape = Sequence[int | str]


@dataclass(frozen=True)
class Stored:
    """Where a weight lies in the data file, in bytes."""

    dtype: int
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class Graph:
    """See the module.

    name: of the graph; folder: where the files are written; metadata: what the file says about itself, texts by name;
    progress: told how many bytes of weights are written. hashes: the sha256 of each weight, by name.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        metadata: Mapping[str, str] | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.name, self.folder, self.metadata, self._progress = name, folder, dict(metadata or {}), progress
        self.hashes: dict[str, str] = {}
        self.stored: dict[str, Stored] = {}
        self._data = (folder / DATA).open("wb")
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._infos: list[Any] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._initializers: list[Any] = []
        self._names: Counter[str] = Counter()
        self._opset = LOWEST_OPSET

    def input(self, name: str, dtype: int, shape: Shape, default: NDArray[Any] | None = None) -> str:
        """An input; with a default it may be left out."""
        from onnx import helper, numpy_helper

        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        if default is not None:
            self._initializers.append(numpy_helper.from_array(default, name))
        return name

    def output(self, value: str, name: str, dtype: int, shape: Shape) -> None:
        """Gives the result of a node to the outside, as `name`."""
        from onnx import helper

        for node in self._nodes if value != name else ():
            for names in (node.input, node.output):
                for i, one in enumerate(names):
                    if one == value:
                        names[i] = name
        self._infos = [info for info in self._infos if info.name != value]
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def emit(
        self,
        op_type: str,
        *inputs: str,
        label: str = "",
        outputs: Sequence[str] = ("",),
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Append a node; the names of its outputs.

        inputs: "" for one that is left out. label: what the node is about, for its name. outputs: names, "" for one
        that is made up, "-" for one that nobody wants. attributes: None for one that keeps its default.
        """
        from onnx import helper

        stem = f"{label}/{op_type}" if label else op_type
        n = self._names[stem]
        self._names[stem] += 1
        name = f"{stem}_{n}" if n or not label else stem
        names = ["" if o == "-" else o or f"{name}:{i}" for i, o in enumerate(outputs)]
        given_inputs = list(inputs)
        while given_inputs and not given_inputs[-1]:
            given_inputs.pop()
        given = {key: value for key, value in attributes.items() if value is not None}
        self._nodes.append(helper.make_node(op_type, given_inputs, names, name, domain=domain, **given))
        if not domain:
            self._opset = max(self._opset, SINCE.get(op_type, LOWEST_OPSET))
        return names

    def describe(self, value: str, dtype: int, shape: Shape) -> None:
        """Type and shape of a value that nobody can infer: one from an operator beyond ai.onnx."""
        from onnx import helper

        self._infos.append(helper.make_tensor_value_info(value, dtype, list(shape)))

    def constant(self, values: Any, dtype: str = "int64") -> str:
        """A small constant; equal ones are one."""
        from onnx import numpy_helper

        array = np.asarray(values, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = name
            self._initializers.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def store(self, name: str, dtype: int, shape: tuple[int, ...], parts: Iterable[NDArray[Any]]) -> str:
        """A weight: its bytes go to the data file now. The same name means the same weight, which is written once."""
        if name in self.stored:
            return name
        n_bits = BITS[dtype] * math.prod(shape)
        step = _LARGE_ALIGNMENT if n_bits >= 8 * _LARGE else _ALIGNMENT
        self._data.write(bytes(-self._data.tell() % step))
        start, digest = self._data.tell(), hashlib.sha256()
        for part in parts:
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
            self._data.write(data)
            digest.update(data)
            self._progress(self._data.tell())
        n_bytes = self._data.tell() - start
        if n_bytes != -(-n_bits // 8):
            raise AssertionError(f"{name}: {n_bytes} bytes written for {shape} of type {dtype}")
        self.stored[name] = Stored(dtype, shape, start, n_bytes)
        self.hashes[name] = digest.hexdigest()
        return name

    def view(self, name: str, of: str, shape: tuple[int, ...]) -> str:
        """The same bytes once more, in another shape."""
        self.stored[name] = replace(self.stored[of], shape=shape)
        return name

    def save(self) -> None:
        """Write the model; it and its data reach the disk before this returns."""
        self._flush(self._data)
        with (self.folder / MODEL).open("wb") as file:
            file.write(self._proto().SerializeToString())
            self._flush(file)

    @staticmethod
    def _flush(file: IO[bytes]) -> None:
        file.flush()
        os.fsync(file.fileno())

    def close(self) -> None:
        self._data.close()

    def _proto(self) -> Any:
        from onnx import TensorProto, helper

        tensors = list(self._initializers)
        for name, weight in self.stored.items():
            tensor = TensorProto(name=name, data_type=weight.dtype, dims=weight.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", DATA), ("offset", str(weight.offset)), ("length", str(weight.n_bytes))):
                tensor.external_data.add(key=key, value=value)
            tensors.append(tensor)
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, tensors, value_info=self._infos)
        opsets = [helper.make_opsetid("", self._opset)]
        if any(node.domain == MICROSOFT for node in self._nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        version = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="edgelm")
        helper.set_model_props(model, self.metadata)
        return model
