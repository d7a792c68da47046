"""The analysis a study file asks for: read and checked before anything runs, written when everything has run.

`kind` says which: `method_by_shift` (`lmms_plugin.study.verdicts.contrasts`; also without a kind), `against_reference` (every
cell against the unquantized model, with published numbers beside) or `components` (which component's bits decide a
score).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from lmms_plugin.study.file.asked import AskedError, parse
from lmms_plugin.utils.files import replace_text
from lmms_plugin.utils.plain_json import plain
from lmms_plugin.utils.suggest import near

DEFAULT = "method_by_shift"
JSON, MARKDOWN = "verdict.json", "verdict.md"


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


class Planned(Protocol):
    """A cell that will run."""

    @property
    def axes(self) -> Any:
        """Where it stands in the study."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks and groups that it answers."""


class Kind(NamedTuple):
    """A kind of analysis.

    Attributes:
        question: What its entries in a study file make.
        conclude: Study's folder, what was parsed, ids of the cells that count (None for all), threads → what the study
            says; raises ValueError.
        expect: Question, cells that will run → ValueError where some that it needs are not among them.
    """

    question: type[Any]
    conclude: Callable[[Path, Any, Collection[str] | None, int], list[Conclusion]]
    expect: Callable[[Any, Sequence[Planned]], None]


def check(asked: Mapping[str, Any]) -> None:
    """Refuse an `analysis` that could not be made.

    Raises:
        ValueError: Something in it is unknown, missing or of the wrong kind.
    """
    _parsed(asked)


def expect(asked: Mapping[str, Any], cells: Sequence[Planned]) -> None:
    """Refuse an analysis for which a study, when all of it has run, would lack cells or tasks.

    Raises:
        ValueError: Says what is missing.
    """
    kind, question = _parsed(asked)
    kind.expect(question, cells)


def conclude(
    study: Path,
    asked: Mapping[str, Any],
    only: Collection[str] | None = None,
    *,
    workers: int = 1,
    partial: Partial | None = None,
) -> list[Conclusion]:
    """Analyse a study's finished cells and write `verdict.json` and `verdict.md` into its folder.

    Args:
        study: Its folder.
        asked: The `analysis` of the study file.
        only: Ids of the cells that count; None for all in the folder.
        workers: Threads.
        partial: What is missing of the study; None where nothing is.

    Raises:
        ValueError: The analysis is not as it has to be, or cells that it needs are missing.
    """
    kind, question = _parsed(asked)
    found = kind.conclude(study, question, only, workers)
    if partial is not None:
        found = _said_of(partial, found)
    said = {
        "sentences": [line for one in found for line in one.sentences],
        "findings": [line for one in found for line in one.findings],
        "tables": [table for one in found for table in one.tables],
        "notes": list(dict.fromkeys(note for one in found for note in one.notes)),
        "details": [plain(one.details) for one in found],
    }
    replace_text(study / MARKDOWN, "\n".join(map(markdown, found)))
    replace_text(study / JSON, json.dumps(said, indent=1, allow_nan=False))
    return found


def withdraw(study: Path) -> None:
    """Remove the verdict of a study whose cells will not be those that it is about."""
    for name in (JSON, MARKDOWN):
        (study / name).unlink(missing_ok=True)


def _said_of(partial: Partial, found: Sequence[Conclusion]) -> list[Conclusion]:
    note = f"{partial}. Differences, intervals and p-values may be others when all are."
    noted = [one._replace(notes=[note, *one.notes]) for one in found]
    sentence = f"Partial: {partial.finished} (see the notes)."
    return [noted[0]._replace(sentences=[sentence, *noted[0].sentences]), *noted[1:]]


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


def _parsed(asked: Mapping[str, Any]) -> tuple[Kind, Any]:
    kinds = _kinds()
    given = dict(asked)
    name = given.pop("kind", DEFAULT)
    if not isinstance(name, str) or name not in kinds:
        raise AskedError("kind", f"expected one of {', '.join(kinds)}, got {name!r}{near(str(name), kinds)}")
    return kinds[name], parse(kinds[name].question, given)


def _kinds() -> Mapping[str, Kind]:
    from lmms_plugin.study.verdicts import against_reference, component_bits, contrasts

    return MappingProxyType(
        {
            DEFAULT: Kind(contrasts.Question, contrasts.conclude, contrasts.expect),
            "against_reference": Kind(against_reference.Question, against_reference.conclude, against_reference.expect),
            "components": Kind(component_bits.Question, component_bits.conclude, component_bits.expect),
        }
    )
