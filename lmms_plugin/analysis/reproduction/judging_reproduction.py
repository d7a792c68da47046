"""Verdict on whether an unquantized model reaches its published accuracies."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import NamedTuple

from lmms_plugin.analysis import groups
from lmms_plugin.analysis.logs import ALL, LoggedRun
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.analysis.overview import Estimate
from lmms_plugin.analysis.reproduction.deviation_reasons import DeviationReason, reasons
from lmms_plugin.analysis.reproduction.published import Published, PublishedGrounding, PublishedModel
from lmms_plugin.analysis.reproduction.run_facts import checkpoint_of, facts_of

WIDEST = 0.05
"""Width of an interval up to which a number inside it is reproduced: sizes of one model are apart by less than that or
little more (88.0, 89.1 and 92.2 % on RefCOCO+ testA), so that a wider one would contain those of other models."""


class Reproduction(StrEnum):
    """Verdict on one published number."""

    REPRODUCED = "reproduced"
    OFF = "off"
    UNDECIDED = "undecided"


class SplitReproduction(NamedTuple):
    """Our accuracy on one task beside the published one.

    Attributes:
        task: Name of the task.
        ours: Our accuracy with its interval over images.
        published: Published accuracy.
        verdict: Verdict.
        difference: Ours minus the published one.
        width: Width of the interval.
        others_inside: Number of other models' published accuracies on this task that lie inside the interval.
        others: Number of other models with a published accuracy on this task.
        whole: Whether all documents of the task were asked.
        records: Number of expressions.
        images: Number of images.
        reasons: Reasons why it may differ; empty where it is reproduced.
    """

    task: str
    ours: Estimate
    published: Published
    verdict: Reproduction
    difference: float
    width: float
    others_inside: int
    others: int
    whole: bool
    records: int
    images: int
    reasons: list[DeviationReason]


class ModelReproduction(NamedTuple):
    """Our accuracies beside all that were published for a model.

    Attributes:
        model: Name of the published model.
        checkpoint: Checkpoint that ran.
        results: Results file of the run.
        level: Confidence level of the intervals.
        splits: Tasks that were judged.
        not_run: Tasks with a published number that the run does not have.
    """

    model: str
    checkpoint: str
    results: str
    level: float
    splits: list[SplitReproduction]
    not_run: list[str]

    @property
    def reproduced(self) -> bool:
        """Whether every judged number is reproduced."""
        return all(one.verdict is Reproduction.REPRODUCED for one in self.splits)


def verdict_on(ours: Estimate, published: float, *, whole: bool) -> Reproduction:
    """Judge one published number.

    A number outside the interval is off. One inside is reproduced if the interval is no wider than `WIDEST` and all
    documents were asked: the first documents of a split are no sample of it.

    Args:
        ours: Our value with its interval.
        published: Published value.
        whole: Whether all documents were asked.
    """
    if not ours.low <= published <= ours.high:
        return Reproduction.OFF
    return Reproduction.REPRODUCED if whole and ours.high - ours.low <= WIDEST else Reproduction.UNDECIDED


def not_degenerate(ours: Estimate, images: int, level: float) -> Estimate:
    """Return an interval that is no point where every answer is right, or every answer wrong.

    Resamples of equal answers are equal, and would exclude every other number after two images. The interval is then
    Clopper and Pearson's over images: down to (α/2)^(1/n), or up to 1 − (α/2)^(1/n).

    Args:
        ours: Value with its interval by resampling.
        images: Number n of images.
        level: Confidence level 1 − α.
    """
    if ours.low != ours.high or ours.value not in (0.0, 1.0):
        return ours
    end = ((1.0 - level) / 2) ** (1.0 / images)
    return ours._replace(low=end) if ours.value == 1.0 else ours._replace(high=1.0 - end)


def judge(
    run: LoggedRun,
    record: PublishedGrounding,
    settings: MeasurementSettings,
    *,
    name: str | None = None,
    tasks: Collection[str] = (),
) -> ModelReproduction:
    """Judge a run of the unquantized model.

    Args:
        run: Finished run.
        record: Published numbers.
        settings: Settings of the intervals.
        name: Name of the published model that the checkpoint is taken for; None to go by the checkpoint.
        tasks: Tasks to judge; empty for all that have a published number.

    Raises:
        ValueError: The model was quantized, no published number is known of it or of the tasks it ran, or a task has
            fewer than 2 images.
    """
    checkpoint = checkpoint_of(run)
    model, named_by = record.identify(checkpoint, name)
    wanted = expect_tasks(model, tasks) if tasks else list(model.scores)
    judged = [task for task in wanted if task in run.tasks]
    if not judged or (tasks and len(judged) < len(wanted)):
        missing = next(task for task in wanted if task not in run.tasks) if tasks else " or ".join(wanted)
        raise ValueError(f"expected {missing} in {run.file}, got {', '.join((*run.tasks, *run.others)) or 'no task'}")
    for task in judged:
        if (images := run.tasks[task].names.size) < 2:
            raise ValueError(f"expected 2 images of {task} or more for an interval, got {images}; raise --limit")
    measured = groups.measure([run.tasks[task] for task in judged], settings).tasks
    splits = []
    for task in judged:
        split = _judge(measured[task], model, record, settings.level, whole=_whole(run, task))
        if split.verdict is not Reproduction.REPRODUCED:
            split = split._replace(reasons=reasons(facts_of(run, task, named_by), split.difference))
        splits.append(split)
    rest = [task for task in model.scores if task not in judged]
    return ModelReproduction(model.name, checkpoint, str(run.file), settings.level, splits, rest)


def expect_tasks(model: PublishedModel, tasks: Collection[str]) -> list[str]:
    """Refuse a task without a published number of the model.

    Raises:
        ValueError: There is no such number; lists the tasks that have one.
    """
    for task in tasks:
        if task not in model.scores:
            known = ", ".join(model.scores)
            raise ValueError(f"no published number of {model.name} is known on {task!r:.100} (known: {known})")
    return list(dict.fromkeys(tasks))


def _whole(run: LoggedRun, task: str) -> bool:
    offset = (run.content.get("config") or {}).get("offset")
    asked = run.content["n-samples"][task]["effective"]
    return offset in ALL and (run.limit is None or 1 <= asked < run.limit)


def _judge(
    one: groups.Task, model: PublishedModel, record: PublishedGrounding, level: float, *, whole: bool
) -> SplitReproduction:
    place = groups.METRICS.index("accuracy")
    value, low, high = (float(numbers[place]) for numbers in (one.value, one.low, one.high))
    ours = not_degenerate(Estimate(value, low, high), one.images, level)
    published = model.scores[one.task]
    known = [other.scores[one.task].value for other in record.models.values() if one.task in other.scores]
    # The model's own number counts among them.
    inside = sum(ours.low <= number <= ours.high for number in known) - (ours.low <= published.value <= ours.high)
    return SplitReproduction(
        one.task,
        ours,
        published,
        verdict_on(ours, published.value, whole=whole),
        value - published.value,
        ours.high - ours.low,
        inside,
        len(known) - 1,
        whole,
        one.records,
        one.images,
        [],
    )
