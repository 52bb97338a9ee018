"""The parts that model families share, over the same named operations."""

from __future__ import annotations

from typing import Any

from ..arch import Config
from ..weights import Layer


def linear(op: Any, x: Any, layer: Layer) -> Any:
    """x (T, in) -> (T, out). A factor that formats such as NVFP4 keep beside their blocks scales the input here."""
    if layer.scale is not None:
        x = op.scale(x, float(layer.scale.dequantize()[0]))
    return op.linear(x, layer)


def norm(op: Any, c: Config, x: Any, layer: Layer) -> Any:
    """The architecture's own normalisation of each row of x (T, D)."""
    if c.spec.norm == "rms":
        return op.rms_norm(x, layer.weight, c.norm_eps)
    return op.layer_norm(x, layer.weight, layer.bias, c.norm_eps)


def projections(op: Any, c: Config, h: Any, b: Any) -> tuple[Any, Any, Any]:
    """Queries (T, q_dim), keys (T, k_dim) and values (T, v_dim), from three layers or a fused one."""
    if b.attn_qkv is not None:
        q, k, v = op.split(linear(op, h, b.attn_qkv), (c.q_dim, c.k_dim, c.v_dim))
        return q, k, v
    return linear(op, h, b.attn_q), linear(op, h, b.attn_k), linear(op, h, b.attn_v)


def feed_forward(op: Any, c: Config, h: Any, b: Any) -> Any:
    """down(act(gate h) * up h); the gate apart, stacked on top of up, or absent."""
    act = getattr(op, c.activation)
    up = linear(op, h, b.ffn_up)
    if b.ffn_gate is not None:
        up = act(linear(op, h, b.ffn_gate)) * up
    elif b.ffn_up.weight.shape[0] == c.gate_up_dim:
        gate, up = op.split(up, (c.ffn_dim, c.ffn_dim))
        up = act(gate) * up
    else:
        up = act(up)
    return linear(op, up, b.ffn_down)
