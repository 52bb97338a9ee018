"""An encoder: tokens that all see each other -> one hidden state per token, as BERT has it (arXiv 1810.04805).

Normalises after each residual. A sequence must be whole in one batch. Pooling is the caller's matter.
"""

from __future__ import annotations

from typing import Any

from ..arch import Config
from ..weights import Weights
from .layers import feed_forward, linear, norm, projections


def encoder(op: Any, c: Config, w: Weights) -> Any:
    """Hidden states (R, D) of the rows that want an output."""
    x = op.embed(w.token_embd.weight)  # (T, D)
    if w.token_types is not None:
        x = x + op.row(w.token_types.weight, 0)  # a text on its own is "sentence A"
    if w.position_embd is not None:
        x = x + op.embed_positions(w.position_embd.weight)
    x = norm(op, c, x, w.token_embd_norm)

    for i, b in enumerate(w.blk):
        q, k, v = projections(op, c, x, b)
        rope = c.rope(i)
        if rope is not None:
            q, k = op.rope(q, rope, c.n_heads), op.rope(k, rope, c.n_kv_heads)
        h = op.attention(q, k, v, i, c.attention_scale, c.attn_softcap, c.causal)
        if i == c.n_layers - 1:  # from here on a row needs no other
            x, h = op.outputs(x), op.outputs(h)
        x = norm(op, c, x + linear(op, h, b.attn_output), b.attn_output_norm)
        x = norm(op, c, x + feed_forward(op, c, x, b), b.layer_output_norm)
    return x
