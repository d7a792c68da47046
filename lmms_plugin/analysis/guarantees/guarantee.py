"""Whether a guarantee that was chosen on one run survives quantization and shift.

A threshold of confidence is chosen on clean images of one run, usually the unquantized model's, so that with a stated
probability at most a stated share of accepted answers is wrong. It is then applied to other images, clean and shifted,
and to other runs, where nothing promises that it holds: it is judged there.

The threshold is chosen on a task of its own (`GuaranteeSettings.calibrate`), or on a share of a task's images; these
are judged in no run and under no shift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lmms_plugin.analysis import axes, logs
from lmms_plugin.analysis.guarantees.covariates import Covariates, KeptFeatures, ToWeigh, covariates
from lmms_plugin.analysis.guarantees.guarantee_results import (
    ChosenAnew,
    GuaranteeSettings,
    JudgedCell,
    ReweighedThreshold,
    Reweighing,
    RunGuarantee,
    Survival,
)
from lmms_plugin.analysis.guarantees.guarded_loss import GuardedLoss
from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.records import CLEAN, GROUNDING, REJECTION, Bools, Floats, TaskRecords, Texts
from lmms_plugin.metrics.guarantees.box_margins import BoxMargin, box_margin, growth_needed
from lmms_plugin.metrics.guarantees.covariate_shift import density_ratio, effective_images
from lmms_plugin.metrics.guarantees.risk_bounds import ImageLosses, image_losses, images_needed
from lmms_plugin.metrics.guarantees.thresholds import (
    NOTHING,
    ChosenThreshold,
    Promise,
    ScoredDocuments,
    monotone_threshold,
    selective_threshold,
)
from lmms_plugin.metrics.paired import holm
from lmms_plugin.utils.chance import uniform

_Tasks = dict[str, list[TaskRecords]]


def named(found: Sequence[tuple[Path, LoggedRun]]) -> dict[str, LoggedRun]:
    """Name runs by method and bits, and further where two have the same name.

    Args:
        found: Runs with the path at or under which each was found; one that was found twice counts once.
    """
    of = {run.file.resolve(): (axes.of(run.file, root, run.content), run) for root, run in found}
    labels = [place.config.label for place, _ in of.values()]
    names: dict[str, LoggedRun] = {}
    for place, run in of.values():
        label = place.config.label
        if labels.count(label) > 1:
            label = ", ".join((label, *place.config.parts, *([] if place.seed is None else [f"seed {place.seed}"])))
        names[label if label not in names else f"{label} ({run.file})"] = run
    return names


def guarantee_of(
    path: Path, on: Iterable[Path], settings: GuaranteeSettings, features: KeptFeatures | None = None
) -> RunGuarantee:
    """Read runs, choose a threshold on the first and judge it on all.

    Args:
        path: Run to choose on.
        on: Runs, or folders of runs, to judge it on besides.
        settings: What is promised, and on which images it is chosen.
        features: Reader of features that runs kept; None where none are to be used.

    Raises:
        ValueError: As `guarantee`, or a run cannot be read.
    """
    first = logs.read_one(path)
    found = [(path, first), *((root, logs.read(file)) for root in on for file in logs.find(root))]
    runs = named(found)
    name = next(name for name, run in runs.items() if run.file.resolve() == first.file.resolve())
    return guarantee(name, runs[name], {of: run for of, run in runs.items() if of != name}, settings, features)


def guarantee(
    name: str,
    run: LoggedRun,
    others: Mapping[str, LoggedRun],
    settings: GuaranteeSettings,
    features: KeptFeatures | None = None,
) -> RunGuarantee:
    """Choose a threshold on one run and judge it on all.

    Args:
        name: Name of the run to choose on.
        run: Run to choose on.
        others: Further runs to judge it on, by name.
        settings: What is promised, and on which images it is chosen.
        features: Reader of features that runs kept; None where none are to be used.

    Raises:
        ValueError: There is no task to choose on, or several and none was named, or a task has no confidences; or
            features that are to be used are missing.
    """
    source = _source(run, settings)
    runs = {name: run} | dict(others)
    judged = _judged(runs, source, settings)
    choosing = _choosing(source, [one for tasks in judged.values() for one in tasks], settings)
    largest = max(_largest(one, settings) for one in (source, *(one for tasks in judged.values() for one in tasks)))
    judge = _Judge(source, choosing, largest, settings, {one.task: one for one in judged[name]})
    margin = judge.margin(run)
    by = covariates(runs, settings.reweigh_by, features) if settings.reweigh else None
    cells = []
    for of, tasks in judged.items():
        for records in tasks:
            cell = judge.cell(of, runs[of], records, margin, own=of == name)
            if by is not None:
                cell = replace(cell, reweighed=judge.reweighed((name, run), (of, runs[of], records), by))
            cells.append(cell)
    anew = _anew(judge, others)
    needed = images_needed(settings.risk, settings.level)
    return RunGuarantee(
        name,
        source.task,
        settings,
        judge.chosen,
        needed,
        margin,
        tuple(_corrected(cells, settings)),
        tuple(anew),
        None if by is None else Reweighing(by.by, by.lacking),
    )


def _anew(judge: _Judge, others: Mapping[str, LoggedRun]) -> list[ChosenAnew]:
    """Choose thresholds on the other runs' own answers to the same documents."""
    source = judge.source
    return [
        ChosenAnew(of, judge.chosen_on(one.tasks[source.task]))
        for of, one in others.items()
        if source.task in one.tasks and one.tasks[source.task].documents == source.documents
    ]


