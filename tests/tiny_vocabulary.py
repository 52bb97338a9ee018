"""Small vocabularies for the models of `tiny`: real ones, learned from a paragraph, of each kind that GGUF knows.

Byte pairs ("bpe"), SentencePiece ("spm", and "gemma" with Gemma's order of special tokens) and WordPiece ("wordpiece").
"""

from __future__ import annotations

import collections
import itertools
from typing import Any

TEXT = (
    "the quick brown fox jumps over the lazy dog while the other dogs look at the fox and the hen . what is the "
    "capital of france ? the capital of france is paris . once upon a time there was a small model that could read "
    "and write , and it said hello world to all the others ."
)
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def metadata(kind: str, pre: str, size: int) -> dict[str, Any]:
    """The keys `tokenizer.*` of a vocabulary with `size` tokens; what is not learned is filled with unused ones."""
    build = {"bpe": _bpe, "spm": _spm, "gemma": _spm, "wordpiece": _wordpiece}[kind]
    kv, tokens, types, scores = build(kind, pre)
    assert len(tokens) <= size, (kind, len(tokens))
    assert len(set(tokens)) == len(tokens)
    n_unused = size - len(tokens)
    kv["tokens"] = tokens + [f"[unused{i}]" for i in range(n_unused)]
    kv["token_type"] = types + [UNUSED] * n_unused
    if scores:
        kv["scores"] = scores + [-1000.0] * n_unused
    out = {f"tokenizer.ggml.{key}": value for key, value in kv.items()}
    return out if kind == "wordpiece" else {**out, "tokenizer.chat_template": CHATML}


def _merges(words: list[str], n: int) -> list[tuple[str, str]]:
    """Byte-pair merges (arXiv 1508.07909), the most frequent pair first, ties in order of the alphabet."""
    counts = collections.Counter(words)
    split = {word: tuple(word) for word in counts}
    merges: list[tuple[str, str]] = []
    for _ in range(n):
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for word, parts in split.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: _join(parts, best) for word, parts in split.items()}
    return merges


def _join(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


def _bpe(kind: str, pre: str) -> tuple[dict[str, Any], list[str], list[int], list[float]]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
    merges = _merges(["Ġ" + word for word in TEXT.split()], 96)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + [letters[b] for b in range(256)] + ["".join(pair) for pair in merges]
    kv = {
        "model": "gpt2",
        "pre": pre,
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "eot_token_id": 3,
        "add_bos_token": pre == "llama-bpe",
    }
    return kv, tokens, [CONTROL] * len(special) + [NORMAL] * (len(tokens) - len(special)), []


def _spm(kind: str, pre: str) -> tuple[dict[str, Any], list[str], list[int], list[float]]:
    special = ["<pad>", "<eos>", "<bos>", "<unk>"] if kind == "gemma" else ["<unk>", "<s>", "</s>", "<pad>"]
    chat = ["<|im_start|>", "<|im_end|>"]
    words = ["▁" + word for word in TEXT.split()]
    pieces = ["".join(pair) for pair in _merges(words, 96)]
    pieces += sorted({letter for word in words for letter in word} | set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'\"!-"))
    tokens = special + chat + [f"<0x{b:02X}>" for b in range(256)] + pieces
    types = [UNKNOWN if t == "<unk>" else CONTROL for t in special] + [CONTROL] * 2 + [BYTE] * 256
    scores = [0.0] * (len(special) + len(chat) + 256) + [-float(i) for i in range(len(pieces))]
    kv = {
        "model": "llama",
        "pre": "default",
        "bos_token_id": 2 if kind == "gemma" else 1,
        "eos_token_id": 1 if kind == "gemma" else 2,
        "unknown_token_id": special.index("<unk>"),
        "padding_token_id": special.index("<pad>"),
        "add_bos_token": True,
        "add_space_prefix": kind != "gemma",
    }
    return kv, tokens, types + [NORMAL] * len(pieces), scores


def _wordpiece(kind: str, pre: str) -> tuple[dict[str, Any], list[str], list[int], list[float]]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,?!'-"]
    words = sorted({word for word in TEXT.split() if len(word) > 1})
    ends = ["ing", "ed", "er", "est", "ly", "ss"]
    # GGUF marks the beginning of a word with a lower one eighth block, and continuations not at all.
    tokens = special + ["▁" + piece for piece in letters + words] + letters + ends
    kv = {
        "model": "bert",
        "pre": "default",
        "cls_token_id": 2,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "seperator_token_id": 3,
        "unknown_token_id": 1,
        "padding_token_id": 0,
        "mask_token_id": 4,
    }
    return kv, tokens, [CONTROL] * len(special) + [NORMAL] * (len(tokens) - len(special)), []
