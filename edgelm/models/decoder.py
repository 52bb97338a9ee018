"""A decoder: tokens -> logits of the next token. Every causal language model of `edgelm.architectures`, written once.

What differs from one to the other is a number of `Config`, a switch of `Arch`, or a tensor that is there or is not.
It knows operations by name (`edgelm.reference` says what each means), never how they are computed.
Shapes: T tokens of the batch, R of them with an output, D = c.dim.
"""

from __future__ import annotations

import math
from typing import Any

from ..arch import Config
from ..weights import Weights
from .layers import feed_forward, linear, norm, projections


def decoder(op: Any, c: Config, w: Weights) -> Any:
    """Logits (R, vocabulary); with `op.head == "hidden"` the last hidden states (R, D)."""
    x = op.embed(w.token_embd.weight)  # (T, D)
    if c.spec.scaled_embedding:
        x = op.scale(x, math.sqrt(c.dim))
    if w.position_embd is not None:
        x = x + op.embed_positions(w.position_embd.weight)

    for i, b in enumerate(w.blk):
        h = norm(op, c, x, b.attn_norm)
        q, k, v = projections(op, c, h, b)  # (T, heads * head_dim) each
        if b.attn_q_norm is not None:
            q = op.rms_norm(q, b.attn_q_norm.weight, c.norm_eps, heads=c.n_heads)
            k = op.rms_norm(k, b.attn_k_norm.weight, c.norm_eps, heads=c.n_kv_heads)
        rope = c.rope(i)
        if rope is not None:
            q, k = op.rope(q, rope, c.n_heads), op.rope(k, rope, c.n_kv_heads)
        h = op.attention(q, k, v, i, c.attention_scale, c.attn_softcap, c.causal)  # (T, heads * v_head_dim)
        if i == c.n_layers - 1:  # from here on a row needs no other
            x, h = op.outputs(x), op.outputs(h)
        h = linear(op, h, b.attn_output)
        if b.post_attention_norm is not None:
            h = norm(op, c, h, b.post_attention_norm)
        x = x + h
        h = feed_forward(op, c, norm(op, c, x, b.ffn_norm), b)
        if b.post_ffw_norm is not None:
            h = norm(op, c, h, b.post_ffw_norm)
        x = x + h

    x = norm(op, c, x, w.output_norm)  # (R, D)
    if op.head == "hidden":
        return x
    x = linear(op, x, w.output if w.output is not None else w.token_embd)
    return op.softcap(x, c.final_softcap) if c.final_softcap else x
