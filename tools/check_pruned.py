"""Does transformers compute with pruned models what we compute? Every tiny architecture, cut in every way.

    python tools/check_pruned.py [NAME ...]     with torch and transformers, development only

For each model: the NMSE between our logits (the reference interpreter, on the GGUF file) and those of `transformers`
(on the Hugging Face folder), and whether its tokenizer cuts a text as ours does. For llama.cpp: `check_llama_cpp.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
import tiny_vocabulary  # noqa: E402

import edgelm  # noqa: E402
from converters import checkpoint as checkpoints  # noqa: E402
from converters import gguf_export, hf_export  # noqa: E402
from converters.conversion import Conversion, Options  # noqa: E402
from converters.prune import PruneSpec, pruned  # noqa: E402
from converters.recipe import Recipe, make_plan  # noqa: E402
from edgelm.cache import Batch  # noqa: E402
from edgelm.errors import EdgelmError  # noqa: E402

CUTS = ("depth=1", "ffn=32", "heads=1", "queries=1", "hidden=16", "vocab=the quick brown fox", "depth=1,ffn=8,hidden=8")
TOKENS = np.random.default_rng(0).integers(3, 60, 512).tolist()


def exported(checkpoint: Any, folder: Path) -> tuple[Path, Path | str]:
    """The model as a GGUF file and as a folder, in float32; a text where it cannot be had as a folder."""
    plan = make_plan(checkpoint.config, checkpoint.tensors, Recipe("f32"))
    keys, notes, n = gguf_export.metadata(checkpoint, plan, Options(check_tokenizer=False))
    made = Conversion(checkpoint, checkpoint, Recipe("f32"), Options(), plan, keys, tuple(notes), n)
    gguf_export.export(made, folder / "small.gguf", lambda draft: {})
    try:
        hf_export.export(made, folder / "small", lambda draft: {})
    except EdgelmError as error:
        return folder / "small.gguf", str(error)
    return folder / "small.gguf", folder / "small"


def compared(path: Path, folder: Path, tokens: list[int]) -> tuple[float, bool]:
    """(NMSE of outputs, whether texts are cut alike)."""
    import torch
    import transformers

    model = edgelm.load(path, interpreter="reference")
    ours = model.runner.forward(Batch.of([(model.new_cache().new_sequence(), tokens, "all")]))
    is_encoder = model.config.spec.family == "encoder"
    kind = transformers.AutoModel if is_encoder else transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        out = theirs(torch.tensor([tokens]))
    expected = (out.last_hidden_state if is_encoder else out.logits)[0].numpy()
    text = tiny_vocabulary.TEXT
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    same = tokenizer(text)["input_ids"] == model.tokenizer.encode(text, parse_special=False)
    return float(np.sum((ours - expected) ** 2) / np.sum(expected**2)), same


def in_transformers(path: Path, folder: Path) -> str:
    try:
        return "NMSE {:.1e}, same tokens {}".format(*compared(path, folder, [5, 6, 7, 9, 11, 17] * 4))
    except Exception as error:  # of its own kinds: it checks sizes that it does not need
        return f"transformers refuses: {str(error).splitlines()[-1].strip()}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=tiny.ALL)
    args = parser.parse_args()
    for name in args.names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            source = checkpoints.read(tiny.tiny(name, folder=folder, n_layers=3))
            for i, cut in enumerate(CUTS):
                (folder / str(i)).mkdir()
                try:
                    smaller = pruned(source, PruneSpec.parse(cut), TOKENS, n_ctx=32, chunks=4)
                    path, hf = exported(smaller, folder / str(i))
                    facts = f"no folder: {hf}"
                    if isinstance(hf, Path):
                        facts = in_transformers(path, hf)
                except EdgelmError as error:
                    facts = str(error)
                print(f"{name:20} {cut:28} {facts}", flush=True)


if __name__ == "__main__":
    main()
