"""Whether this process may use the processor's matrix unit, and for how many tokens that is worth while.

What the unit is, and code for it, is in `amx`. With it, prompts are multiplied as bfloat16, more than twice as fast as
int8 without it, and more exactly; but then a token's results depend, in their last bits, on how many it comes with.
Imports no LLVM.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

LEAST = 32  # tokens from which matrices are multiplied by it: fewer are as fast without (docs/LOG.md)
ROWS = 16  # of a tile: so many tokens are multiplied, or a few that are not there
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64: ask for a part of a thread's state


@functools.cache
def permitted() -> bool:
    """Whether the system lets this process use the unit: asks for it. False where there is none, and not on Linux."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 1 << 32:
        return False
    try:
        return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) == 0)
    except (OSError, AttributeError):
        return False
