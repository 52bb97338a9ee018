"""What a Hugging Face folder says around its vocabulary: special tokens, when they are added, chat templates.

Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and generation_config.json.
The order in which they are asked is that of gguf's `SpecialVocab`. No template is run here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelm.errors import FormatError

from .safetensors_file import open_map, read_json

MAX_TEMPLATE_BYTES = 1 << 20
_P = "tokenizer.ggml."
_KEYS = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls", "mask": "mask",
}  # fmt: skip


@dataclass
class Folder:
    """The parsed files of a tokenizer; {} for those that are not there.

    settings: tokenizer_config.json over special_tokens_map.json; defaults: ids that the vocabulary itself names;
    notes: what a user should know.
    """

    path: Path
    hf: Mapping[str, Any]
    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    generation: dict[str, Any]
    defaults: dict[str, int | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, hf: Mapping[str, Any]) -> Folder:
        """The files in the folder `path`; FormatError when one is no JSON object."""
        settings = {**_object(path / "special_tokens_map.json"), **_object(path / "tokenizer_config.json")}
        return cls(path, hf, _object(path / "tokenizer.json"), settings, _object(path / "generation_config.json"))

    def added(self) -> dict[int, dict[str, Any]]:
        """The added tokens by id: those of tokenizer.json, over those of tokenizer_config.json."""
        found: dict[int, dict[str, Any]] = {}
        decoder = self.settings.get("added_tokens_decoder") or {}
        entries = [(int(i) if str(i).isdecimal() else i, e) for i, e in decoder.items()]
        entries += [(e.get("id"), e) for e in self.tokenizer.get("added_tokens") or () if isinstance(e, dict)]
        for token, entry in entries:
            if type(token) is not int or not isinstance(entry, dict):
                raise FormatError(f"{self.path}: an added token with the id {token!r:.20} is garbled")
            found[token] = entry
        return found

    def text_of(self, name: str) -> str | None:
        """The text of a special token ("bos", …) in tokenizer_config.json."""
        entry = self.settings.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        return text if isinstance(text, str) else None


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise FormatError(f"{path}: no JSON object")
    return value


def special_keys(folder: Folder, texts: Sequence[str], model: str) -> dict[str, Any]:
    """The keys of special tokens, of what is added around a text, of the normalizer and of chat templates."""
    ids = {text: i for i, text in enumerate(texts)}
    names = _names(folder)
    keys: dict[str, Any] = {}
    for name, key in _KEYS.items():
        if (token := _id(folder, name, names.get(name), ids, len(texts))) is not None:
            keys[f"{_P}{key}_token_id"] = token
    for name, value in _adds(folder, names).items():
        keys[f"{_P}add_{name}_token"] = value
    keys |= _templates(folder)
    if model == "bert":
        keys |= _normalizer(folder)
    return keys


def _names(folder: Folder) -> dict[str, str]:
    """The texts of special tokens; what begins and ends a text of BERT's is its BOS and EOS."""
    names = {name: text for name in _KEYS if (text := folder.text_of(name)) is not None}
    if folder.tokenizer or "cls" in names:
        for name, instead in (("bos", "cls"), ("eos", "sep")):
            if name not in names and instead in names:
                names[name] = names[instead]
    first, last = _around(folder)
    if first and "bos" not in names:
        names["bos"] = first
    if last and "eos" not in names:
        names["eos"] = last
    return names


def _id(folder: Folder, name: str, text: str | None, ids: Mapping[str, int], n: int) -> int | None:
    candidates = [ids.get(text) if text is not None else None, folder.hf.get(f"{name}_token_id")]
    candidates += [(folder.hf.get("text_config") or {}).get(f"{name}_token_id"), folder.defaults.get(name)]
    return next((c for c in candidates if type(c) is int and 0 <= c < n), None)


def _around(folder: Folder) -> tuple[str, str]:
    """The texts of the special tokens that tokenizer.json puts before and after a text; "" for none."""
    first, last = "", ""
    for step in _processors(folder):
        if step.get("type") in ("RobertaProcessing", "BertProcessing"):
            first, last = str(step["cls"][0]), str(step["sep"][0])
        elif step.get("type") == "TemplateProcessing" and len(texts := _special_texts(step.get("single"))) > 1:
            first, last = texts[0], texts[-1]
    return first, last


