"""What lmms-eval's log tells: how far a run is, and why it failed, which its exit status does not."""

import re
import signal
from itertools import pairwise

from lmms_plugin import ending

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_BAR = re.compile(r"(Answering|Postprocessing)[^:\r\n]*: *\d+%\|[^|\r\n]*\| *(\d+)/(\d+) ")
_TOLD = re.compile(r"Error during evaluation: (.*?)(?:\.? Please set `--verbosity=DEBUG`.*)?$")
_RAISED = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt|OutOfMemory)(?:: .*)?$")
_FROM_SIGNALS = 128


def lines(log: str) -> list[str]:
    """The lines of a log as a terminal would show them at last: without colours and overwritten progress bars."""
    return [line.rstrip().rsplit("\r", 1)[-1] for line in _COLOURS.sub("", log).split("\n")]


def share(log: str) -> float | None:
    """How much of a run's work is done, from 0 to 1, by lmms-eval's bars; None before the first request is answered.

    The work is to answer every request and then to score every document, one request each; both count the same.
    """
    found = [(bar[1], int(bar[2]), int(bar[3])) for bar in _BAR.finditer(log)]
    answering = [(done, total) for title, done, total in found if title == "Answering"]
    if not answering or not answering[-1][0]:
        return None
    answered, total = answering[-1]
    # There is one bar of this title for every task; each is drawn again and again, from 0 on.
    scoring = [done for title, done, _ in found if title != "Answering"]
    scored = sum(now for now, then in pairwise([*scoring, 0]) if then < now)
    return min(1.0, (answered + scored) / (2 * total))


def last_error(log: str) -> str | None:
    """The last error that a log tells of, in one line; its last line where none looks like one; None if it is empty."""
    written = [line.strip() for line in lines(log) if line.strip()]
    # What tenacity raises after the last try names no reason; what it was raised from is told above it.
    for line in reversed([line for line in written if "RetryError[" not in line]):
        if told := _TOLD.search(line) or ending.LINE.match(line):
            return told[1]
        if _RAISED.match(line):
            return line
    return written[-1] if written else None


def failure(log: str, status: int) -> str:
    """Why a run of lmms-eval that is no good failed, in one line.

    Args:
        log: What it wrote to standard output and standard error.
        status: Its exit status; 128 and the number of the signal that ended it.
    """
    if status == 0:
        how = "left no results (it exits with 0 after an error)"
    elif status - _FROM_SIGNALS in signal.valid_signals():
        name = signal.Signals(status - _FROM_SIGNALS).name
        how = f"was ended by {name}{', as systems do when memory runs out' if name == 'SIGKILL' else ''}"
    else:
        how = f"ended with status {status}"
    said = last_error(log)
    return f"lmms-eval {how}" + ("" if said is None else f"; last error: {said}")
