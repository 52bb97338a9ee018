"""How fast the matrix kernels are, beside what the machine can do at all, measured in the same minutes.

    python tools/bench_kernels.py                          # all formats, one and two threads
    python tools/bench_kernels.py Q4_1 Q8_0 -t 1 --tokens 1 8 128

For each format: GB/s of weights for one token, from memory and from the cache; billions of multiply-adds a second for
more tokens, and their share of the peak of the int8 instruction. Figures are medians of several rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from edgelm.kernels import compiler, linear
from edgelm.kernels.abi import Env, Row
from edgelm.kernels.blocks import BLOCKS
from edgelm.kernels.executor import Executor
from edgelm.kernels.packing import FLOATS, Packed, packed_bytes

SHAPE = (2048, 2048)


class Bench:
    """Weights of one shape and format, repeated until they exceed `n_bytes`, and an executor to multiply them."""

    def __init__(self, format: str, shape: tuple[int, int], n_bytes: int, threads: int, tokens: int) -> None:
        self.tokens, self.executor = tokens, Executor(threads)
        rows, cols = shape
        size = packed_bytes(format, rows, cols)
        copies = max(1, -(-n_bytes // size))
        rng = np.random.default_rng(0)
        self.weights = np.empty(copies * size + 64, np.uint8)
        at = -self.weights.ctypes.data % 64
        one = rng.integers(0, 64, size, dtype=np.uint8)  # as scales: small positive float16
        for i in range(copies):
            self.weights[at + i * size : at + (i + 1) * size] = one
        address = self.weights.ctypes.data + at
        self.n_bytes, self.macs = copies * size, copies * rows * cols * tokens
        x_stride = 4 * cols + 64 if linear.is_float(format) else linear.activation_bytes(cols)
        self.workspace = np.zeros(tokens * (x_stride + 4 * rows) + 64, np.uint8)
        base = -self.workspace.ctypes.data % 64
        x, y = base, base + tokens * x_stride
        self.workspace[x:y].view(np.int8)[:] = rng.integers(0, 60, y - x)
        table = [
            linear.row_linear(Packed(format, rows, cols, address + i * size, size), x, x_stride, y, 4 * rows)
            for i in range(copies)
        ]
        self.table = np.array(table, np.int64)
        self.table[:, Row.BARRIER] = 1
        self.env = np.zeros(Env.SIZE, np.int64)
        self.env[Env.WORKSPACE], self.env[Env.N_TOKENS] = self.workspace.ctypes.data, tokens
        self.env[Env.N_THREADS] = threads

    def seconds(self, rounds: int) -> float:
        """Median time of a pass over all weights."""
        times = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            self.executor.run(self.table, len(self.table), self.env.ctypes.data)
            times.append(time.perf_counter() - start)
        self.executor.close()
        return statistics.median(times[1:])


def int8_peak(threads: int) -> float:
    """Multiply-adds a second of the int8 instruction with everything in registers."""
    from concurrent.futures import ThreadPoolExecutor

    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic

    from edgelm.kernels import isa as isas
    from edgelm.kernels.emit import I32, I64, I8x64, I32x16, repeat, spread

    chains = 12

    @intrinsic
    def loop(typingctx, n):
        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            isa = isas.select(context)
            form = isa.form(4, False)
            zero = repeat(I32x16, 0)
            sums = [cgutils.alloca_once_value(b, zero) for _ in range(chains)]
            w = b.bitcast(spread(b, b.trunc(args[0], I32), I32x16), I8x64)
            x = spread(b, b.add(b.trunc(args[0], I32), I32(3)), I32x16)
            with cgutils.for_range(b, args[0], intp=I64):
                for acc in sums:
                    value = isa.end(b, isa.step(b, isa.empty(b, b.load(acc)), w, x, form, 4))
                    b.store(value, acc)
            total = zero
            for acc in sums:
                total = b.add(total, b.load(acc))
            return b.zext(b.extract_element(total, I32(0)), I64)

        return types.int64(types.int64), codegen

    @njit(nogil=True)
    def run(n):
        return loop(n)

    n = 4_000_000
    run(10)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(run, [n] * threads))
            rates.append(threads * n * chains * 64 / (time.perf_counter() - start))
    return max(rates)


def compile_seconds(format: str) -> float:
    start = time.perf_counter()
    compiler.address(linear.linear_kernel(format))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("formats", nargs="*", default=[*BLOCKS, *FLOATS])
    parser.add_argument("-t", "--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 128, 512])
    parser.add_argument("--shape", type=int, nargs=2, default=SHAPE, metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--megabytes", type=int, default=400, help="weights read for one token, from memory")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    from edgelm.kernels.bandwidth import read_bandwidth

    for threads in options.threads:
        read = statistics.median(read_bandwidth(threads, options.megabytes << 20, 5)) / 1e9
        peak = int8_peak(threads) / 1e9
        print(f"{threads} thread(s): memory is read at {read:.1f} GB/s; int8 peak {peak:.0f} G multiply-adds/s")
        for format in options.formats:
            print(f"  {format:7s} compiled in {compile_seconds(format):.2f} s", end="", flush=True)
            for tokens in options.tokens:
                n_bytes = (options.megabytes << 20) if tokens == 1 else 0
                large = Bench(format, tuple(options.shape), n_bytes, threads, tokens)
                if tokens == 1:
                    rate = large.n_bytes / large.seconds(options.rounds) / 1e9
                    small = Bench(format, (512, 512), 0, threads, 1)
                    small.table = np.repeat(small.table, 200, axis=0)
                    cached = 200 * small.n_bytes / small.seconds(options.rounds) / 1e9
                    print(f" | memory {rate:5.1f} GB/s ({rate / read:4.0%}), cache {cached:5.1f}", end="", flush=True)
                else:
                    large.table = np.repeat(large.table, max(1, 1024 // tokens), axis=0)
                    rate = large.macs * max(1, 1024 // tokens) / large.seconds(options.rounds) / 1e9
                    print(f" | {tokens} tokens {rate:4.0f} G ({rate / peak:3.0%})", end="", flush=True)
            print()


if __name__ == "__main__":
    main()
