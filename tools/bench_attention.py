"""How fast attention and the row-wise kernels are, on one thread: `python tools/bench_attention.py`.

Prefill, without a matrix unit, in multiply-adds per second that causality asks for, beside the peak of float32 that
this core reaches in a loop of nothing else (pairs of bfloat16 may pass it); decoding in bytes of keys and values per
second, beside plain reading; the rest in microseconds of a call. Times are those of the thread, the best of many. With
--compile, seconds that each kernel takes to compile.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NATIVE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)


@dataclass(frozen=True)
class Group:
    layers: tuple[int, ...]
    n_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int


@dataclass(frozen=True)
class Model:
    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dim: int


MODELS = (Model("SmolLM2-135M", 30, 9, 3, 64, 576), Model("Gemma-3-270M", 18, 4, 1, 256, 640),
          Model("Llama-7B", 4, 32, 32, 128, 4096), Model("Phi-3", 4, 32, 32, 96, 3072))


def best(call: Callable[[], None], seconds: float) -> float:
    """Seconds of the fastest call."""
    call()
    fastest, end = 1e9, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.thread_time()  # not wall time: others may use this core too
        call()
        fastest = min(fastest, time.thread_time() - start)
    return fastest


class Layer:
    """Attention layers of a model, over one sequence of a given length."""

    def __init__(self, model: Model, n_tokens: int, depth: int, kv_type: str, window: int = 0) -> None:
        from edgelm.cache import KVCache
        from edgelm.kernels.abi import Env
        from edgelm.kernels.attention import row_attention, row_store_kv, scratch_bytes
        from edgelm.pages import PAGE

        m, n_ctx = model, depth + n_tokens
        self.cache = KVCache((Group(tuple(range(m.n_layers)), m.n_kv_heads, m.head_dim, m.head_dim, window),), kv_type)
        self.sequence = self.cache.new_sequence()
        self.sequence.reserve(n_ctx)
        rng = np.random.default_rng(0)
        layout = self.cache.layouts[0]
        pages = [self.cache._pools[0].pages[int(address)] for address in self.sequence.table(0)]
        for view, array in zip(layout.views(pages[0], 0), (layout.keys, layout.values), strict=True):
            array.write(view, 0, rng.standard_normal((PAGE, m.n_kv_heads, m.head_dim), np.float32))
        for page in pages:
            page[:] = np.resize(pages[0][: layout.page_bytes // m.n_layers], len(page))
        widths = (m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim, m.n_kv_heads * m.head_dim, m.n_heads * m.head_dim)
        self.buffers = [rng.standard_normal((n_tokens, w)).astype(np.float32) for w in widths]
        n_scratch = scratch_bytes(layout, m.n_heads, n_ctx)
        self.scratch = np.zeros(n_scratch + 64, np.uint8)
        angles = rng.uniform(0, 7, (n_ctx, m.head_dim // 2))
        self.tables = [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]
        self.fields = [np.arange(depth, n_ctx, dtype=np.int32), np.zeros(n_tokens, np.int32),
                       np.array([self.sequence.table(0).ctypes.data]), np.array([n_ctx], np.int32),
                       *(np.array([t.ctypes.data]) for t in self.tables)]
        self.env = np.zeros(Env.SIZE, np.int64)
        for field, array in zip((Env.POSITIONS, Env.ROWS, Env.TABLES, Env.LENGTHS, Env.COS, Env.SIN), self.fields,
                                strict=True):
            self.env[field] = array.ctypes.data
        self.env[Env.N_TOKENS], self.env[Env.N_GROUPS] = n_tokens, 1
        q, k, v, y = (b.ctypes.data for b in self.buffers)  # absolute addresses: the workspace begins at 0
        scratch, rope = self.scratch.ctypes.data, {"rope": 0, "rope_dim": m.head_dim, "halves": True}
        strides = [4 * w for w in widths]
        self.store = [
            self._call(row_store_kv(layout, 0, i, k, strides[1], v, strides[2], scratch_off=scratch, **rope))
            for i in range(m.n_layers)
        ]
        self.attend = [
            self._call(row_attention(layout, 0, i, m.n_heads, q, strides[0], y, strides[3], scale=m.head_dim**-0.5,
                                     scratch_off=scratch, n_scratch=n_scratch, **rope))
            for i in range(m.n_layers)
        ]

    def _call(self, row: list[int]) -> Callable[[], None]:
        """All units of a row, with as little of Python around them as possible."""
        from edgelm.kernels.abi import Row

        op = np.array(row)
        self.fields.append(op)
        units = row[Row.UNITS] * -(-len(self.fields[0]) // (row[Row.UNITS_PER] or 1))
        return functools.partial(NATIVE(row[Row.KERNEL]), op.ctypes.data, self.env.ctypes.data, 0, units)

    def run(self, calls: list[Callable[[], None]]) -> None:
        for call in calls:
            call()


def peak() -> float:
    """Multiply-adds per second of float32 that one core does at most, measured."""
    from numba import njit

    from edgelm.kernels.simd import add_f32, fma, splat_f32, sum_f32

    @njit
    def spin(n, x):
        a = splat_f32(x)
        s = (a, a, a, a, a, a, a, a, a, a, a, a)
        for _ in range(n):
            s = (fma(a, s[0], a), fma(a, s[1], a), fma(a, s[2], a), fma(a, s[3], a), fma(a, s[4], a), fma(a, s[5], a),
                 fma(a, s[6], a), fma(a, s[7], a), fma(a, s[8], a), fma(a, s[9], a), fma(a, s[10], a), fma(a, s[11], a))
        t = s[0]
        for i in range(1, 12):
            t = add_f32(t, s[i])
        return sum_f32(t)

    n = 200_000
    return n * 12 * 16 / best(lambda: spin(n, np.float32(1e-9)), 0.3)


def compile_times() -> None:
    from edgelm.kernels import compiler

    for module, kernels in {
        "attention_kernels": ("attention_of_floats", "attention"),
        "attention_store": ("store_kv",),
        "elementwise_kernels": ("rms_norm", "layer_norm", "combine", "copy", "rope", "silu", "gelu", "tanh"),
    }.items():
        for name in kernels:
            start = time.perf_counter()
            compiler.address(f"{module}:{name}")
            print(f"compile {name:12} {time.perf_counter() - start:6.2f} s", flush=True)


def reading() -> float:
    """Bytes per second of memory that one thread reads."""
    from edgelm.bench import beyond_caches
    from edgelm.kernels.bandwidth import _read

    memory = np.ones(beyond_caches() // 8, np.int64)
    return memory.nbytes / best(lambda: _read(memory.ctypes.data, memory.nbytes), 0.5)


def bench_attention(seconds: float) -> None:
    from edgelm.pages import KV_TYPES, PAGE

    fastest = peak()
    print(f"one thread: {fastest / 1e9:.0f} G multiply-adds/s, reads {reading() / 1e9:.1f} GB/s")
    for m in MODELS:
        for kv_type in KV_TYPES:
            layer = Layer(m, 512, 0, kv_type)
            t = best(lambda layer=layer: layer.run(layer.attend[:1]), seconds)
            macs = 2 * m.n_heads * m.head_dim * 512 * 513 / 2
            stored = best(lambda layer=layer: layer.run(layer.store[:1]), seconds)
            print(f"{m.name:13} {kv_type:4} prefill 512     {t * 1e3:7.3f} ms a layer {macs / t / 1e9:5.1f} GMAC/s "
                  f"{macs / t / fastest:4.0%} of peak; store {stored * 1e6:5.0f} us")
            for depth in (128, 512, 4096):
                layer = Layer(m, 1, depth, kv_type)
                t = best(lambda layer=layer: layer.run(layer.attend), seconds) / m.n_layers
                rate = depth / PAGE * layer.cache.layouts[0].page_bytes / m.n_layers / t / 1e9
                stored = best(lambda layer=layer: layer.run(layer.store), seconds) / m.n_layers
                print(f"{m.name:13} {kv_type:4} decode at {depth:4}  {t * 1e6:7.1f} us a layer {rate:5.1f} GB/s; "
                      f"store {stored * 1e6:4.1f} us")


def bench_rows(seconds: float) -> None:
    """Row-wise kernels on one token."""
    from edgelm.kernels import elementwise as ew
    from edgelm.kernels.abi import Env
    from edgelm.kernels.records import activation_bytes

    env = np.zeros(Env.SIZE, np.int64)
    angles, position = np.ones(1 << 14, np.float32), np.zeros(1, np.int32)
    table = np.array([angles.ctypes.data])
    env[Env.COS] = env[Env.SIN] = table.ctypes.data
    env[Env.POSITIONS], env[Env.N_TOKENS] = position.ctypes.data, 1
    x, y = np.random.default_rng(0).standard_normal((2, 1 << 14)).astype(np.float32)
    record = np.zeros(activation_bytes(1 << 14), np.uint8)
    a, b, q = x.ctypes.data, y.ctypes.data, record.ctypes.data
    for name, row in {
        "rms_norm 576": ew.row_rms_norm(a, 0, b, 0, 576, a, 1e-5),
        "rms_norm 576 + quantize": ew.row_rms_norm(a, 0, b, 0, 576, a, 1e-5, quantized_off=q),
        "rms_norm 4096 + quantize": ew.row_rms_norm(a, 0, b, 0, 4096, a, 1e-5, quantized_off=q),
        "layer_norm 768 + quantize": ew.row_layer_norm(a, 0, b, 0, 768, a, a, 1e-5, quantized_off=q),
        "rms_norm of 4 heads of 256": ew.row_rms_norm(a, 0, b, 0, 1024, a, 1e-5, heads=4),
        "rope of 9 heads of 64": ew.row_rope(a, 0, b, 0, 9, 64, rope=0, rope_dim=64, halves=True),
        "add 576": ew.row_add(a, 0, a, 0, b, 0, 576),
        "silu 1536": ew.row_activation("silu", a, 0, b, 0, 1536),
        "gelu 3072": ew.row_activation("gelu", a, 0, b, 0, 3072),
        "softcap 4096": ew.row_softcap(a, 0, b, 0, 4096, 30.0),
        "copy 576": ew.row_copy(a, 0, b, 0, 576),
    }.items():
        op = np.array(row)
        call = functools.partial(NATIVE(row[0]), op.ctypes.data, env.ctypes.data, 0, 1)
        print(f"{name:28} {best(lambda call=call: [call() for _ in range(100)], seconds / 3) * 1e4:6.2f} us")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=0.3, help="for each figure")
    options.add_argument("--compile", action="store_true", help="measure compiling, with an empty cache of kernels")
    arguments = options.parse_args()
    if arguments.compile:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["NUMBA_CACHE_DIR"] = folder
            compile_times()
        return
    bench_rows(arguments.seconds)
    bench_attention(arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
