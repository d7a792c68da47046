"""Reading lmms-eval's log: the progress of a run, and why it failed, which its exit status does not tell."""

import codecs
import re
from dataclasses import dataclass
from pathlib import Path

from lmms_plugin import ending
from lmms_plugin.utils.processes import process_log

_BAR = re.compile(r"(Answering|Postprocessing)[^:\r\n]*: *\d+%\|[^|\r\n]*\| *(\d+)/(\d+) ")
_TOLD = re.compile(r"Error during evaluation: (.*?)(?:\.? Please set `--verbosity=DEBUG`.*)?$")
_RAISED = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt|OutOfMemory)(?:: .*)?$")


@dataclass
class Bars:
    """Progress of a run by lmms-eval's progress bars, as far as its log was read.

    The work is to answer every request and then to score every document; each answer and each score counts as one unit.
    """

    _rest: str = ""
    _answered: tuple[int, int] = (0, 0)
    _scored: int = 0
    _scoring: int = 0

    def read(self, text: str) -> None:
        """Read the next piece of the log."""
        text = self._rest + text
        end = 0
        for bar in _BAR.finditer(text):
            end, done = bar.end(), int(bar[2])
            if bar[1] == "Answering":
                self._answered = done, int(bar[3])
                continue
            # Every task has one bar of this title; each is redrawn from 0.
            if done < self._scoring:
                self._scored += self._scoring
            self._scoring = done
        # The last bar may be incomplete.
        self._rest = text[max(end, text.rfind("\r"), text.rfind("\n")) :]

    @property
    def share(self) -> float | None:
        """Return the share of the work that is done, from 0 to 1; None before the first request is answered."""
        answered, total = self._answered
        return min(1.0, (answered + self._scored + self._scoring) / (2 * total)) if answered else None


class Followed:
    """A log that is still being written; every byte of it is read once.

    Attributes:
        file: Path of the log; need not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._bars, self._read = Bars(), 0
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def share(self) -> float | None:
        """Return the share of the run's work that is done now, as `Bars.share` does."""
        with self.file.open("rb") as stream:
            stream.seek(self._read)
            added = stream.read()
        self._read += len(added)
        self._bars.read(self._decode(added))
        return self._bars.share


def last_error(log: str) -> str | None:
    """Return the last error in a log in one line, else its last line; None if the log is empty."""
    written = [line.strip() for line in process_log.lines(log) if line.strip()]
    # The error that tenacity raises after the last attempt names no reason; its cause is printed above it.
    for line in reversed([line for line in written if "RetryError[" not in line]):
        if told := _TOLD.search(line) or ending.LINE.match(line):
            return told[1]
        if _RAISED.match(line):
            return line
    return written[-1] if written else None


def failure(log: str, status: int) -> str:
    """Return why a run of lmms-eval failed, in one line.

    Args:
        log: Standard output and standard error of the run.
        status: Exit status; 128 plus the number of the signal that ended the run.
    """
    how = "left no results (it exits with 0 after an error)" if status == 0 else process_log.ending(status)
    said = last_error(log)
    return f"lmms-eval {how}" + ("" if said is None else f"; last error: {said}")
