"""Python imports this when it starts, if this folder is in PYTHONPATH: then the process has a matrix unit, and so have
those that it starts, to compile or otherwise. What the unit is made of is in `emulated_tiles`.

Modules of edgelm are changed while they are imported, and nothing is imported for that. What is compiled is kept where
no other process looks.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


def _emulate(amx: ModuleType) -> None:
    """All that is still asked of the processor is what code beside the unit needs; instructions become other code."""
    import emulated_tiles

    amx.NEEDS = frozenset(name for name in amx.NEEDS if not name.startswith("amx-"))  # type: ignore[attr-defined]
    amx._call = emulated_tiles.call  # type: ignore[attr-defined]


def _permit(matrix_unit: ModuleType) -> None:
    matrix_unit.permitted = lambda: True  # type: ignore[attr-defined]


def _keep_apart(compiler: ModuleType) -> None:
    """The compiler makes other code of the same source: a version of its own, for each state of the files here."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    compiler.VERSION = int(digest[:12], 16)  # type: ignore[attr-defined]


_CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "edgelm.kernels.amx": _emulate,
    "edgelm.kernels.matrix_unit": _permit,
    "edgelm.kernels.compiler": _keep_apart,
}


class _Changing(MetaPathFinder):
    """Finds the modules that are to be changed, and changes them before anybody sees them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _CHANGES else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _CHANGES[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Changing())
