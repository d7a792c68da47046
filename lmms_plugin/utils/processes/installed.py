"""Paths of commands that were installed with this package."""

import sys
from pathlib import Path


def command(name: str) -> str:
    """Return the path of a command beside this interpreter, whose environment may be inactive; else its name for the PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name
