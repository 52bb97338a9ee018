"""What is said when the disk is full, wherever a conversion writes: nothing is lost, the same command goes on."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def resumable(part: Path) -> Iterator[None]:
    """Says what to do when the disk fills up while `part` is written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        what = error.strerror or "no space left"
        hint = "make room and give the same command again: it goes on where it stopped"
        raise OSError(error.errno, f"{what}; {hint}", error.filename or str(part)) from error
