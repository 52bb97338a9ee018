"""Types chosen by what they cost, beside llama.cpp's mixes of the same size: KL divergence from the source.

    python tools/check_allocation.py MODEL CALIBRATE.txt EVAL.txt q4_k_m q3_k_m [--method gptq] [--free]

MODEL: a GGUF file of floats. --method: how both files are rounded. --free: first make another file of the same
function, with random scales folded between norms (or rows) and the columns that read them: a source that was itself
dequantized lies on the grid of its old type, where the choice of that type loses nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from converters import checkpoint  # noqa: E402
from converters.conversion import Options  # noqa: E402
from converters.gguf_writer import Layout, Planned, write  # noqa: E402
from converters.pipeline import prepare, run  # noqa: E402
from converters.recipe import Recipe  # noqa: E402
from edgelm.formats import by_name  # noqa: E402


def scaled(source: Path, out: Path) -> None:
    """A model of llama's or Gemma's kind with the same function and weights on no grid."""
    read = checkpoint.read(source)
    c, rng = read.config, np.random.default_rng(5)
    w = {name: array.read().copy() for name, array in read.tensors.items()}

    def scales(n: int) -> Any:
        return np.exp(0.3 * rng.standard_normal(n)).astype(np.float32)

    for i in range(c.n_layers):
        b = f"blk.{i}."
        for norm, readers in (("attn_norm", ("attn_q", "attn_k", "attn_v")), ("ffn_norm", ("ffn_gate", "ffn_up"))):
            s = scales(c.dim)
            w[f"{b}{norm}.weight"] /= s
            for reader in readers:
                w[f"{b}{reader}.weight"] *= s
        s = scales(c.ffn_dim)
        w[f"{b}ffn_up.weight"] *= s[:, None]
        w[f"{b}ffn_down.weight"] /= s
        s = scales(c.n_kv_heads * c.head_dim)
        w[f"{b}attn_v.weight"] *= s[:, None]
        of_queries = np.repeat(s.reshape(c.n_kv_heads, 1, -1), c.n_heads // c.n_kv_heads, 1).reshape(-1)
        w[f"{b}attn_output.weight"] /= of_queries
    planned = [Planned(name, a.shape, by_name("F32" if a.ndim == 1 else "F16")) for name, a in w.items()]

    def contents(tensor: Planned) -> Iterator[Any]:
        values = w[tensor.name].astype(np.float16 if tensor.format.name == "F16" else np.float32)
        yield np.ascontiguousarray(values).view(np.uint8).reshape(-1)

    write(out, Layout(dict(read.metadata), planned), contents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibrate", type=Path)
    parser.add_argument("eval", type=Path)
    parser.add_argument("mixes", nargs="+")
    parser.add_argument("--method", default="imatrix")
    parser.add_argument("--free", action="store_true")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--eval-chunks", type=int, default=8)
    parser.add_argument("--n-ctx", type=int, default=512, help="tokens of a chunk of both texts")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.model.parent) as folder:
        source, out = a.model, Path(folder) / "out.gguf"
        if a.free:
            source = Path(folder) / "free.gguf"
            scaled(a.model, source)
        options = Options(
            calibrate=a.calibrate, calibrate_chunks=a.chunks, n_ctx=a.n_ctx, evaluate=a.eval,
            evaluate_chunks=a.eval_chunks, method=a.method,
        )  # fmt: skip
        for mix in a.mixes:
            plain = prepare(source, Recipe(mix), options)
            theirs = run(plain, out).loss
            began = time.process_time()
            asked = replace(options, target_bpw=8 * plain.plan.n_bytes / plain.plan.n_weights)
            ours = prepare(source, Recipe(mix), asked, work=Path(folder) / "costs")
            seconds = time.process_time() - began
            loss = run(ours, out).loss
            assert theirs is not None and loss is not None
            change = loss["mean_kl"] / theirs["mean_kl"] - 1
            print(
                f"{mix}: {plain.plan.bits_per_weight:.3f} bits, KL {theirs['mean_kl']:.5f}; chosen "
                f"{ours.plan.bits_per_weight:.3f} bits, KL {loss['mean_kl']:.5f} ({change:+.1%}), {seconds:.0f} s",
                flush=True,
            )
            formats = Counter(step.format.name for step in ours.plan.steps)
            print(f"  {dict(Counter(step.format.name for step in plain.plan.steps))} -> {dict(formats)}", flush=True)


if __name__ == "__main__":
    main()
