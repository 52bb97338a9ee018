"""llama-bench's flags and JSON for an engine that is a Python package: what makes a program a peer.

A peer is any program that understands `-m FILE -p N,… -n N,… -d N,… -t N,… -r N -ctk TYPE -ctv TYPE -o json` and prints
a list of records with `n_prompt`, `n_gen`, `n_depth`, `n_threads`, `samples_ns` and `avg_ts`. Here a package says how
it loads a file, computes a prompt and generates; `main` does the rest. Two flags are not llama-bench's: `--say 1,2,3`
prints the `-n` token ids that follow greedily, so that one can see that an engine computes the model at all;
`--set KEY=VALUE` is for an engine with settings of its own.

Needs NumPy alone: it runs in the interpreter of the engine that is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

Tokens = list[int]


@dataclass(frozen=True)
class Settings:
    """What an engine is loaded with."""

    model: str
    n_threads: int
    n_ctx: int
    type_k: str
    type_v: str
    prefixes: bool  # a test will ask for a prompt after tokens that are in the cache
    own: dict[str, str]  # settings that only this engine knows


class Engine(Protocol):
    """A loaded model. Times are nanoseconds; nothing of one call may be left for the next one."""

    n_vocab: int

    def facts(self) -> dict[str, Any]:
        """Versions and settings that a reader of the figures has to know."""

    def prompt(self, depth: Tokens, tokens: Tokens) -> int:
        """Time from `tokens` to the logits of the token after them, `depth` being in the cache."""

    def generate(self, depth: Tokens, n_tokens: int) -> int:
        """Time for `n_tokens` one by one, after `depth` (one token at least) in the cache."""

    def say(self, tokens: Tokens, n_tokens: int) -> Tokens:
        """The tokens that follow, the most probable one each time, beyond the end of the text too."""


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main(description: str | None, load: Callable[[Settings], Engine]) -> None:
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-p", "--n-prompt", type=numbers, default=[512])
    parser.add_argument("-n", "--n-gen", type=numbers, default=[128])
    parser.add_argument("-d", "--n-depth", type=numbers, default=[0])
    parser.add_argument("-t", "--threads", type=numbers, default=[2])
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-ctk", "--cache-type-k", default="f16")
    parser.add_argument("-ctv", "--cache-type-v", default="f16")
    parser.add_argument("-o", "--output", choices=["json"], default="json")
    parser.add_argument("--no-warmup", action="store_true")
    parser.add_argument("--say", type=numbers, metavar="ID,ID,…", help="print the token ids that follow greedily")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of this engine")
    args = parser.parse_args()

    own = dict(setting.split("=", 1) for setting in args.set)
    tests = [(p, 0, d) for d in args.n_depth for p in args.n_prompt if p]
    tests += [(0, n, d) for d in args.n_depth for n in args.n_gen if n]
    longest = len(args.say or []) + max((sum(test) for test in tests), default=0) + 1
    records = []
    for n_threads in args.threads:
        prefixes = any(p and d for p, _, d in tests)
        engine = load(Settings(args.model, n_threads, longest, args.cache_type_k, args.cache_type_v, prefixes, own))
        if args.say:
            print(json.dumps(engine.say(args.say, max(args.n_gen))))
            return
        for test in tests:
            samples = measure(engine, test, args.repetitions, warmup=not args.no_warmup)
            records.append(record(args, n_threads, test, samples) | {"engine": engine.facts()})
    print(json.dumps(records, indent=2))
    gc.freeze()  # ends as `edgelm` does: without looking for cycles in what it still holds


def measure(engine: Engine, test: tuple[int, int, int], repetitions: int, warmup: bool) -> list[int]:
    """Nanoseconds of each repetition; every one has random tokens of its own, so that no cache can know them."""
    n_prompt, n_gen, n_depth = test
    samples = []
    for _ in range(repetitions + warmup):
        depth = random.choices(range(engine.n_vocab), k=n_depth if n_prompt else max(1, n_depth))
        if n_prompt:
            samples.append(engine.prompt(depth, random.choices(range(engine.n_vocab), k=n_prompt)))
        else:
            samples.append(engine.generate(depth, n_gen))
    return samples[warmup:]


def record(args: argparse.Namespace, n_threads: int, test: tuple[int, int, int], samples: list[int]) -> dict[str, Any]:
    """A record under llama-bench's keys."""
    speeds = [(test[0] + test[1]) * 1e9 / ns for ns in samples]
    mean = sum(speeds) / len(speeds)
    variance = sum((speed - mean) ** 2 for speed in speeds) / max(1, len(speeds) - 1)
    return {
        "model_filename": args.model,
        "n_threads": n_threads,
        "type_k": args.cache_type_k,
        "type_v": args.cache_type_v,
        "n_prompt": test[0],
        "n_gen": test[1],
        "n_depth": test[2],
        "avg_ns": round(sum(samples) / len(samples)),
        "avg_ts": mean,
        "stddev_ts": variance**0.5,
        "samples_ns": samples,
        "samples_ts": speeds,
    }
