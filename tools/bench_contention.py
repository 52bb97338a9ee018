"""What becomes of the speed when others want the cores too: it should fall in proportion, and no token should stall.

    python tools/bench_contention.py MODEL.gguf
    python tools/bench_contention.py MODEL.gguf --llama-bench PATH/TO/llama-bench -r 5 --save contention.json

Situations: alone with a thread for each core; two such processes at once; one beside a process that burns a core; with
twice and four times as many threads as cores. Every round goes through all of them; a share is that of "alone" in the
same round, the median over the rounds counts. A fair system gives each runnable thread the same time: the column "fair"
says what that leaves of the machine for one process. A worker is this program again: it loads the model, and then
does what it reads from its standard input, so that two of them begin at the same moment and measure the same seconds.
Processes of llama-bench can only be started at the same moment, which flatters two of them a little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Record = dict[str, Any]
N_CACHED = 256  # tokens after which a worker begins a new sequence


@dataclass(frozen=True)
class Situation:
    """`n_processes` with `n_threads` each, beside `n_burners` processes that do nothing but burn a core."""

    name: str
    n_processes: int
    n_threads: int
    n_burners: int = 0

    def fair(self, n_cores: int) -> float:
        """The share of the machine that one of the processes is due."""
        return self.n_threads / max(n_cores, self.n_processes * self.n_threads + self.n_burners)


def situations(n_cores: int) -> list[Situation]:
    return [
        Situation("alone", 1, n_cores),
        Situation("two processes", 2, n_cores),
        Situation("beside a busy loop", 1, n_cores, n_burners=1),
        Situation("one thread, beside a busy loop on each core", 1, 1, n_burners=n_cores),
        Situation("twice as many threads as cores", 1, 2 * n_cores),
        Situation("four times as many threads", 1, 4 * n_cores),
    ]


def work(path: str, n_threads: int, n_prompt: int) -> None:
    """A worker: answers each line "decode SECONDS" or "prefill SECONDS" with what it did in that time, as JSON."""
    import edgelm
    from edgelm.bench import feed

    model = edgelm.load(path, ctx_size=max(N_CACHED, n_prompt) + 1, threads=n_threads, threads_batch=n_threads)

    def fresh() -> Any:
        return model.new_cache().new_sequence()

    def measure(n_tokens: int, seconds: float) -> Record:
        """Nanoseconds of each batch of `n_tokens`; a new sequence begins between two of them."""
        sequence, held, times = fresh(), 0, []
        before, end = time.process_time(), time.monotonic() + seconds
        while time.monotonic() < end:
            if held + n_tokens > max(N_CACHED, n_tokens):
                sequence.release()
                sequence, held = fresh(), 0
            began = time.perf_counter_ns()
            feed(model, sequence, [7] * n_tokens)
            times.append(time.perf_counter_ns() - began)
            held += n_tokens
        sequence.release()
        return {"times": times, "n_tokens": n_tokens, "cpu_s": time.process_time() - before}

    measure(n_prompt, 0.5)
    measure(1, 0.5)
    print("ready", flush=True)
    for line in sys.stdin:
        what, seconds = line.split()
        print(json.dumps(measure({"decode": 1, "prefill": n_prompt}[what], float(seconds))), flush=True)


@contextmanager
def processes(commands: list[list[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Programs that are ended with the block, whatever happens."""
    with ExitStack() as stack:
        started = []
        for command in commands:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        yield started


BURN = [sys.executable, "-c", "while True: pass"]


def edgelm_in(situation: Situation, args: argparse.Namespace) -> Record:
    """What one process does on average, and the latency of every token of all of them."""
    worker = [sys.executable, __file__, args.model, "-p", str(args.p), "--worker", str(situation.n_threads)]
    with processes([worker] * situation.n_processes) as workers:
        for process in workers:
            if process.stdout.readline() != "ready\n":
                sys.exit(f"{args.model}: a worker ended before its work")
        found: Record = {}
        with processes([BURN] * situation.n_burners):
            for what in ("decode", "prefill"):
                for process in workers:
                    process.stdin.write(f"{what} {args.seconds}\n")
                    process.stdin.flush()
                answers = [json.loads(process.stdout.readline()) for process in workers]
                done = [len(a["times"]) * a["n_tokens"] * 1e9 / sum(a["times"]) for a in answers]
                cores = [a["cpu_s"] * 1e9 / sum(a["times"]) for a in answers]
                found[what] = {"ts": statistics.fmean(done), "each": done, "cores": statistics.fmean(cores)}
                if what == "decode":
                    found["latencies"] = [ns for a in answers for ns in a["times"]]
    return found


