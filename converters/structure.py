"""What the layers of a model do to each other, read off the model function itself: no architecture is named here.

`edgelm.graph` records the function of `edgelm.models` for the tensors that a model has; who adds to the residual
stream, who reads a norm, whose outputs another layer reads, follows from that graph.
"""

from __future__ import annotations

from edgelm.arch import Config
from edgelm.graph import Node, Recorder, in_order
from edgelm.models import model_of
from edgelm.weights import Weights


def recorded(config: Config, weights: Weights) -> list[Node]:
    """All operations of a model up to its last hidden states, in order."""
    return in_order([model_of(config)(Recorder(config, "hidden"), config, weights)])


def linears(nodes: list[Node]) -> tuple[str, ...]:
    """Names of the weights of linear layers, in the order in which they are used."""
    return tuple(dict.fromkeys(node.args["matrix"].tensor.name for node in nodes if node.kind == "linear"))


def adding(nodes: list[Node]) -> frozenset[str]:
    """Names of weights whose outputs are added, as they are, to what the last norm before them read: the stream."""
    stream: Node | None = None
    found: dict[int, tuple[str, Node | None]] = {}
    names = set()
    for node in nodes:
        if node.kind in ("rms_norm", "layer_norm") and not node.args.get("heads"):
            stream = node.inputs[0]
        elif node.kind == "linear":
            found[node.serial] = node.args["matrix"].tensor.name, stream
        elif node.kind == "add":
            for value, other in (node.inputs, node.inputs[::-1]):
                name, before = found.get(value.serial, ("", None))
                if name and before is (other.inputs[0] if other.kind == "outputs" else other):
                    names.add(name)
    return frozenset(names)
