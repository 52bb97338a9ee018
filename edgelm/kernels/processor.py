"""The processor that kernels are compiled for, by the name and features that LLVM finds: what Numba decides by.

To ask LLVM takes its library into the process, 20 ms of each start. So its answer is kept, until the system is started
again or finds another processor.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

CPUS, BOOT = Path("/proc/cpuinfo"), Path("/proc/sys/kernel/random/boot_id")
_FACTS = ("vendor_id", "cpu family", "model", "stepping", "flags")  # of the first processor in CPUS
_KEPT = re.compile(r"([0-9a-f]{64}) ([\w.-]+) (pairs|no pairs)\n")


class Processor(NamedTuple):
    """What is asked of one.

    Attributes:
        folder: a name for code of this processor.
        adds_pairs: whether it adds two products of bfloat16 to a sum at a time.
    """

    folder: str
    adds_pairs: bool


@functools.cache
def llvm() -> Any:
    """llvmlite's binding of LLVM, ready to compile for this machine."""
    import llvmlite.binding

    with contextlib.suppress(RuntimeError):  # newer versions do it themselves and refuse
        llvmlite.binding.initialize()
    llvmlite.binding.initialize_native_target()
    llvmlite.binding.initialize_native_asmprinter()
    return llvmlite.binding


def find(cache: Path) -> Processor:
    """The processor, perhaps as it is kept in `cache`; NUMBA_CPU_NAME, NUMBA_CPU_FEATURES choose another."""
    machine = "" if {"NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"} & os.environ.keys() else _machine()
    file = cache / "processor"
    if machine:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            kept = _KEPT.fullmatch(file.read_text())
            if kept and kept[1] == machine:
                return Processor(kept[2], kept[3] == "pairs")
    name = os.environ.get("NUMBA_CPU_NAME") or llvm().get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES") or llvm().get_host_cpu_features().flatten()
    folder = f"{name}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
    found = Processor(folder, "+avx512bf16" in features.split(","))
    if machine:
        with contextlib.suppress(OSError):
            file.write_text(f"{machine} {found.folder} {'pairs' if found.adds_pairs else 'no pairs'}\n")
    return found


def _machine() -> str:
    """Digest of all that is known of the processor without LLVM, and of when the system was started; "" if it is not
    enough to tell another one."""
    try:
        with CPUS.open("rb") as file:
            first = file.read(1 << 14).decode().partition("\n\n")[0]
        boot, features = BOOT.read_text(), _numpy_features()
    except (ImportError, OSError, UnicodeDecodeError):
        return ""
    facts = [line for line in first.splitlines() if line.split("\t")[0] in _FACTS]
    if len(facts) < len(_FACTS):
        return ""
    return hashlib.sha256(repr((boot, facts, features)).encode()).hexdigest()


def _numpy_features() -> list[tuple[str, bool]]:
    """What NumPy has found by asking the processor itself: an emulator may show the host's `CPUS`."""
    from numpy._core._multiarray_umath import __cpu_features__

    return sorted(__cpu_features__.items())
