"""How much to cut for a number of parameters: `amounts` divides it between whole layers and feed-forward channels.

    amounts(checkpoint, 100_000_000)        # "depth=4,ffn=320"

Feed-forward networks bear more than depth does (Minitron, 2408.11796), so their share goes twice as far, as nearly as
whole layers and blocks of channels allow. Knows shapes alone; `prune` decides which layers and channels go.
"""

from __future__ import annotations

import math

from edgelm.arch import tensors
from edgelm.errors import UsageError

from .checkpoint import Checkpoint

_UNIT = 32  # channels that go together: a block of most weight formats
_MOST_DEPTH, _MOST_FFN = 0.5, 0.75
_FFN_PER_DEPTH = 2.0


def amounts(checkpoint: Checkpoint, n_parameters: int) -> str:
    """What `--prune` would be told to leave n_parameters at most, and few less; "" if there are not more.

    Raises UsageError when half of the layers and three quarters of the channels would not be enough.
    """
    config = checkpoint.config
    sizes = {name: math.prod(array.shape) for name, array in checkpoint.tensors.items()}
    too_many = sum(sizes.values()) - n_parameters
    if too_many <= 0:
        return ""
    per_layer = sum(n for name, n in sizes.items() if name.startswith("blk.")) // config.n_layers
    per_channel = _per_channel(checkpoint)
    found = []
    for depth in range(int(config.n_layers * _MOST_DEPTH) + 1):
        left = max(0, too_many - depth * per_layer)
        channels = -(-left // (per_channel * (config.n_layers - depth) * _UNIT)) * _UNIT
        if channels <= config.ffn_dim * _MOST_FFN:
            uneven = abs(channels / config.ffn_dim - _FFN_PER_DEPTH * depth / config.n_layers)
            found.append((uneven, depth, channels))
    if not found:
        raise UsageError(
            f"--target-params {n_parameters}: of {sum(sizes.values())} parameters so few cannot be left; embeddings "
            "take their part, which --prune vocab=FILE makes smaller"
        )
    _, depth, channels = min(found)
    return ",".join(f"{name}={n}" for name, n in (("depth", depth), ("ffn", channels)) if n)


def _per_channel(checkpoint: Checkpoint) -> int:
    """Weights of one layer that go with one channel of its feed-forward network."""
    config, layer = checkpoint.config, "blk.0."
    specs = [spec for spec in tensors(config) if spec.gguf.startswith(layer) and spec.gguf in checkpoint.tensors]
    wide = [spec for spec in specs if any(str(size).startswith("ffn") for size in spec.shape)]
    return max(1, sum(math.prod(spec.shape_for(config)) for spec in wide) // config.ffn_dim)
