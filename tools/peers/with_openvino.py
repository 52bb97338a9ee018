"""OpenVINO GenAI under llama-bench's flags.

    PYTHON tools/peers/with_openvino.py -m MODEL.gguf -p 512 -n 64 -t 2 -o json

PYTHON is one that has the package openvino-genai. Its LLMPipeline reads the GGUF file (llama, qwen2, qwen3; matrices of
F16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K) and refuses others, Gemma 3's among them. Token ids go in and out; its tokenizer is
built, but not used. A prompt is timed from call to first token, generation from the first token to the last. The cache
of common prefixes is off, unless a test asks for a prompt at a depth, which needs it; keys and values are of the types
asked for, not of 8 bits. Everything else, pinned threads too, is as the package sets it, which is written into the
records: bfloat16 where the processor has it, activations quantized in groups of 32. Another setting is a flag:
`--set INFERENCE_PRECISION_HINT=f32`, which is the faster one on some processors, `--set ATTENTION_BACKEND=SDPA`.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai
from llama_bench import Settings, Tokens, main

TYPES = {"f16": "f16", "bf16": "bf16", "f32": "f32", "q8_0": "u8", "u8": "u8", "q4_0": "u4", "u4": "u4"}
DEFAULTS = ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "ENABLE_CPU_PINNING")


class Arrivals(openvino_genai.StreamerBase):
    """When each token came, in nanoseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[int] = []

    def write(self, token: Any) -> openvino_genai.StreamingStatus:
        self.times += [time.perf_counter_ns()] * (len(token) if isinstance(token, list) else 1)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class Pipeline:
    """A model in an LLMPipeline; see `llama_bench.Engine`."""

    def __init__(self, settings: Settings) -> None:
        if settings.type_k not in TYPES or settings.type_v not in TYPES:
            sys.exit(f"cache types {settings.type_k}, {settings.type_v}: only {', '.join(TYPES)}")
        self.properties = {
            "INFERENCE_NUM_THREADS": settings.n_threads,
            "KEY_CACHE_PRECISION": TYPES[settings.type_k],
            "VALUE_CACHE_PRECISION": TYPES[settings.type_v],
        } | settings.own
        paged = {}
        if settings.own.get("ATTENTION_BACKEND") != "SDPA":  # which has neither batches nor prefixes
            scheduler = paged["scheduler_config"] = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching = settings.prefixes
            scheduler.max_num_batched_tokens = max(256, settings.n_ctx)  # a prompt at once
        self.pipeline = openvino_genai.LLMPipeline(settings.model, "CPU", **paged, **self.properties)
        self.n_vocab = len(self.pipeline.get_tokenizer().get_vocab())

    def facts(self) -> dict[str, Any]:
        core = openvino.Core()
        defaults = {name: core.get_property("CPU", name) for name in DEFAULTS}
        defaults = {name: getattr(value, "to_string", value.__repr__)() for name, value in defaults.items()}
        own = {name: value for name, value in self.properties.items() if name != "INFERENCE_NUM_THREADS"}
        return {"version": openvino_genai.__version__, **defaults, **own}

    def run(self, tokens: Tokens, n_tokens: int) -> tuple[int, list[int], Tokens]:
        """(when it began, when each token came, the tokens)."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = n_tokens
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        ids = np.array([tokens], np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        arrivals = Arrivals()
        began = time.perf_counter_ns()
        result = self.pipeline.generate(inputs, config, arrivals)
        if len(arrivals.times) != n_tokens:
            sys.exit(f"asked for {n_tokens} tokens, {len(arrivals.times)} came")
        return began, arrivals.times, list(result.tokens[0])

    def prompt(self, depth: Tokens, tokens: Tokens) -> int:
        if depth:
            self.run(depth, 1)
        began, times, _ = self.run(depth + tokens, 1)
        return times[0] - began

    def generate(self, depth: Tokens, n_tokens: int) -> int:
        _, times, _ = self.run(depth, n_tokens + 1)
        return times[-1] - times[0]

    def say(self, tokens: Tokens, n_tokens: int) -> Tokens:
        return self.run(tokens, n_tokens)[2]


if __name__ == "__main__":
    main(__doc__, Pipeline)
