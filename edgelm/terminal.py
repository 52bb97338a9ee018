"""What a person sees while waiting: progress bars and notes on standard error. Knows no model.

Standard output carries answers and nothing else, so everything here writes to standard error; when that is not a
terminal, bars are left out and notes stay.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE_S = 0.3  # a stage that is over sooner than this shows no bar


def note(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


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
