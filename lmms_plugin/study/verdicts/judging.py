"""Dispatch of a study file's question to its analysis: checked before anything runs, written when all has run.

The kinds of question are `method_by_shift` (`lmms_plugin.study.verdicts.contrasts`), `against_reference` (every cell
against the unquantized model, with published numbers beside) and `components` (which component's bits decide a score).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lmms_plugin.analysis.study_files import STAGES, VERDICT, VERDICT_IN_WORDS
from lmms_plugin.study.file import analyses
from lmms_plugin.study.verdicts import against_reference, component_bits, contrasts, verdict
from lmms_plugin.study.verdicts.conclusions import Conclusion, ExpectedCell, Partial, markdown
from lmms_plugin.utils.files import replace_text
from lmms_plugin.utils.plain_json import plain


class Procedure(NamedTuple):
    """Functions that answer one kind of question.

    Attributes:
        conclude: Function of the study's folder, question, ids of the cells that count (None for all) and number of
            threads that returns conclusions; raises ValueError.
        expect: Function of question and cells to run that raises ValueError if some required cells are not among them.
    """

    conclude: Callable[[Path, Any, Collection[str] | None, int], list[Conclusion]]
    expect: Callable[[Any, Sequence[ExpectedCell]], None]


_ANSWERED: Mapping[type[analyses.Question], Procedure] = MappingProxyType(
    {
        analyses.MethodByShift: Procedure(verdict.conclude, contrasts.expect),
        analyses.AgainstReference: Procedure(against_reference.conclude, against_reference.expect),
        analyses.ComponentBits: Procedure(component_bits.conclude, component_bits.expect),
    }
)


def expect(asked: Mapping[str, Any], cells: Sequence[ExpectedCell]) -> None:
    """Refuse an analysis for which the complete study would lack cells or tasks.

    Raises:
        ValueError: Something is missing; names it.
    """
    question = analyses.question(asked)
    _ANSWERED[type(question)].expect(question, cells)


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
        study: Folder of the study.
        asked: `analysis` of the study file.
        only: Ids of the cells that count; None for all in the folder.
        workers: Number of threads.
        partial: Extent of a partial analysis; None if no cell is missing.

    Raises:
        ValueError: The analysis is invalid, or cells that it needs are missing.
    """
    question = analyses.question(asked)
    found = _ANSWERED[type(question)].conclude(study, question, only, workers)
    if partial is not None:
        found = _said_of(partial, found)
    write(study, found)
    return found


def write(study: Path, found: Sequence[Conclusion]) -> None:
    """Write `verdict.json` and `verdict.md` into a study's folder."""
    said = {
        "sentences": [line for one in found for line in one.sentences],
        "findings": [line for one in found for line in one.findings],
        "tables": [table for one in found for table in one.tables],
        "notes": list(dict.fromkeys(note for one in found for note in one.notes)),
        "details": [plain(one.details) for one in found],
    }
    replace_text(study / VERDICT_IN_WORDS, "\n".join(map(markdown, found)))
    replace_text(study / VERDICT, json.dumps(said, indent=1, allow_nan=False))


def withdraw(study: Path) -> None:
    """Remove the verdict of a study whose set of cells is about to change, and the stages that it came from."""
    for name in (VERDICT, VERDICT_IN_WORDS, STAGES):
        (study / name).unlink(missing_ok=True)


def _said_of(partial: Partial, found: Sequence[Conclusion]) -> list[Conclusion]:
    note = f"{partial}. Differences, intervals and p-values may be others when all are."
    noted = [one._replace(notes=[note, *one.notes]) for one in found]
    sentence = f"Partial: {partial.finished} (see the notes)."
    return [noted[0]._replace(sentences=[sentence, *noted[0].sentences]), *noted[1:]]
