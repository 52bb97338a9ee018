"""The command `edgelm`, which is `python -m edgelm`, too."""

import gc
import sys


def start() -> None:
    """Runs the command; Ctrl-C ends it without a traceback, also while its modules are still read."""
    try:
        from edgelm.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        gc.freeze()  # what the process still holds need not be looked through for cycles: 30 ms of its end


if __name__ == "__main__":
    start()
