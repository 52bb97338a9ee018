"""Fewer tokens: those that a text needs, and those that no model can be without.

    kept = kept_tokens(Tokenizer.from_gguf(keys), text)
    keys = cut_keys(keys, kept)

A text is cut into the same tokens as before, because every piece that came up while it was cut stays: joining pieces
(byte pairs, SentencePiece) picks the best pair of those that are there, the longest match (WordPiece) and the best path
(Unigram) pick the best of all; taking away what was never picked changes none of these choices. Control tokens, bytes
and what a user has added stay, so any other text can still be written, in more tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import UsageError
from edgelm.subwords import SPACE
from edgelm.tokenizer import Tokenizer
from edgelm.vocabulary import Kind, Vocabulary
from edgelm.vocabulary import read as read_vocabulary

Indices = NDArray[np.intp]
_P = "tokenizer.ggml."
_PER_TOKEN = (_P + "tokens", _P + "scores", _P + "token_type")


def kept_tokens(keys: Mapping[str, Any], text: str) -> Indices:
    """Ids of the tokens that stay, ascending, for a vocabulary (keys `tokenizer.*` of a GGUF file) and a text.

    Raises UsageError when the text is empty, the errors of `edgelm.vocabulary` when the vocabulary is broken.
    """
    if not text.strip():
        raise UsageError("--prune vocab: the text is empty, so no token would stay but the special ones")
    vocabulary = read_vocabulary(keys)
    needed = _pieces_on_the_way(Tokenizer(vocabulary), vocabulary, text)
    needed |= {i for i, kind in enumerate(vocabulary.kinds.tolist()) if kind not in (Kind.NORMAL, Kind.UNUSED)}
    needed |= {i for i, piece in enumerate(vocabulary.pieces) if _is_basic(vocabulary, piece)}
    needed |= {value for key, value in keys.items() if key.endswith("_token_id") and _is_id(value, vocabulary)}
    return np.array(sorted(needed), np.intp)


def _is_id(value: Any, vocabulary: Vocabulary) -> bool:
    return isinstance(value, int | np.integer) and bool(0 <= value < len(vocabulary.pieces))


def _is_basic(vocabulary: Vocabulary, piece: str) -> bool:
    """A piece that other pieces are made of: a byte, or a character that a keyboard has."""
    letter = piece.removeprefix(SPACE) if vocabulary.model == "bert" else piece
    stands_for_bytes = vocabulary.model == "gpt2" and vocabulary.pre.byte_level
    return len(letter) == 1 and (bool(stands_for_bytes) or letter.isascii() or letter == SPACE)


def _pieces_on_the_way(tokenizer: Tokenizer, vocabulary: Vocabulary, text: str) -> set[int]:
    """The tokens of a text, and the pieces that are made on the way and then joined into others."""
    seen: set[str] = set()
    cutter: Any = tokenizer._segment
    if hasattr(cutter, "_rank"):  # of a pair of pieces; every piece that comes up is asked about, with its neighbour
        rank = cutter._rank

        def seeing(left: str, right: str) -> Any:
            seen.update((left, right))
            return rank(left, right)

        cutter._rank = seeing
    needed = {i for parse in (True, False) for i in tokenizer.encode(text, parse_special=parse)}
    return needed | {vocabulary.ids[piece] for piece in seen if piece in vocabulary.ids}


def cut_keys(keys: Mapping[str, Any], kept: Indices) -> dict[str, Any]:
    """The keys `tokenizer.*` of a vocabulary that has only the tokens `kept`, in their order."""
    new_ids = renumbered(kept)
    found: dict[str, Any] = {}
    for key, value in keys.items():
        if key in _PER_TOKEN:
            found[key] = [value[i] for i in kept] if isinstance(value, list) else value[kept]
        elif key.endswith("_token_id") and isinstance(value, int | np.integer):
            if int(value) in new_ids:
                found[key] = type(value)(new_ids[int(value)])
        else:
            found[key] = value
    if _P + "merges" in keys:
        found[_P + "merges"] = kept_merges(keys[_P + "merges"], set(found[_P + "tokens"]))
    return found


def renumbered(kept: Indices) -> dict[int, int]:
    """{old id: new id}."""
    return {old: new for new, old in enumerate(kept.tolist())}


def kept_merges(merges: Sequence[str], pieces: set[str]) -> list[str]:
    """The merges, "left right", of which both parts and the whole are still pieces."""
    found = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left in pieces and right in pieces and left + right in pieces:
            found.append(merge)
    return found


def cut_tokenizer_json(parsed: Mapping[str, Any], kept: Indices) -> dict[str, Any]:
    """tokenizer.json with only the tokens `kept`, under new ids."""
    new_ids, model = renumbered(kept), dict(parsed["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {text: new_ids[i] for text, i in vocab.items() if i in new_ids}
    else:  # Unigram: a list of pieces and scores, by id
        model["vocab"] = [vocab[i] for i in kept.tolist() if i < len(vocab)]
        if type(model.get("unk_id")) is int:
            model["unk_id"] = new_ids[model["unk_id"]]
    if model.get("merges"):
        pieces = set(model["vocab"])
        model["merges"] = [m for m in model["merges"] if _stays(m, pieces)]
    added = [entry for entry in parsed.get("added_tokens") or () if entry["id"] in new_ids]
    out = {**parsed, "model": model, "added_tokens": [{**entry, "id": new_ids[entry["id"]]} for entry in added]}
    if parsed.get("post_processor"):
        out["post_processor"] = _renumbered_ids(parsed["post_processor"], new_ids)
    return out


def _stays(merge: Any, pieces: set[str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in pieces and right in pieces and left + right in pieces


def _renumbered_ids(step: Any, new_ids: Mapping[int, int]) -> Any:
    """A post-processor with the new ids of its special tokens: "ids" of templates, (text, id) pairs of BERT's."""
    if isinstance(step, dict):
        return {
            key: [new_ids.get(i, i) for i in value] if key == "ids" else _renumbered_ids(value, new_ids)
            for key, value in step.items()
        }
    if isinstance(step, list):
        if len(step) == 2 and isinstance(step[0], str) and type(step[1]) is int:
            return [step[0], new_ids.get(step[1], step[1])]
        return [_renumbered_ids(value, new_ids) for value in step]
    return step


def text_of(value: str) -> str:
    """The text that `--prune vocab=VALUE` means: of the file with this name, or else VALUE itself.

    Raises UsageError for a file that is no text, or that looks like a name and is none.
    """
    from pathlib import Path

    path = Path(value)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"--prune vocab={value:.80}: the file is no text in UTF-8") from None
    except OSError:  # too long for a name: a text
        return value
    if re.fullmatch(r"\S+\.\w{1,5}", value):
        raise UsageError(f"--prune vocab={value:.80}: there is no such file")
    return value
