"""What the layers of a model do to each other, read off the model function itself: no architecture is named here.

`edgelm.graph` records the function of `edgelm.models` for the tensors that a model has. Who adds to the residual
stream, and whose outputs can be made smaller while those who read them make up for it, follows from that graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelm.arch import Config
from edgelm.graph import Matrix, Node, Recorder, in_order
from edgelm.models import model_of
from edgelm.weights import Weights

_NORMS = ("rms_norm", "layer_norm")


def recorded(config: Config, weights: Weights) -> list[Node]:
    """All operations of a model up to its last hidden states, in order."""
    return in_order([model_of(config)(Recorder(config, "hidden"), config, weights)])


def linears(nodes: list[Node]) -> tuple[str, ...]:
    """Names of the weights of linear layers, in the order in which they are used."""
    return tuple(dict.fromkeys(_name(node) for node in nodes if node.kind == "linear"))


def _name(linear: Node) -> str:
    return str(linear.args["matrix"].tensor.name)


def adding(nodes: list[Node]) -> frozenset[str]:
    """Names of weights whose outputs are added, as they are, to what the last norm before them read: the stream."""
    stream: Node | None = None
    found: dict[int, tuple[str, Node | None]] = {}
    names = set()
    for node in nodes:
        if node.kind in _NORMS and not node.args.get("heads"):
            stream = node.inputs[0]
        elif node.kind == "linear":
            found[node.serial] = _name(node), stream
        elif node.kind == "add":
            for value, other in (node.inputs, node.inputs[::-1]):
                name, before = found.get(value.serial, ("", None))
                if name and before is (other.inputs[0] if other.kind == "outputs" else other):
                    names.add(name)
    return frozenset(names)


@dataclass(frozen=True)
class Fold:
    """Channels that can be scaled: what makes them divided by s, the columns of all who read them multiplied.

    readers: names of weights; vectors: (name, start) of vectors whose n_channels numbers from `start` are divided;
    rows: the same of matrices; channels: which channel each column of the readers is.
    """

    readers: tuple[str, ...]
    vectors: tuple[tuple[str, int], ...]
    rows: tuple[tuple[str, int], ...]
    channels: NDArray[np.intp]

    @property
    def n_channels(self) -> int:
        return int(self.channels.max()) + 1


def folds(config: Config, nodes: list[Node]) -> list[Fold]:
    """Everything that can be scaled without a change of what the model computes, in order of use."""
    readers: dict[int, list[Node]] = {}
    for node in nodes:
        for value in node.inputs:
            readers.setdefault(value.serial, []).append(node)
    found = []
    for node in nodes:
        users = readers.get(node.serial, [])
        while len(users) == 1 and users[0].kind == "outputs":  # a choice of rows
            users = readers.get(users[0].serial, [])
        if users and all(user.kind == "linear" for user in users):
            made = _made_by(config, node, readers)
            if made is not None:
                vectors, rows, channels = made
                found.append(Fold(tuple(dict.fromkeys(_name(user) for user in users)), vectors, rows, channels))
    return found


_Places = tuple[tuple[str, int], ...]


def _made_by(
    config: Config, node: Node, readers: dict[int, list[Node]]
) -> tuple[_Places, _Places, NDArray[np.intp]] | None:
    """What makes the channels of a value: (vectors, rows, channel of each column), None if it cannot be scaled."""
    if node.kind in _NORMS and not node.args.get("heads") and node.args["weight"] is not None:
        bias = node.args.get("bias")
        names = (node.args["weight"].name, *((bias.name,) if bias is not None else ()))
        return tuple((name, 0) for name in names), (), np.arange(node.n_cols)
    maker, channels = _linear_before(config, node)
    if maker is None or len(readers[maker.serial]) != 1:
        return None
    matrix, bias = maker.args["matrix"], maker.args["bias"]
    vectors = ((bias.tensor.name, bias.start),) if isinstance(bias, Matrix) else ()
    return vectors, ((matrix.tensor.name, matrix.start),), channels


def _linear_before(config: Config, node: Node) -> tuple[Node | None, NDArray[np.intp]]:
    """The linear layer that a value grows with channel by channel, and which of its rows each column comes from."""
    columns = np.arange(node.n_cols)
    if node.kind == "mul":  # act(gate) * up
        maker = next((value for value in node.inputs if value.kind == "linear"), None)
        return maker, columns
    if node.kind == "activation" and node.args["function"] == "relu":
        return (node.inputs[0] if node.inputs[0].kind == "linear" else None), columns
    if node.kind == "attention" and node.inputs[2].kind == "linear":  # means of values, for each head of its group
        group, size = config.n_heads // config.n_kv_heads, config.v_head_dim
        return node.inputs[2], columns // (group * size) * size + columns % size
    return None, columns
