"""How much memory a process takes, as its system counts it; and what a fresh process takes that answers with a model.

    python -m edgelm.footprint MODEL TOKENS-OF-CONTEXT TOKENS-OF-PROMPT SETTINGS

prints a JSON object: see `measure`, which runs it; or, if the model cannot be loaded so, the class and the text of the
error.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgelm import errors
from edgelm.kernels import child

CONTEXT = 4096  # tokens, if nothing is said and the model can do as much
STEPS = 16  # tokens that are generated one by one
_LINUX = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "files"}


def footprint() -> dict[str, int]:
    """Bytes of this process, as far as the system tells: "peak" ever resident; "resident" now, of which "anonymous",
    that nobody else can use, and "files", whose pages the system can drop and read again."""
    if sys.platform.startswith("linux"):
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file)
        return {ours: int(fields[name].split()[0]) << 10 for name, ours in _LINUX.items() if name in fields}
    if sys.platform == "win32":
        counters = (ctypes.c_size_t * 10)(ctypes.sizeof(ctypes.c_size_t) * 10)  # its size, faults, peak, working set …
        kernel = ctypes.WinDLL("kernel32")
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        kernel.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
        kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), counters, ctypes.sizeof(counters))
        return {"peak": counters[1], "resident": counters[2]}
    import resource

    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)}


def measure(path: str, n_ctx: int | None, n_prompt: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process takes with the model `path`, loaded with `settings` of `edgelm.load`; n_ctx None: `CONTEXT`.

    Gives "loaded" and "answered", as of `footprint`, after a prompt of `n_prompt` tokens and `STEPS` more; "estimate",
    what `edgelm.memory` says to that; "packed_file"; "n_ctx". Raises what `edgelm.load` raises.
    """
    n_ctx = n_ctx or _context(path)
    if n_ctx <= STEPS:
        raise errors.UsageError(f"ctx_size is {n_ctx}; {STEPS} tokens are generated after a prompt, so it must be more")
    command = child.command("-m", "edgelm.footprint", path, str(n_ctx), str(n_prompt), json.dumps(settings))
    for _ in range(2):  # the first one compiles what is not compiled
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=child.environment())
        if done.returncode:
            raise errors.UsageError(f"{path}: a process with this model ended with exit code {done.returncode}")
        result: dict[str, Any] = json.loads(done.stdout)
        if "error" in result:
            raise getattr(errors, result["error"], errors.EdgelmError)(result["message"])
    return result


def _context(path: str) -> int:
    """`CONTEXT`, or as many tokens as a model has a table of positions for."""
    from . import gguf, hub
    from .arch import Config

    if hub.is_onnx(Path(path)):
        return CONTEXT
    return min(CONTEXT, Config.from_gguf(gguf.read(path).metadata).max_position or CONTEXT)


def main(path: str, n_ctx: int, n_prompt: int, settings: dict[str, Any]) -> dict[str, Any]:
    from .cache import Batch
    from .model import load

    with load(path, ctx_size=n_ctx, **settings) as model:
        model.wait()  # for weights that are packed behind it
        loaded = footprint()
        sequence = model.new_cache().new_sequence()
        model.runner.forward(Batch.of([(sequence, [0] * min(n_prompt, model.n_ctx - STEPS), "last")]))
        for _ in range(STEPS):
            model.runner.forward(Batch.of([(sequence, [0], "last")]))
        need = model.memory(sequence.length)
        packed = getattr(model, "packed_file", None)
        return {
            "n_ctx": model.n_ctx,
            "n_tokens": sequence.length,
            "loaded": loaded,
            "answered": footprint(),
            "estimate": {
                "weights": need.weights, "kv_cache": need.kv_cache, "workspace": need.workspace, "total": need.total,
            },
            "packed_file": None if packed is None else str(packed),
        }  # fmt: skip


if __name__ == "__main__":
    model, context, prompt, rest = sys.argv[1:]
    try:
        found = main(model, int(context), int(prompt), json.loads(rest))
    except errors.EdgelmError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(found))
