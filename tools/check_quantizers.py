"""Compares the errors of our quantizers with those of llama.cpp's own, tensor by tensor.

    tools/check_quantizers.py LIBGGML --record                       # the figures that tests hold us to
    tools/check_quantizers.py LIBGGML --model F16.gguf [--imatrix FILE] [--types Q4_K,Q2_K] [--tensors blk.0]

LIBGGML is libggml-base.so of a build of llama.cpp, whose `ggml_quantize_chunk` is what llama-quantize calls. Both
results are decoded by `gguf.quants`; an error is the sum of importance times squared error, over that of the weights.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "converters")]

from quantizer_cases import CASES, FIGURES, relative_error  # noqa: E402

from converters import imatrix, quantizers  # noqa: E402
from edgelm import gguf  # noqa: E402
from edgelm.formats import by_name  # noqa: E402


class Ggml:
    """llama.cpp's quantizers."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.library.ggml_quantize_init.argtypes = [ctypes.c_int]

    def quantize(self, name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        format = by_name(name)
        out = np.zeros((len(x), format.row_bytes(x.shape[1])), np.uint8)
        self.library.ggml_quantize_init(format.id)
        pointers = [ctypes.c_void_p(a.ctypes.data if a is not None else None) for a in (x, out, importance)]
        n = [ctypes.c_int64(v) for v in (0, *x.shape)]
        self.library.ggml_quantize_chunk(format.id, pointers[0], pointers[1], *n, pointers[2])
        return out


def tensors(path: str, wanted: str) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in gguf.read(path).tensors.items():
        if name.startswith("blk.") and len(tensor.shape) == 2 and wanted in name:
            yield name, tensor.dequantize()


def compare_model(ggml: Ggml, path: str, types: list[str], wanted: str, weights: imatrix.Imatrix | None) -> None:
    print("| type | tensors | llama.cpp | ours | ratio | worst tensor | ours, Mw/s | llama.cpp |\n|" + "---|" * 8)
    for name in types:
        format, rows = by_name(name), []
        seconds = [0.0, 0.0]
        n_weights = 0
        for tensor, x in tensors(path, wanted):
            if x.shape[1] % format.block:
                continue
            importance = weights.importance(tensor) if weights else None
            start = time.thread_time()
            theirs = ggml.quantize(name, x, importance)
            middle = time.thread_time()
            begin = time.process_time()
            ours = quantizers.quantize(name, x, importance, n_threads=1, search=True)
            seconds[0] += middle - start
            seconds[1] += time.process_time() - begin
            n_weights += x.size
            rows.append((tensor, *(relative_error(name, x, data, importance) for data in (theirs, ours))))
        if rows:
            errors = np.array([row[1:] for row in rows])
            ratios = errors[:, 1] / errors[:, 0]
            speeds = [n_weights / s / 1e6 for s in seconds]
            print(
                f"| {name} | {len(rows)} | {errors[:, 0].mean():.3e} | {errors[:, 1].mean():.3e} | "
                f"{math.exp(np.log(ratios).mean()):.3f} | {ratios.max():.3f} {rows[int(ratios.argmax())][0]} | "
                f"{speeds[1]:.0f} | {speeds[0]:.0f} |",
                flush=True,
            )


def record(ggml: Ggml) -> None:
    """llama.cpp's errors on the matrices of the tests."""
    figures: dict[str, dict[str, float]] = {}
    for name in quantizers.SEARCHED:
        figures[name] = {}
        for case, make in CASES.items():
            x, importance = make()
            for suffix, weights in (("", None), (" weighted", importance)):
                data = ggml.quantize(name, x, weights)
                figures[name][case + suffix] = float(f"{relative_error(name, x, data, weights):.6g}")
    FIGURES.parent.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--imatrix")
    parser.add_argument("--types", default=",".join(quantizers.SEARCHED))
    parser.add_argument("--tensors", default="")
    options = parser.parse_args()
    ggml = Ggml(options.library)
    if options.record:
        record(ggml)
    if options.model:
        weights = imatrix.read(options.imatrix) if options.imatrix else None
        compare_model(ggml, options.model, options.types.split(","), options.tensors, weights)


if __name__ == "__main__":
    main()
