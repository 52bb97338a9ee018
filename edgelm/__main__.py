"""The command `edgelm`, which is `python -m edgelm`, too."""

import gc
import os
import sys


def prepare() -> None:
    """Settings of a process that is there for edgelm alone, so that it starts sooner; before NumPy is imported."""
    gc.set_threshold(100_000)  # a start makes many objects and hardly any garbage: 8 ms
    # In cycles, a power of two: NumPy's threads burn a core for 0.1 s when they are made, while weights are packed.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")


def start() -> None:
    """Runs the command; Ctrl-C ends it without a traceback, also while its modules are still read."""
    try:
        prepare()
        from edgelm.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        gc.freeze()  # what the process still holds need not be looked through for cycles: 30 ms of its end


if __name__ == "__main__":
    start()
