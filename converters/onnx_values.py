"""What a model function computes with while it is exported: names of tensors in a graph, some of them not there yet.

A sum, a product and a rotation wait until somebody asks for their name: an operator that does the sum and the norm
after it, several products at once, or the rotation and the attention after it takes what they are made of instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgelm.arch import Rope

if TYPE_CHECKING:
    from .onnx_nodes import Operations

Shape = tuple[int | str, ...]


class Value:
    """A tensor of the graph. dtype: of onnx.TensorProto; shape: numbers and names of dimensions."""

    def __init__(self, op: Operations, name: str, dtype: int, shape: Shape) -> None:
        self.op, self.dtype, self.shape = op, dtype, shape
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def n_cols(self) -> int:
        """Numbers in a row."""
        assert isinstance(self.shape[-1], int)
        return self.shape[-1]

    def __add__(self, other: Value) -> Value:
        return self.op.add(self, other)

    def __mul__(self, other: Value) -> Value:
        return self.op.multiply(self, other)


class Late(Value):
    """A value whose node is appended when its name is asked for, unless another node gives it first.

    parts: what it is made of; make: appends the node and gives its name.
    """

    def __init__(
        self, op: Operations, dtype: int, shape: Shape, parts: tuple[Any, ...], make: Callable[[], str]
    ) -> None:
        super().__init__(op, "", dtype, shape)
        self.parts, self._make = parts, make

    @property
    def is_made(self) -> bool:
        return bool(self._name)

    @property
    def name(self) -> str:
        if not self._name:
            self._name = self._make()
        return self._name

    def given(self, name: str) -> None:
        """Another node has computed it on the way."""
        self._name = name


class Sum(Late):
    """The sum of two values, which are `parts`."""


class Product(Late):
    """A linear layer of a value: parts = (value, layer)."""


class Rotated(Late):
    """Heads turned by the angles of their positions: parts = (value,)."""

    def __init__(self, source: Value, rope: Rope, make: Callable[[], str]) -> None:
        super().__init__(source.op, source.dtype, source.shape, (source,), make)
        self.rope = rope
