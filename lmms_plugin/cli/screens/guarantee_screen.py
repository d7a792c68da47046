"""What `guarantee` prints: the promise, where it survives, and with `--all` every judged task."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from lmms_plugin.analysis.guarantees.guarantee_results import JudgedCell, RunGuarantee, Survival
from lmms_plugin.analysis.guarantees.guarantee_sentences import promise, sentences
from lmms_plugin.cli.screens.screen import NUMBERS, ScreenTable, number, screen, wrapped
from lmms_plugin.utils.messages import counted


def guarantee_screen(found: RunGuarantee) -> str:
    """Return the promise, on how many tasks it is kept and broken, and where."""
    settings = found.settings
    answer = sentences(found)
    pilot = found.chosen.pilot_images
    after = f", after {counted(pilot, 'other')} said which to test" if pilot else ""
    notes = wrapped(
        f"Chosen on {counted(found.chosen.images, 'image')} of {found.task} in {found.run}{after}."
        f" Bounds hold with {100 * settings.level:g} %. Broken: p by Holm over all tasks."
    )
    if found.margin is not None:
        notes += wrapped(_margin(found))
    tables = [_by_condition(found), _worst(found), _anew(found)]
    return screen(answer, tables, notes, f"Every task: --all, --json; {NUMBERS}")


def _margin(found: RunGuarantee) -> str:
    assert found.margin is not None
    one = found.margin
    if not one.boxes:
        return "No box is accepted on the images for a margin, so that none is chosen."
    if not math.isfinite(one.margin):
        return f"No margin of boxes is enough to contain the true one in {100 * one.probability:g} % of images."
    return (
        f"Boxes grown by {100 * one.margin:.0f} % of their sides contain the true one with {100 * one.probability:g} %"
        f" ({counted(one.images, 'image')})."
    )


def _by_condition(found: RunGuarantee) -> ScreenTable:
    """Return one row for every run, on clean data and under each kind of shift."""
    groups: dict[tuple[str, str], list[JudgedCell]] = {}
    for cell in found.cells:
        groups.setdefault((cell.run, cell.condition), []).append(cell)
    rows = []
    for (run, condition), cells in groups.items():
        counts = [sum(cell.verdict is verdict for cell in cells) for verdict in (Survival.HOLDS, Survival.BROKEN)]
        flipped = [cell.flipped_high for cell in cells if cell.flipped_high is not None]
        rows.append(
            (
                f"{run}, {condition}",
                str(len(cells)),
                *map(str, counts),
                _span([cell.risk for cell in cells]),
                _span([cell.coverage for cell in cells]),
                _percent(max(flipped)) if flipped else "",
            )
        )
    headings = ("run", "tasks", "hold", "broken", "risk, %", "accepted, %", "flipped <=")
    return ScreenTable(headings, rows, "group of tasks")


def _worst(found: RunGuarantee) -> ScreenTable:
    """Return the tasks on which it is broken, those with the highest lower bound first."""
    broken = sorted((cell for cell in found.cells if cell.verdict is Survival.BROKEN), key=lambda cell: -cell.low)
    rows = [
        (cell.task, cell.run, _percent(cell.risk), _between(cell), _percent(cell.coverage), _reweighed(cell))
        for cell in broken
    ]
    headings = ("broken on", "run", "risk, %", "bounds", "accepted, %", "reweighed" if found.settings.reweigh else "")
    return ScreenTable(headings, rows, "task", texts=(1,))


def _anew(found: RunGuarantee) -> ScreenTable:
    """Return what can be promised where a threshold is chosen on each run's own answers."""
    rows = []
    for one in found.anew:
        finite = math.isfinite(one.chosen.threshold)
        shown = number(one.chosen.threshold) if finite else "none"
        rows.append((one.run, shown, _percent(one.chosen.coverage) if finite else "", _percent(one.chosen.observed)))
    headings = ("chosen anew on", "threshold", "accepted, %", "risk, %")
    return ScreenTable(headings, rows, "run", f"Thresholds of other runs' own answers to {found.task}")


def _reweighed(cell: JudgedCell) -> str:
    one = cell.reweighed
    if one is None:
        return ""
    if not one.overlaps:
        return "no overlap"
    return one.verdict.value if math.isfinite(one.threshold) else "none shown"


def _span(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    low, high = _percent(min(known)), _percent(max(known))
    return low if low == high else f"{low}\N{EN DASH}{high}"


def _between(cell: JudgedCell) -> str:
    return f"{_percent(cell.low)}\N{EN DASH}{_percent(cell.high)}"


def _percent(value: float) -> str:
    return number(100 * value, 1)


def guarantee_tables(found: RunGuarantee) -> list[Table]:
    """Return every judged task, and the promise as the title."""
    settings = found.settings
    shown = Table(title=promise(found), caption="p broken: adjusted by Holm over all tasks")
    for heading in ("run", "task"):
        shown.add_column(heading, no_wrap=True)
    headings = ["verdict", "risk", "bounds", "p broken", "accepted", "flipped", "flipped <=", "records", "images"]
    headings += ["contained"] if settings.contain is not None else []
    headings += ["reweighed", "risk", "accepted", "effective images", "AUROC"] if settings.reweigh else []
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for cell in found.cells:
        row = [cell.run, cell.task, cell.verdict.value, _percent(cell.risk), _between(cell), _p(cell.p_broken)]
        row += [_percent(cell.coverage), _maybe(cell.flipped), _maybe(cell.flipped_high)]
        row += [str(cell.documents), str(cell.images)]
        row += [_maybe(cell.contained)] if settings.contain is not None else []
        if (one := cell.reweighed) is not None:
            row += [_reweighed(cell), _percent(one.risk), _percent(one.coverage)]
            row += [f"{one.effective_images:.0f}", f"{one.auroc:.3f}"]
        shown.add_row(*row)
    return [shown]


def _maybe(value: float | None) -> str:
    return "" if value is None else _percent(value)


def _p(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2g}"
