"""What a person sees: progress bars and notes on standard error, facts as aligned lines or JSON. Knows no model.

Standard output carries answers and nothing else, so everything here writes to standard error; when that is not a
terminal, bars are left out and notes stay.
"""

from __future__ import annotations

import errno
import math
import sys
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

BYTES = {"n_bytes", "weights", "kv_cache", "workspace", "total"}  # facts that `readable` shows with a unit
NO_MEMORY = (
    "there is not enough memory; a smaller context window (-c), --packed file, or a model quantized to fewer bits "
    "needs less"
)
PATIENCE_S = 0.3  # a stage that is over sooner than this shows no bar


def note(text: str) -> None:
    """A line, or several, on standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def told(error: BaseException) -> str:
    """What an error says, in one line; of an error of the system the file and the reason, without its number."""
    if getattr(error, "errno", None) == errno.ENOMEM or (isinstance(error, MemoryError) and not error.args):
        return NO_MEMORY
    if isinstance(error, OSError) and error.strerror:
        return ": ".join([*([str(error.filename)] if error.filename is not None else []), error.strerror])
    return " ".join(str(error).split())


def say(text: str) -> None:
    """A piece of an answer on standard output: as it is, but a terminal gets nothing that it would obey."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


class Bars:
    """A `progress(stage, done, total)` callback that draws one bar per stage.

    Bytes are shown as bytes for stages whose name starts with "download"; everything else is counted. Rich is
    imported only when a bar is really shown.
    """

    def __init__(self, enabled: bool | None = None) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self._since: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        self._lock = threading.Lock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self.enabled:
            return
        with self._lock:
            now = time.monotonic()
            began = self._since.setdefault(stage, now)
            if stage in self._tasks and self._progress is not None:
                self._progress.update(self._tasks[stage], completed=done, total=total or None)
            elif now - began >= PATIENCE_S and (not total or done < total):
                self._show(stage, done, total)
            if total and done >= total:
                self._finish(stage)

    def close(self) -> None:
        """Takes all bars away."""
        with self._lock:
            if self._progress is not None:
                self._progress.stop()
            self._progress = None
            self._tasks.clear()
            self._since.clear()

    def _show(self, stage: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

        if self._progress is None:
            amount: ProgressColumn = (
                DownloadColumn() if stage.startswith("download") else TextColumn("{task.completed:.0f}/{task.total}")
            )
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                amount,
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
        self._tasks[stage] = self._progress.add_task(stage, total=total or None, completed=done)

    def _finish(self, stage: str) -> None:
        task = self._tasks.pop(stage, None)
        self._since.pop(stage, None)
        if task is not None and self._progress is not None:
            self._progress.remove_task(task)
            if not self._tasks:
                self._progress.stop()
                self._progress = None


@contextmanager
def bars(quiet: bool = False) -> Iterator[Bars]:
    """Progress bars for the time of a `with` block."""
    shown = Bars(False if quiet else None)
    try:
        yield shown
    finally:
        shown.close()


def size(n_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


_OBEYED = ("Cc", "Cs", "Zl", "Zp")  # categories of Unicode: control characters, surrogates, ends of lines
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # let a line look like another one


def printable(text: str) -> str:
    """Text of a file or a model without what a terminal would obey, which is spelled out; newline and tab stay."""
    if text.isprintable():
        return text

    def shown(c: str) -> bool:
        return c in "\n\t" or c.isprintable() or not (unicodedata.category(c) in _OBEYED or c in _TURNS)

    return "".join(c if shown(c) else ascii(c)[1:-1] for c in text)


# --- facts as text ---------------------------------------------------------------------------------------------------

def summary(last: Any, n_prompt: int) -> dict[str, Any]:
    """The counts and speeds of a finished answer to a prompt of `n_prompt` tokens; `last` None: of one of no tokens."""
    counts = {
        "prompt_tokens": n_prompt, "cached_tokens": 0, "generation_tokens": 0, "prompt_tps": None,
        "generation_tps": None, "finish_reason": "length", "dropped_tokens": 0,
    }  # fmt: skip
    return counts if last is None else {name: getattr(last, name) for name in counts}


def choices(response: Any) -> dict[str, Any]:
    """A token of an answer, and what could have stood in its place: natural logarithms of probabilities."""
    return {
        "token": response.token, "text": response.text, "logprob": response.logprob, "top_logprobs": response.logprobs,
    }  # fmt: skip


def statistics(last: Any) -> str:
    return (
        f"prompt {last.prompt_tokens} tokens ({last.cached_tokens} cached), {last.prompt_tps:.1f} tokens/s; "
        f"answer {last.generation_tokens} tokens, {last.generation_tps:.1f} tokens/s; ended by {last.finish_reason}"
    )


def print_json(value: Any) -> None:
    print(json_text(value))


def json_text(value: Any) -> str:
    """JSON that every reader takes: floats that are no numbers, or infinite, become null."""
    import json

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {name: plain(inner) for name, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    return json.dumps(plain(value), ensure_ascii=False, indent=2, default=str, allow_nan=False)


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows as lines with aligned columns: each is one line, whatever is in its cells."""
    shown = [[printable(cell).replace("\n", "\\n").replace("\t", "\\t") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]


def readable(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Facts as aligned lines: nested mappings indented below their name, bytes as KiB, MiB or GiB."""
    lines = []
    for name, value in facts.items():
        label = name.replace("_", " ") if name.islower() else name  # names of types keep their underscore
        if value in ({}, []):
            value = "none"
        if isinstance(value, dict):
            lines += [f"{indent}{label}", *readable(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ("  ".join(printable(str(v)) for v in row.values()) for row in value)
            lines += [f"{indent}{label}", *(f"  {indent}{row}" for row in rows)]
        else:
            if name in BYTES and isinstance(value, int):
                shown = size(value)
            elif isinstance(value, list):
                shown = printable(", ".join(map(str, value)))
            else:
                shown = f"{value:.6g}" if isinstance(value, float) else printable(str(value))
            lines.append(f"{indent}{label:<{max(1, 26 - len(indent))}} {shown}")
    return lines
