"""How fast a model runs: llama-bench's tests under llama-bench's names, beside what the memory allows.

A test `pp N` computes a prompt of N tokens, `tg N` generates N tokens one by one, `pp+tg` does both; `@ d` starts
with d tokens in the cache. Tokens are random, nothing is sampled or turned into text. Beside tokens/s stand the bytes
of weights and cache that a generated token has to read, in GB/s, and their share of the read bandwidth that this
machine showed in the same minute.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelm.errors import UsageError
from edgelm.flags import cache_type, given
from edgelm.free_memory import free_memory
from edgelm.kv_types import both

if TYPE_CHECKING:
    from edgelm.model import Model


N_PROMPT = 512  # tokens, for --memory
LEAST = 512 << 20  # bytes of memory to read, where nothing is known of the caches
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # of Linux; elsewhere the least is several times what there is


@dataclass(frozen=True)
class Test:
    """One line of the table: `n_prompt` tokens at once, then `n_gen` one by one, after `n_depth` in the cache."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        parts = {
            (True, False): f"pp {self.n_prompt}",
            (False, True): f"tg {self.n_gen}",
            (True, True): f"pp {self.n_prompt}+tg {self.n_gen}",
        }
        return parts[self.n_prompt > 0, self.n_gen > 0] + (f" @ d{self.n_depth}" if self.n_depth else "")


@dataclass
class Result:
    """The samples of one test at one number of threads."""

    test: Test
    n_threads: int
    samples_ns: list[int] = field(default_factory=list)
    bytes_per_token: float = 0.0  # read for one generated token: weights once, the cache at its mean length
    read_bandwidth: float = 0.0  # bytes/s, the best of a few passes over memory just before

    @property
    def samples_ts(self) -> list[float]:
        n = self.test.n_prompt + self.test.n_gen
        return [n * 1e9 / ns for ns in self.samples_ns]

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return statistics.stdev(self.samples_ts) if len(self.samples_ns) > 1 else 0.0

    @property
    def gb_s(self) -> float | None:
        return self.avg_ts * self.bytes_per_token / 1e9 if self.test.n_prompt == 0 else None


def main(
    path: str,
    *,
    n_prompt: str,
    n_gen: str,
    prompt_gen: tuple[str, ...],
    n_depth: str,
    threads: str,
    repetitions: int,
    output: str,
    startup: bool,
    memory: bool,
    ctx_size: int | None,
    packed: str | None,
    no_warmup: bool,
    quiet: bool,
    max_tokens_per_run: int | None = None,
    cache_type_k: str | None = None,
    cache_type_v: str | None = None,
) -> None:
    """Runs `edgelm bench`: prints a table, or records, to standard output."""
    settings = given({"max_tokens_per_run": max_tokens_per_run, "packed": packed})
    settings |= cache_type({"cache_type_k": cache_type_k, "cache_type_v": cache_type_v})
    counts = numbers(threads, "-t")
    if memory and startup:
        raise UsageError("--memory and --startup are two measurements; choose one")
    if memory:
        if counts:
            settings["threads"] = counts[0]
        print_memory(path, ctx_size, settings, output)
    elif startup:
        print_startup(path, repetitions, output, packed)
    else:
        tests = tests_of(n_prompt, n_gen, prompt_gen, n_depth)
        print_speed(path, tests, counts, 0 if no_warmup else 1, repetitions, output, quiet, settings)


def tests_of(n_prompt: str, n_gen: str, prompt_gen: tuple[str, ...], n_depth: str) -> list[Test]:
    """What the flags -p, -n, -pg and -d ask for."""
    depths = numbers(n_depth, "-d")
    tests = [Test(n, 0, d) for d in depths for n in numbers(n_prompt, "-p") if n]
    tests += [Test(0, n, d) for d in depths for n in numbers(n_gen, "-n") if n]
    for pair in prompt_gen:
        both = numbers(pair, "-pg")
        if len(both) != 2:
            raise UsageError(f"-pg {pair!r}: write two numbers, such as 512,128")
        tests += [Test(both[0], both[1], d) for d in depths]
    if not tests:
        raise UsageError("nothing to measure: give -p, -n or -pg")
    return tests


