"""What a kernel's code depends on: the source file of its module and all that this imports from edgelm, by their bytes.

Numba's own disk cache never notices an edit in a file that a kernel inlines from. Knows nothing of compiling.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # of the package edgelm
OUTSIDE = "compiler.py"  # its version stands in for it

# At the beginning of a line; not with "^", which is looked for at each character.
_IMPORTS = re.compile(r"\n[ \t]*from[ \t]+(edgelm[\w.]*|\.+[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)")


@functools.cache
def imports(file: str) -> tuple[bytes, tuple[str, ...]]:
    """Hash of a source file, and the files of edgelm that it imports from. Paths are strings, as there are hundreds."""
    try:
        with open(file, "rb") as source:
            data = source.read()
    except OSError:
        return b"", ()
    found: dict[str, None] = {}
    for start, names in _IMPORTS.findall("\n" + data.decode(errors="replace")):
        folder, dots = ROOT, len(start) - len(start.lstrip("."))
        for up in range(dots):
            folder = os.path.dirname(folder if up else file)
        place = os.path.join(folder, *filter(None, start.split(".")))
        candidates = [f"{place}.py"]
        if not os.path.isfile(candidates[0]):  # a package: names may be modules of it
            modules = re.findall(r"\w+", re.sub(r"#.*", "", names))
            candidates = [os.path.join(place, f"{name}.py") for name in ("__init__", *modules)]
        found.update(dict.fromkeys(path for path in candidates if os.path.isfile(path)))
    return hashlib.sha256(data).digest(), tuple(path for path in found if os.path.basename(path) != OUTSIDE)


@functools.cache
def digest(file: str) -> str:
    """Hash of a source file and of all it imports from edgelm, directly or not: 16 digits."""
    seen: dict[str, bytes] = {}
    todo = [file]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen[path], others = imports(path)
            todo.extend(others)
    whole = hashlib.sha256()
    for path in sorted(seen):
        whole.update(os.path.basename(path).encode() + seen[path])
    return whole.hexdigest()[:16]
