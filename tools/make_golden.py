"""Write tests/golden/NAME.npz: what `transformers` computes for every tiny model of tests/tiny.py.

    python tools/make_golden.py [NAME ...]          in an environment with torch, transformers, gguf and NumPy
    python tools/make_golden.py FOLDER              all-MiniLM-L6-v2 as its Hugging Face folder
    python tools/make_golden.py llama-perplexity    that program of llama.cpp, built without graphics cards

Weights are not stored: both sides make them from their names. Each file holds the tokens of one text and the float32
logits (for encoders: hidden states) that the model gives at some positions of it; minilm.npz the tokens of three texts
and their sentence embeddings, llama_cpp.json the perplexity of a text by every decoder that llama.cpp can run as meant.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
import tiny_vocabulary  # noqa: E402

from edgelm.arch import ARCHS, Config  # noqa: E402

N_TOKENS = 40
POSITIONS = np.array([0, 1, 8, 9, 10, 31, 32, 39])  # around windows of 9 and original contexts of 32


def golden(name: str) -> dict[str, np.ndarray]:
    """Tokens (40,), positions (8,) and outputs (8, vocabulary or D) of a variant."""
    import torch
    import transformers

    hf = tiny.hf_config(name)
    config = Config.from_hf(hf)
    settings = {key: value for key, value in hf.items() if key not in ("architectures", "model_type", "pooling_type")}
    hf_config = transformers.AutoConfig.for_model(hf["model_type"], **settings, attn_implementation="eager")
    hf_config.bos_token_id = hf_config.eos_token_id = None
    state = {spec.hf: torch.tensor(tiny.hf_array(spec, config)) for spec in tiny.hf_specs(name, config, hf)}
    model: Any
    model, loaded = getattr(transformers, hf["architectures"][0]).from_pretrained(
        None, config=hf_config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    missing = [key for key in loaded["missing_keys"] if not key.startswith(("lm_head.", "pooler."))]
    if missing or loaded["unexpected_keys"] or loaded["mismatched_keys"]:
        raise SystemExit(f"{name}: the table and transformers differ: {loaded}")

    tokens = np.random.RandomState(7).randint(0, config.vocab_size, N_TOKENS)
    with torch.no_grad():
        out = model(torch.tensor(tokens)[None])
    values = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return {
        "tokens": tokens.astype(np.int32),
        "positions": POSITIONS.astype(np.int32),
        "outputs": values[0].numpy()[POSITIONS].astype(np.float32),
    }


TEXTS = ("The capital of France is Paris.", "Paris is where the French government sits.", "A recipe for onion soup.")


def embeddings(path: Path) -> dict[str, np.ndarray]:
    """Of each of TEXTS its tokens (padded with -1) and its normalised mean embedding, by the model in a folder."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval().float()
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    tokens = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    means = []
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        with torch.no_grad():
            mean = model(torch.tensor([row])).last_hidden_state[0].mean(0).numpy()
        means.append(mean / np.linalg.norm(mean))
    return {"tokens": tokens, "embeddings": np.array(means, np.float32)}


# llama.cpp reads no window for these, and no scale of queries for this one.
NOT_IN_LLAMA_CPP = ("mistral", "phi3", "gemma2")
PLAIN = "-c 64 --chunks 2 -b 64 -ub 64 -t 1 -fa off -ctk f32 -ctv f32"


def perplexities(binary: Path) -> dict[str, float]:
    """Of tiny_vocabulary.TEXT four times, two chunks of 64 tokens, by each tiny decoder."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text((tiny_vocabulary.TEXT + " ") * 4)
        for name, variant in tiny.VARIANTS.items():
            if ARCHS[variant.arch].family != "decoder" or name in NOT_IN_LLAMA_CPP:
                continue
            path = tiny.tiny(name, folder=Path(folder))
            command = shlex.split(f"{binary} -m {path} -f {text} {PLAIN}")
            for _ in range(9):  # its log may lose the last line
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                match = re.search(r"PPL = ([0-9.]+)", done.stdout + done.stderr)
                if match is not None:
                    break
            else:
                raise SystemExit(f"{name}: no perplexity in the answer of {binary}")
            found[name] = float(match[1])
    return found


def main(names: list[str]) -> None:
    folder = ROOT / "tests" / "golden"
    folder.mkdir(exist_ok=True)
    for name in names or tiny.ALL:
        if Path(name).is_file():
            (folder / "llama_cpp.json").write_text(json.dumps(perplexities(Path(name)), indent=2) + "\n")
            continue
        made = golden(name) if name in tiny.ALL else embeddings(Path(name))
        name = name if name in tiny.ALL else "minilm"
        np.savez_compressed(folder / f"{name}.npz", **made)
        print(f"{name}: {(folder / f'{name}.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
