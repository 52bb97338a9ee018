"""onnxruntime-genai under llama-bench's flags, on a folder with a genai_config.json.

    PYTHON tools/peers/with_onnxruntime_genai.py -m FOLDER -p 512 -n 64 -t 2 -o json
    python tools/bench_peers.py MODEL.gguf --peer "genai=PYTHON tools/peers/with_onnxruntime_genai.py --set model=DIR"

PYTHON is one that has the package onnxruntime-genai. `--set model=DIR` takes the place of -m, so that a comparison
that names a GGUF file can hold the same weights in ONNX. Token ids go in and out. A prompt is timed until its logits
are there; generation is greedy, from the first token to the last. Types of cached keys and values are the graph's own.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from llama_bench import Settings, Tokens, main


class Generators:
    """A model of onnxruntime-genai; see `llama_bench.Engine`."""

    def __init__(self, settings: Settings) -> None:
        path = settings.own.get("model", settings.model)
        said = json.loads((Path(path) / "genai_config.json").read_text("utf-8"))["model"]
        self.n_vocab, self.n_ctx = int(said["vocab_size"]), settings.n_ctx
        config = og.Config(path)
        options = {"intra_op_num_threads": settings.n_threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)

    def facts(self) -> dict[str, Any]:
        return {"version": og.__version__}

    def generator(self, depth: Tokens) -> Any:
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=self.n_ctx, min_length=self.n_ctx, do_sample=False)
        generator = og.Generator(self.model, params)
        if depth:
            generator.append_tokens(np.array(depth, np.int32))
            generator.get_logits()
        return generator

    def prompt(self, depth: Tokens, tokens: Tokens) -> int:
        generator = self.generator(depth)
        began = time.perf_counter_ns()
        generator.append_tokens(np.array(tokens, np.int32))
        generator.get_logits()
        return time.perf_counter_ns() - began

    def generate(self, depth: Tokens, n_tokens: int) -> int:
        generator = self.generator(depth)
        generator.generate_next_token()
        began = time.perf_counter_ns()
        for _ in range(n_tokens):
            generator.generate_next_token()
        return time.perf_counter_ns() - began

    def say(self, tokens: Tokens, n_tokens: int) -> Tokens:
        generator = self.generator(tokens)
        for _ in range(n_tokens):
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(tokens) :]]


if __name__ == "__main__":
    main(__doc__, Generators)