def _source(run: LoggedRun, settings: GuaranteeSettings) -> TaskRecords:
    """Return the task to choose on."""
    absent = settings.loss is GuardedLoss.FALSE_POSITIVE
    fitting = [one for one in run.tasks.values() if _fits(one, settings)]
    what = "a task of rejection" if absent else "a task with boxes" if settings.loss is GuardedLoss.IOU else "a task"
    if settings.calibrate is not None:
        found = [one for one in fitting if one.task == settings.calibrate]
        if not found:
            known = ", ".join(one.task for one in fitting) or "none"
            raise ValueError(f"expected {what} of {run.file} to choose on, one of {known}; got {settings.calibrate!r}")
    else:
        found = [one for one in fitting if one.place.condition == CLEAN]
        if len(found) != 1:
            named = ", ".join(one.task for one in found) or "none"
            raise ValueError(f"expected {what} on clean images in {run.file} to choose on, got {named}; name one")
    if np.isnan(found[0].confidence_by(settings.estimator)).all():
        raise ValueError(f"expected confidences of {found[0].task} in {run.file} to choose a threshold of, got none")
    return found[0]


def _fits(records: TaskRecords, settings: GuaranteeSettings) -> bool:
    if settings.loss is GuardedLoss.FALSE_POSITIVE:
        return records.kind is REJECTION and bool((records.outcome == 0.0).any())
    if settings.loss is GuardedLoss.IOU:
        return records.kind is GROUNDING
    return records.kind is not REJECTION


def _judged(runs: Mapping[str, LoggedRun], source: TaskRecords, settings: GuaranteeSettings) -> _Tasks:
    """Return the tasks that a threshold is judged on, by run: those of the same kind, without one chosen on alone."""
    found = {
        name: [one for one in run.tasks.values() if _fits(one, settings) and one.kind is source.kind]
        for name, run in runs.items()
    }
    found = {name: [one for one in tasks if one.reported.any()] for name, tasks in found.items()}
    for name, tasks in found.items():
        if silent := [one.task for one in tasks if np.isnan(one.confidence_by(settings.estimator)).all()]:
            raise ValueError(f"expected confidences of {silent[0]} in {name} to judge a threshold on, got none")
    others = {name: [one for one in tasks if one.task != source.task] for name, tasks in found.items()}
    apart = any(others.values()) and not any(_overlap(one, source) for tasks in others.values() for one in tasks)
    return others if settings.calibrate is not None and settings.share is None and apart else found


