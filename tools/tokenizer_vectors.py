"""Writes tests/data/sentencepiece.json: tiny vocabularies of every kind that SentencePiece can train, and what its own
encoder makes of some texts. For developers; needs `pip install sentencepiece protobuf`.

    python tools/tokenizer_vectors.py [FOLDER OF tests]
"""

from __future__ import annotations

import base64
import io
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

LINES = """\
A tokenizer cuts text into pieces, and the pieces are numbers to the model.
The quick brown fox jumps over the lazy dog; the dog doesn't mind.
In the year 1969 three people flew to the moon: 384,400 km, or 238,855 miles.
Il était une fois, dans une forêt lointaine, un château où personne n'allait jamais.
Straße, Äpfel, Öl und Übermut: wer weiß, wie viele Wörter daraus werden?
吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。
for i in range(10): print(i, i ** 2, "x" * i)  # a loop
What is the capital of France? The capital of France is Paris.
""".splitlines()

# Rules of normalization: what is replaced -> by what, in hexadecimal code points.
RULES = {
    "\t": " ",
    "\n": " ",
    "\u3000": " ",
    "\ufb01": "fi",
    "\u2460": "1",
    "e\u0301": "\u00e9",
    "a\u0301": "\u00e1",
    "\uff21": "A",
    "\uff21\uff22": "AB",
    "\u200b": "",
}
KINDS: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram"},
    "unigram as it is": {
        "model_type": "unigram",
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    },
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True},
    "pairs": {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "pairs with bytes": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<b>", "\u2581\u2581", "\u2581\u2581\u2581"],
    },
}


def texts(rng: random.Random) -> list[str]:
    words = " ".join(LINES).split()
    odd = [
        "  ",
        "   x",
        "\t",
        "\n\n",
        "<b>",
        "\ufb01",
        "e\u0301",
        "\uff21\uff22",
        "\u2460",
        "\u200b",
        "🙂",
        "猫",
        "ß",
        "'s",
    ]
    out = ["", "a", " ", "Hello world", " two  spaces ", "the the the", *LINES[:6]]
    for _ in range(60):
        parts = [rng.choice(odd if rng.random() < 0.3 else words) for _ in range(6)]
        out.append("".join(" " * (rng.random() < 0.7) + part for part in parts))
    return out


def code_points(text: str) -> str:
    return " ".join(f"{ord(char):X}" for char in text)


def build(settings: dict[str, Any]) -> dict[str, Any]:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        if "normalization_rule_name" not in settings:
            rules = Path(folder) / "rules.tsv"
            rules.write_text("".join(f"{code_points(a)}\t{code_points(b)}\n" for a, b in RULES.items()))
            settings = settings | {"normalization_rule_tsv": str(rules)}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES * 3),
            model_writer=model,
            vocab_size=420 if settings.get("byte_fallback") else 260,
            character_coverage=0.98,
            hard_vocab_limit=False,
            minloglevel=2,
            **settings,
        )
    encoder = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    user_defined = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    return {
        "model": "llama" if settings["model_type"] == "bpe" else "t5",
        # GGUF keeps the spaces of user-defined pieces
        "tokens": [p.piece.replace("\u2581", " ") if p.type == user_defined else p.piece for p in proto.pieces],
        "scores": [round(p.score, 6) for p in proto.pieces],
        "token_type": [p.type for p in proto.pieces],
        "unknown_token_id": proto.trainer_spec.unk_id,
        "add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        "remove_extra_whitespaces": proto.normalizer_spec.remove_extra_whitespaces,
        "precompiled_charsmap": base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode(),
        "cases": [[text, encoder.encode(text)] for text in texts(random.Random(1))],
    }


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "tests") / "data"
    folder.mkdir(exist_ok=True)
    made = {name: build(settings) for name, settings in KINDS.items()}
    (folder / "sentencepiece.json").write_text(json.dumps(made, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
