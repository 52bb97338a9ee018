"""A source as the user writes it -> a folder or a file on this disk, fetched if it is not there yet."""

from __future__ import annotations

import os
from pathlib import Path

from edgelm import hub, huggingface, rooms
from edgelm.disk import Progress, nothing
from edgelm.errors import SourceError

# What a conversion reads of a repository: never code, and no weights in a format that it would not read.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_REST = (
    "*.json", "tokenizer.model", "vocab.txt", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "1_Pooling/config.json",
)  # fmt: skip


def resolve(source: str | Path, offline: bool = False, progress: Progress = nothing) -> Path:
    """The folder or file that `source` means: a path, hf:ORG/REPO[@REVISION], or whatever `edgelm.hub` knows.

    Raises SourceError when it cannot be had, UsageError when it is not written as a source.
    """
    text = os.fspath(source)
    if os.path.exists(text):
        return Path(text)
    if text.startswith("hf:") and not huggingface.parse(text[3:])[2]:
        return huggingface.fetch_folder(text[3:], (_WEIGHTS, _PICKLES), _REST, rooms.is_offline(offline), progress)
    if ":" not in text and text not in hub.KNOWN:
        raise SourceError(f"there is no {text}; a source is a Hugging Face folder, a GGUF file, or hf:ORG/REPO")
    return hub.resolve(text, offline=offline, progress=progress)
