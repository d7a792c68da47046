"""What a process that has ended left behind: its log as a terminal shows it, and its exit status in words."""

import re
import signal

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_FROM_SIGNALS = 128


def lines(log: str) -> list[str]:
    """Return the lines of a log as a terminal finally shows them: without colours and overwritten progress bars."""
    return [line.rstrip().rsplit("\r", 1)[-1] for line in _COLOURS.sub("", log).split("\n")]


def ending(status: int) -> str:
    """Return how a process ended: `ended with status 1`, `was ended by SIGKILL, as systems do when memory runs out`.

    Args:
        status: Exit status; 128 plus the number of the signal that ended the process.
    """
    if status - _FROM_SIGNALS in signal.valid_signals():
        name = signal.Signals(status - _FROM_SIGNALS).name
        return f"was ended by {name}{', as systems do when memory runs out' if name == 'SIGKILL' else ''}"
    return f"ended with status {status}"
