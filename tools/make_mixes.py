"""Which type llama-quantize gives to which tensor, as data for tests/converters/test_mixes.py.

    python tools/make_mixes.py PATH/OF/llama-quantize

Random models in the shapes of `tests/tiny.py` (deeper, and with rows of 256 and of other lengths) go through
`llama-quantize --dry-run` with each type and with the switches that change types; tests/converters/mixes.json.gz keeps
the result.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402

LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?")
TYPES = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ4_NL IQ4_XS"
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama-gqa4": ("llama-gqa", 22, WIDE),
    "llama-gqa8": ("llama-mqa", 9, WIDE),
    "llama-mha": ("llama-mha", 16, {**WIDE, "num_key_value_heads": 8}),
    "llama-576": ("llama-gqa", 5, {**WIDE, "hidden_size": 192, "num_attention_heads": 6}),
    "llama-odd": ("llama-gqa", 3, {"hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 4}),
    "llama-80": ("llama-gqa", 80, {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 8}),
    "qwen3": ("qwen3", 12, WIDE),
    "gemma3": ("gemma3", 18, WIDE),
    "gpt2": ("gpt2", 12, WIDE),
    "phi3": ("phi3", 10, WIDE),
    "bert": ("bert-mean", 6, {**WIDE, "hidden_size": 384, "num_attention_heads": 12}),
}
SWITCHES = {
    "pure": "--pure",
    "leave_output": "--leave-output-tensor",
    "output_type": "--output-tensor-type q8_0",
    "embedding_type": "--token-embedding-type q4_0",
    "overrides": "--tensor-type attn_v=q8_0 --tensor-type blk\\.[01]\\.ffn=iq4_nl",
}


def types(binary: str, path: Path, type: str, switches: str = "") -> dict[str, Any]:
    """{"most": the most frequent type, "others": {tensor: type}} by the dry run of llama-quantize."""
    command = [binary, "--dry-run", *switches.split(), str(path), type]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {m[1]: (m[3] or m[2]).upper() for m in LINE.finditer(done.stdout + done.stderr)}
    most = Counter(found.values()).most_common(1)[0][0]
    return {"most": most, "n": len(found), "others": {name: t for name, t in found.items() if t != most}}


def main(binary: str) -> None:
    data: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (variant, n_layers, overrides) in MODELS.items():
            path = tiny.tiny(variant, folder=Path(folder), n_layers=n_layers, **overrides)
            cases = {type: types(binary, path, type) for type in TYPES.split()}
            if name in ("llama-gqa4", "gemma3"):
                cases |= {f"Q4_K_M {key}": types(binary, path, "Q4_K_M", flags) for key, flags in SWITCHES.items()}
            data[name] = {"variant": variant, "n_layers": n_layers, "config": overrides, "types": cases}
            print(name, len(cases), flush=True)
    out = ROOT / "tests" / "converters" / "mixes.json.gz"
    out.write_bytes(gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0))
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
