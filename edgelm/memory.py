"""How much memory a model will need, from its header alone: nothing is read, packed or computed.

Weights in the order of bytes that the kernels read; keys and values with what windows, grouped heads and the real size
of a head make of them; the workspace of activations.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arch import Config, Role, tensors
from .errors import UsageError
from .formats import QTensor
from .pages import PAGE, UNDO, GroupLayout
from .program import TOKENS_AT_ONCE

if TYPE_CHECKING:
    from .weights import Weights


@dataclass(frozen=True)
class Memory:
    """Bytes that a model takes with a context window filled by one sequence."""

    weights: int
    kv_cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.workspace


def estimate(
    config: Config, weights: Iterable[QTensor], n_ctx: int, kv_type: str, max_tokens: int = TOKENS_AT_ONCE
) -> Memory:
    """The memory for sequences of `n_ctx` tokens, `max_tokens` of which are computed at a time; all in encoders."""
    at_once = n_ctx if config.spec.family == "encoder" else min(max_tokens, n_ctx)
    return Memory(
        weights=sum(packed_bytes(tensor) for tensor in weights),
        kv_cache=kv_bytes(config, n_ctx, kv_type, max_tokens),
        workspace=workspace_bytes(config, at_once),
    )


def kv_bytes(config: Config, n_tokens: int, kv_type: str, max_tokens: int = TOKENS_AT_ONCE) -> int:
    """Bytes of the pages that hold the keys and values of one sequence at its largest."""
    total = 0
    for group in config.cache_groups():
        held = n_tokens
        if group.window:  # older pages are given back after each batch
            held = min(n_tokens, group.window + UNDO + max_tokens + PAGE)
        total += -(-held // PAGE) * GroupLayout(group, kv_type).page_bytes
    return total


def bytes_per_token(config: Config, weights: Weights, n_cached: float, kv_type: str) -> float:
    """Bytes that one token reads: the weights it is multiplied with, as they are in the file, and its cached keys and
    values. Of an embedding table a token reads one row, unless it is the output matrix as well."""
    total = 0.0
    for spec in tensors(config):
        tensor = weights.by_name.get(spec.gguf)
        if tensor is None:
            continue
        if spec.role is not Role.EMBED or (spec.gguf == "token_embd.weight" and weights.output is None):
            total += tensor.n_bytes
    for group in config.cache_groups():
        seen = min(n_cached, group.window) if group.window else n_cached
        total += seen * GroupLayout(group, kv_type).page_bytes / PAGE
    return total


def context_window(config: Config, ctx_size: int) -> int:
    """Tokens of the window that was asked for; 0 is that of the model."""
    if ctx_size < 0:
        raise UsageError(f"ctx_size is {ctx_size}; it must be a number of tokens, or 0 for that of the model")
    if config.max_position and ctx_size > config.max_position:
        raise UsageError(f"ctx_size is {ctx_size}; this model has a table of {config.max_position} positions, no more")
    if ctx_size > config.context_length:
        warnings.warn(
            f"a window of {ctx_size} tokens is longer than the {config.context_length} that the model was trained on: "
            f"what it says beyond them may make no sense",
            stacklevel=2,
        )
    return ctx_size or config.context_length


def packed_bytes(tensor: QTensor) -> int:
    """Bytes of a weight in the order that the kernels read; vectors are float32. What is not known without the kernels
    (on machines where they cannot run) is taken to be as large as in the file."""
    n_rows, n_cols = len(tensor.data), tensor.shape[-1]
    if len(tensor.shape) < 2:
        return 4 * n_cols
    try:
        from .kernels import weight_layout
    except ImportError:
        return tensor.n_bytes
    return weight_layout.packed_bytes(weight_layout.format_for(tensor), n_rows, n_cols)


def transcoded(tensors: Iterable[QTensor]) -> dict[str, int]:
    """How many matrices are of a type that has no kernels, by "type as type that is used instead"."""
    try:
        from .kernels import weight_layout
    except ImportError:
        return {}
    names = [(t.format.name, weight_layout.format_for(t)) for t in tensors if len(t.shape) > 1]
    return dict(Counter(f"{theirs} as {ours}" for theirs, ours in names if theirs != ours))


def workspace_bytes(config: Config, max_tokens: int) -> int:
    """Activations that live at the same time, about: two rows of the model, the record of one, as large, and
    what is widest beside them: queries, keys, values and what attention gives, or the feed-forward network, twice."""
    widest = max(config.qkv_dim + config.attn_dim, 2 * config.ffn_dim)
    return max_tokens * 4 * (3 * config.dim + widest)
