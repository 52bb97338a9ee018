"""Does every weight format compute what the reference says? Perplexity and KL divergence of one model in all formats.

    python tools/check_formats.py MODEL.gguf --llama-quantize PATH/TO/llama-quantize -f eval.txt --chunks 8
    python tools/check_formats.py MODEL.gguf -f eval.txt --llama-quantize PATH --types q4_0 q6_k --llama-perplexity PATH
    python tools/check_formats.py READY-Q4_K_M.gguf READY-IQ4_XS.gguf -f eval.txt
    python tools/check_formats.py --table formats.json

llama-quantize makes a file of each type; of a model that is quantized already too, for nothing is compared but the
compiled program with the reference interpreter on the same file. Files given without it are taken as they are. A row of
weights that is no multiple of a format's block gets another type from llama-quantize, so the table names the types that
are in the file. The bounds are 0.1 % of perplexity and 0.001 nats of mean KL divergence.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Record = dict[str, Any]
MAX_RATIO, MAX_KL = 0.001, 0.001
PURE = ["--pure"]


def each(name: str) -> tuple[list[str], str]:
    """Arguments for a type that llama-quantize makes no whole model of: of attention and feed-forward matrices."""
    return ["--tensor-type", f"attn={name}", "--tensor-type", f"ffn={name}", "--token-embedding-type", "q8_0"], "q8_0"


# llama-quantize's arguments: options, then what it calls the type. What it calls a mix is taken as such where people
# use the mix; a format without a name of its own is asked for tensor by tensor.
TYPES: dict[str, tuple[list[str], str]] = {
    **{name: (PURE, name) for name in ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k")},
    **{name: (PURE, name) for name in ("q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs")},
    **{name: ([], name) for name in ("q2_k_s", "q3_k_m", "q4_k_m", "q5_k_m")},
    **{name: each(name) for name in ("mxfp4", "nvfp4")},
    # of a model that was not trained for it three values leave nothing, so of one matrix alone
    **{name: (["--tensor-type", f"blk.5.ffn_down={name}"], "q8_0") for name in ("tq1_0", "tq2_0")},
}  # fmt: skip
NEED_IMATRIX = {
    **{name: (PURE, name) for name in ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs")},
    "iq2_s": each("iq2_s"),  # what it calls IQ2_S is a mix of IQ2_XS
}


def quantize(source: Path, target: Path, name: str, args: argparse.Namespace) -> None:
    """Makes a file of a type; RuntimeError with the last line of llama-quantize where it cannot."""
    options, kind = (TYPES | NEED_IMATRIX)[name]
    matrix = ["--imatrix", args.imatrix] if args.imatrix else []
    command = [args.llama_quantize, "--allow-requantize", *matrix, *options, str(source), str(target), kind.upper()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise RuntimeError(f"llama-quantize: {words[-1] if words else done.returncode}")


def compare(path: Path, args: argparse.Namespace) -> Record:
    """What `edgelm eval` says of a file, of the types in it, and llama-perplexity of the same text."""
    from edgelm import gguf

    size = ["-f", args.text, "-c", str(args.n_ctx), "--chunks", str(args.chunks)]
    command = [sys.executable, "-m", "edgelm", "eval", str(path), *size, "-q", "--json"]
    command += ["--against", str(path), "--against-interpreter", "reference"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"edgelm eval: {done.stderr.strip().splitlines()[-1]}")
    found: Record = json.loads(done.stdout)
    weights: Counter[str] = Counter()
    for tensor in gguf.read(path).tensors.values():
        if len(tensor.shape) > 1:
            weights[tensor.format.name] += prod(tensor.shape)
    found["weights"] = {kind: n / weights.total() for kind, n in weights.most_common()}
    if args.llama_perplexity:
        done = subprocess.run([args.llama_perplexity, "-m", str(path), *size], capture_output=True, text=True)
        estimate = re.search(r"PPL = ([\d.]+)", done.stdout + done.stderr)
        found["llama_perplexity"] = float(estimate[1]) if estimate else None
    return found


def table(results: list[Record]) -> Iterator[str]:
    """One row for each file."""
    peer = any(r.get("llama_perplexity") for r in results)
    head = ["model", "asked for", "weights", "perplexity", "reference", "difference", "mean KL", "99 %", "same top"]
    head += ["llama.cpp"] if peer else []
    yield "| " + " | ".join([*head, "within"]) + " |"
    yield "| --- | --- | --- |" + " ---: |" * (len(head) - 3) + " --- |"
    for r in results:
        if "error" in r:
            yield f"| {r['model']} | {r['type']} | {r['error']} |" + " – |" * (len(head) - 2)
            continue
        kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in r["weights"].items() if share >= 0.005)
        off = r["ppl_ratio"] - 1
        cells = [r["model"], r["type"], kinds, f"{r['perplexity']:.4f}", f"{r['base_perplexity']:.4f}", f"{off:+.2%}"]
        cells += [f"{r['mean_kl']:.5f}", f"{r['kl_99']:.4f}", f"{r['same_top']:.1%}"]
        cells += [f"{r['llama_perplexity']:.4f}" if r.get("llama_perplexity") else "–"] if peer else []
        yield "| " + " | ".join([*cells, "yes" if within(r) else "no"]) + " |"


def within(result: Record) -> bool:
    return abs(result["ppl_ratio"] - 1) <= MAX_RATIO and result["mean_kl"] <= MAX_KL


def keep(path: Path, result: Record) -> None:
    """Adds a result to a file, in the place of an older one of the same model and type."""
    kept = json.loads(path.read_text("utf-8")) if path.exists() else []
    kept = [r for r in kept if (r["model"], r["type"]) != (result["model"], result["type"])]
    path.write_text(json.dumps([*kept, result], indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.gguf")
    parser.add_argument("-f", "--file", dest="text", metavar="TEXT", help="the text to predict")
    parser.add_argument("-c", "--ctx-size", dest="n_ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--llama-quantize", metavar="PATH", help="makes the files")
    parser.add_argument("--types", nargs="+", choices=[*TYPES, *NEED_IMATRIX], metavar="TYPE", help=", ".join(TYPES))
    parser.add_argument(
        "--imatrix", metavar="FILE", help="importance matrix: the smallest types cannot be made without"
    )
    parser.add_argument("--llama-perplexity", metavar="PATH", help="what llama.cpp says of the same files")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="keep the figures, with versions")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE.json", help="no runs: the table of kept figures")
    args = parser.parse_args()
    if args.table:
        print(*table([r for path in args.table for r in json.loads(path.read_text("utf-8"))]), sep="\n")
        return
    if not args.text:
        parser.error("-f TEXT is needed")

    import edgelm

    names = args.types or [*TYPES, *(NEED_IMATRIX if args.imatrix else {})]
    versions = {"edgelm": edgelm.__version__, "python": platform.python_version(), "machine": platform.machine()}
    results = []
    for model in args.models:
        for name in names if args.llama_quantize else ["as it is"]:
            result: Record = {"model": model.stem, "type": name, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
            with tempfile.TemporaryDirectory() as folder:
                path = model if name == "as it is" else Path(folder) / f"{model.stem}-{name}.gguf"
                try:
                    if path != model:
                        quantize(model, path, name, args)
                    result |= compare(path, args) | {"versions": versions}
                except RuntimeError as error:
                    result["error"] = str(error)
            results.append(result)
            print(list(table([result]))[-1], file=sys.stderr)
            if args.save:
                keep(args.save, result)
    print(*table(results), sep="\n")


if __name__ == "__main__":
    main()
