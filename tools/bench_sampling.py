"""Microseconds that choosing a token takes, by parameters, size of the vocabulary, and with or without machine code.

Between two tokens a model's weights go by, and nothing of the sampler is left in the caches: so more memory than
they hold is read before each one. Without that all figures would be three to five times as good, and no user would see
them. The logits are noise with a peak, about as wide as a language model's.

    python tools/bench_sampling.py
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

from edgelm.bench import beyond_caches
from edgelm.sampling import GREEDY, Sampler, Sampling, logprobs

CASES = {
    "greedy": GREEDY,
    "default": Sampling(seed=1),
    "repeat_penalty 1.1": Sampling(seed=1, repeat_penalty=1.1),
    "dry_multiplier 0.8": Sampling(seed=1, dry_multiplier=0.8),
    "ignore_eos": Sampling(seed=1, ignore_eos=True),
    "xtc_probability 0.5": Sampling(seed=1, xtc_probability=0.5),
    "dynatemp_range 0.5": Sampling(seed=1, dynatemp_range=0.5),
    "top_n_sigma 1": Sampling(seed=1, top_n_sigma=1),
    "temperature alone": Sampling(seed=1, samplers="t"),
    "top_p 0.95 alone": Sampling(seed=1, samplers="pt"),
    "min_p 0.05 alone": Sampling(seed=1, samplers="mt"),
    "typical_p 0.9 first": Sampling(seed=1, samplers="ypt", typical_p=0.9),
    "mirostat 1": Sampling(seed=1, mirostat=1),
    "mirostat 2": Sampling(seed=1, mirostat=2),
}


def logits(vocab_size: int, n: int) -> np.ndarray:
    """(n, vocab_size) logits: most of them low, some dozens stand out."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n, vocab_size)).astype(np.float32) * 2
    for row in rows:
        row[rng.integers(0, vocab_size, 30)] += rng.exponential(4, 30).astype(np.float32) + 4
    return rows


def measure(sampler: Sampler, rows: np.ndarray, weights: np.ndarray) -> float:
    """Median seconds for a token."""
    for token in range(64):
        sampler.accept(token)
    seconds = []
    for row in rows:
        weights.sum()
        row += 0  # as if just computed
        began = time.perf_counter()
        sampler.accept(sampler(row))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    weights = np.ones(beyond_caches() // 8)
    print(f"{'microseconds per token':24s}" + "".join(f"{n:>10,} compiled" for n in (49_152, 262_144)), file=sys.stderr)
    for name, params in CASES.items():
        line = f"{name:24s}"
        for vocab_size in (49_152, 262_144):
            rows = logits(vocab_size, 30)
            for compiled in (False, True):
                sampler = Sampler(params, vocab_size, eog_ids=(2,), token_text=lambda token: "word", compiled=compiled)
                shown = not compiled or sampler._chooser is not None
                line += f"{measure(sampler, rows, weights) * 1e6:10.0f}" if shown else f"{'':9s}"
        print(line, flush=True)
    for vocab_size in (49_152, 262_144):
        (row,) = logits(vocab_size, 1)
        weights.sum()
        began = time.perf_counter()
        logprobs(row, 5, 5)
        print(f"logprobs, 5 alternatives, {vocab_size:,}: {(time.perf_counter() - began) * 1e6:.0f}")


if __name__ == "__main__":
    main()
