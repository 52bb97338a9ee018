"""Speed of the quantizers, beside llama.cpp's on the same matrix, and that of a whole file beside llama-quantize.

    tools/bench_quantize.py [--ggml libggml-base.so] [--types Q4_K,Q6_K] [--rows 256] [-r 5]

Both take turns in one process; each figure is the best of the rounds, in million weights per second of processor time,
so that what else runs on the machine matters little.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests" / "converters")]

from converters import quantizers  # noqa: E402


def speed(work: Callable[[], object], n_weights: int) -> float:
    start = time.process_time()
    work()
    return n_weights / (time.process_time() - start) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", help="libggml-base.so of a build of llama.cpp")
    parser.add_argument("--types", default=",".join(quantizers.writable()))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    x = (rng.standard_t(6, (options.rows, 2048)) * 0.02).astype(np.float32)
    importance = rng.lognormal(0, 1, 2048).astype(np.float32)
    theirs = None
    if options.ggml:
        from check_quantizers import Ggml

        theirs = Ggml(options.ggml)
    print("| type | rounding | search | weighted search | llama.cpp | with imatrix |\n|" + "---|" * 6)
    for name in options.types.split(","):
        ways: list[Callable[[], object] | None] = [None] * 5
        if name in (*quantizers.PLAIN, *quantizers.ROUNDED):
            ways[0] = lambda name=name: quantizers.quantize(name, x, None, 1)
        if name in quantizers.SEARCHED:
            ways[1] = lambda name=name: quantizers.quantize(name, x, None, 1, search=True)
            ways[2] = lambda name=name: quantizers.quantize(name, x, importance, 1)
        if theirs is not None:
            ways[3] = lambda name=name: theirs.quantize(name, x, None)
            ways[4] = lambda name=name: theirs.quantize(name, x, importance)
        best = [0.0] * 5
        for each in range(options.rounds + 1):  # the first compiles
            for i, way in enumerate(ways):
                if way is not None:
                    result = speed(way, x.size)
                    best[i] = max(best[i], result) if each else 0.0
        print(f"| {name} | " + " | ".join(f"{b:.0f}" if b else "" for b in best) + " |", flush=True)


if __name__ == "__main__":
    main()
