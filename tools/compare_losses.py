"""What each way of making a model smaller loses, beside llama-quantize: a table that is filled cell by cell.

    python tools/compare_losses.py docs/losses.json MODEL-f16.gguf --type q4_0 --method gptq --calibrate calibrate.txt \
        --eval eval.txt [--llama FOLDER] [--again]
    python tools/compare_losses.py docs/losses.json MODEL-f16.gguf --type f16 --prune depth=25%,refit=no …
    python tools/compare_losses.py docs/losses.json --speed KEPT    adds speeds of the files that --keep KEPT kept
    python tools/compare_losses.py docs/losses.json          prints the tables

A cell is made by the command (`edgelm convert`, its report tells the loss), or by llama-quantize with an imatrix of
llama-imatrix from the same text (`--method llama-quantize`, measured by `edgelm eval` as `convert` measures). --llama:
the folder of llama.cpp's programs; with it llama-perplexity measures the file, too. A cell that is there is not made
again unless --again says so. Speeds are measured apart from the cells, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EDGELM = [sys.executable, "-m", "edgelm"]
METHODS = ("llama-quantize", "rtn", "imatrix", "awq", "gptq", "auto")
THREADS = 2  # that speeds are measured with
CHUNKS, IMATRIX_CHUNKS = 16, 64  # of 512 tokens: llama-imatrix is given more text than our methods
_IDENTITY = ("model", "type", "method", "prune", "chunks", "eval_chunks")  # of a cell
LLAMA_FIGURES = {
    "kl": r"Mean +KLD: +([-0-9.]+)", "perplexity": r"Mean PPL\(Q\) +: +([0-9.]+)", "same_top": r"Same top p: +([0-9.]+)"
}  # fmt: skip


def called(command: list[str], expect: int = 0) -> str:
    """What a program prints; raises SystemExit with the end of it when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != expect:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def by_llama_quantize(a: argparse.Namespace, out: Path) -> dict[str, Any]:
    """A file of llama-quantize, and its loss."""
    if a.prune:  # layers to leave out
        options = ["--prune-layers", a.prune]
    else:
        imatrix = a.scratch / f"{a.model.stem}-{a.chunks}.imatrix.gguf"
        if not imatrix.exists():
            text = ["-m", str(a.model), "-f", str(a.calibrate), "-c", str(a.n_ctx), "--chunks", str(a.chunks)]
            called([str(a.llama / "llama-imatrix"), *text, "-o", str(imatrix), "-t", "1"])
        options = ["--imatrix", str(imatrix)]
    called([str(a.llama / "llama-quantize"), "--allow-requantize", *options, str(a.model), str(out), a.type, "1"])
    against = ["--against", str(a.model), "--against-interpreter", "reference"]
    text = ["-f", str(a.eval), "-c", str(a.n_ctx), "--chunks", str(a.eval_chunks)]
    return dict(json.loads(called([*EDGELM, "eval", str(out), *text, *against, "--json", "-q"])))


def by_convert(a: argparse.Namespace, out: Path) -> dict[str, Any]:
    """A file of `edgelm convert`, and the loss that its report tells."""
    options = ["--type", a.type, "--method", a.method, "--eval", str(a.eval), "--eval-chunks", str(a.eval_chunks)]
    if a.calibrate is not None and (a.method != "rtn" or a.prune):
        options += ["--calibrate", str(a.calibrate), "--calibrate-chunks", str(a.chunks)]
    options += ["--calibrate-ctx", str(a.n_ctx), *(["--prune", a.prune] if a.prune else [])]
    called([*EDGELM, "convert", str(a.model), str(out), *options, *a.more, "--allow-requantize", "-q"])
    report = json.loads(out.with_name(f"{out.stem}.report.json").read_text())
    return {**report["loss"], "transformations": report["transformations"], "n_weights": report["n_weights"]}


