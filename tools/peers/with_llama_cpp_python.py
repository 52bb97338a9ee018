"""llama-cpp-python under llama-bench's flags.

    PYTHON tools/peers/with_llama_cpp_python.py -m MODEL.gguf -p 512 -n 64 -t 2 -o json

PYTHON is one that has the package, built for this processor (it comes as sources): then no llama-bench is needed.
Batches are llama-bench's: 2048 tokens, computed 512 at a time, logits for the last one alone.
"""

from __future__ import annotations

import time
from typing import Any

import llama_cpp
from llama_bench import Settings, Tokens, main

LOGICAL, PHYSICAL = 2048, 512  # tokens of a batch, and of a part of it that is computed at once


class Package:
    """A model in a `llama_cpp.Llama`; see `llama_bench.Engine`."""

    def __init__(self, settings: Settings) -> None:
        types = [getattr(llama_cpp, f"GGML_TYPE_{name.upper()}") for name in (settings.type_k, settings.type_v)]
        self.model = llama_cpp.Llama(
            settings.model, n_ctx=settings.n_ctx, n_batch=LOGICAL, n_ubatch=PHYSICAL, n_threads=settings.n_threads,
            n_threads_batch=settings.n_threads, type_k=types[0], type_v=types[1], verbose=False,
        )  # fmt: skip
        self.n_vocab = self.model.n_vocab()

    def facts(self) -> dict[str, Any]:
        return {"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()}

    def feed(self, tokens: Tokens) -> None:
        """Computes tokens to the end: the call that starts it may return before."""
        self.model.eval(tokens)
        llama_cpp.llama_synchronize(self.model.ctx)

    def prompt(self, depth: Tokens, tokens: Tokens) -> int:
        self.model.reset()
        if depth:
            self.feed(depth)
        began = time.perf_counter_ns()
        self.feed(tokens)
        return time.perf_counter_ns() - began

    def generate(self, depth: Tokens, n_tokens: int) -> int:
        self.model.reset()
        self.feed(depth)
        began = time.perf_counter_ns()
        for i in range(n_tokens):
            self.feed([depth[i % len(depth)]])
        return time.perf_counter_ns() - began

    def say(self, tokens: Tokens, n_tokens: int) -> Tokens:
        self.model.reset()
        answer: Tokens = []
        for token in self.model.generate(tokens, temp=0.0, repeat_penalty=1.0):
            answer.append(token)
            if len(answer) == n_tokens:
                break
        return answer


if __name__ == "__main__":
    main(__doc__, Package)