def _choosing(source: TaskRecords, judged: Iterable[TaskRecords], settings: GuaranteeSettings) -> Texts:
    """Return the names of the images that a threshold is chosen on: all, or a share of those that are judged too."""
    names = source.names[np.unique(source.image[source.reported])]
    if not any(_overlap(one, source) for one in judged):
        return names
    share = 0.5 if settings.share is None else settings.share
    return names[[uniform(f"guarantee {settings.seed}:{name}") < share for name in names.tolist()]]


def _overlap(one: TaskRecords, other: TaskRecords) -> bool:
    return _same_images(one, other) and bool(np.isin(one.names, other.names).any())


def _same_images(one: TaskRecords, other: TaskRecords) -> bool:
    return (one.place.dataset, one.place.split) == (other.place.dataset, other.place.split)


def _counting(records: TaskRecords, settings: GuaranteeSettings) -> Bools:
    """Return the mask of documents that a risk is of."""
    keep = records.reported
    return keep & (records.outcome == 0.0) if settings.loss is GuardedLoss.FALSE_POSITIVE else keep


def _largest(records: TaskRecords, settings: GuaranteeSettings) -> int:
    image = records.image[_counting(records, settings)]
    return int(np.bincount(image).max()) if image.size else 1


def _loss(records: TaskRecords, settings: GuaranteeSettings) -> Floats:
    if settings.loss is GuardedLoss.FALSE_POSITIVE:
        return np.ones(records.ids.size)
    return 1.0 - (records.score if settings.loss is GuardedLoss.IOU else records.outcome)


