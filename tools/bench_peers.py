"""Times edgelm beside other engines: the same file, the same threads, runs that alternate, medians of ratios.

    python tools/bench_peers.py MODEL.gguf… --llama-bench PATH/TO/llama-bench --openvino PYTHON -p 512 -n 64 -t 1,2 -r 5
    python tools/bench_peers.py MODEL.gguf --peer "ik_llama.cpp=/opt/ik/llama-bench --run-time-repack 1" --save ik.json
    python tools/bench_peers.py --table peers.json ik.json
    python tools/bench_peers.py --update README.md docs/benchmarks.md

A peer is any program with llama-bench's flags and JSON; tools/peers/ makes programs of that kind of Python packages
(PYTHON is an interpreter that has the package). Each round runs every engine once as a process of its own (one warm-up
and one measured run each), so that a machine whose speed wanders is the same for all of them; a ratio is taken within a
round, and the median over the rounds is what counts. In the same round, before the engines of each number of threads:
how fast this machine reads memory and how many multiply-adds it does in a second.

--save keeps every round, beside those that the file has of the same model, types of keys and values, and processor;
--table makes tables of what was kept, and with --save one file of it. --update puts the tables into Markdown pages, in
place of what stands between `<!-- rounds: NAME.json … -->` and `<!-- end -->`: of docs/rounds/NAME.json, with
`<!-- rounds: NAME.json as: short -->` one row for each model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from peers import rounds, tables  # noqa: E402

KEPT = HERE.parent / "docs" / "rounds"  # what the tables of this project are made of
FLOATS = ("F32", "F16", "BF16")
FACTS = ("engine", "build_commit", "build_number")  # keys of a record that say what gave it
Record = dict[str, Any]


@dataclass(frozen=True)
class Engine:
    """A program with llama-bench's flags; `speaks` if it has the flag --say of tools/peers as well."""

    name: str
    command: tuple[str, ...]
    speaks: bool = False


class Failed(Exception):
    """An engine that ended without an answer; its last words."""


def own(name: str, python: str, program: str) -> Engine:
    return Engine(name, (python, str(HERE / "peers" / program)), speaks=True)


def engines(args: argparse.Namespace) -> list[Engine]:
    """edgelm first, then the peers that were asked for."""
    found = [own("edgelm", sys.executable, "with_edgelm.py")]
    for text in [*args.llama_bench, *args.peer]:
        name, equals, command = text.partition("=")
        if not equals:
            name, command = "llama.cpp", text
        found.append(Engine(name, tuple(shlex.split(command))))
    if args.llama_cpp_python:
        found.append(own("llama-cpp-python", args.llama_cpp_python, "with_llama_cpp_python.py"))
    if args.openvino:
        found.append(own("OpenVINO GenAI", args.openvino, "with_openvino.py"))
    return found


def run(command: list[str], timeout: float) -> tuple[Any, float, float | None]:
    """(the JSON that a program printed, its seconds from start to end, its peak memory in bytes).

    Raises:
        Failed: it gave an error, or took longer than `timeout` seconds.
    """
    # A new process counts the memory of the one that started it into its peak, so this one must stay small: even the
    # roofs are measured by a process of their own.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True, env=installed())
        peak = None
        if hasattr(os, "wait4"):  # what the system says of this one process; not on Windows
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                if time.perf_counter() - began > timeout:
                    process.kill()
                    process.wait()
                    raise Failed(f"took more than {timeout:.0f} s")
                time.sleep(0.005)
            process.returncode = os.waitstatus_to_exitcode(ended[1])
            peak = ended[2].ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        else:
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise Failed(f"took more than {timeout:.0f} s") from None
        seconds = time.perf_counter() - began
        out.seek(0)
        err.seek(0)
        text, words = out.read(), [line for line in err.read().splitlines() if line.strip()]
    try:
        if process.returncode:
            raise ValueError
        return json.loads(text[text.index("[") :]), seconds, peak
    except ValueError:
        raise Failed(f"{ended_by(process.returncode)}: {' | '.join(words[-3:])[-500:] or text[-200:]}") from None


