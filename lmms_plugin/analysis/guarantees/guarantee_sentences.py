"""What `lmms_plugin.analysis.guarantees.guarantee` found, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lmms_plugin.analysis.guarantees.guarantee_results import JudgedCell, RunGuarantee, Survival
from lmms_plugin.analysis.guarantees.guarded_loss import GuardedLoss
from lmms_plugin.analysis.records import CLEAN
from lmms_plugin.utils.messages import counted

_RARE = {
    GuardedLoss.ERROR: ("of accepted answers are wrong", "of which {lost} are wrong"),
    GuardedLoss.IOU: ("of IoU are lost by accepted boxes on average", "which lose {lost}"),
    GuardedLoss.FALSE_POSITIVE: (
        "of expressions that match nothing get an accepted box",
        "of those that match nothing",
    ),
}
"""What is promised to be rare, and how what was seen of it is told."""
_MOST_NAMED = 3


def sentences(found: RunGuarantee) -> list[str]:
    """Return the promise, on how many tasks it is kept and broken, for which runs, and what weights are worth."""
    said = [promise(found), *(_survival(found) if math.isfinite(found.chosen.threshold) else ())]
    return said if found.reweighing is None else [*said, _weighed(found)]


def promise(found: RunGuarantee) -> str:
    """Return what is promised, and at which threshold; or that nothing could be."""
    settings, chosen = found.settings, found.chosen
    rare, told = _RARE[settings.loss]
    alike = ", images counting alike" if settings.per_image else ""
    what = f"At most {100 * settings.risk:g} % {rare}{alike}, with {100 * settings.level:g} % confidence"
    if not math.isfinite(chosen.threshold):
        none = f"No threshold of {found.run} was shown to promise this on {found.task}: {what[0].lower()}{what[1:]}."
        if settings.loss is not GuardedLoss.FALSE_POSITIVE and not (chosen.images and chosen.pilot_images):
            return (
                f"{none} Nothing was tested: of the images to choose on, {chosen.pilot_images} are pilot (--pilot) and"
                f" {chosen.images} left to test; it takes both."
            )
        tested = f"{counted(chosen.images, 'image')} {'was' if chosen.images == 1 else 'were'} tested"
        return f"{none} {tested}; {found.needed} without any error are the fewest that can show it."
    return (
        f"{what}, at {_where(chosen.threshold)}: that accepts {100 * chosen.coverage:.0f} % on {found.task},"
        f" {told.format(lost=f'{100 * chosen.observed:.1f} %')}."
    )


def _weighed(found: RunGuarantee) -> str:
    """Return what images are weighted by, for how many tasks a threshold was chosen so, and that it is no guarantee."""
    assert found.reweighing is not None
    chosen = [one.reweighed for one in found.cells if one.reweighed and math.isfinite(one.reweighed.threshold)]
    missed = sum(one.verdict is Survival.BROKEN for one in chosen)
    lacking = found.reweighing.lacking
    why = f" ({lacking} kept no features)" if lacking else ""
    head, tasks = f"Reweighed by {found.reweighing.by.value}{why}, ", counted(len(found.cells), "task")
    if not chosen:
        return f"{head}none of {tasks} gets a threshold."
    get = "gets" if len(chosen) == 1 else "get"
    told = f"{missed} of them shown to miss" if missed else "none of them shown to miss"
    return f"{head}{len(chosen)} of {tasks} {get} a threshold, {told} the risk: estimated weights are no guarantee."


def _survival(found: RunGuarantee) -> list[str]:
    broken, holds = found.count(Survival.BROKEN), found.count(Survival.HOLDS)
    runs = len({cell.run for cell in found.cells})
    said = [
        f"Of {counted(len(found.cells), 'task')} of {counted(runs, 'run')}, it is broken on {broken}, shown to hold on"
        f" {holds}, and neither was shown on {len(found.cells) - broken - holds}."
    ]
    for clean, where in ((True, "On clean images"), (False, "Under shift")):
        cells = [cell for cell in found.cells if (cell.condition == CLEAN) == clean]
        lost = [cell for cell in cells if cell.verdict is Survival.BROKEN]
        if cells:
            said.append(f"{where} it is broken {_who(lost, cells) if lost else 'for no run'}.")
    return said


def _who(lost: Sequence[JudgedCell], cells: Sequence[JudgedCell]) -> str:
    names = dict.fromkeys(cell.run for cell in lost)
    told = []
    for name in names:
        of = sum(cell.run == name for cell in cells)
        told.append(name if of == 1 else f"{name} ({sum(cell.run == name for cell in lost)} of {of})")
    more = f" and {counted(len(told) - _MOST_NAMED, 'more run')}" if len(told) > _MOST_NAMED else ""
    return f"for {', '.join(told[:_MOST_NAMED])}{more}"


def _where(threshold: float) -> str:
    return f"a confidence of {threshold:.3g} or more" if threshold > 0.0 else "any confidence"
