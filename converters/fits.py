"""`Fits`: matrices that pruning has computed, on the disk: not in memory, and not to be computed again."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .arrays import Floats
from .finished import Finished


@dataclass(frozen=True)
class Fit:
    """A matrix w (out, columns that stay), which columns those are, and its relative errors before and after it."""

    w: Floats
    kept: NDArray[np.intp]
    errors: tuple[float, float]


class Fits:
    """What is finished, by the name of its tensor, mapped from the files of `folder` (None: a temporary one).

    identity: what it is all made of; what was made of something else is thrown away.
    """

    def __init__(self, folder: Path | None, identity: str) -> None:
        if folder is None:
            folder = Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)  # what is mapped stays readable
        self._finished = Finished(folder, identity)

    def keep(self, name: str, fit: Fit) -> Fit:
        """The same, read from the disk when it is used. OSError when the disk is full."""
        self._finished.put(f"{name}.kept", np.asarray(fit.kept, "<i8")[None].view(np.uint8))
        self._finished.put(f"{name}.errors", np.array([fit.errors], "<f8").view(np.uint8))
        self._finished.put(name, np.ascontiguousarray(fit.w, "<f4").view(np.uint8))
        return self[name]

    def __contains__(self, name: str) -> bool:
        return name in self._finished  # which was put last

    def __getitem__(self, name: str) -> Fit:
        kept = self._finished[f"{name}.kept"].view("<i8")[0].astype(np.intp)
        before, after = self._finished[f"{name}.errors"].view("<f8")[0].tolist()
        return Fit(self._finished[name].view("<f4"), kept, (before, after))
