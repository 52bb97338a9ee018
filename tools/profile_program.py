"""Where the time of a program goes: every row of its op table on its own, and the same rows as one run.

    python tools/profile_program.py MODEL.gguf --threads 2 --tokens 1 --depth 128

Rows are timed one by one from Python, so that each is finished before the next begins; what that costs is measured
with an empty row and taken off. "run" is the same table in one go: the difference is what threads lose by waiting, or
gain by overlapping.
All times are the best of --repeat: what the machine can do when nobody disturbs it.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict

import numpy as np

from edgelm import gguf
from edgelm.arch import Config
from edgelm.cache import Batch
from edgelm.kernels.abi import Row
from edgelm.models import model_of
from edgelm.program import Program
from edgelm.weights import Weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-n", "--tokens", type=int, default=1, help="tokens of the call")
    parser.add_argument("-d", "--depth", type=int, default=128, help="tokens that are in the cache before")
    parser.add_argument("-r", "--repeat", type=int, default=20)
    parser.add_argument("--rows", action="store_true", help="each row, not sums over layers")
    args = parser.parse_args()

    file = gguf.read(args.model)
    config = Config.from_gguf(file.metadata)
    n_ctx = min(config.context_length, args.depth + args.tokens + 8)
    start = time.perf_counter()
    program = Program(
        model_of(config), config, Weights.from_gguf(config, file.tensors), n_ctx=n_ctx,
        n_threads=args.threads, max_tokens=max(256, args.tokens),
    )
    print(f"loaded in {time.perf_counter() - start:.2f} s, {program.n_bytes / 1e6:.1f} MB of weights")
    rng = np.random.default_rng(0)
    sequence = program.new_cache().new_sequence()
    if args.depth:
        program.forward(Batch.of([(sequence, rng.integers(0, config.vocab_size, args.depth), "none")]))
    tokens = rng.integers(0, config.vocab_size, args.tokens)
    program.forward(Batch.of([(sequence, tokens, "last")]))  # the environment now is that of this call
    logits = np.zeros((1, config.vocab_size), np.float32)
    program._words[11] = logits.ctypes.data
    calls = []
    for _ in range(args.repeat):
        sequence.truncate(args.depth)
        start = time.perf_counter()
        program.forward(Batch.of([(sequence, tokens, "last")]))
        calls.append(time.perf_counter() - start)
    program._words[11] = logits.ctypes.data

    plan = program._plans["f16"]
    executor, env, n_threads = program._executor, program._env_address, program.n_threads
    empty = np.zeros((1, Row.SIZE), np.int64)
    rows = [plan.table[i : i + 1].copy() for i in range(len(plan.table))]

    def timed(table: np.ndarray, n_rows: int) -> float:
        start = time.perf_counter()
        executor.run(table, n_rows, env, n_threads)
        return time.perf_counter() - start

    overhead = np.min([timed(empty, 1) for _ in range(500)])
    single = np.min([[timed(row, 1) for row in rows] for _ in range(args.repeat)], axis=0) - overhead
    whole = np.min([timed(plan.table, len(plan.table)) for _ in range(args.repeat)])

    groups: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for i, (step, seconds) in enumerate(zip(plan.steps, single, strict=True)):
        names = " ".join(re.sub(r"blk\.\d+\.|\.weight", "", name) for name in step.weights[0].split())
        label = f"{step.name} {names}".strip()
        group = groups[f"{i:4} {label}" if args.rows else label]
        group[0] += 1
        group[1] += max(0.0, seconds)
        group[2] += step.weights[1]
    total = sum(seconds for _, seconds, _ in groups.values())
    for label, (count, seconds, n_bytes) in sorted(groups.items(), key=lambda item: 0 if args.rows else -item[1][1]):
        rate = f"{n_bytes / seconds / 1e9:8.1f} GB/s" if n_bytes and seconds else ""
        each, share = seconds / count * 1e6, seconds / total
        print(f"{label:40s} {count:4.0f} x {each:9.2f} us = {seconds * 1e3:8.3f} ms {share:6.1%} {rate}")
    barriers = int(plan.table[:, Row.BARRIER].sum())
    print(f"{'sum of rows':40s} {len(rows):4d} rows, {barriers} barriers: {total * 1e3:.3f} ms")
    print(f"{'run':40s} {whole * 1e3:.3f} ms; {program.n_bytes / whole / 1e9:.1f} GB/s if every weight were read")
    best = min(calls)
    print(f"{'call':40s} {best * 1e3:.3f} ms, {args.tokens / best:.1f} tokens/s; Python {(best - whole) * 1e6:.0f} us")
    program.close()


if __name__ == "__main__":
    main()