class _Judge:
    """A threshold, and what it takes to judge it."""

    def __init__(
        self,
        source: TaskRecords,
        choosing: Texts,
        largest: int,
        settings: GuaranteeSettings,
        own: Mapping[str, TaskRecords],
    ) -> None:
        self.source, self.choosing, self.settings, self.own = source, choosing, settings, own
        hard = source.kind.right is not None and settings.loss is GuardedLoss.ERROR
        binary = hard or settings.loss is GuardedLoss.FALSE_POSITIVE
        self.promise = Promise(settings.risk, settings.level, largest, binary, settings.per_image, settings.bound)
        self.chosen = self.chosen_on(source)

    def chosen_on(self, records: TaskRecords) -> ChosenThreshold:
        """Choose a threshold on the answers of some run to the task."""
        keep = _counting(records, self.settings) & np.isin(records.images, self.choosing)
        if self.settings.loss is GuardedLoss.FALSE_POSITIVE:
            return monotone_threshold(self._scored(records, keep), self.promise)
        parts = self._parts(records)
        keep &= parts != _MARGIN
        return selective_threshold(self._scored(records, keep), (parts == _PILOT)[keep], self.promise)

    def margin(self, run: LoggedRun) -> BoxMargin | None:
        """Choose the margin of accepted boxes, on images that the threshold does not depend on."""
        if self.settings.contain is None:
            return None
        if self.source.kind is not GROUNDING:
            raise ValueError(f"expected a task with boxes for a margin, got {self.source.task}")
        keep = self.source.reported & (self._parts(self.source) == _MARGIN) & self._accepts(self.source)
        needed = _growth(run, self.source)[keep]
        if not needed.size:
            return BoxMargin(NOTHING, self.settings.contain, 0, 0)
        return box_margin(needed, self.source.image[keep].astype(np.intp), self.settings.contain)

    def cell(
        self, name: str, run: LoggedRun, records: TaskRecords, margin: BoxMargin | None, *, own: bool
    ) -> JudgedCell:
        """Judge the threshold on one task of a run."""
        keep = self._judged_documents(records)
        accepted = self._accepts(records)
        sums = self._sums(records, keep, self.chosen.threshold)
        if self.chosen.bet is not None:
            sums = replace(sums, bet=np.array([self.chosen.bet]))
        place, level = records.place, self.settings.level
        flips = None if own else self._flips(records, keep, accepted)
        contained, kept = self._contained(run, records, keep & accepted, margin)
        some = bool((keep & accepted).any()) or self.settings.loss is GuardedLoss.FALSE_POSITIVE
        return JudgedCell(
            name,
            records.task,
            place.condition,
            "" if place.shift is None else f"{place.shift} {place.severity}",
            int(keep.sum()),
            int(np.unique(records.image[keep]).size),
            int((keep & accepted).sum()),
            float(accepted[keep].mean()) if keep.any() else math.nan,
            float(sums.observed.item()) if some else math.nan,
            sums.lower(level, self.settings.bound),
            sums.upper(level, self.settings.bound),
            float(sums.p_above(self.settings.risk, self.settings.bound).item()),
            _verdict(sums, self.settings) if some else Survival.NOTHING_ACCEPTED,
            None if flips is None else float(flips.observed.item()),
            None if flips is None else flips.upper(level),
            contained,
            kept,
        )

    def _scored(self, records: TaskRecords, keep: Bools) -> ScoredDocuments:
        index = np.unique(records.image[keep], return_inverse=True)[1].astype(np.intp)
        told = records.confidence_by(self.settings.estimator)[keep]
        return ScoredDocuments(told, _loss(records, self.settings)[keep], index)

    def _parts(self, records: TaskRecords) -> Texts:
        """Return what each document's image is for, where a threshold is chosen: `pilot`, `margin` or `tested`."""
        seed, pilot = self.settings.seed, self.settings.pilot
        margin = 0.0 if self.settings.contain is None else (1.0 - pilot) / 2.0
        chosen = set(self.choosing.tolist())

        def part(name: str) -> str:
            drawn = uniform(f"guarantee's part {seed}:{name}")
            if name not in chosen:
                return ""
            return _PILOT if drawn < pilot else _MARGIN if drawn < pilot + margin else _TESTED

        return np.array([part(name) for name in records.names.tolist()])[records.image]

    def _judged_documents(self, records: TaskRecords) -> Bools:
        keep = _counting(records, self.settings)
        if _same_images(records, self.source):
            keep = keep & ~np.isin(records.images, self.choosing)
        return keep

    def _accepts(self, records: TaskRecords) -> Bools:
        with np.errstate(invalid="ignore"):
            found: Bools = records.confidence_by(self.settings.estimator) >= self.chosen.threshold
        return found

    def _sums(self, records: TaskRecords, keep: Bools, threshold: float) -> ImageLosses:
        scored = self._scored(records, keep)
        accepted = scored.accepted(threshold)
        everything = self.settings.loss is GuardedLoss.FALSE_POSITIVE
        loss = np.where(accepted, scored.loss, 0.0)
        return self._added(loss, np.ones_like(accepted) if everything else accepted, scored.image)

    def _added(self, loss: Floats, counted: Bools, image: np.ndarray) -> ImageLosses:
        promise = self.promise
        return image_losses(
            loss,
            np.where(counted, 0, 1),
            image,
            largest=promise.largest,
            per_image=promise.per_image,
            binary=promise.binary,
        )

    def _flips(self, records: TaskRecords, keep: Bools, accepted: Bools) -> ImageLosses | None:
        """Return what is accepted and was lost to quantization, of all documents."""
        ours = self.own.get(records.task)
        if records.kind.right is None or ours is None or ours.documents != records.documents or not keep.any():
            return None
        flipped = (accepted & (ours.outcome > records.outcome))[keep].astype(np.float64)
        image = np.unique(records.image[keep], return_inverse=True)[1].astype(np.intp)
        return self._added(flipped, np.ones(flipped.size, np.bool_), image)

    def _contained(
        self, run: LoggedRun, records: TaskRecords, keep: Bools, margin: BoxMargin | None
    ) -> tuple[float | None, Survival | None]:
        if margin is None:
            return None, None
        if not keep.any():
            return None, Survival.NOTHING_ACCEPTED
        missed = (_growth(run, records)[keep] > margin.margin).astype(np.float64)
        image = np.unique(records.image[keep], return_inverse=True)[1].astype(np.intp)
        sums = image_losses(missed, np.zeros(missed.size), image, largest=self.promise.largest, per_image=True)
        promised = replace(self.settings, risk=1.0 - margin.probability)
        return 1.0 - float(sums.observed.item()), _verdict(sums, promised)

    def reweighed(
        self, chosen_on: tuple[str, LoggedRun], judged: tuple[str, LoggedRun, TaskRecords], by: Covariates
    ) -> ReweighedThreshold:
        """Choose a threshold with the weights of a task that it is judged on, and judge it there."""
        source, records, parts = self.source, judged[2], self._parts(self.source)
        keep = self._judged_documents(records)
        chosen = source.reported & (parts != "") & (parts != _MARGIN)
        ratio = density_ratio(*by.both(ToWeigh(*chosen_on, source, chosen), ToWeigh(*judged, keep)))
        pilot = np.unique(source.image[chosen & (parts == _PILOT)])
        tested = ~np.isin(np.unique(source.image[chosen]), pilot)
        threshold = NOTHING
        if ratio.overlaps:
            threshold = selective_threshold(
                self._scored(source, chosen),
                (parts == _PILOT)[chosen],
                self.promise,
                weights=ratio.weights,
                heaviest=ratio.heaviest,
            ).threshold
        sums = self._sums(records, keep, threshold)
        accepted = self._scored(records, keep).accepted(threshold)
        return ReweighedThreshold(
            threshold,
            ratio.auroc,
            ratio.overlaps,
            effective_images(ratio.weights[tested]),
            float(sums.observed.item()) if accepted.any() else math.nan,
            float(accepted.mean()),
            _verdict(sums, self.settings) if accepted.any() else Survival.NOTHING_ACCEPTED,
        )