def print_speed(
    path: str,
    tests: list[Test],
    counts: list[int],
    n_warmup: int,
    repetitions: int,
    output: str,
    quiet: bool,
    settings: dict[str, Any],
) -> None:
    """Every test with every number of threads."""
    from edgelm.model import load
    from edgelm.terminal import bars

    longest = max(t.n_prompt + t.n_gen + t.n_depth for t in tests)
    results: list[Result] = []
    facts: dict[str, Any] = {}
    for n_threads in counts or (None,):
        with bars(quiet) as progress:
            model = load(
                path, ctx_size=longest, threads=n_threads, threads_batch=n_threads, progress=progress, **settings
            )
            facts, roof = facts or about(model), read_bandwidth(model.n_threads)
            for test in tests:
                progress(f"{test.name}, {model.n_threads} threads", 0, 0)
                results.append(measure(model, test, repetitions, n_warmup, roof))
                progress(f"{test.name}, {model.n_threads} threads", 1, 1)
                if output == "jsonl":
                    progress.close()
                    print(json.dumps(record(facts, results[-1])), flush=True)
    if output == "json":
        print(json.dumps([record(facts, r) for r in results], indent=2))
    elif output == "csv":
        print(as_csv([record(facts, r) for r in results]), end="")
    elif output == "md":
        print("\n".join(as_table(facts, results)))


def numbers(text: str, flag: str) -> list[int]:
    """'512,1024' as a list."""
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"{flag} {text!r}: write numbers separated by commas") from None
    if any(v < 0 for v in values):
        raise UsageError(f"{flag} {text!r}: numbers must not be negative")
    return values


def measure(model: Model, test: Test, repetitions: int, n_warmup: int, read_bandwidth: float) -> Result:
    """Times one test. A first run that is not counted warms caches and clocks up, as in llama-bench."""
    result = Result(
        test,
        model.n_threads,
        bytes_per_token=model.bytes_per_token(test.n_depth + test.n_gen / 2),
        read_bandwidth=read_bandwidth,
    )
    rng = np.random.default_rng(0)
    for repetition in range(n_warmup + repetitions):
        if repetition:
            model.wait()  # what is packed behind a first run is no part of the next one
        sequence = model.new_cache().new_sequence()
        try:
            if test.n_depth:
                feed(model, sequence, rng.integers(0, model.vocab_size, test.n_depth))
            began = time.perf_counter_ns()
            if test.n_prompt:
                feed(model, sequence, rng.integers(0, model.vocab_size, test.n_prompt))
            for token in rng.integers(0, model.vocab_size, test.n_gen):
                feed(model, sequence, [token])
            if repetition >= n_warmup:
                result.samples_ns.append(time.perf_counter_ns() - began)
        finally:
            sequence.release()
    return result


def feed(model: Model, sequence: Any, tokens: Any) -> None:
    """Computes tokens; logits only for the last, as llama-bench does."""
    from edgelm.cache import Batch

    model.runner.forward(Batch.of([(sequence, tokens, "last")]))


def read_bandwidth(n_threads: int) -> float:
    """Bytes/s that `n_threads` read from memory: the best of a few passes over more than its caches hold."""
    from edgelm.kernels.bandwidth import read_bandwidth as passes

    return max(passes(n_threads, beyond_caches(), n_passes=4))


