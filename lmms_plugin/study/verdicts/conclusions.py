"""Input and output types of an analysis."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Conclusion(NamedTuple):
    """Result of an analysis.

    Attributes:
        title: Question of the study.
        sentences: Verdict, the most important sentence first.
        findings: Evidence for the verdict, one finding each.
        tables: Tables as {"title", "columns", "rows"}, all cells text.
        notes: Explanation of the tables.
        details: All numbers.
    """

    title: str
    sentences: list[str]
    findings: list[str]
    tables: list[dict[str, Any]]
    notes: list[str]
    details: Any


class Partial(NamedTuple):
    """Extent of a partial analysis, in words.

    Attributes:
        finished: Number of finished cells.
        missing: Cells that are missing.
    """

    finished: str
    missing: str

    def __str__(self) -> str:
        return f"Partial: {self.finished}, missing: {self.missing}"


class ExpectedCell(Protocol):
    """A cell that will run."""

    @property
    def axes(self) -> Any:
        """Place of the cell in the study."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks and groups that the cell answers."""


def markdown(found: Conclusion) -> str:
    """Render a conclusion as Markdown, without the detailed numbers."""
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
