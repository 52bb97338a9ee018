"""The command `edgelm`, which is `python -m edgelm`, too."""

import sys


def start() -> None:
    """Runs the command; Ctrl-C ends it without a traceback, also while its modules are still read."""
    try:
        from edgelm.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    start()