def _special_texts(template: Any) -> list[str]:
    """The special tokens of a template in order, "" for the texts between them."""
    parts = [part for part in template or () if isinstance(part, dict)]
    return [str((part.get("SpecialToken") or {}).get("id") or "") for part in parts]


def _processors(folder: Folder) -> list[dict[str, Any]]:
    post = folder.tokenizer.get("post_processor") or {}
    return [step for step in post.get("processors", [post]) if isinstance(step, dict)]


def _adds(folder: Folder, names: Mapping[str, str]) -> dict[str, bool]:
    """Which special tokens are put around a text: as tokenizer.json does it, else as tokenizer_config.json says."""
    first, last = _around(folder)
    kinds = {step.get("type") for step in _processors(folder)}
    adds = {"bos": False, "eos": False} if "ByteLevel" in kinds else {}
    if first:
        adds["bos"] = first in (names.get("bos"), names.get("cls"))
    if last:
        adds["eos"] = last == names.get("eos")
    if "RobertaProcessing" in kinds:
        adds["sep"] = True
    for step in _processors(folder):
        if step.get("type") == "TemplateProcessing" and (pair := _special_texts(step.get("pair"))):
            inner = pair[bool(first and pair[0] == first) : len(pair) - bool(last and pair[-1] == last)][1:-1]
            ends = (names.get("sep"), names.get("eos"))
            if inner:
                adds["sep"] = (inner[0] in ends and not last) or (len(inner) == 2 and inner[1] in ends)
    for name in _KEYS:
        value = folder.settings.get(f"add_{name}_token")
        if isinstance(value, bool):
            adds.setdefault(name, value)
    return {name: value for name, value in adds.items() if name in ("bos", "eos", "sep")}


def _normalizer(folder: Folder) -> dict[str, Any]:
    """BERT's switches, where they are said."""
    said: dict[str, Any] = {"lowercase": folder.settings.get("do_lower_case")} if not folder.tokenizer else {}
    pending = [folder.tokenizer.get("normalizer")]
    while pending:
        step = pending.pop()
        if not isinstance(step, dict):
            continue
        pending += step.get("normalizers") or []
        if step.get("type") == "BertNormalizer":
            said |= {"lowercase": step.get("lowercase"), "strip_accents": step.get("strip_accents")}
        elif step.get("type") in ("Lowercase", "StripAccents"):
            said["lowercase" if step["type"] == "Lowercase" else "strip_accents"] = True
    return {f"{_P}normalizer.{name}": value for name, value in said.items() if isinstance(value, bool)}


# --------------------------------------------------------------------------------------------------- chat templates


def _templates(folder: Folder) -> dict[str, Any]:
    """The chat template, and others by name."""
    found: dict[str, str] = {}
    value = folder.settings.get("chat_template")
    if value is None and (folder.path / "chat_template.jinja").exists():
        found["default"] = _text(folder.path / "chat_template.jinja")
        for path in sorted((folder.path / "additional_chat_templates").glob("*.jinja")):
            found[path.stem] = _text(path)
    elif value is None and (folder.path / "chat_template.json").exists():
        value = _object(folder.path / "chat_template.json").get("chat_template")
    if isinstance(value, str):
        found["default"] = value
    elif isinstance(value, list):
        found = {
            entry["name"]: entry["template"]
            for entry in value
            if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        }
    named = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in found.items() if name != "default"}
    keys: dict[str, Any] = {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    if named:
        keys["tokenizer.chat_templates"] = sorted(named)
    if found.get("default"):
        keys["tokenizer.chat_template"] = found["default"]
    return keys


def _text(path: Path) -> str:
    data = open_map(path)
    if len(data) > MAX_TEMPLATE_BYTES:
        raise FormatError(f"{path}: a chat template of {len(data)} bytes")
    try:
        return bytes(data).decode()
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not valid UTF-8") from None


def sampling_keys(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of generation_config.json under GGUF's names."""
    import numpy as np

    keys: dict[str, Any] = {}
    for name, key, kind in (
        ("top_k", "top_k", np.int32),
        ("top_p", "top_p", np.float32),
        ("min_p", "min_p", np.float32),
        ("temperature", "temp", np.float32),
        ("repetition_penalty", "penalty_repeat", np.float32),
    ):
        value = generation.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 31:
            keys[f"general.sampling.{key}"] = kind(value)
    return keys
