"""Paths of commands that were installed with this package."""

import sys
from pathlib import Path


def command(name: str) -> str:
    """Return the path of a command beside this interpreter (even in an inactive environment), else its name."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name
