"""What a check has found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


class Status(StrEnum):
    """Whether a run works: as it should (`ok`), in part or differently (`warn`), or not (`fail`)."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class DiagnosisRow:
    """One line of the diagnosis.

    Attributes:
        check: What was looked at.
        status: Whether a run works.
        message: What was found, in one line.
        remedy: What to do about it; None where there is nothing to do.
    """

    check: str
    status: Status
    message: str
    remedy: str | None = None

    def __post_init__(self) -> None:
        """Keep texts of libraries, which may have many lines, to one."""
        for name in ("message", "remedy"):
            text = getattr(self, name)
            object.__setattr__(self, name, None if text is None else " ".join(text.split()))

    def to_dict(self) -> dict[str, str | None]:
        """Return the row as JSON has it."""
        return asdict(self)

    def line(self) -> str:
        """Return the row as one line of text."""
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.status:4}  {self.check}: {self.message}{remedy}"


def ok(check: str, message: str) -> DiagnosisRow:
    """Return a row on something that works."""
    return DiagnosisRow(check, Status.OK, message)


def warn(check: str, message: str, remedy: str | None = None) -> DiagnosisRow:
    """Return a row on something that works in part."""
    return DiagnosisRow(check, Status.WARN, message, remedy)


def fail(check: str, message: str, remedy: str | None = None) -> DiagnosisRow:
    """Return a row on something that does not work."""
    return DiagnosisRow(check, Status.FAIL, message, remedy)
