"""A file in memory, whose pages come when they are read and can be given back: where a model's weights are."""

from __future__ import annotations

import mmap
import os
import sys
from typing import IO

GIVES_BACK = sys.platform.startswith("linux")  # mapped pages at once; others keep them until memory is short
WINDOW = 2 << 20  # bytes; Linux maps no more around a page that is read, since 6.18 all of a large folio


class MappedFile(mmap.mmap):
    """Can be read from as well, by `descriptor`: under its name there may be another file by then."""

    descriptor = -1

    @classmethod
    def of(cls, file: IO[bytes]) -> MappedFile:
        mapped = cls(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.descriptor = os.dup(file.fileno())
        return mapped

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def forget(self, start: int, stop: int) -> None:
        """Gives back the pages around bytes `start` to `stop`. Others may be reading there: they will be read again.
        The system maps pages in windows, so the whole window goes."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start -= start % WINDOW
            self.madvise(mmap.MADV_DONTNEED, start, min(-(-stop // WINDOW) * WINDOW, len(self)) - start)
