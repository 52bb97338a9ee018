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
from contextlib import closing

import numpy as np

from edgelm import gguf
from edgelm.arch import Config
from edgelm.cache import Batch, Sequence
from edgelm.kernels.abi import Env, Row
from edgelm.kernels.attention import usual_kv_type
from edgelm.lowering import Plan
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
    with closing(load(args.model, args.depth + args.tokens + 8, args.threads, max(256, args.tokens))) as program:
        sequence = program.new_cache().new_sequence()  # which rows that are run by themselves read and write, too
        call = seconds_of_calls(program, sequence, args.depth, args.tokens, args.repeat)
        plan = program._plans[usual_kv_type()]
        rows, whole = seconds_of_rows(program, plan, args.repeat)
        total = print_rows(plan, rows, args.rows)
        barriers = int(plan.table[:, Row.BARRIER].sum())
        print(f"{'sum of rows':40s} {len(rows):4d} rows, {barriers} barriers: {total * 1e3:.3f} ms")
        print(f"{'run':40s} {whole * 1e3:.3f} ms; {program.n_bytes / whole / 1e9:.1f} GB/s if every weight were read")
        rate = args.tokens / call
        print(f"{'call':40s} {call * 1e3:.3f} ms, {rate:.1f} tokens/s; Python {(call - whole) * 1e6:.0f} us")


def load(model: str, n_ctx: int, n_threads: int | None, max_tokens: int) -> Program:
    """The program of a model's file; says how long that took."""
    file = gguf.read(model)
    config = Config.from_gguf(file.metadata)
    start = time.perf_counter()
    program = Program(
        model_of(config), config, Weights.from_gguf(config, file.tensors), n_ctx=min(config.context_length, n_ctx),
        n_threads=n_threads, max_tokens=max_tokens,
    )
    print(f"loaded in {time.perf_counter() - start:.2f} s, {program.n_bytes / 1e6:.1f} MB of weights")
    return program


def seconds_of_calls(program: Program, sequence: Sequence, depth: int, n_tokens: int, repeat: int) -> float:
    """The best of calls with `n_tokens` tokens behind `depth` others. Its environment stays that of the last one."""
    rng = np.random.default_rng(0)
    vocab_size = program.config.vocab_size
    if depth:
        program.forward(Batch.of([(sequence, rng.integers(0, vocab_size, depth), "none")]))
    tokens = rng.integers(0, vocab_size, n_tokens)
    calls = []
    for _ in range(repeat + 1):  # the first one warms
        sequence.truncate(depth)
        start = time.perf_counter()
        program.forward(Batch.of([(sequence, tokens, "last")]))
        calls.append(time.perf_counter() - start)
    return min(calls[1:])


def seconds_of_rows(program: Program, plan: Plan, repeat: int) -> tuple[np.ndarray, float]:
    """The best of each row of a plan alone, (rows,), and of all of them as one run."""
    logits = np.zeros((1, program.config.vocab_size), np.float32)  # where the last call's were, nothing may be now
    program._environment._words[Env.LOGITS] = logits.ctypes.data

    def seconds(table: np.ndarray) -> float:
        start = time.perf_counter()
        program._executor.run(table, len(table), program._environment.address, program.n_threads)
        return time.perf_counter() - start

    empty = np.zeros((1, Row.SIZE), np.int64)
    rows = [plan.table[i : i + 1].copy() for i in range(len(plan.table))]
    overhead = np.min([seconds(empty) for _ in range(500)])
    single = np.min([[seconds(row) for row in rows] for _ in range(repeat)], axis=0) - overhead
    return single, float(np.min([seconds(plan.table) for _ in range(repeat)]))


def print_rows(plan: Plan, rows: np.ndarray, each: bool) -> float:
    """Prints the time of rows, summed over layers unless `each`; gives that of all."""
    groups: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])  # rows, seconds, bytes of weights
    for i, (step, seconds) in enumerate(zip(plan.steps, rows, strict=True)):
        names = " ".join(re.sub(r"blk\.\d+\.|\.weight", "", name) for name in step.weights[0].split())
        label = f"{step.name} {names}".strip()
        group = groups[f"{i:4} {label}" if each else label]
        group[0] += 1
        group[1] += max(0.0, seconds)
        group[2] += step.weights[1]
    total = sum(seconds for _, seconds, _ in groups.values())
    for label, (count, seconds, n_bytes) in sorted(groups.items(), key=lambda item: 0 if each else -item[1][1]):
        rate = f"{n_bytes / seconds / 1e9:8.1f} GB/s" if n_bytes and seconds else ""
        mean, share = seconds / count * 1e6, seconds / total
        print(f"{label:40s} {count:4.0f} x {mean:9.2f} us = {seconds * 1e3:8.3f} ms {share:6.1%} {rate}")
    return total


if __name__ == "__main__":
    main()
