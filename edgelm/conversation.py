"""Conversations on disk: messages and settings, as JSON, in the folder that the platform has for what a user keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgelm.disk import replacing
from edgelm.errors import UsageError

Message = dict[str, str]


def data_folder() -> Path:
    """Where history and saved conversations are kept, by the platform's convention."""
    from platformdirs import user_data_path

    return user_data_path("edgelm", appauthor=False)


def path_of(name: str) -> Path:
    """NAME as a file among the saved conversations; a path with a folder in it is used as it is."""
    if not name:
        raise UsageError("give a name")
    path = Path(name).expanduser()
    return path if path.parent != Path() else data_folder() / "conversations" / f"{path.name}.json"


def save(name: str, model: Path, messages: list[Message], settings: dict[str, Any]) -> Path:
    """Writes a conversation down and says where."""
    path = path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"model": str(model), "messages": messages, "settings": settings}
    with replacing(path) as file:
        file.write(json.dumps(record, ensure_ascii=False, indent=2).encode("utf-8", "replace"))
    return path


def load(name: str) -> tuple[list[Message], dict[str, Any]]:
    """The messages and settings of a saved conversation. UsageError if there is none, or the file is none."""
    from edgelm.request import Request

    path = path_of(name)
    if not path.exists():
        saved = sorted(p.stem for p in data_folder().glob("conversations/*.json"))
        raise UsageError(f"nothing was saved as {name!r}; there are {', '.join(saved) or 'no conversations'}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in record["messages"]]
        settings = dict(record["settings"])
        Request.of(settings)
    except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
        raise UsageError(f"{path} is not a saved conversation ({error})") from None
    return messages, settings
