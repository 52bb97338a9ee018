"""How fast the matrix kernels are, beside what the machine can do at all, measured in turns.

    python tools/bench_kernels.py                          # all formats, one and two threads
    python tools/bench_kernels.py Q4_1 Q8_0 -t 1 --tokens 1 8 128

For each format: GB/s of weights for one token, from memory and from the cache, and their share of the read bandwidth;
billions of multiply-adds a second for more tokens, and their share of the peak of the int8 instruction (F16, BF16, F32,
multiplied as they are: of the float32 one; INT12, what x86 makes of F16 and BF16: of int16's); without a matrix unit.
Roof and kernel take turns; a figure is the best round, a share the median of ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from edgelm.bench import beyond_caches
from edgelm.kernels import compiler, int16, linear
from edgelm.kernels.abi import Env
from edgelm.kernels.executor import Executor
from edgelm.kernels.units import UNITS
from edgelm.kernels.weight_layout import FLOATS, Packed, packed_bytes, zeroed

LINE = 64
EACH = {"int8": 64, "int16": 32, "float32": 16}  # multiply-adds of one vector
AT_ONCE = {name: 96 * each for name, each in EACH.items()} | {"unit": 4 * 16 * 16 * 32}


class Bench:
    """Weights of one shape and format, as often as fits into `n_bytes`, and a table that multiplies with them."""

    def __init__(self, format: str, shape: tuple[int, int], n_bytes: int, threads: int, tokens: int) -> None:
        self.executor = Executor(threads)
        rows, cols = shape
        size = packed_bytes(format, rows, cols)
        copies, repeats = max(1, n_bytes // size), 1 if n_bytes else max(1, (8 << 30) // (rows * cols * tokens * 32))
        self.weights = zeroed(copies * size)
        self.weights[:] = 0x33  # scales and weights of a sensible size in every format: no subnormal numbers
        kind = linear.record_kind(format)
        x_stride = -(-4 * cols // LINE) * LINE if kind == "float32" else linear.record_bytes(kind, cols)
        x, y = LINE, LINE + tokens * (x_stride + 4 * cols)
        self.workspace = zeroed(y + tokens * 4 * -(-rows // 16) * 16)
        self.env = np.zeros(Env.SIZE, np.int64)
        self.env[Env.WORKSPACE], self.env[Env.N_TOKENS] = self.workspace.ctypes.data, tokens
        values = np.random.default_rng(0).standard_normal((tokens, cols)).astype(np.float32)
        if kind == "float32":
            self.workspace[x : x + tokens * x_stride].reshape(tokens, x_stride)[:, : 4 * cols] = values.view(np.uint8)
        else:
            floats = x + tokens * x_stride
            self.workspace[floats : floats + values.nbytes] = values.view(np.uint8).ravel()
            self._run([linear.row_quantize(floats, 4 * cols, cols, x, kind=kind)])
        base, stride = self.weights.ctypes.data, size // -(-rows // 16)
        self.table = np.array(repeats * [
            linear.row_linear(Packed(format, rows, cols, base + i * size, size, stride), x, x_stride, y, 4 * rows)
            for i in range(copies)
        ], np.int64)  # fmt: skip
        self.n_bytes, self.macs = repeats * copies * size, repeats * copies * rows * cols * tokens

    def _run(self, rows: list[list[int]]) -> None:
        table = np.array(rows, np.int64)
        self.executor.run(table, len(table), self.env.ctypes.data)

    def run(self) -> None:
        self.executor.run(self.table, len(self.table), self.env.ctypes.data)


def compiled(write: Callable[[Any, Any, Any], Any]) -> Callable[[int], int]:
    """A function of n: the code that write(context, builder, n) writes, whose result, an int64, it returns."""
    from numba import njit, types
    from numba.extending import intrinsic

    @intrinsic
    def code(typingctx: Any, n: Any) -> Any:
        return types.int64(types.int64), lambda context, b, sig, args: write(context, b, args[0])

    @njit(nogil=True)
    def run(n):
        return code(n)

    run(10)
    return run


def spin(name: str) -> Callable[[int], int]:
    """A loop of n times `AT_ONCE` multiply-adds in registers: "int8", "int16" or "float32".

    What adds products of int8 in 16 bits takes as many of weights of four bits as fit there before it widens them.
    """
    from llvmlite import ir
    from numba.core import cgutils

    from edgelm.kernels import int16_tiles, isas
    from edgelm.kernels.emit import I32, I64, F32x16, I8x64, I16x32, I32x16, emit_fma, repeat, spread, target
    from edgelm.kernels.isa import joined, parts

    def write(context: Any, b: Any, n: Any) -> Any:
        isa = isas.select(context)
        form = isa.form(4, False)
        x = spread(b, b.trunc(b.add(n, I64(0x3F800000)), I32), I32x16)  # as float32 about 1
        place = "w" if target(context)[0] == "aarch64" else "v" if isa.n_parts == 1 else "x"

        def unknown(vector: Any) -> Any:
            """The same, of which LLVM does not know that: else it multiplies once for all."""
            same = [
                b.asm(ir.FunctionType(part.type, [part.type]), "", f"={place},0", [part], side_effect=True)
                for part in parts(b, vector, isa.n_parts)
            ]
            return joined(b, same)

        vector, chains, steps = F32x16 if name == "float32" else I32x16, 12 // isa.n_parts, AT_ONCE[name] // EACH[name]
        sums = [cgutils.alloca_once_value(b, repeat(vector, 0)) for _ in range(chains)]
        with cgutils.for_range(b, n, intp=I64):
            for acc in sums:
                new = b.load(acc)
                new = isa.empty(b, new) if name == "int8" else new
                for _ in range(steps // chains):
                    w = unknown(x)
                    if name == "int8":
                        new = isa.step(b, new, b.bitcast(w, I8x64), x, form, 4)
                    elif name == "int16":
                        new = int16_tiles.machine(context).step(b, new, b.bitcast(w, I16x32), x)
                    else:
                        new = emit_fma(context, b, new, repeat(F32x16, 0.5), b.bitcast(x, F32x16))
                b.store(isa.end(b, new) if name == "int8" else new, acc)
        total = repeat(I32x16, 0)
        for acc in sums:
            total = b.add(total, b.bitcast(b.load(acc), I32x16))
        return b.zext(b.extract_element(total, I32(0)), I64)

    return compiled(write)


def spin_unit() -> Callable[[int], int] | None:
    """A loop of n times four products of tiles of bfloat16, 16 x 16 x 32 each; None where there is no matrix unit."""
    from numba.core import cgutils
    from numba.core.registry import cpu_target

    from edgelm.kernels import amx, matrix_unit
    from edgelm.kernels.emit import I64

    def write(context: Any, b: Any, n: Any) -> Any:
        amx.configure(b)
        with cgutils.for_range(b, n, intp=I64):
            for i in range(4):
                amx.multiply(b, i, 4 + i // 2, 6 + i % 2)
        amx.release(b)
        return n

    usable = matrix_unit.permitted() and amx.has_tiles(cpu_target.target_context)
    return compiled(write) if usable else None


class Roofs:
    """What the machine can do, each measured in a few milliseconds."""

    def __init__(self, threads: int, n_bytes: int) -> None:
        from edgelm.kernels import bandwidth

        self.threads, self.pool = threads, ThreadPoolExecutor(threads)
        self._read, self._memory = bandwidth._read, zeroed(n_bytes)
        self._memory[:] = 1
        measured = [name for name in EACH if name != "int16" or int16.preferred()]  # ARM has no products of pairs
        self._spins = {**{name: spin(name) for name in measured}, "unit": spin_unit()}

    def read(self) -> float:
        """Bytes a second."""
        share = len(self._memory) // self.threads // 256 * 256
        starts = [self._memory.ctypes.data + i * share for i in range(self.threads)]
        return self._rate(self._read, [(start, share) for start in starts], share * self.threads)

    def peak(self, name: str) -> float:
        """Multiply-adds a second: "int8", "int16", "float32", or "unit", bfloat16 of the matrix unit; 0 without."""
        spins, n = self._spins.get(name), 1_000_000 if name == "unit" else 125_000
        if spins is None:
            return 0.0
        return self._rate(spins, [(n,)] * self.threads, n * AT_ONCE[name] * self.threads)

    def _rate(self, work: Any, arguments: list[tuple[int, ...]], amount: float) -> float:
        start = time.perf_counter()
        list(self.pool.map(lambda a: work(*a), arguments))
        return amount / (time.perf_counter() - start)


def in_turns(bench: Bench, amount: float, roof: Callable[[], float], rounds: int) -> tuple[float, float]:
    """(best rate of the bench, median of its ratios to the roof)."""
    bench.run()
    rates, ratios = [], []
    for _ in range(rounds):
        limit = roof()
        start = time.perf_counter()
        bench.run()
        rates.append(amount / (time.perf_counter() - start))
        ratios.append(rates[-1] / limit)
    bench.executor.close()
    return max(rates), statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=[*UNITS, *FLOATS, *(["INT12"] if int16.preferred() else [])])
    parser.add_argument("-t", "--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 128, 512])
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 2048), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--megabytes", type=int, help="weights read for one token; as many as no cache holds")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    shape, n_bytes = tuple(options.shape), options.megabytes << 20 if options.megabytes else beyond_caches()
    for threads in options.threads:
        roofs = Roofs(threads, n_bytes)
        read = max(roofs.read() for _ in range(5)) / 1e9
        int8, float32 = (max(roofs.peak(name) for _ in range(5)) / 1e9 for name in ("int8", "float32"))
        print(f"{threads} thread(s): reads {read:.1f} GB/s; int8 {int8:.0f}, float32 {float32:.0f} G MAC/s")
        for format in options.formats:
            start = time.perf_counter()
            compiler.address(linear.linear_kernel(format))
            print(f"  {format:7s} compiled in {time.perf_counter() - start:.2f} s", end="", flush=True)
            peak = partial(roofs.peak, linear.record_kind(format))
            for tokens in options.tokens:
                bench = Bench(format, shape, n_bytes if tokens == 1 else 0, threads, tokens)
                if tokens == 1:
                    rate, share = in_turns(bench, bench.n_bytes, roofs.read, options.rounds)
                    small = Bench(format, (512, 512), 0, threads, 1)
                    cached, _ = in_turns(small, small.n_bytes, roofs.read, options.rounds)
                    line = f"memory {rate / 1e9:5.1f} GB/s ({share:4.0%}), cache {cached / 1e9:5.1f}"
                else:
                    rate, share = in_turns(bench, bench.macs, peak, options.rounds)
                    line = f"{tokens} tokens {rate / 1e9:4.0f} G ({share:3.0%})"
                print(f" | {line}", end="", flush=True)
            print()


if __name__ == "__main__":
    main()
