"""From a plain Python function to the address of machine code, kept on disk.

A kernel is a module-level function ``def name(op, env, begin, end)`` over int64; `address` compiles it when it is first
asked for. Compiled code goes to a folder of the user's cache named by everything that may change it: the sources of
this package (Numba's own check sees only the file that holds the function, not those it inlines) and the versions of
Numba and llvmlite. A NUMBA_CACHE_DIR in the environment takes precedence.

Knows nothing of what kernels do. Importing it imports no Numba, but must come before anything that does.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

Kernel = Callable[[int, int, int, int], None]

_lock = threading.RLock()
_compiled: dict[Kernel, Any] = {}  # kernel -> what keeps its code alive; `.address`


def fingerprint() -> str:
    """Hash of what compiled kernels depend on besides the processor, which Numba itself keeps apart."""
    digest = hashlib.sha256()
    for package in ("numba", "llvmlite"):
        digest.update(f"{package} {metadata.version(package)}\n".encode())
    digest.update(f"{sys.implementation.cache_tag}\n".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def cache_dir() -> Path:
    """Where compiled kernels are kept: NUMBA_CACHE_DIR, else a folder of the user's cache, else a temporary one."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("edgelm", appauthor=False)) / "kernels" / fingerprint()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return Path(tempfile.mkdtemp(prefix="edgelm-kernels-"))
    return folder


def prepare() -> None:
    """Points Numba to our folder; called when the package is imported: before any of its modules loads Numba."""
    folder = str(cache_dir())
    os.environ["NUMBA_CACHE_DIR"] = folder
    config = sys.modules.get("numba.core.config")
    if config is not None and not config.CACHE_DIR:
        config.CACHE_DIR = folder  # the application imported Numba first


def address(kernel: Kernel) -> int:
    """Address of the compiled `kernel`, compiling or loading it if this process has not done so yet."""
    found = _compiled.get(kernel)
    if found is None:
        with _lock:
            found = _compiled.get(kernel)
            if found is None:
                found = _compiled[kernel] = _compile(kernel)
    return int(found.address)


def _compile(kernel: Kernel) -> Any:
    from numba import cfunc, types

    word = types.int64
    signature = types.void(word, word, word, word)
    return cfunc(signature, nopython=True, cache=True, error_model="numpy")(kernel)


def compile_all(kernels: Iterable[Kernel], progress: Callable[[str, int, int], None] | None = None) -> None:
    """Compiles or loads all of `kernels`. `progress(name of the kernel, done, total)` is called after each one."""
    todo = list(dict.fromkeys(kernels))
    for done, kernel in enumerate(todo, 1):
        address(kernel)
        if progress is not None:
            progress(kernel.__name__, done, len(todo))