def llama_bench_in(situation: Situation, args: argparse.Namespace) -> Record:
    """The same of llama-bench, which tells no latencies.

    Its processes are started together, but load each in its own time, and the last one to end is alone for a while.
    """
    found: Record = {}
    command = [args.llama_bench, "-m", args.model, "-t", str(situation.n_threads), "-o", "json", "-r", "3"]
    for what, test in (("decode", ["-p", "0", "-n", "64"]), ("prefill", ["-p", str(args.p), "-n", "0"])):
        with processes([BURN] * situation.n_burners), processes([[*command, *test]] * situation.n_processes) as benches:
            done = [json.loads(process.communicate()[0])[0]["avg_ts"] for process in benches]
        found[what] = {"ts": statistics.fmean(done), "each": done}
    return found


def percentile(values: list[int], share: float) -> float:
    """Milliseconds that `share` of the values stay below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1e6


def table(result: Record) -> Iterator[str]:
    """One row for each situation."""
    rounds, peer = result["rounds"], "llama.cpp" in result["rounds"][0]["alone"]
    head = ["situation", "threads", "fair", "decode t/s", "of alone", "p50 ms", "p99", "max", "prefill t/s", "of alone"]
    head += ["llama.cpp decode", "of alone", "prefill", "of alone"] if peer else []
    yield "| " + " | ".join(head) + " |"
    yield "| --- |" + " ---: |" * (len(head) - 1)
    for situation in situations(result["n_cores"]):
        if situation.name not in rounds[0]:
            continue

        def both(engine: str, what: str, name: str = situation.name) -> list[str]:
            speeds = [round[name][engine][what]["ts"] for round in rounds]
            shares = [round[name][engine][what]["ts"] / round["alone"][engine][what]["ts"] for round in rounds]
            return [f"{statistics.median(speeds):.1f}", f"{statistics.median(shares):.2f}"]

        times = [ns for round in rounds for ns in round[situation.name]["edgelm"]["latencies"]]
        latency = [f"{percentile(times, share):.1f}" for share in (0.5, 0.99, 1.0)]
        n_threads = str(situation.n_threads) + (f" × {situation.n_processes}" if situation.n_processes > 1 else "")
        cells = [situation.name, n_threads, f"{situation.fair(result['n_cores']):.2f}"]
        cells += [*both("edgelm", "decode"), *latency, *both("edgelm", "prefill")]
        cells += [*both("llama.cpp", "decode"), *both("llama.cpp", "prefill")] if peer else []
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--llama-bench", metavar="PATH", help="a peer in the same situations")
    parser.add_argument("-p", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("-r", type=int, default=3, help="rounds")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="keep the rounds, with every latency")
    parser.add_argument("--table", action="store_true", help="no runs: MODEL is a file that was saved")
    parser.add_argument("--worker", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.model, args.worker, args.p)
        return
    if args.table:
        print(*table(json.loads(Path(args.model).read_text("utf-8"))), sep="\n")
        return
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = {"model": Path(args.model).name, "n_cores": n_cores, "seconds": args.seconds, "system": platform.system()}
    result: Record = facts | {"date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "rounds": []}
    for i in range(args.r):
        result["rounds"].append({})
        for situation in situations(n_cores)[:: -1 if i % 2 else 1]:
            found = {"edgelm": edgelm_in(situation, args)}
            if args.llama_bench:
                found["llama.cpp"] = llama_bench_in(situation, args)
            result["rounds"][-1][situation.name] = found
            print(f"round {i + 1} of {args.r}: {situation.name}", file=sys.stderr)
        if args.save:
            args.save.write_text(json.dumps(result), "utf-8")
    print(*table(result), sep="\n")


if __name__ == "__main__":
    main()
