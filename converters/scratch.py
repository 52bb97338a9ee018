"""Arrays that are computed long before they are written: kept on the disk, not in memory."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Scratch:
    """A nameless file that disappears with the process; it lies in `folder`, by default where temporary files lie."""

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this)
        weakref.finalize(self, self._file.close)  # what is mapped stays readable

    def keep(self, values: Floats) -> Floats:
        """The same float32 numbers, read from the disk when they are used."""
        start = self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(values, np.float32).tobytes())
        self._file.flush()
        return np.memmap(self._file, np.float32, "r", start, values.shape)
