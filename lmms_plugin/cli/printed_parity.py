"""What `parity` prints: one screen, the verdict first, or all of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from lmms_plugin.analysis.comparison import Change
from lmms_plugin.analysis.parity.gaps import Counted
from lmms_plugin.analysis.parity.judging_parity import Parity
from lmms_plugin.cli.screens.screen import HEIGHT, cut, labelled, wrapped

_METRICS = ("acc@0.5", "accuracy", "box_rate", "mean_iou", "ece", "aurc")
_CLOSING = "What each line means: docs/parity.md; everything: --all, --json"


def lines(found: Parity, level: float, *, everything: bool = False) -> list[str]:
    """Return the lines of a comparison.

    Args:
        found: Comparison.
        level: Confidence level of the intervals.
        everything: Whether nothing is cut, however long it gets.
    """
    if everything:
        return _all_lines(found, level)
    head = [*wrapped(found.sentence), ""]
    head += labelled(("A: ", "B: "), (found.first, found.second))
    if found.left_out:
        head += [cut(f"only one run has: {', '.join(found.left_out)}")]
    head += ["", *(cut(f"{name:22}{value}") for name, value in _numbers(found)), ""]
    for cause in found.causes[1:]:
        head += wrapped(f"also: {cause.name}: {cause.evidence}", 3)
    changes = list(_changes(found.changes, level))
    room = HEIGHT - len(head) - 2
    if len(changes) > room:
        changes = [*changes[: max(room - 1, 0)], f"... and {len(changes) - room + 1} more lines: --all"]
    return [*head[: HEIGHT - 1 - len(changes)], *changes, _CLOSING]


def _all_lines(found: Parity, level: float) -> list[str]:
    head = [found.sentence, "", f"A: {found.first}", f"B: {found.second}"]
    head += [f"only one run has: {', '.join(found.left_out)}"] if found.left_out else []
    numbers = [f"{name:22}{value}" for name, value in _numbers(found)]
    causes = [f"also: {cause.name}: {cause.evidence}" for cause in found.causes[1:]]
    return [*head, "", *numbers, "", *causes, *_changes(found.changes, level, None)]


def _numbers(found: Parity) -> Iterator[tuple[str, str]]:
    whole = found.whole
    only = f"; {whole.first_only} only in A, {whole.second_only} only in B"
    yield "documents", f"{whole.documents}{only if whole.first_only or whole.second_only else ''}"
    yield "image size", _counted(whole.read.image_sizes)
    yield "image tokens", _counted(whole.read.image_tokens)
    yield "prompt length", _counted(whole.read.prompt_lengths)
    yield "prompt ids", _counted(whole.read.prompts)
    yield "answers, texts", _counted(whole.written.texts)
    yield "answers, tokens", _counted(whole.written.tokens._replace(example=""))
    if first := whole.written.first_different:
        median = f"after {np.median(first):g} equal tokens (median)"
        yield "first difference", f"{median}, {whole.written.at_coordinates} of {len(first)} at coordinates"
    gap = whole.logprobs
    if gap.tokens:
        yield "log-probabilities", f"mean {gap.mean:.2g}, max {gap.largest:.2g} nats over {gap.tokens} equal tokens"
    if gap.coordinates:
        of = f"mean {gap.coordinate_mean:.2g}, max {gap.coordinate_largest:.2g} over {gap.coordinates}"
        yield "  at coordinates", of
    boxes = whole.boxes
    if boxes.both or boxes.first_only or boxes.second_only:
        alone = f"; {boxes.first_only} only in A, {boxes.second_only} only in B"
        yield "boxes", f"{boxes.moved} of {boxes.both} moved{alone if boxes.first_only or boxes.second_only else ''}"
    if not math.isnan(boxes.mean_shift):
        yield "  shift", f"mean {boxes.mean_shift:.3g}, max {boxes.largest_shift:.3g} pixels of the original image"
    if boxes.both:
        yield "  IoU of A's and B's", f"mean {boxes.mean_iou:.4f}, least {boxes.least_iou:.4f}"


def _counted(one: Counted) -> str:
    if not one.known:
        return "not told by both"
    return (
        f"equal in {one.known}"
        if not one.different
        else f"{one.different} of {one.known} differ{f'; {one.example}' if one.example else ''}"
    )


def _changes(changes: list[Change], level: float, metrics: tuple[str, ...] | None = _METRICS) -> Iterator[str]:
    asked = [change for change in changes if metrics is None or change.metric in metrics]
    shown = [change for change in asked if not math.isnan(change.difference.value)]
    if shown:
        yield f"{'B less A':22}{'A':>9}{'B':>9}{'B - A':>10}  {100 * level:g} % interval by image"
    task = ""
    for change in shown:
        if change.task != task:
            task = change.task
            yield cut(task)
        d = change.difference
        ends = "" if math.isnan(d.low) else f"  [{d.low:+z.4f}, {d.high:+z.4f}]"
        yield f"  {change.metric:20}{change.first:z9.4f}{change.second:z9.4f}{d.value:+z10.4f}{ends}"
