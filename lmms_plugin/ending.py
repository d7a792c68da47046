"""End of an lmms-eval run on an error that its user can fix: a last line (one for each error) and exit status 2.

By itself, lmms-eval prints a traceback, continues and exits with status 0, which signals success to its caller.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmms_plugin.utils.reading.problems import lines_of

STATUS = 2
_BEFORE, _BEHIND = "lmms-plugin: ", " (--verbosity DEBUG shows where)"
LINE = re.compile(rf"{_BEFORE}(.*?){re.escape(_BEHIND)}$")
"""Pattern of the last line; the first group is the error message, of several errors the last."""
USER_ERRORS = (ValueError, OSError, ImportError)
"""Exceptions that stand for unusable arguments, files and libraries."""
_COMMANDS = ("lmms-eval", "lmms_eval")


@contextmanager
def ends_the_command(kinds: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[None]:
    """End lmms-eval's command on an error within; a caller of lmms-eval from Python gets the exception itself.

    The command, too, raises the exception if several evaluations are configured, since others may succeed, or if it
    shows everything (`--verbosity DEBUG`). On a thread other than the main one, the waiting caller gets it, since only
    the main thread ends the process.

    Args:
        kinds: Exceptions that end the command.

    Raises:
        SystemExit: In the command, after the line is written to standard error.
    """
    try:
        yield
    except kinds as error:
        if threading.current_thread() is not threading.main_thread() or not _ends(sys.argv):
            raise
        sys.stdout.flush()
        _close_bars()
        *above, last = lines_of(error)
        print(
            *(f"{_BEFORE}{line}\n" for line in above), f"{_BEFORE}{last}{_BEHIND}", sep="", file=sys.stderr, flush=True
        )
        raise SystemExit(STATUS) from error


def _close_bars() -> None:
    """End every progress bar now: each is drawn once more when it ends, which would be below the last line."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


def in_command(argv: list[str]) -> bool:
    """Return whether this process runs lmms-eval's command on arguments alone, not on a file of evaluations."""
    program = Path(argv[0]) if argv else Path()
    named = program.name if program.name != "__main__.py" else program.parent.name
    return named in _COMMANDS and "--config" not in _words(argv)


def _words(argv: list[str]) -> list[str]:
    return " ".join(argv[1:]).replace("=", " ").split()


def _ends(argv: list[str]) -> bool:
    return in_command(argv) and "--verbosity DEBUG" not in " ".join(_words(argv))
