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
    return screen(answer, tables, notes, f"Everything: --json; the run: --results {found.results}")


_ORDER = (Reproduction.OFF, Reproduction.UNDECIDED, Reproduction.REPRODUCED)


def _sentence(one: SplitReproduction, found: ModelReproduction) -> str:
    percent = f"{found.level:.0%}".replace("%", " %")
    interval = f"{percent} interval {_ends(one)}"
    said = (
        f"{found.model} has {_points(one.ours.value)} % on {one.task}, {_points(one.published.value)} % are published"
    )
    limited = "" if one.whole else f" the first {counted(one.records, 'expression')} alone, which are no sample of it,"
    if one.verdict is Reproduction.REPRODUCED:
        return f"Reproduced: {said}, inside the {interval}."
    if one.verdict is Reproduction.OFF:
        away = f"Off by {_points(one.difference, signed=True)} points"
        on = f" on{limited}" if limited else ""
        return f"{away}{on.rstrip(',')}: {said}, outside the {interval}."
    inside = f"which also holds {one.others_inside} of the {one.others} other models' numbers"
    wide = f"is {_points(one.width)} points wide ({_points(WIDEST)} at most), and {inside}"
    why = f"the {interval} {wide}" if one.width > WIDEST else f"the {interval} is narrow enough"
    asked = f"; it is of{limited.rstrip(',')}" if limited else ""
    return f"Not decided: {said}; {why}{asked}."


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