def beyond_caches() -> int:
    """Bytes that must be read so that memory is measured: four times the last-level cache; not what would press others.

    A pass finds nothing of the one before in a cache that throws out what is oldest, but not all caches do.
    """
    wanted, free = max(LEAST, 4 * last_level_cache()), free_memory()
    return wanted if free is None else min(wanted, free // 4) // (1 << 20) << 20


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core shares; 0 where the system does not tell."""
    sizes = (path.read_text().strip() for path in CACHES.glob("index*/size"))
    return max((int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]] for size in sizes), default=0)


def about(model: Model) -> dict[str, Any]:
    """What all results of a model have in common, under llama-bench's keys."""
    facts = model.info()
    return {
        "cpu_info": processor(),
        "gpu_info": "",
        "backends": "CPU",
        "model_filename": str(model.path),
        "model_type": f"{facts['architecture']} {facts['type']}",
        "model_size": facts["n_bytes"],
        "model_n_params": facts["n_parameters"],
        "n_batch": model.runner.max_tokens,
        "n_ubatch": model.runner.max_tokens,
        "type_k": both(model.kv_type)[0],
        "type_v": both(model.kv_type)[1],
    }


def record(facts: dict[str, Any], result: Result) -> dict[str, Any]:
    """One result under llama-bench's keys, and a few of our own at the end."""
    return facts | {
        "n_threads": result.n_threads,
        "n_prompt": result.test.n_prompt,
        "n_gen": result.test.n_gen,
        "n_depth": result.test.n_depth,
        "test_time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(statistics.fmean(result.samples_ns)),
        "stddev_ns": round(statistics.stdev(result.samples_ns)) if len(result.samples_ns) > 1 else 0,
        "avg_ts": result.avg_ts,
        "stddev_ts": result.stddev_ts,
        "samples_ns": result.samples_ns,
        "samples_ts": result.samples_ts,
        "bytes_per_token": round(result.bytes_per_token),
        "gb_s": result.gb_s,
        "read_gb_s": result.read_bandwidth / 1e9,
        "bandwidth_share": None if result.gb_s is None else result.gb_s * 1e9 / result.read_bandwidth,
    }


def as_table(facts: dict[str, Any], results: list[Result]) -> Iterator[str]:
    """llama-bench's Markdown table, and two columns more."""
    from edgelm.terminal import size

    model = f"{facts['model_type']} | {size(facts['model_size'])} | {facts['model_n_params'] / 1e6:.2f} M"
    yield "| model | size | params | backend | threads | test | t/s | GB/s | of bandwidth |"
    yield "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    for r in results:
        rate = ("", "") if r.gb_s is None else (f"{r.gb_s:.1f}", f"{r.gb_s * 1e11 / r.read_bandwidth:.0f} %")
        yield (
            f"| {model} | CPU | {r.n_threads} | {r.test.name} | {r.avg_ts:.2f} ± {r.stddev_ts:.2f} "
            f"| {rate[0]} | {rate[1]} |"
        )
    last = results[-1]
    yield f"\nread bandwidth beside it: {last.read_bandwidth / 1e9:.1f} GB/s with {last.n_threads} threads"


def as_csv(records: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def print_memory(path: str, n_ctx: int | None, settings: dict[str, Any], output: str) -> None:
    """What a fresh process with the model takes, beside what `edgelm info` says it will need."""
    from edgelm.footprint import measure
    from edgelm.terminal import size

    result = measure(path, n_ctx, N_PROMPT, settings)
    if output != "md":
        print(json.dumps(result))
        return
    names = ("peak", "resident", "anonymous", "files")
    print(f"| context {result['n_ctx']} | {' | '.join(names)} |\n| --- |" + " ---: |" * len(names))
    for name, key in (("loaded", "loaded"), (f"after {result['n_tokens']} tokens", "answered")):
        cells = (size(result[key][n]) if n in result[key] else "" for n in names)
        print(f"| {name} | {' | '.join(cells)} |")
    need = ", ".join(f"{name.replace('_', ' ')} {size(n)}" for name, n in result["estimate"].items())
    print(f"\nestimate, without Python, libraries and vocabulary: {need}")
    print(f"packed weights in {result['packed_file'] or 'memory'}")


def print_startup(path: str, repetitions: int, output: str, packed: str | None = None) -> None:
    """Seconds from the start of a process to its first token, and to its end, of `edgelm run`.

    With the bytecode of its modules, which pip makes when it installs them and a checkout's first run, too.
    """
    firsts, ends = [], []
    command = [sys.executable, "-m", "edgelm", "run", path, "-p", "Hello", "-n", "2", "--temp", "0", "-q"]
    command += [] if packed is None else ["--packed", packed]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(repetitions + 1):  # the first one compiles what is not compiled, and is not counted
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            firsts.append(time.perf_counter() - began)
            process.communicate()
        if process.returncode:
            raise UsageError(f"{path}: `edgelm run` ended with exit code {process.returncode}; it says why above")
        ends.append(time.perf_counter() - began)
    if output == "md":
        print("| | best | median |\n| --- | ---: | ---: |")
        for name, values in (("first token", firsts[1:]), ("end of process", ends[1:])):
            print(f"| {name} | {min(values):.2f} s | {statistics.median(values):.2f} s |")
    else:
        print(json.dumps({"first_token_s": firsts[1:], "end_s": ends[1:], "first_run_s": firsts[0]}))


def processor() -> str:
    """The processor's name, as far as the system tells."""
    if sys.platform == "linux" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("model name", "Model")):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
