"""IgLM, a small trained model with float weights, and texts of its own, for `tools/compare_losses.py`.

    pip download --no-deps iglm==0.1.0        (for non-commercial use; nothing of it is kept in this repository)
    python tools/make_iglm.py iglm-0.1.0-py3-none-any.whl FOLDER

Makes FOLDER/iglm-f32.gguf, calibrate.txt and eval.txt. IgLM (Shuai et al. 2023) writes antibodies: one token is one
amino acid, before them stand the kind of chain and the species. Its words `[HEAVY]` and the like are named by single
characters here, so that every program cuts a text into the same tokens. The texts are sampled from the model: human
heavy chains, each cut to N_CTX tokens: positions after 150 have never been trained.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import edgelm  # noqa: E402
from converters.conversion import Options  # noqa: E402
from converters.pipeline import convert  # noqa: E402
from converters.recipe import Recipe  # noqa: E402

MEMBERS = "iglm/trained_models/"
N_CTX = 96  # tokens of a chain: its kind, its species, 94 amino acids (or a gap, and later what fills it)
HUMAN_HEAVY = "+h"
NAMES = {
    "[CAMEL]": "c", "[HUMAN]": "h", "[MOUSE]": "m", "[RABBIT]": "b", "[RAT]": "r", "[RHESUS]": "s",
    "[HEAVY]": "+", "[LIGHT]": "-", "[CLS]": ".", "[SEP]": ";", "[MASK]": "_", "[PAD]": "0", "[UNK]": "?",
}  # fmt: skip
TEXTS = {"calibrate.txt": (1, 384), "eval.txt": (2, 96)}  # seed, chains


def folder_of(wheel: Path, folder: Path) -> Path:
    """The checkpoint as a Hugging Face folder with a tokenizer of characters."""
    hf = folder / "IgLM"
    hf.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        words = archive.read(f"{MEMBERS}vocab.txt").decode().split()
        config = json.loads(archive.read(f"{MEMBERS}IgLM/config.json"))
        (hf / "pytorch_model.bin").write_bytes(archive.read(f"{MEMBERS}IgLM/pytorch_model.bin"))
    config |= {"bos_token_id": None, "eos_token_id": words.index("[CLS]")}  # 50256 is no token of it
    vocabulary = {NAMES.get(word, word): number for number, word in enumerate(words)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None, "decoder": {"type": "ByteLevel"},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "fuse_unk": False,
            "end_of_word_suffix": "", "vocab": vocabulary, "merges": ["? ?"],  # never met; programs want one
        },
    }  # fmt: skip
    (hf / "config.json").write_text(json.dumps(config))
    (hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    return hf


def chains(model: edgelm.Model, seed: int, n: int) -> list[str]:
    """n human heavy chains, each of N_CTX characters; shorter ones are left out."""
    plainly = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": N_CTX - len(HUMAN_HEAVY)}
    written: Iterator[str] = (
        HUMAN_HEAVY + model.generate(HUMAN_HEAVY, seed=number, **plainly) for number in count(100_000 * seed)
    )
    return list(islice((text for text in written if len(text) == N_CTX), n))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    a = parser.parse_args()
    file = a.folder / "iglm-f32.gguf"
    convert(folder_of(a.wheel, a.folder), file, Recipe("f32"), Options(pre="gpt-2", check_tokenizer=False))
    with edgelm.load(str(file)) as model:
        for name, (seed, n) in TEXTS.items():
            (a.folder / name).write_text("".join(chains(model, seed, n)))
        for name in TEXTS:
            tokens = model.tokenize((a.folder / name).read_text(), parse_special=False)
            assert len(tokens) == N_CTX * TEXTS[name][1], "a character is no token"
            print(name, len(tokens), np.bincount(tokens, minlength=model.vocab_size).tolist())


if __name__ == "__main__":
    main()
