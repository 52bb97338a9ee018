"""Times edgelm beside other engines: the same file, the same threads, runs that alternate, medians of ratios.

    python tools/bench_peers.py MODEL.gguf --llama-bench PATH/TO/llama-bench -p 512 -n 64 -t 2 -r 5
    python tools/bench_peers.py MODEL.gguf --llama-bench NAME=PATH --llama-bench OTHER=PATH -o json

Any program with llama-bench's flags and JSON can be a peer. Each round runs every engine once as a process of its own
(one warm-up and one measured run each), so that a machine whose speed wanders is the same for all of them; a ratio is
taken within a round, and the median over the rounds is what counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

Key = tuple[int, int, int, int]  # prompt tokens, generated tokens, depth, threads


def measure(command: list[str], tests: list[str]) -> dict[Key, float]:
    """Tokens/s of each test that one run of an engine reports."""
    done = subprocess.run([*command, *tests, "-r", "1", "-o", "json"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    records: list[dict[str, Any]] = json.loads(done.stdout)
    return {(r["n_prompt"], r["n_gen"], r.get("n_depth", 0), r["n_threads"]): r["avg_ts"] for r in records}


def table(rounds: list[dict[str, dict[Key, float]]], peers: list[str]) -> list[str]:
    """A Markdown table: medians of tokens/s, and of the ratios within a round."""
    head = ["test", "threads", "edgelm t/s", *(f"{p} t/s" for p in peers)]
    head += [f"edgelm / {p} (min … max)" for p in peers]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for key in rounds[0]["edgelm"]:
        n_prompt, n_gen, depth, threads = key
        name = (f"pp {n_prompt}" if n_prompt else f"tg {n_gen}") + (f" @ d{depth}" if depth else "")
        speeds = [f"{statistics.median(r[e][key] for r in rounds):.1f}" for e in ["edgelm", *peers]]
        ratios = []
        for peer in peers:
            values = [r["edgelm"][key] / r[peer][key] for r in rounds]
            ratios.append(f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})")
        lines.append("| " + " | ".join([name, str(threads), *speeds, *ratios]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--llama-bench", action="append", default=[], metavar="[NAME=]PATH", help="a peer")
    parser.add_argument("-p", default="512")
    parser.add_argument("-n", default="64")
    parser.add_argument("-d", default="0")
    parser.add_argument("-t", default="1,2")
    parser.add_argument("-r", type=int, default=5, help="rounds")
    parser.add_argument("-o", choices=("md", "json"), default="md")
    args = parser.parse_args()

    engines = {"edgelm": [sys.executable, "-m", "edgelm", "bench", args.model, "-q"]}
    for peer in args.llama_bench:
        name, _, path = peer.rpartition("=")
        engines[name or "llama.cpp"] = [path, "-m", args.model]
    tests = ["-p", args.p, "-n", args.n, "-d", args.d]
    rounds: list[dict[str, dict[Key, float]]] = []
    for i in range(args.r):
        rounds.append({})
        for name in list(engines) if i % 2 == 0 else list(engines)[::-1]:
            rounds[-1][name] = {}
            for threads in args.t.split(","):
                rounds[-1][name] |= measure(engines[name], [*tests, "-t", threads])
        print(f"round {i + 1} of {args.r}", file=sys.stderr)
    if args.o == "json":
        print(json.dumps([{e: {str(k): v for k, v in r[e].items()} for e in r} for r in rounds], indent=2))
    else:
        print("\n".join(table(rounds, [e for e in engines if e != "edgelm"])))


if __name__ == "__main__":
    main()
