"""edgelm under llama-bench's flags, as the other peers are: without the pass over memory that `edgelm bench` adds.

`--set model=FOLDER` takes the place of -m: so one comparison can hold a GGUF file and the same weights in ONNX.
`--set packed=FILE` has the weights in a file of `edgelm pack`.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from llama_bench import Settings, Tokens, main

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from edgelm.__main__ import prepare  # noqa: E402

prepare()  # as `edgelm` does
import edgelm  # noqa: E402
from edgelm import hub  # noqa: E402
from edgelm.cache import Batch  # noqa: E402
from edgelm.kv_types import named  # noqa: E402


class Loaded:
    """A model in an `edgelm.Model`; see `llama_bench.Engine`."""

    def __init__(self, settings: Settings) -> None:
        path = settings.own.get("model", settings.model)
        kv_type = named(settings.type_k, settings.type_v)
        if hub.is_onnx(Path(path)) or kv_type == "f16":  # 16 bits: what is kept if nothing is said, f16 or bf16
            kv_type = settings.own.get("kv_type")
        self.model = edgelm.load(
            path, ctx_size=settings.n_ctx, threads=settings.n_threads, threads_batch=settings.n_threads,
            packed=settings.own.get("packed", "auto"), kv_type=kv_type,
        )  # fmt: skip
        self.n_vocab, self.has_run = self.model.vocab_size, False

    def facts(self) -> dict[str, Any]:
        facts = {"version": edgelm.__version__, "interpreter": self.model.interpreter} | commit()
        facts |= {"keys and values": self.model.kv_type, "Python": platform.python_version()}
        return facts | {name: metadata.version(name) for name in ("numpy", "numba")}

    def timed(self, depth: Tokens, batches: list[Tokens]) -> int:
        if self.has_run:
            self.model.wait()  # what is packed behind a first run is no part of the next one
        self.has_run = True
        sequence = self.model.new_cache().new_sequence()
        try:
            if depth:
                self.model.runner.forward(Batch.of([(sequence, depth, "last")]))
            began = time.perf_counter_ns()
            for tokens in batches:
                self.model.runner.forward(Batch.of([(sequence, tokens, "last")]))
            return time.perf_counter_ns() - began
        finally:
            sequence.release()

    def prompt(self, depth: Tokens, tokens: Tokens) -> int:
        return self.timed(depth, [tokens])

    def generate(self, depth: Tokens, n_tokens: int) -> int:
        return self.timed(depth, [[depth[i % len(depth)]] for i in range(n_tokens)])

    def say(self, tokens: Tokens, n_tokens: int) -> Tokens:
        stream = self.model.stream_generate(tokens, max_tokens=n_tokens, temperature=0, ignore_eos=True)
        return [response.token for response in stream if response.token is not None]


def commit() -> dict[str, str]:
    """The commit of the checkout that this runs from, if it is one; and whether it was changed."""
    if not (ROOT / ".git").exists():
        return {}
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return {"commit": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}
    except (OSError, subprocess.CalledProcessError):
        return {}


if __name__ == "__main__":
    main(__doc__, Loaded)
