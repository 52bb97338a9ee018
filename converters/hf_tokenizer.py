"""The tokenizer's files of a Hugging Face folder: the source's, without the tokens that were cut; or made from GGUF.

    files(checkpoint)      {"tokenizer.json": b"…", …}

tokenizer.json is the one that counts; older forms of it (vocab.json, merges.txt, tokenizer.model) are copied only where
nothing has changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgelm.errors import UnsupportedError
from edgelm.vocabulary import read as read_vocabulary

from . import calibrate, tokenizer_files, vocab_prune
from .checkpoint import Checkpoint

_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json", "modules.json",
)  # fmt: skip
_OLDER = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temp": "temperature",
             "penalty_repeat": "repetition_penalty"}  # fmt: skip


def files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Name and content of every file but config.json and the weights.

    Raises UnsupportedError for a tokenizer that cannot be written so.
    """
    if checkpoint.is_gguf:
        return _made(checkpoint)
    names = _COPIED if checkpoint.kept_tokens is not None else (*_COPIED, *_OLDER)
    names = (*names, *(f"{folder.name}/config.json" for folder in checkpoint.path.glob("*_Pooling")))
    found = {name: (checkpoint.path / name).read_bytes() for name in names if (checkpoint.path / name).is_file()}
    if checkpoint.kept_tokens is None:
        return found
    if "tokenizer.json" not in found:
        raise UnsupportedError(f"{checkpoint.path}: tokens can only be cut from a tokenizer.json, which is not there")
    new_ids = vocab_prune.renumbered(checkpoint.kept_tokens)
    parsed = {name: json.loads(data) for name, data in found.items() if name.endswith(".json")}
    parsed["tokenizer.json"] = vocab_prune.cut_tokenizer_json(parsed["tokenizer.json"], checkpoint.kept_tokens)
    settings = parsed.get("tokenizer_config.json", {})
    if "added_tokens_decoder" in settings:
        added = settings["added_tokens_decoder"].items()
        settings["added_tokens_decoder"] = {str(new_ids[int(i)]): e for i, e in added if int(i) in new_ids}
    if "generation_config.json" in parsed:
        parsed["generation_config.json"] = _renumbered(parsed["generation_config.json"], new_ids)
    return {**found, **{name: _json(value) for name, value in parsed.items()}}


def token_ids(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json that name tokens."""
    if checkpoint.is_gguf:
        v = read_vocabulary(calibrate.vocabulary(checkpoint))
        ids = {"bos_token_id": v.bos_id, "eos_token_id": v.eos_id, "pad_token_id": v.pad_id}
        return {name: value for name, value in ids.items() if value is not None}
    if checkpoint.kept_tokens is None:
        return {}
    changed = _renumbered(config, vocab_prune.renumbered(checkpoint.kept_tokens))
    return {name: value for name, value in changed.items() if value != config[name]}


def _renumbered(config: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """The values of keys that end in _token_id, by new numbers; tokens that are gone are left out."""

    def new(value: Any) -> Any:
        if isinstance(value, list):
            return [new_ids[i] for i in value if i in new_ids]
        return new_ids.get(value) if type(value) is int else value

    return {key: new(value) if key.endswith("_token_id") else value for key, value in config.items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------------------------------------------- from a GGUF file


def _made(checkpoint: Checkpoint) -> dict[str, bytes]:
    keys = calibrate.vocabulary(checkpoint)
    v = read_vocabulary(keys)
    found = {name: tokenizer_files.content(value) for name, value in tokenizer_files.made(keys).items()}
    named = {new: keys.get(f"general.sampling.{old}") for old, new in _SAMPLING.items()}
    sampling = {new: value for new, value in named.items() if value is not None}
    ends = sorted(v.eog_ids)
    generation = {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    generation |= {"bos_token_id": v.bos_id} if v.bos_id is not None else {}
    if generation or sampling:
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in sampling.items()}
        found["generation_config.json"] = _json({**generation, **plain})
    return found
