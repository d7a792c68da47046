"""What `distance` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lmms_plugin.analysis.distances import Distance, TaskDistance
from lmms_plugin.cli.screens.screen import ScreenTable, ends, labelled, number, screen
from lmms_plugin.utils.messages import counted

_REST = "Everything: --all, --json; what each line means: docs/distance.md"
_BOUNDED = ("kl", "kl_coordinates")


def distance_screen(found: Sequence[TaskDistance], labels: Sequence[str], level: float) -> str:
    """Return what the distance of a model is, in sentences and a table for each task.

    Args:
        found: Distance on each task.
        labels: Labels of the run, or of the reference's and the model's run.
        level: Confidence level of the intervals.
    """
    answer = [_sentence(found[0], level)]
    if len(found) > 1:
        answer.append(f"{counted(len(found) - 1, 'more task')} below.")
    return screen(answer, [_table(one, level) for one in found], _notes(found[0], labels), _REST)


def distance_lines(found: Sequence[TaskDistance], labels: Sequence[str], level: float) -> list[str]:
    """Return everything, line by line, however long it gets."""
    lines = [_sentence(one, level) for one in found]
    lines += ["", *_notes(found[0], labels)]
    for one in found:
        table = _table(one, level)
        cells = [table.headings, *table.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", table.title]
        for first, *others in cells:
            padded = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([f"{first:{widths[0]}}", *padded]).rstrip())
    return lines


def _notes(one: TaskDistance, labels: Sequence[str]) -> list[str]:
    flips = "flips: of F flipped answers, the share among the F of the largest distance."
    if one.exact:
        return [f"run: {labels[0]}", "KL is exact: the reference's answers were forced through the model.", flips]
    names = labelled(("A: ", "B: "), labels)
    kept = f"KL is bounded by what logs keep, at {one.compared} of {one.tokens} tokens (to the first other one);"
    return [*names, kept, "exact: run B with --model_args reference=.", flips]


def _sentence(one: TaskDistance, level: float) -> str:
    by_name = {measure.measure: measure for measure in one.measures}
    kl = by_name.get("kl")
    said = f"On {one.task} no token's distribution could be compared"
    if kl is not None:
        between = f"{100 * level:g} % interval {_short(kl.interval.low)}\N{EN DASH}{_short(kl.interval.high)}"
        amount = _short(kl.value) if one.exact else f"{_short(kl.value)} to {_short(kl.upper)}"
        # What A is, only the user knows.
        which = ("the model", "the unquantized one") if one.exact else ("B", "A")
        said = f"On {one.task} {which[0]} is {amount} nats per token from {which[1]} ({between})"
    if (same := by_name.get("answer_agreement")) is not None:
        writes, like = ("would write", "that") if one.exact else ("writes", "A")
        said += f" and {writes} {100 * same.value:.0f} % of the answers as {like} does, token by token"
    if one.lost is None or one.won is None:
        return f"{said}."
    flipped = one.lost + one.won
    said += f"; {flipped} of {counted(one.records, 'answer')} flipped between right and wrong"
    best = _best(one.measures)
    if best is None:
        return f"{said}."
    furthest = f"{counted(flipped, 'answer')} of the largest {best.measure}"
    return f"{said}, {100 * best.flips_predicted:.0f} % of them among the {furthest}."


def _best(measures: Sequence[Distance]) -> Distance | None:
    known = {one.measure: one for one in measures if not math.isnan(one.flips_predicted)}
    return known.get("box_shift", known.get("kl"))


def _table(one: TaskDistance, level: float) -> ScreenTable:
    rows = []
    for measure in one.measures:
        bounded = not one.exact and measure.measure in _BOUNDED
        value = f"{_short(measure.value)}\N{EN DASH}{_short(measure.upper)}" if bounded else _short(measure.value)
        between = f"{_short(measure.interval.low)}\N{EN DASH}{_short(measure.interval.high)}"
        if measure.interval.low < 0 and not math.isnan(measure.interval.low):
            between = f"[{_short(measure.interval.low)}, {_short(measure.interval.high)}]"
        if math.isnan(measure.interval.low):
            between = ""
        of_flips = ends(*measure.flips_interval, digits=2)
        rows.append((measure.measure, value, between, number(measure.flips_predicted, 2), of_flips))
    title = f"{one.task}: {counted(one.records, 'answer')}, {counted(one.images, 'image')}"
    wide = f"{100 * level:g} %"
    return ScreenTable(("measure", "mean", wide, "flips", wide), rows, "measure", title)


def _short(value: float) -> str:
    """Format with three digits that count; divergences of 8 bits are far below a thousandth."""
    if math.isnan(value):
        return "?"
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0.0 else f"{value:#.2g}"
