"""What `reproduce` prints: a verdict per published number, and why one may differ."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from lmms_plugin.analysis.reproduction.deviation_reasons import DeviationReason
from lmms_plugin.analysis.reproduction.judging_reproduction import (
    WIDEST,
    ModelReproduction,
    Reproduction,
    SplitReproduction,
)
from lmms_plugin.cli.screens.screen import WIDTH, ScreenTable, ends, number, screen
from lmms_plugin.utils.messages import counted

_MOST_SENTENCES = 3
_EVIDENCE = WIDTH - 16 - 5 - 4
"""Columns of the last column of reasons."""


def reproduction_screen(found: ModelReproduction) -> str:
    """Return the verdicts in sentences, the numbers in a table, and the reasons of the first number that differs."""
    worst_first = sorted(found.splits, key=lambda one: _ORDER.index(one.verdict))
    answer = [_sentence(one, found) for one in worst_first[:_MOST_SENTENCES]]
    tables = [_numbers(found)]
    if (first := worst_first[0]).reasons:
        title = "Why it may differ" + (f", on {first.task}" if len(found.splits) > 1 else "")
        tables.append(_reasons(first.reasons, title))
    sources = dict.fromkeys(one.published.source for one in found.splits)
    notes = [line for source in sources for line in wrap(f"Published: {source}.", WIDTH)]
    if found.not_run:
        notes += wrap(f"Also published, not in this run: {', '.join(found.not_run)}.", WIDTH)
    return screen(answer, tables, notes, "Everything: --json; the same run again: --results FOLDER")


_ORDER = (Reproduction.OFF, Reproduction.UNDECIDED, Reproduction.REPRODUCED)


def _sentence(one: SplitReproduction, found: ModelReproduction) -> str:
    interval = f"the {100 * found.level:g} % interval {_ends(one)}"
    ours, published = _points(one.ours.value), _points(one.published.value)
    said = f"{found.model} has {ours} % on {one.task} where {published} % are published"
    part = "" if one.whole else f" This is of the first {counted(one.records, 'expression')}, which are no sample."
    if one.verdict is Reproduction.REPRODUCED:
        return f"Reproduced: {said}, inside {interval}."
    if one.verdict is Reproduction.OFF:
        off = f"Off {'' if one.whole else 'so far '}by {_points(one.difference, signed=True)} points"
        return f"{off}: {said}, outside {interval}.{part}"
    if one.width <= WIDEST:
        return f"Not decided: {said}, inside {interval}.{part}"
    return (
        f"Not decided: {said}, inside {interval}, which is {_points(one.width)} points wide (at most"
        f" {_points(WIDEST)} decide) and holds {one.others_inside} of {one.others} other models' numbers as well.{part}"
    )


def _numbers(found: ModelReproduction) -> ScreenTable:
    rows = [
        (
            one.task,
            _points(one.ours.value),
            _ends(one),
            _points(one.published.value),
            _points(one.difference, signed=True),
            str(one.records),
            str(one.images),
            str(one.verdict),
        )
        for one in found.splits
    ]
    level = f"{100 * found.level:g} %"
    headings = ("acc@0.5, %", "ours", level, "publ.", "diff.", "n", "images", "verdict")
    return ScreenTable(headings, rows, "task", texts=(7,))


def _reasons(reasons: Sequence[DeviationReason], title: str) -> ScreenTable:
    rows = [(one.name, str(one.standing), "\n".join(wrap(one.evidence, _EVIDENCE))) for one in reasons]
    return ScreenTable(("reason", "is", "what the run says"), rows, "reason", title, texts=(1, 2))


def _points(value: float, *, signed: bool = False) -> str:
    return number(100 * value, 1, signed=signed)


def _ends(one: SplitReproduction) -> str:
    return ends(100 * one.ours.low, 100 * one.ours.high, 1)
