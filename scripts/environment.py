"""Makes the virtual environment that the other scripts run in: needs nothing but Python 3.11 or newer."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def prepare(extra: str = "") -> Path:
    """The interpreter of an environment with this checkout installed; set up at first use, kept after that.

    EDGELM_PYTHON names an interpreter that has everything already, and is used as it is.
    """
    if chosen := os.environ.get("EDGELM_PYTHON"):
        if not (found := shutil.which(chosen)):
            sys.exit(f"EDGELM_PYTHON={chosen}: there is no such program")
        return Path(found)
    if sys.version_info < (3, 11):  # noqa: UP036 - the one place that an old interpreter reaches
        sys.exit(f"edgelm needs Python 3.11 or newer; this is {sys.version.split()[0]} ({sys.executable})")
    stamp = VENV / f"edgelm-{extra or 'runtime'}.stamp"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if not PYTHON.exists():
        print(f"Making a virtual environment in {VENV} ...", file=sys.stderr)
        run([sys.executable, "-m", "venv", str(VENV)], "on Debian and Ubuntu: apt install python3-venv")
    if not stamp.exists() or stamp.read_text() != wanted:
        print("Installing edgelm and what it needs ...", file=sys.stderr)
        target = f"{ROOT}[{extra}]" if extra else str(ROOT)
        run([str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", target],
            "is a package index reachable?")
        stamp.write_text(wanted)
    return PYTHON


def run(command: list[str], hint: str) -> None:
    if subprocess.run(command, stdout=sys.stderr.fileno()).returncode:
        sys.exit(f"failed: {' '.join(command)}\n({hint})")


def become(command: list[str]) -> None:
    """Replaces this process by `command`, with the same terminal and exit code."""
    if os.name == "nt":  # Windows has no exec that keeps the console
        sys.exit(subprocess.run(command).returncode)
    os.execv(command[0], command)
