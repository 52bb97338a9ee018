"""`python -m edgelm` is the command `edgelm`."""

from edgelm.cli import main

main()
