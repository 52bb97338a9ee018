"""A file in memory, whose pages come when they are read and can be given back: where a model's weights are."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from typing import IO

import numpy as np
from numpy.typing import NDArray

from .errors import SourceError

GIVES_BACK = sys.platform.startswith("linux")  # mapped pages at once; others keep them until memory is short
WINDOW = 2 << 20  # bytes; Linux maps no more around a page that is read, since 6.18 all of a large folio


_seek = threading.Lock()  # where reading needs it, the place in a file is that of all threads


def unreadable() -> SourceError:
    return SourceError("the model's file cannot be read any more; was it changed, or its disk taken away?")


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

    def read_at(self, start: int, n_bytes: int) -> NDArray[np.uint8]:
        """Bytes of the file that are not mapped for it. SourceError if they cannot be read any more."""
        found = np.empty(n_bytes, np.uint8)
        done = 0
        while done < n_bytes:
            try:
                data = self._some_at(start + done, n_bytes - done)
            except OSError:
                data = b""
            if not data:
                raise unreadable()
            found[done : done + len(data)] = np.frombuffer(data, np.uint8)
            done += len(data)
        return found

    def _some_at(self, start: int, n_bytes: int) -> bytes:
        if sys.platform != "win32":
            return os.pread(self.descriptor, n_bytes, start)
        with _seek:
            os.lseek(self.descriptor, start, os.SEEK_SET)
            return os.read(self.descriptor, n_bytes)

    def forget(self, start: int, stop: int) -> None:
        """Gives back the pages around bytes `start` to `stop`. Others may be reading there: they will be read again.
        The system maps pages in windows, so the whole window goes."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start -= start % WINDOW
            self.madvise(mmap.MADV_DONTNEED, start, min(-(-stop // WINDOW) * WINDOW, len(self)) - start)