def ended_by(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit {code}"


def installed() -> dict[str, str]:
    """The environment, but that Python keeps the bytecode of a checkout, as pip does of what it installs."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def in_turns(model: str, present: dict[str, Engine], args: argparse.Namespace) -> Iterator[Record]:
    """The rounds, each with the records of every engine; one that fails is left out from then on, and says why."""
    common = ["-m", model, "-ctk", args.ctk, "-ctv", args.ctv, "-o", "json", "-r", "1"]
    tests = ["-p", args.p, "-n", args.n, "-d", args.d]
    threads = [int(t) for t in args.t.split(",")]
    for i in range(args.r):
        found: Record = {"date": now(), "roofs": {}, "speeds": [], "processes": [], "failed": {}}
        for t in threads:
            [found["roofs"][str(t)]] = run([sys.executable, __file__, "--roofs", str(t)], args.timeout)[0]
            for engine in list(present.values())[:: -1 if i % 2 else 1]:
                command = [*engine.command, *common, "-t", str(t)]
                try:
                    records, _, peak = run([*command, *tests], args.timeout)
                    _, seconds, _ = run([*command, "-p", "1", "-n", "0", "--no-warmup"], args.timeout)
                except Failed as failure:
                    if engine.name == "edgelm":
                        sys.exit(f"{model}: {failure}")
                    del present[engine.name]
                    found["failed"][engine.name] = str(failure)
                    continue
                who = {"engine": engine.name, "n_threads": t}
                keys = ("n_prompt", "n_gen", "n_depth", "avg_ts")
                found["speeds"] += [who | {key: r.get(key, 0) for key in keys} for r in records]
                facts = {key: records[0][key] for key in FACTS if key in records[0]}
                found["processes"].append(who | {"peak": peak, "start_s": seconds, "is": facts})
        print(f"{Path(model).name}: round {i + 1} of {args.r}", file=sys.stderr)
        yield found


def roofs(n_threads: int) -> Record:
    """What this machine can do, the best of three: bytes/s, multiply-adds/s of int8, float32, a matrix unit."""
    from bench_kernels import Roofs

    from edgelm.bench import beyond_caches

    measured = Roofs(n_threads, beyond_caches())
    peaks = {name: max(measured.peak(name) for _ in range(3)) for name in ("int8", "int16", "float32", "unit")}
    return {"read": max(measured.read() for _ in range(3)), **peaks}


def work(path: str, kv: tuple[str, str], tests: tables.Tests) -> Record:
    """What a model asks of a machine, by its file: facts, multiply-adds of a prompt, bytes read for a generated token.

    Multiply-adds are those with weights; the output matrix is needed for the last token of a prompt alone. Bytes are
    those of the file's weights and of the cache at its mean length, for every engine, however it stores them.
    """
    from edgelm import gguf
    from edgelm.arch import Config, Role, tensors
    from edgelm.describe import describe_file
    from edgelm.kernels import int16
    from edgelm.kv_types import named
    from edgelm.memory import bytes_per_token
    from edgelm.weights import Weights

    file = gguf.read(path)
    config = Config.from_gguf(file.metadata)
    weights = Weights.from_gguf(config, file.tensors)
    head = weights.by_name.get("output.weight", weights.by_name["token_embd.weight"])
    body = sum(
        tensor.shape[0] * tensor.shape[1]
        for spec in tensors(config)
        if spec.role is not Role.EMBED and spec.gguf != "output.weight"
        and (tensor := weights.by_name.get(spec.gguf)) is not None and len(tensor.shape) == 2
    )  # fmt: skip
    facts = describe_file(file, ctx_size=512)
    kv_type = named(*kv)
    most = max(facts["types"], key=lambda name: sum(t.n_bytes for t in file.tensors.values() if t.format.name == name))
    keys = ("name", "architecture", "type", "n_parameters", "n_bytes")
    return {
        **{key: facts[key] for key in keys},
        "products": "int8" if most not in FLOATS else "int16" if most != "F32" and int16.preferred() else "float32",
        "macs": {str(p): body * p + head.shape[0] * head.shape[1] for p in tests.prompts},
        "bytes": {
            f"{n}@{d}": bytes_per_token(config, weights, d + n / 2, kv_type) for n in tests.gens for d in tests.depths
        },
    }


def say(model: str, text: str, present: list[Engine], n_tokens: int, threads: str) -> Iterator[str]:
    """What each engine writes after a text, from the same token ids, and how long it agrees with the first."""
    from edgelm import gguf
    from edgelm.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(gguf.read(model).metadata)
    ids = ",".join(map(str, tokenizer.encode(text)))
    first: list[int] = []
    for engine in (engine for engine in present if engine.speaks):
        command = [*engine.command, "-m", model, "-t", threads.split(",")[-1], "-n", str(n_tokens), "--say", ids]
        try:
            tokens = run(command, 600)[0]
        except Failed as failure:
            yield f"{engine.name}: {failure}"
            continue
        first = first or tokens
        same = next((i for i, pair in enumerate(zip(first, tokens, strict=False)) if pair[0] != pair[1]), n_tokens)
        yield f"{engine.name} ({same} of {n_tokens} tokens as edgelm): {text}{tokenizer.decode(tokens)!r}"


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def machine() -> Record:
    from edgelm.bench import processor

    system = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    return {"processor": processor(), "cores": os.cpu_count(), "system": system}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL.gguf")
    parser.add_argument("--llama-bench", action="append", default=[], metavar="[NAME=]PATH", help="a peer")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="a peer, with arguments")
    parser.add_argument("--llama-cpp-python", metavar="PYTHON", help="a peer: the package of that Python")
    parser.add_argument("--openvino", metavar="PYTHON", help="a peer: the package openvino-genai of that Python")
    parser.add_argument("-p", default="512", help="prompt lengths")
    parser.add_argument("-n", default="64", help="numbers of tokens to generate")
    parser.add_argument("-d", default="0", help="tokens in the cache before a test")
    parser.add_argument("-t", default="1,2", help="numbers of threads")
    parser.add_argument("-r", type=int, default=5, help="rounds")
    parser.add_argument("-ctk", default="f16", help="type of cached keys")
    parser.add_argument("-ctv", default="f16", help="type of cached values")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one process may take")
    parser.add_argument("--about", action="append", default=[], metavar="NAME=TEXT",
                        help="what tables say of an engine instead of the versions that it gives, "
                        "or call a model instead of its file's name")  # fmt: skip
    parser.add_argument("--say", metavar="TEXT", help="no speeds: what the engines of Python packages write after TEXT")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="keep all rounds; added to what is in the file")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE.json", help="no runs: tables of kept rounds")
    parser.add_argument("--update", type=Path, nargs="+", metavar="FILE.md", help="no runs: pages with these tables")
    parser.add_argument("--roofs", type=int, metavar="THREADS", help="no runs: what this machine can do, as JSON")
    parser.add_argument("-o", choices=("md", "json"), default="md")
    return parser


def main() -> None:
    args = arguments().parse_args()
    if args.roofs:
        print(json.dumps([roofs(args.roofs)]))
    elif args.say:
        for model in args.models:
            print(*say(model, args.say, engines(args), int(args.n), args.t), sep="\n")
    elif args.update or args.table:
        if args.table:
            show(keep([result | about(result, args) for result in rounds.read(args.table)], args.save), args.o)
        for path in args.update or []:
            path.write_text(tables.update(path.read_text("utf-8"), KEPT), "utf-8")
    else:
        show(rounds.merged(measure(args)), args.o)


def measure(args: argparse.Namespace) -> list[Record]:
    """What the models give, kept after every round."""
    tests = tables.Tests.of(args.p, args.n, args.d)
    kept = rounds.read([args.save]) if args.save and args.save.exists() else []
    results: list[Record] = []
    for model in args.models:
        result = {
            "model": Path(model).name,
            "work": work(model, (args.ctk, args.ctv), tests),
            "kv": [args.ctk, args.ctv],
            "date": now(),
            "machine": machine(),
            "engines": {e.name: " ".join(Path(part).name for part in e.command) for e in engines(args)},
            "rounds": [],
        }
        results.append(result | about(result, args))
        for found in in_turns(model, {engine.name: engine for engine in engines(args)}, args):
            result["rounds"].append(found)
            keep([*kept, *results], args.save)
    return results


def about(result: Record, args: argparse.Namespace) -> Record:
    """What --about says of the engines and the model of a result, added to what is said already."""
    said = dict(text.split("=", 1) for text in args.about)
    names = {*result["engines"], result["model"].removesuffix(".gguf")}
    return {"about": result.get("about", {}) | {name: text for name, text in said.items() if name in names}}


def keep(results: list[Record], path: Path | None) -> list[Record]:
    """Merges results, and writes them to a file if there is one to write to."""
    results = rounds.merged(results)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rounds.text(results), "utf-8")
    return results


def show(results: list[Record], form: str) -> None:
    print(rounds.text(results) if form == "json" else tables.markdown(results), end="" if form == "json" else "\n")


if __name__ == "__main__":
    main()
