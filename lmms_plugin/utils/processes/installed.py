"""Commands that were installed with this package."""

import sys
from pathlib import Path


def command(name: str) -> str:
    """Path of a command beside this interpreter, whose environment need not be active; else its name for the PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name
