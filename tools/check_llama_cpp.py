"""Does llama.cpp load what we write, and compute what we compute? Every type, every architecture, every transformation.

    python tools/check_llama_cpp.py PATH/OF/llama-perplexity [--model F16.gguf --text FILE] [--only PATTERN]

Tiny models of every decoder in several types, one of them in every type, pruned in every way, merged with adapters,
rounded by each method; with --model, that model in every type, pruned, and rounded by each method. llama.cpp keeps the
log-probabilities of a text (`--save-all-logits`, 16 bits each); beside each file stands how far those of our reference
interpreter are from them, which computes in float32 with the very weights of the file: NMSE, and mean Kullback-Leibler
divergence. In float32 the 16 bits and llama.cpp's float16 table of GELU are left; other weights make it round
activations to their type, or to 8 bits. A file fails if it is not loaded and the conversion did not say so, if a text
becomes other tokens, or if the NMSE is more than LIMITS allow.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "converters")]

import hf_folder  # noqa: E402
import lora_folder  # noqa: E402
import tiny  # noqa: E402
import tiny_vocabulary  # noqa: E402

import edgelm  # noqa: E402
from converters import Options, Recipe, convert  # noqa: E402
from converters.mixes import MIXES  # noqa: E402
from converters.quantizers import writable  # noqa: E402
from edgelm import evaluate  # noqa: E402
from edgelm.arch import Config  # noqa: E402
from edgelm.errors import EdgelmError  # noqa: E402

LIMITS = {"F32": 1e-5, "F16": 1e-5, "BF16": 1e-3, "": 0.02}  # NMSE by type; "": of quantized ones
RANGE = 16  # llama.cpp keeps logits down to this far below the largest
# What llama.cpp does not read from the file: it ignores these windows, and scales Gemma 2's queries by their width.
SETTINGS = {
    "mistral": {"sliding_window": 64},
    "phi3": {"sliding_window": 64},
    "gemma2": {"query_pre_attn_scalar": 32},
}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}  # rows of whole super-blocks
CUTS = (
    "depth=1",
    "ffn=32",
    "heads=1",
    "queries=1",
    "hidden=16",
    "vocab={text}",
    "depth=1,ffn=8,hidden=8",
    "sparse=2:4",
)
SHARES = ("depth=10%", "ffn=20%", "heads=1", "queries=1", "hidden=10%", "vocab={text}", "depth=1,ffn=10%", "sparse=2:4")
TYPES = [mix.name for mix in MIXES.values() if mix.base in writable()]
DECODERS = [n for n in tiny.ALL if tiny.VARIANTS[n].arch not in ("bert", "nomic-bert")]
GOLDEN = ROOT / "tests" / "golden"


@dataclass(frozen=True)
class Case:
    """A conversion: what of, to which type, with what done to it; how the model is read afterwards."""

    name: str
    source: Path
    type: str
    text: Path
    n_ctx: int
    options: dict[str, Any] = field(default_factory=dict)


class Failed(Exception):
    """llama.cpp did not do what it should."""


def theirs(
    program: str, path: Path, text: Path, n_ctx: int, saved: Path
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(tokens of the chunks (chunks, n_ctx), log-probabilities (chunks, scored tokens, vocabulary)) of llama.cpp."""
    settings = [
        "-c",
        str(n_ctx),
        "-b",
        str(n_ctx),
        "--chunks",
        "2",
        "-t",
        "2",
        "-ctk",
        "f32",
        "-ctv",
        "f32",
        "-fa",
        "off",
    ]
    command = [program, "-m", str(path), "-f", str(text), "--save-all-logits", str(saved), *settings]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = re.findall(r"error loading model: (.*)", done.stdout + done.stderr)
        raise Failed(f"llama.cpp: {lines[0] if lines else f'ended with {done.returncode}'}")
    data = saved.read_bytes()
    size, n_vocab, n_chunks = np.frombuffer(data, "<i4", 3, 8)
    tokens = np.frombuffer(data, "<i4", n_chunks * size, 20).reshape(n_chunks, size)
    rows = np.frombuffer(data, "<u2", offset=20 + tokens.nbytes).reshape(n_chunks, size - 1 - size // 2, -1)
    scale, lowest = rows[..., :2].copy().view("<f4"), rows[..., 2:4].copy().view("<f4")
    return tokens.astype(np.int64), (rows[..., 4 : 4 + n_vocab] * scale + lowest).astype(np.float32)


def compared(program: str, path: Path, case: Case, saved: Path) -> tuple[float, float]:
    """(NMSE of our log-probabilities, mean Kullback-Leibler divergence of our predictions) from llama.cpp's."""
    tokens, log_probs = theirs(program, path, case.text, case.n_ctx, saved)
    model = edgelm.load(path, interpreter="reference")
    ours = model.tokenizer.encode(case.text.read_text().removesuffix("\n"), add_special=True, parse_special=False)
    if ours[: tokens.size] != tokens.reshape(-1).tolist():
        raise Failed("the text becomes other tokens")
    error, size, kls = 0.0, 0.0, []
    for chunk, base in zip(tokens, log_probs, strict=True):
        logits = np.concatenate(list(evaluate._logits(model, chunk, case.n_ctx // 2, 1 << 20)))
        top = logits.max(axis=1, keepdims=True)
        logits = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        logits = np.maximum(logits, logits.max(axis=1, keepdims=True) - RANGE)
        kls.append(evaluate.score(logits, chunk[case.n_ctx // 2 + 1 :], base).kl)
        error += float(np.sum((logits - base) ** 2, dtype=np.float64))
        size += float(np.sum((base - base.mean(axis=1, keepdims=True)) ** 2, dtype=np.float64))
    return error / size, float(np.mean(kls))


def judged(program: str, case: Case, out: Path) -> tuple[bool, str]:
    """Whether something is wrong with the file that a conversion writes to `out`, and what was found."""
    said: list[str] = []
    try:
        options = Options(**{"check_tokenizer": False, "name": "checked", **case.options})
        report = convert(case.source, out, Recipe(case.type, allow_requantize=True), options)
        said = [note for note in report.notes if "llama.cpp" in note]
        nmse, kl = compared(program, out, case, out.with_suffix(".saved"))
    except (EdgelmError, Failed) as error:
        return not said, f"{error}{' (the conversion says so)' if said else ''}"
    limit, facts = LIMITS.get(case.type.upper(), LIMITS[""]), f"NMSE {nmse:.1e}, KL {max(kl, 0):.1e}"
    if said:
        return True, f"{facts}, although the conversion says: {said[0]}"
    return not nmse <= limit, facts if nmse <= limit else f"{facts}: more than {limit}"


def cases(folder: Path, model: Path | None, text: Path | None) -> Iterator[Case]:
    short = folder / "tiny.txt"
    short.write_text(tiny_vocabulary.TEXT * 4)
    calibrated = {"calibrate": short, "n_ctx": 32, "calibrate_chunks": 4}

    def small(name: str, n_layers: int = 2, **hf: Any) -> Path:
        hf = {**SETTINGS.get(name, {}), **hf}
        return hf_folder.write(Path(tempfile.mkdtemp(dir=folder)), name, sentencepiece=True, n_layers=n_layers, **hf)

    for name in DECODERS:
        for type_ in ("f32", "f16", "bf16", "q8_0", "q4_0"):
            yield Case(name, small(name), type_, short, 32)
        yield Case(name, small(name, **_wide(name)), "q4_k_m", short, 32)
    for type_ in TYPES:
        yield Case("llama-gqa wide", small("llama-gqa", **WIDE), type_, short, 32)
    for name in DECODERS:
        c = Config.from_hf(tiny.hf_config(name))
        for cut in CUTS:
            if (cut == "heads=1" and c.n_kv_heads == 1) or (cut == "queries=1" and c.n_heads == c.n_kv_heads):
                continue  # none would be left
            cut = cut.format(text="the quick brown fox")
            chosen = {**calibrated, "prune": (cut,)}
            yield Case(f"{name} {cut}", small(name, 3), "f32", short, 32, chosen)
    adapters = json.loads((GOLDEN / "lora.json").read_text())
    for name, lora in lora_folder.CASES.items():
        adapter = lora_folder.write(folder / f"adapter {name}", adapters[name]["config"], adapters[name]["shapes"])
        yield Case(f"{lora.variant} adapter {name}", small(lora.variant), "f32", short, 32, {"lora": ((adapter, 1.0),)})
    for method in ("imatrix", "gptq", "awq"):
        for type_ in ("q4_0", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs"):
            chosen = {**calibrated, "method": method}
            yield Case(f"llama-gqa wide {method}", small("llama-gqa", **WIDE), type_, short, 32, chosen)
    if model is None or text is None:
        return
    calibrated = {"calibrate": text, "calibrate_chunks": 2, "n_ctx": 256, "evaluate_chunks": 1}
    for type_ in TYPES:
        yield Case(model.stem, model, type_, text, 128)
    for cut in SHARES:
        chosen = {**calibrated, "method": "rtn", "prune": (cut.format(text=text),)}
        yield Case(f"{model.stem} {cut.format(text=text.name)}", model, "q8_0", text, 128, chosen)
    for method, type_ in (("gptq", "q4_k_m"), ("gptq", "q2_k"), ("awq", "q4_0"), ("imatrix", "iq4_xs")):
        yield Case(f"{model.stem} {method}", model, type_, text, 128, {**calibrated, "method": method})


def _wide(name: str) -> dict[str, Any]:
    """WIDE for a variant: it may want as many heads of keys as of queries, or heads as wide as its factors of RoPE."""
    if tiny.VARIANTS[name].hf.get("num_key_value_heads") == tiny.COMMON["num_attention_heads"]:
        return {**WIDE, "num_key_value_heads": 8}
    return {**WIDE, "num_attention_heads": 16} if "longrope" in name else WIDE


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("llama_perplexity")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--only", default="", help="cases whose name and type fit this pattern")
    args = parser.parse_args()
    n, failed = 0, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for case in cases(folder, args.model, args.text):
            title = f"{case.name} {case.type}"
            if not re.search(args.only, title):
                continue
            n, out = n + 1, folder / "out.gguf"
            is_wrong, facts = judged(args.llama_perplexity, case, out)
            failed += [title] if is_wrong else []
            print(f"{title:44} {facts}", flush=True)
    print(f"{n} files, {len(failed)} failed" + "".join(f"\n  {title}" for title in failed))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
