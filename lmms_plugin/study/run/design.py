"""Design of a study: what its images and seeds will show, and how many of both a difference or a budget asks for.

Every comparison (contrast, bits, under shift or interaction, model) has the standard error √(v ÷ images + s ÷ seeds),
with the variances v of an image and s of a seed (`lmms_plugin.study.verdicts.pilot`). Its test is planned at the level
that Holm's first step asks for, 1 − (1 − level) ÷ tests, which is at least as hard as the one that is made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lmms_plugin.metrics.power import (
    POWER,
    images_needed,
    power_of_difference,
    power_of_equivalence,
    smallest_difference,
)
from lmms_plugin.study.file import analyses
from lmms_plugin.study.file.analyses import AgainstReference, MethodByShift
from lmms_plugin.study.file.expansion import of_images
from lmms_plugin.study.file.grid import Cell, CellAxes
from lmms_plugin.study.file.schema import Study
from lmms_plugin.study.file.task_images import ImageCounts, image_counts
from lmms_plugin.study.run import cost, reference_design
from lmms_plugin.study.run.planning import Plan, PlannedCell
from lmms_plugin.study.run.progress import duration
from lmms_plugin.study.run.reference_design import ReferenceDesign
from lmms_plugin.study.store.folder import StudyFolder
from lmms_plugin.study.verdicts import pilot
from lmms_plugin.study.verdicts.boundaries import Planned
from lmms_plugin.study.verdicts.decisions import BOUNDS, ArmComparison, ComparedCells, comparisons
from lmms_plugin.study.verdicts.pilot import AssumedVariance
from lmms_plugin.study.verdicts.stages import first_stage
from lmms_plugin.utils import image_slices
from lmms_plugin.utils.image_slices import ImageSlice
from lmms_plugin.utils.reading.located import load

DIFFERENCES = (0.1, 0.05, None)
"""Differences for which the stages of a run until decided are told; None for equality within the margin."""
_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}


class PlannedComparison(NamedTuple):
    """What a design shows of a comparison.

    Attributes:
        comparison: Question about two arms.
        variance: Variance that it is planned with.
        smallest: Smallest difference that is found with a probability of `POWER`.
        equivalent: Probability that no difference is shown to lie within the margin, if there is none.
    """

    comparison: ArmComparison
    variance: AssumedVariance
    smallest: float
    equivalent: float


@dataclass(frozen=True)
class Assumptions:
    """What a design is made with.

    Attributes:
        question: Question of the study.
        counts: Images of the data.
        comparisons: Comparison → its cells.
        variances: Comparison → its variance.
    """

    question: MethodByShift
    counts: ImageCounts
    comparisons: Mapping[ArmComparison, ComparedCells]
    variances: Mapping[ArmComparison, AssumedVariance]

    @classmethod
    def of(cls, found: Plan, folder: Path | None = None) -> Assumptions:
        """Return the assumptions of a planned study.

        Args:
            found: Plan of all of its cells.
            folder: Folder whose finished cells tell variances; None to take the stated ones.

        Raises:
            ValueError: Its analysis compares no arms, its images are not known, or it limits documents.
        """
        if found.study.analysis is None:
            raise ValueError(f"{found.study.file}: expected an analysis, whose comparisons have power, got none")
        question = analyses.question(found.study.analysis)
        if not isinstance(question, MethodByShift):
            kinds = f"{analyses.DEFAULT}, got {found.study.analysis['kind']}"
            raise ValueError(
                f"{found.study.file}: expected an analysis of kind {kinds}: images are chosen for no other"
            )
        cells = [one.keyed.cell for one in found.cells]
        if limited := [cell.limit for cell in cells if cell.limit is not None]:
            told = f"got limit: {limited[0]}, which takes the first documents of a split and no sample of images"
            raise ValueError(f"{found.study.file}: expected images: or all, {told}")
        counts = image_counts((question.clean, *question.shifted))
        members = comparisons(question, cells)
        there = {} if folder is None else pilot.measured(folder, question, members)
        variances = {
            one: there.get(one) or pilot.stated(one.asked, counts, seeded=_seeded(of_one))
            for one, of_one in members.items()
        }
        return cls(question, counts, members, variances)

    @property
    def tests(self) -> int:
        """Number of tests of a model and question, among which the error is divided."""
        return max(
            sum((other.model, other.asked) == (one.model, one.asked) for other in self.comparisons)
            for one in self.comparisons
        )

    @property
    def level(self) -> float:
        """Level of one test, so that all of a model and question together have that of the study."""
        return 1.0 - (1.0 - self.question.level) / self.tests

    def shown(self, images: int, seeds: int) -> list[PlannedComparison]:
        """Return what every comparison shows with so many images and seeds."""
        # Stated variances are the same for many comparisons.
        errors = {one: math.sqrt(one.images / images + one.seeds / seeds) for one in set(self.variances.values())}
        smallest = {one: smallest_difference(error, level=self.level, images=images) for one, error in errors.items()}
        margin, level = self.question.margin, self.question.level
        equal = {one: power_of_equivalence(margin, error, level=level, images=images) for one, error in errors.items()}
        return [PlannedComparison(key, one, smallest[one], equal[one]) for key, one in self.variances.items()]

    def needed(self, difference: float, seeds: int) -> float:
        """Return the images at which every comparison finds a difference with a probability of `POWER`."""
        return max(
            images_needed(difference, one.images, constant=one.seeds / seeds, level=self.level)
            for one in set(self.variances.values())
        )


@dataclass(frozen=True)
class Design:
    """Images and seeds of a study, and what they show.

    Attributes:
        assumed: What it is made with.
        images: Number of images.
        seeds: Largest number of seeds of a configuration.
        seconds: Estimated time of all cells one after the other; None if unknown.
        shown: What every comparison shows.
    """

    assumed: Assumptions
    images: int
    seeds: int
    seconds: float | None
    shown: tuple[PlannedComparison, ...]

    def smallest(self, asked: str) -> float:
        """Return the smallest difference that every comparison of a question finds."""
        return max(one.smallest for one in self.shown if one.comparison.asked == asked)

    @property
    def documents(self) -> int:
        """Expected number of documents of a task."""
        return self.assumed.counts.documents_of(self.images)

    def stages_until_decided(self, asked: str, difference: float | None) -> tuple[int, int] | None:
        """Return the stage and the images after which a run until decided has decided a question; None if it does not.

        By then it has with a probability of `POWER` or more, for each of the comparisons.

        Args:
            asked: `UNDER_SHIFT` or `INTERACTION`.
            difference: True difference; None where there is none, which is to be shown to lie within the margin.
        """
        rule = Planned(self.assumed.question.level, self.assumed.question.margin, self.stages)
        variances = {one for key, one in self.assumed.variances.items() if key.asked == asked}
        for k, images in enumerate(self.stages):
            errors = (math.sqrt(one.images / images + one.seeds / self.seeds) for one in variances)
            if images >= 2 and min(self._decided(rule, k, error, difference) for error in errors) >= POWER:
                return k + 1, images
        return None

    def _decided(self, rule: Planned, stage: int, error: float, difference: float | None) -> float:
        """Return the probability that a stage decides a comparison."""
        images = self.stages[stage]
        if difference is None:
            return power_of_equivalence(rule.margin, error, level=1.0 - rule.nominal_equality(stage), images=images)
        level = 1.0 - 2.0 * rule.nominal(stage, (1.0 - self.assumed.level) / 2.0)
        return power_of_difference(difference, error, level=level, images=images)

    @property
    def stages(self) -> tuple[int, ...]:
        """Images after each stage of a run until decided."""
        return image_slices.stages(self.images, first_stage(self.images))

    def to_dict(self) -> dict[str, Any]:
        """Return the design as `study plan --json` prints it."""
        assumed = self.assumed
        until = {
            asked: {
                "equal" if difference is None else f"{difference:g}": self.stages_until_decided(asked, difference)
                for difference in DIFFERENCES
            }
            for asked in BOUNDS
        }
        return {
            "power": POWER,
            "level_of_a_test": assumed.level,
            "images": self.images,
            "documents": self.documents,
            "images_of_the_data": assumed.counts.images,
            "documents_of_the_data": assumed.counts.documents,
            "seeds": self.seeds,
            "seconds": self.seconds,
            "stages_until_decided": {"images": self.stages, "stage_and_images_by_difference": until},
            "comparisons": [
                one.comparison._asdict()
                | {
                    "smallest_difference": one.smallest,
                    "power_of_equivalence": one.equivalent,
                    "variance_of_an_image": one.variance.images,
                    "variance_of_a_seed": one.variance.seeds,
                    "variances": one.variance.basis,
                }
                for one in self.shown
            ],
        }


def as_planned(found: Plan, folder: Path | None = None) -> Design:
    """Return the design of a study as its file states it; arguments and errors as of `Assumptions.of`."""
    assumed = Assumptions.of(found, folder)
    parts = {one.keyed.cell.images for one in found.cells}
    if len(parts) > 1:
        raise ValueError(f"{found.study.file}: expected the same images in all cells, got {sorted(map(str, parts))}")
    part = parts.pop()
    images = assumed.counts.images if part is None else min(ImageSlice.parse(part).stop, assumed.counts.images)
    seeds = _seeds(found)
    seconds = [one.seconds.value for one in found.cells]
    return Design(
        assumed,
        images,
        seeds,
        None if None in seconds else sum(filter(None, seconds)),
        tuple(assumed.shown(images, seeds)),
    )


def told(found: Plan, folder: Path | None = None) -> Design | ReferenceDesign | str | None:
    """Return the design of a study, or why there is none; None where its analysis tests nothing, or all is done."""
    asked = found.study.analysis
    question = None if asked is None else analyses.question(asked)
    if not isinstance(question, MethodByShift | AgainstReference) or found.counts()["done"] == len(found.cells):
        return None
    try:
        if isinstance(question, AgainstReference):
            return reference_design.designed(found, folder)
        return as_planned(found, folder)
    except ValueError as error:
        return " ".join(str(error).split())


def chosen(
    found: Plan, *, difference: float | None = None, budget: float | None = None, folder: Path | None = None
) -> Design:
    """Choose images and seeds: the cheapest that find a difference, or those within a budget that find the smallest.

    Args:
        found: Plan of all cells of the study.
        difference: Difference that every comparison is to find with a probability of `POWER`; None for the smallest
            that the budget allows.
        budget: Most time of all cells one after the other, in seconds; None for no bound.
        folder: Folder whose finished cells tell variances and times; None to take the stated ones.

    Raises:
        ValueError: As `as_planned`; the costs are not known; or no number of images and seeds is enough.
    """
    assumed, most = Assumptions.of(found, folder), _seeds(found)
    past = cost.past(StudyFolder(folder) if folder is not None and folder.is_dir() else None)

    def seconds(images: int, seeds: int) -> float:
        total, shared = 0.0, cost.SharedCosts()
        for one in kept(found, seeds):
            told = _seconds(one, images, past, shared)
            if told.value is None:
                raise ValueError(
                    f"{found.study.file}: expected cells of known cost, but that of {one.keyed.cell.slug} is"
                    f" {told.basis}; leave it out, or choose images: by hand"
                )
            total += told.value
        return total

    bound = math.inf if budget is None else budget

    def affordable(seeds: int) -> int:
        return _most(lambda images: seconds(images, seeds) <= bound, assumed.counts.images)

    designs = []
    for seeds in range(1, most + 1):
        images = affordable(seeds) if difference is None else assumed.needed(difference, seeds)
        if 2 <= images <= assumed.counts.images:
            count = int(images)
            designs.append(Design(assumed, count, seeds, seconds(count, seeds), tuple(assumed.shown(count, seeds))))
    if not designs:
        raise ValueError(_too_much(assumed, most, difference, budget))
    if difference is None:
        return min(designs, key=lambda one: max(map(one.smallest, BOUNDS)))
    best = min(designs, key=lambda one: one.seconds or 0.0)
    if budget is not None and (best.seconds or 0.0) > budget:
        told = f"{duration(best.seconds or 0.0)} for {best.images} images and {best.seeds} seeds"
        raise ValueError(f"--budget: expected at least {told}, which find {100 * difference:g} points, got less")
    return best


def _too_much(assumed: Assumptions, seeds: int, difference: float | None, budget: float | None) -> str:
    if difference is None:
        return f"--budget: expected time for two images of every cell, got {duration(budget or 0.0)}"
    smallest = max(one.smallest for one in assumed.shown(assumed.counts.images, seeds))
    return (
        f"--power: expected a difference that all {assumed.counts.images} images with {seeds} seeds can show, from"
        f" {smallest:.3g}, got {difference:g}: fewer contrasts or bits are fewer tests, more seeds or tasks less chance"
    )


def kept(found: Plan, seeds: int) -> list[PlannedCell]:
    """Return the cells of a plan with the first seeds of every configuration."""
    return [one for configuration in _configurations(found) for one in configuration[:seeds]]


def cells_of(found: Plan, design: Design) -> list[Cell]:
    """Return the cells of a plan with the images and seeds of a design."""
    images = of_images(design.images)
    return [replace(one.keyed.cell, images=images) for one in kept(found, design.seeds)]


def written(study: Study, design: Design) -> str:
    """Return a study file with the images and seeds of a design; comments are lost, aliases are written out."""
    top = load(Path(study.file)).plain()
    parts = [top, *(part for name in ("grids", "cells") for part in _several(top.get(name)))]
    for part in parts:
        part.pop("images", None)
        if "seeds" in part:
            part["seeds"] = sorted(_several(part["seeds"]))[: design.seeds]
    # The analysis stays at the end, where a reader looks for it.
    first = {name: value for name, value in top.items() if name not in ("grids", "cells", "exclude", "analysis")}
    text: str = yaml.safe_dump(
        {**first, "images": design.images, **top}, sort_keys=False, allow_unicode=True, width=120
    )
    return text


def parsed_budget(text: str) -> float:
    """Return the seconds of a time such as 90m, 24h or 2d.

    Raises:
        ValueError: It is something else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", text.strip())
    if found is None or float(found[1]) <= 0.0:
        raise ValueError(f"--budget: expected a time such as 90m, 24h or 2d, got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _seeded(members: ComparedCells) -> bool:
    return any(axes.seed is not None for axes in members.all())


def _seeds(found: Plan) -> int:
    return max(map(len, _configurations(found)))


def _configurations(found: Plan) -> list[list[PlannedCell]]:
    """Group cells that differ in their seed alone, sorted by it."""
    groups: dict[tuple[CellAxes, tuple[str, ...]], list[PlannedCell]] = {}
    for one in found.cells:
        cell = one.keyed.cell
        groups.setdefault((replace(cell.axes, seed=None), cell.tasks), []).append(one)
    return [sorted(group, key=lambda one: one.keyed.cell.axes.seed or 0) for group in groups.values()]


def _seconds(one: PlannedCell, images: int, past: Sequence[cost.Past], shared: cost.SharedCosts) -> cost.Seconds:
    cell = replace(one.keyed.cell, images=of_images(images))
    return cost.seconds(cell, past, one.size.parameters, cuda=one.gpus > 0, shared=shared)


def _most(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that fits; 0 if none does."""
    least, beyond = 0, most + 1
    while beyond - least > 1:
        middle = (least + beyond) // 2
        least, beyond = (middle, beyond) if fits(middle) else (least, middle)
    return least
