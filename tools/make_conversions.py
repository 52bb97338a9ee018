"""What convert_hf_to_gguf.py makes of the tiny models, as data for tests/converters/test_same_as_llama_cpp.py.

    python tools/make_conversions.py PYTHON LLAMA.CPP

PYTHON: an interpreter with torch, transformers and sentencepiece; LLAMA.CPP: the folder of its sources. The data
(tests/converters/conversions.json) holds, of each model, the sha256 of every tensor as F16 and as Q8_0, and its
metadata with arrays as sha256. That script guesses the pre-tokenizer from a hash of what a tokenizer gives, which
cannot know our small vocabularies: here it is told.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "converters")]

import hf_folder  # noqa: E402
import tiny  # noqa: E402

from edgelm import gguf  # noqa: E402

# What the script insists on finding in config.json.
CONFIG: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 128},
    "phi3": {"original_max_position_embeddings": 128},
    "phi3-partial": {"original_max_position_embeddings": 128},
    "nomic-bert": {
        "n_positions": 8192, "max_trained_positions": 2048, "activation_function": "swiglu", "causal": False,
        "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "prenorm": False,
        "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None,
        "rotary_emb_base": 1000,
    },
}  # fmt: skip
WITHOUT_GUESSING = """
import os, runpy, sys
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: os.environ["PRE_TOKENIZER"]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert(python: str, sources: Path, folder: Path, out: Path, type: str, pre: str) -> None:
    script = [python, "-c", WITHOUT_GUESSING, str(sources / "convert_hf_to_gguf.py"), str(folder)]
    path = f"{sources / 'gguf-py'}{os.pathsep}{sources}"
    environment = {**os.environ, "PYTHONPATH": path, "PRE_TOKENIZER": pre}
    command = [*script, "--outfile", str(out), "--outtype", type]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder.name}: {done.stderr[-2000:]}")


def main(python: str, sources: str) -> None:
    data = {}
    with tempfile.TemporaryDirectory() as root:
        for name in tiny.ALL:
            folder = hf_folder.write(Path(root), name, sentencepiece=True, **CONFIG.get(name, {}))
            pre, entry = tiny.VARIANTS[name].vocabulary[1] or "default", dict[str, Any]()
            for type in ("f16", "q8_0"):
                out = Path(root) / f"{name}-{type}.gguf"
                convert(python, Path(sources), folder, out, type, pre)
                file = gguf.read(out)
                entry[type] = {n: hashlib.sha256(t.data.tobytes()).hexdigest() for n, t in file.tensors.items()}
            keys = {k: hf_folder.plain(v) for k, v in file.metadata.items() if k != "general.name"}
            data[name] = {"config": CONFIG.get(name, {}), "metadata": keys, **entry}
            print(name, len(entry["f16"]), flush=True)
    path = ROOT / "tests" / "converters" / "conversions.json"
    path.write_text(json.dumps(data, indent=0) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