_PILOT, _MARGIN, _TESTED = "pilot", "margin", "tested"


def _growth(run: LoggedRun, records: TaskRecords) -> Floats:
    """Return by how much each answer's box must grow to contain the true one, shape (n,); infinite without a box."""
    boxes = {one.id: one.box for one in logs.answers(run, records.task)}
    truths = records.truths.to_pylist()
    there = np.array([boxes.get(str(name)) is not None for name in records.ids.tolist()])
    found = np.full(there.size, np.inf)
    if there.any():
        ours = np.array([boxes[str(name)] for name in records.ids[there].tolist()], np.float64)
        found[there] = growth_needed(ours, [truths[k] for k in np.flatnonzero(there).tolist()])
    return found


def _verdict(sums: ImageLosses, settings: GuaranteeSettings) -> Survival:
    alpha = 1.0 - settings.level
    if float(sums.p_below(settings.risk, settings.bound).item()) <= alpha:
        return Survival.HOLDS
    return Survival.BROKEN if float(sums.p_above(settings.risk, settings.bound).item()) <= alpha else Survival.OPEN


def _corrected(cells: Sequence[JudgedCell], settings: GuaranteeSettings) -> list[JudgedCell]:
    """Adjust what is called broken for the number of cells."""
    told = [cell.p_broken if cell.verdict is not Survival.NOTHING_ACCEPTED else math.nan for cell in cells]
    found = []
    for cell, p in zip(cells, holm(told).tolist(), strict=True):
        verdict = cell.verdict
        if verdict in (Survival.OPEN, Survival.BROKEN):
            verdict = Survival.BROKEN if p <= 1.0 - settings.level else Survival.OPEN
        found.append(replace(cell, p_broken=p, verdict=verdict))
    return found
