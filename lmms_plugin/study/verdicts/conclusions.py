"""What an analysis is given and what it says."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Conclusion(NamedTuple):
    """What a study says.

    Attributes:
        title: The question.
        sentences: The verdict, the most important sentence first.
        findings: What it rests on, one by one.
        tables: As {"title", "columns", "rows"}, all cells text.
        notes: How the tables are to be read.
        details: Everything in numbers.
    """

    title: str
    sentences: list[str]
    findings: list[str]
    tables: list[dict[str, Any]]
    notes: list[str]
    details: Any


class Partial(NamedTuple):
    """Of how much of a study an analysis is, in words.

    Attributes:
        finished: How many cells.
        missing: Which are missing.
    """

    finished: str
    missing: str

    def __str__(self) -> str:
        return f"Partial: {self.finished}, missing: {self.missing}"


class ExpectedCell(Protocol):
    """A cell that will run."""

    @property
    def axes(self) -> Any:
        """Where it stands in the study."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks and groups that it answers."""


def markdown(found: Conclusion) -> str:
    """All of a conclusion but the numbers behind it, as Markdown."""
    parts = [f"## {found.title}", ""]
    parts += [f"- {line}" for line in found.sentences]
    if found.findings:
        parts += ["", "### Finding by finding", "", *(f"- {line}" for line in found.findings)]
    for table in found.tables:
        lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
        parts += ["", f"### {table['title']}", "", *(f"| {' | '.join(line)} |" for line in lines)]
    for note in found.notes:
        parts += ["", note]
    return "\n".join([*parts, ""])
