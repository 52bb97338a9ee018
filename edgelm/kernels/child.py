"""Other processes of this Python: they find the modules that this one has found, and none in the current folder.

Python puts the current folder first where it runs a command or a module. But it may be full of somebody else's files,
whose `hashlib.py` would be executed.
"""

from __future__ import annotations

import os
import sys

from edgelm.kernels import sources


def command(*arguments: str) -> list[str]:
    """The command line of a Python with these arguments, which takes the paths of `environment` alone."""
    return [sys.executable, "-P", *arguments]


def environment() -> dict[str, str]:
    """The environment of this process, and its paths of modules, absolute; for the current folder that of edgelm."""
    paths = [os.path.abspath(path) if path else sources.ROOT for path in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([*paths, sources.ROOT]))}
