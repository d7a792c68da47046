"""The verdict of a study that stops when it knows, in words and one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmms_plugin.analysis.findings import EQUIVALENT, LOST, OPEN, REVERSE, RIGHT, SHOWN
from lmms_plugin.study.file import analyses
from lmms_plugin.study.file.analyses import MethodByShift
from lmms_plugin.study.file.asked import AskedError
from lmms_plugin.study.verdicts import verdict
from lmms_plugin.study.verdicts.conclusions import Conclusion
from lmms_plugin.study.verdicts.decisions import INTERACTION, UNDER_SHIFT, ArmComparison, Decision
from lmms_plugin.study.verdicts.stages import Decided
from lmms_plugin.utils.messages import counted

_WORDS = {UNDER_SHIFT: verdict.UNDER_SHIFT, INTERACTION: verdict.INTERACTION}


def asked_of(analysis: Mapping[str, Any]) -> MethodByShift:
    """Parse the question of an `analysis` that can be decided in stages.

    Raises:
        ValueError: It is of another kind.
    """
    question = analyses.question(analysis)
    if not isinstance(question, MethodByShift):
        raise AskedError("kind", f"expected {analyses.DEFAULT} for --until-decided, got {analysis['kind']!r}")
    return question


def conclude(found: Decided) -> list[Conclusion]:
    """Return what was decided, for each model."""
    decisions = found.decisions
    return [
        Conclusion(
            f"{decisions.question.question} {model}",
            [*_sentences(found, model), _scope(found)],
            [_told(one, decisions.found[one], decisions.question) for one in _of(found, model)],
            [_table(found, model)],
            [_legend(found)],
            _details(found, model),
        )
        for model in dict.fromkeys(one.model for one in decisions.members)
    ]


def _of(found: Decided, model: str) -> list[ArmComparison]:
    return [one for one in found.decisions.members if one.model == model]


def _finding(one: ArmComparison, state: Decision) -> str:
    return verdict.NOT_JUDGED if one.asked == INTERACTION and state.broken else state.finding


def _sentences(found: Decided, model: str) -> list[str]:
    """Return one line for each pair: what is right more often under shift, what loses less, with bits and images."""
    lines = []
    for pair in found.decisions.question.contrasts:
        told = []
        for asked, words in ((UNDER_SHIFT, RIGHT), (INTERACTION, LOST)):
            same = [one for one in _of(found, model) if (one.first, one.second) == pair and one.asked == asked]
            said = []
            for kind, text in {**words, verdict.NOT_JUDGED: "is not judged, an arm is broken,"}.items():
                at = [
                    f"{one.bits} bits ({counted(state.images, 'image')})"
                    for one in same
                    if _finding(one, state := found.decisions.found[one]) == kind
                ]
                if at:
                    said.append(f"{text} at {' and '.join(at)}")
            told.append("; ".join(said))
        lines.append(
            f"{model}, {pair[0]} against {pair[1]} on shifted images: {told[0]}. From clean to shifted images it"
            f" {told[1]}."
        )
    return lines


def _scope(found: Decided) -> str:
    question, schedule = found.decisions.question, found.schedule
    whole = len(found.decisions.compared()) * (1 + len(question.shifted)) * schedule.documents[-1]
    open_ones = len(found.decisions.open())
    rest = f"; {open_ones} of {counted(len(found.decisions.members), 'comparison')} undecided" if open_ones else ""
    return (
        f"Stopped after {counted(found.stages, 'stage')} and {schedule.images[found.stages - 1]} of"
        f" {counted(schedule.images[-1], 'image')}, in random order (seed {schedule.seed}){rest}. {found.asked:,}"
        f" answers instead of {whole:,}: {100 * (1 - found.asked / whole):.0f} % saved."
    )


def _told(one: ArmComparison, state: Decision, question: MethodByShift) -> str:
    by = f"by {_points(state)} points, {counted(state.images, 'image')}"
    if _finding(one, state) == verdict.NOT_JUDGED:
        kept = " and ".join(state.broken)
        return (
            f"{one.bits} bits: robustness of {one.first} and {one.second} is not judged, since less than half of the"
            f" unquantized model's clean accuracy is left in {kept} ({by})."
        )
    words = _WORDS[one.asked]
    kinds = {SHOWN: words.shown, REVERSE: words.reverse, EQUIVALENT: words.equivalent, OPEN: words.open}
    said = kinds[state.finding].format(
        first=one.first, second=one.second, by=by, within=f"±{100 * question.margin:g} points"
    )
    return f"{one.bits} bits: {said}."


def _points(state: Decision) -> str:
    low, high = state.interval
    return f"{100 * state.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _table(found: Decided, model: str) -> dict[str, Any]:
    columns = ["bits", "first", "second", "asked", "finding", "difference, points", "images", "documents", "saved"]
    rows = [_row(one, found) for one in _of(found, model)]
    return {"title": f"{model}: comparisons", "columns": columns, "rows": rows}


def _row(one: ArmComparison, found: Decided) -> list[str]:
    state = found.decisions.found[one]
    saved = 1.0 - state.documents / found.schedule.documents[-1]
    names = [str(one.bits), one.first, one.second, one.asked, _finding(one, state)]
    return [*names, _points(state), str(state.images), str(state.documents), f"{100 * saved:.0f} %"]


def _legend(found: Decided) -> str:
    return (
        f"Differences in points of accuracy, first arm less second. {found.decisions.rule.legend()} Interaction:"
        " difference under shift less difference on clean data. Equivalent means within"
        f" ±{100 * found.decisions.question.margin:g} points. Saved: documents that the comparison did not need."
    )


def _details(found: Decided, model: str) -> dict[str, Any]:
    rows = [one._asdict() | found.decisions.found[one]._asdict() for one in _of(found, model)]
    schedule = found.schedule._asdict()
    return {"model": model, "comparisons": rows, "stages": found.stages, "schedule": schedule, "answers": found.asked}