def in_llama_cpp(a: argparse.Namespace, out: Path) -> dict[str, float]:
    """What llama-perplexity says of a file against the source."""
    base = a.scratch / f"{a.model.stem}-{a.eval_chunks}.logits"
    options = ["-f", str(a.eval), "-c", str(a.n_ctx), "--chunks", str(a.eval_chunks), "-t", "1"]
    options += ["--kl-divergence-base", str(base)]
    program = str(a.llama / "llama-perplexity")
    if not base.exists():
        called([program, "-m", str(a.model), *options])
    text = called([program, "-m", str(out), *options, "--kl-divergence"])
    return {name: float(found[1]) for name, pattern in LLAMA_FIGURES.items() if (found := re.search(pattern, text))}


def cell(a: argparse.Namespace) -> dict[str, Any]:
    """One row of the table: what was made, and what it loses."""
    with tempfile.TemporaryDirectory(dir=a.scratch) as folder:
        out = Path(folder) / "out.gguf"
        loss = (by_llama_quantize if a.method == "llama-quantize" else by_convert)(a, out)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        row = {
            "model": a.model.stem, "type": a.type, "method": a.method, "prune": a.prune, "chunks": a.chunks,
            "eval_chunks": a.eval_chunks,
            "bytes": out.stat().st_size, "kl": loss["mean_kl"], "kl_stderr": loss["mean_kl_stderr"],
            "perplexity": loss["perplexity"], "base_perplexity": loss["base_perplexity"], "same_top": loss["same_top"],
            "seconds": round(used.ru_utime + used.ru_stime), "peak_mb": used.ru_maxrss // 1024,
        }  # fmt: skip
        if pruned := loss.get("transformations", {}).get("pruned"):
            row |= {"layers_removed": pruned.get("layers_removed"), "parameters": loss["n_weights"]}
        if a.llama is not None and a.in_llama_cpp:
            row["llama_cpp"] = in_llama_cpp(a, out)
        if a.keep is not None:
            a.keep.mkdir(parents=True, exist_ok=True)
            shutil.move(out, a.keep / kept_name(row))
    return row


def kept_name(row: dict[str, Any]) -> str:
    """The name of a cell's file in the folder that keeps them."""
    words = (str(row[name]) for name in _IDENTITY if row[name])
    return re.sub(r"[^-.=%\w]+", "_", " ".join(words)) + ".gguf"


def speed(file: Path) -> dict[str, float]:
    """Tokens/s of a prompt of 512 and of 64 tokens one by one (medians of three), and the MB that a chat takes."""
    bench = [*EDGELM, "bench", str(file), "-q", "-t", str(THREADS)]
    tests = json.loads(called([*bench, "-p", "512", "-n", "64", "-r", "3", "-o", "json"]))
    memory = json.loads(called([*bench, "--memory", "-o", "json"]))
    speeds = [round(statistics.median(test["samples_ts"]), 1) for test in tests]
    return {"prompt_tokens_s": speeds[0], "tokens_s": speeds[1], "run_mb": round(memory["answered"]["peak"] / 1e6)}


def with_speeds(rows: list[dict[str, Any]], kept: Path) -> None:
    """Adds to each cell whose file was kept how fast it runs."""
    for row in rows:
        if (file := kept / kept_name(row)).exists():
            row |= speed(file)
            print(json.dumps(row), flush=True)


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _IDENTITY)


