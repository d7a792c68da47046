"""What a comparison shows, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from lmms_plugin.analysis.comparison import Comparison, GroupChange, Shifted
from lmms_plugin.analysis.records import KINDS
from lmms_plugin.metrics.paired import Difference, holm
from lmms_plugin.utils.messages import counted

SHOWN, REVERSE, EQUIVALENT, OPEN = "shown", "the opposite shown", "no difference", "not shown"
RIGHT: Mapping[str, str] = MappingProxyType(
    {
        SHOWN: "more often right",
        REVERSE: "less often right",
        EQUIVALENT: "equally often right",
        OPEN: "no difference shown",
    }
)
"""Finding → wording for a difference of accuracies."""
LOST: Mapping[str, str] = MappingProxyType(
    {
        SHOWN: "loses less",
        REVERSE: "loses more",
        EQUIVALENT: "loses as much",
        OPEN: "was not shown to lose less or more",
    }
)
"""Finding → wording for an interaction of accuracies: what is lost from clean to shifted data."""
REJECTION = "rejection_auroc"
_MOST_GROUPS = 4


def finding(difference: Difference, p: float, level: float) -> str:
    """Return what a test shows: a difference (adjusted p), its absence (equivalence), or neither.

    A significant difference within the margin is too small to count: it is reported as no difference.
    """
    if difference.equivalent:
        return EQUIVALENT
    if p < 1.0 - level:
        return SHOWN if difference.value > 0.0 else REVERSE
    return OPEN


def sentences(found: Comparison, level: float) -> list[str]:
    """Return the verdict on a comparison: on clean tasks, on shifted ones, and whether more is lost under shift.

    Args:
        found: Comparison.
        level: Confidence level of its intervals.
    """
    groups = [one for one in found.groups if is_accuracy(one.metric)]
    lost = [one for one in found.shifted if is_accuracy(one.metric)]
    p_lost = [float(p) for p in holm([one.interaction.p for one in lost])]
    if not groups:
        return [_rejected(one, level) for one in found.groups if one.metric == REJECTION][:_MOST_GROUPS] or [
            "The runs have no accuracy that could be compared."
        ]
    if len(groups) > _MOST_GROUPS:
        said = [_counted("the second run is", groups, [(g.difference, g.p_holm) for g in groups], RIGHT, level)]
        if lost:
            judged = [(one.interaction, p) for one, p in zip(lost, p_lost, strict=True)]
            said.append(_counted("from clean to shifted data it", lost, judged, LOST, level))
        return said
    named = [finding(one.difference, one.p_holm, level) != OPEN for one in groups]
    said = [_right(one, level, first=not any(named[:k])) for k, one in enumerate(groups)]
    return [*said, *(_lost(one, p, level, several=len(lost) > 1) for one, p in zip(lost, p_lost, strict=True))]


def is_accuracy(metric: str) -> bool:
    """Return whether a metric of lmms-eval's table is the share of right answers, strict thresholds left out."""
    return metric in ("accuracy", *(kind.named("accuracy") for kind in KINDS))


def points(difference: Difference) -> str:
    """Format a difference of shares in points, with its interval: `-4.5 [-6.2, -2.8]`."""
    if math.isnan(difference.value):
        return "undefined"
    ends = "" if math.isnan(difference.low) else f" [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return f"{100 * difference.value:+.1f}{ends}"


def p_text(p: float) -> str:
    """Format a p-value; "undefined" where there is none."""
    return "undefined" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _where(one: GroupChange) -> str:
    if one.condition == "clean":
        return one.group
    task = f"{one.condition} task"
    return f"the {task if one.tasks == 1 else counted(one.tasks, task)} of {one.group}"


def _right(one: GroupChange, level: float, *, first: bool) -> str:
    kind = finding(one.difference, one.p_holm, level)
    who = "the second run" if first else "it"
    said = f"{points(one.difference)} points, p {p_text(one.p_holm)}"
    if kind == OPEN:
        return f"On {_where(one)}, no difference was shown ({said})."
    than = " than the first" if first and kind != EQUIVALENT else " as the first" if first else ""
    return f"On {_where(one)}, {who} is {RIGHT[kind]}{than}: {one.second:.3f} against {one.first:.3f} ({said})."


def _lost(one: Shifted, p: float, level: float, *, several: bool) -> str:
    kind = finding(one.interaction, p, level)
    where = f" ({one.task})" if several else ""
    return f"From clean to shifted data{where} it {LOST[kind]} ({points(one.interaction)} points, p {p_text(p)})."


def _rejected(one: GroupChange, level: float) -> str:
    kind = finding(one.difference, one.p_holm, level)
    words = {SHOWN: "better", REVERSE: "worse", EQUIVALENT: "equally well"}
    said = f"AUROC {one.second:.3f} against {one.first:.3f}, p {p_text(one.p_holm)}"
    if kind == OPEN:
        return f"On {_where(one)}, no difference in rejecting what is not there was shown ({said})."
    return f"On {_where(one)}, the second run rejects what is not there {words[kind]} ({said})."


def _counted(
    who: str,
    rows: Sequence[object],
    judged: Sequence[tuple[Difference, float]],
    words: Mapping[str, str],
    level: float,
) -> str:
    """Count findings: how many rows show what, and between which differences."""
    told = []
    for kind, said in words.items():
        same = [difference for difference, p in judged if finding(difference, p, level) == kind]
        if not same:
            continue
        values = sorted(100 * one.value for one in same if not math.isnan(one.value))
        between = f" ({values[0]:+z.1f} to {values[-1]:+z.1f} points)" if values else ""
        told.append(f"{said} on {len(same)}{between}")
    return f"Of {counted(len(rows), 'group')} of tasks, {who} {'; '.join(told)}."
