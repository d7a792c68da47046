"""What goes to a terminal: names are data, and never markup or characters that it cannot write."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 160


def console() -> Console:
    """Standard output for tables, in which `[/x]` and `:x:` are what they are.

    Tables that go to a file or a pipe must not be cut to the 80 columns assumed for it.
    """
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


def write_anything() -> None:
    """Have standard output and error write names that are no UTF-8, as file names may be, with escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