def quantized_table(rows: list[dict[str, Any]]) -> str:
    """Mean KL divergence (perplexity) by model, type and method."""
    lines = [f"| | {' | '.join(METHODS)} | gptq against llama-quantize | the same, by llama.cpp |", "|---" * 9 + "|"]
    rows = [row for row in rows if not row["prune"]]
    for model, type in dict.fromkeys((row["model"], row["type"]) for row in rows):
        of = {row["method"]: row for row in rows if (row["model"], row["type"]) == (model, type)}
        cells = [f"{of[m]['kl']:.4f} ({of[m]['perplexity']:.3f})" if m in of else "" for m in METHODS]
        type += "".join(f", {row['eval_chunks']} chunks" for row in list(of.values())[:1] if row["eval_chunks"] != 8)
        ours, theirs = of.get("gptq"), of.get("llama-quantize")
        change = f"{ours['kl'] / theirs['kl'] - 1:+.0%}" if ours and theirs else ""
        if ours and theirs and "llama_cpp" in ours and "llama_cpp" in theirs:
            mine, other = ours["llama_cpp"]["kl"], theirs["llama_cpp"]["kl"]
            by_llama = f"{other:.4f} → {mine:.4f} ({mine / other - 1:+.0%})"
        else:
            by_llama = ""
        lines.append(f"| {model} {type} | {' | '.join(cells)} | {change} | {by_llama} |")
    return "\n".join(lines)


def pruned_table(rows: list[dict[str, Any]]) -> str:
    """Perplexity of pruned models."""
    columns = ("model", "cut", "by", "parameters, M", "perplexity", "mean KL", "seconds to make")
    columns += ("prompt, tokens/s", "generate, tokens/s", "run, MB")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        if row["prune"]:
            by = "llama-quantize --prune-layers" if row["method"] == "llama-quantize" else "edgelm"
            n = f"{row['parameters'] / 1e6:.1f}" if row.get("parameters") else ""
            figures = f"{n} | {row['perplexity']:.2f} | {row['kl']:.3f} | {row['seconds']}"
            figures += "".join(f" | {row.get(name, '')}" for name in ("prompt_tokens_s", "tokens_s", "run_mb"))
            lines.append(f"| {row['model']} | {row['prune']} | {by} | {figures} |")
    return "\n".join(lines)


def write(table: Path, rows: list[dict[str, Any]]) -> None:
    table.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def absolute(path: str) -> Path:
    return Path(path).absolute()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("model", type=absolute, nargs="?")
    parser.add_argument("--type", default="f16")
    parser.add_argument("--method", choices=METHODS, default="rtn")
    parser.add_argument("--prune", default="", help="as edgelm convert takes it; for llama-quantize: layers, 3,4")
    parser.add_argument("--calibrate", type=absolute)
    parser.add_argument("--chunks", type=int, help="of the text that is calibrated on")
    parser.add_argument("--eval", type=absolute)
    parser.add_argument("--n-ctx", type=int, default=512, help="tokens of a chunk of both texts")
    parser.add_argument("--eval-chunks", type=int, default=8)
    parser.add_argument("--llama", type=absolute, help="folder of llama.cpp's programs")
    parser.add_argument("--in-llama-cpp", action="store_true", help="have llama-perplexity measure the file, too")
    parser.add_argument("--scratch", type=absolute, default=Path(tempfile.gettempdir()))
    parser.add_argument("--keep", type=absolute, help="a folder for the file that is made")
    parser.add_argument("--speed", type=absolute, metavar="KEPT", help="measure the files that --keep has kept there")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further options of edgelm convert")
    a = parser.parse_args()
    rows = json.loads(a.table.read_text()) if a.table.exists() else []
    if a.speed is not None:
        with_speeds(rows, a.speed)
        write(a.table, rows)
    if a.model is None:
        print(quantized_table(rows), pruned_table(rows), sep="\n\n")
        return
    a.chunks = a.chunks or (IMATRIX_CHUNKS if a.method == "llama-quantize" and not a.prune else CHUNKS)
    wanted = (a.model.stem, a.type, a.method, a.prune, a.chunks, a.eval_chunks)
    if wanted in {identity(row) for row in rows} and not a.again:
        return
    made = cell(a)
    rows = json.loads(a.table.read_text()) if a.table.exists() else []  # others may have added to it meanwhile
    rows = [row for row in rows if identity(row) != wanted] + [made]
    write(a.table, rows)
    print(json.dumps(made), flush=True)


if __name__ == "__main__":
    main()
