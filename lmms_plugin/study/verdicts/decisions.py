"""Decisions of a study that stops when it knows: which comparisons are settled after each stage of images.

Every comparison (model, contrast, bits, and under shift or interaction) has a confidence sequence over images; the
error 1 − `level` is divided among all of them (Bonferroni). A comparison is settled when its sequence excludes 0 or
lies within the margin, and stays as it was then. With probability `level`, no difference is claimed that is none, and
no equivalence of arms that differ by more than the margin, whenever the study stops.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.analysis.findings import EQUIVALENT, OPEN, REVERSE, SHOWN
from lmms_plugin.metrics.bootstrap import Interval
from lmms_plugin.metrics.confidence_sequences import confidence_sequence, log_capital
from lmms_plugin.study.file.analyses import MethodByShift
from lmms_plugin.study.file.grid import CellAxes
from lmms_plugin.study.verdicts.arms import FinishedCell, Placed, by_seed, one_reference, select
from lmms_plugin.study.verdicts.contrasts import BROKEN, arm_cells, shared_bits

Floats = npt.NDArray[np.float64]
UNDER_SHIFT, INTERACTION = "under shift", "interaction"
BOUNDS: Mapping[str, float] = {UNDER_SHIFT: 1.0, INTERACTION: 2.0}
"""Question → largest absolute difference of one document."""


class ArmComparison(NamedTuple):
    """A question about two arms.

    Attributes:
        model: Model of both.
        first: Arm in question.
        second: Arm it is compared with.
        bits: Bits per weight of both.
        asked: `UNDER_SHIFT` or `INTERACTION`.
    """

    model: str
    first: str
    second: str
    bits: int
    asked: str


class Decision(NamedTuple):
    """State of a comparison.

    Attributes:
        finding: As in `lmms_plugin.analysis.findings`.
        difference: First − second, per document.
        interval: Confidence sequence at this number of images.
        images: Number of images that it rests on.
        documents: Number of their documents.
        broken: Arms that keep less than half of the unquantized model's accuracy on these clean images.
    """

    finding: str
    difference: float
    interval: Interval
    images: int
    documents: int
    broken: tuple[str, ...]

    def settles(self, asked: str) -> bool:
        """Return whether no further image is needed; the robustness of broken arms is not judged."""
        return self.finding != OPEN or (asked == INTERACTION and bool(self.broken))


class StageAnswers(NamedTuple):
    """StageAnswers of a cell to one stage.

    Attributes:
        sizes: Number of documents of each image, shape (images,).
        right: Task → number of right answers of each image, shape (images,).
    """

    sizes: Floats
    right: Mapping[str, Floats]


Groups = tuple[tuple[CellAxes, ...], ...]
"""Cells of an arm: groups that differ in seeds alone."""


@dataclass(frozen=True)
class ComparedCells:
    """Cells of a comparison.

    Attributes:
        first: Cells of the arm in question.
        second: Cells of the arm it is compared with.
        reference: Cell of the unquantized model.
    """

    first: Groups
    second: Groups
    reference: CellAxes

    @property
    def seeds(self) -> int:
        """Largest number of seeds of a configuration."""
        return max(len(group) for group in (*self.first, *self.second))

    def all(self) -> set[CellAxes]:
        """Return all of them."""
        return {self.reference, *(axes for arm in (self.first, self.second) for group in arm for axes in group)}


@dataclass
class Decisions:
    """Comparisons of a study, and what is known of them after the stages so far.

    Attributes:
        question: Question of the study.
        largest: Largest number of documents of an image in the whole dataset.
        members: ArmComparison → its cells.
        found: ArmComparison → its latest state.
    """

    question: MethodByShift
    largest: int
    members: Mapping[ArmComparison, ComparedCells]
    found: dict[ArmComparison, Decision] = field(default_factory=dict)
    _seen: dict[ArmComparison, list[dict[str, Floats]]] = field(default_factory=dict)

    @classmethod
    def of(cls, question: MethodByShift, cells: Sequence[Placed], largest: int) -> Decisions:
        """Return the comparisons that cells allow, of which nothing is known yet.

        Raises:
            AskedError: An arm has no cell, or two arms differ in bits.
        """
        members: dict[ArmComparison, ComparedCells] = {}
        for model in dict.fromkeys(cell.axes.model for cell in cells):
            own = select(cells, {"model": model})
            for pair in question.contrasts:
                for bits in shared_bits(own, pair, question):
                    arms = [_groups(select(arm_cells(own, name, question), {"bits": bits})) for name in pair]
                    one = ComparedCells(arms[0], arms[1], one_reference(own).axes)
                    members |= {ArmComparison(model, *pair, bits, asked): one for asked in BOUNDS}
        return cls(question, largest, members)

    @property
    def level(self) -> float:
        """Confidence level of each sequence, so that all of them together have that of the study."""
        return 1.0 - (1.0 - self.question.level) / len(self.members)

    def open(self) -> list[ArmComparison]:
        """Return the comparisons that are not settled."""
        return [one for one in self.members if one not in self.found or not self.found[one].settles(one.asked)]

    def needed(self) -> set[CellAxes]:
        """Return the cells whose answers to further images are needed."""
        return self._cells(self.open())

    def compared(self) -> set[CellAxes]:
        """Return the cells of all comparisons."""
        return self._cells(self.members)

    def _cells(self, comparisons: Iterable[ArmComparison]) -> set[CellAxes]:
        return {axes for one in comparisons for axes in self.members[one].all()}

    def add(self, answers: Mapping[CellAxes, StageAnswers]) -> None:
        """Take in a stage: the answers of all needed cells to the same images, in the same order."""
        for one in self.open():
            seen = self._seen.setdefault(one, [])
            seen.append(self._stage(self.members[one], answers))
            columns = {name: np.concatenate([stage[name] for stage in seen]) for name in seen[0]}
            self.found[one] = self._decided(one, columns)

    def _stage(self, members: ComparedCells, answers: Mapping[CellAxes, StageAnswers]) -> dict[str, Floats]:
        reference = answers[members.reference]
        return {
            "sizes": reference.sizes,
            "reference": reference.right[self.question.clean],
            **right_answers(self.question, members.first, members.second, answers),
        }

    def _decided(self, one: ArmComparison, columns: Mapping[str, Floats]) -> Decision:
        sizes, bound = columns["sizes"], BOUNDS[one.asked]
        sums = differences(one.asked, columns)
        floor = BROKEN * columns["reference"].sum()
        arms = {one.first: columns["first clean"], one.second: columns["second clean"]}
        return Decision(
            finding(sums, sizes, bound=bound, largest=self.largest, level=self.level, margin=self.question.margin),
            float(sums.sum() / sizes.sum()),
            confidence_sequence(sums, sizes, bound=bound, largest=self.largest, level=self.level),
            sizes.size,
            int(sizes.sum()),
            tuple(name for name, right in arms.items() if right.sum() < floor),
        )


def right_answers(
    question: MethodByShift, first: Groups, second: Groups, answers: Mapping[CellAxes, StageAnswers]
) -> dict[str, Floats]:
    """Return right answers of two arms on each clean and shifted image: means over tasks, seeds and configurations."""

    def right(arm: Groups, tasks: Sequence[str]) -> Floats:
        groups = [[answers[axes].right[task] for axes in group for task in tasks] for group in arm]
        means: Floats = np.mean([np.mean(group, axis=0) for group in groups], axis=0)
        return means

    return {
        f"{name} {state}": right(arm, tasks)
        for name, arm in (("first", first), ("second", second))
        for state, tasks in (("clean", [question.clean]), ("shifted", question.shifted))
    }


def differences(asked: str, right: Mapping[str, Floats]) -> Floats:
    """Return the sum of the documents' differences of each image, given the columns of `right_answers`."""
    sums = right["first shifted"] - right["second shifted"]
    return sums - (right["first clean"] - right["second clean"]) if asked == INTERACTION else sums


def finding(sums: Floats, sizes: Floats, *, bound: float, largest: int, level: float, margin: float) -> str:
    """Return what a confidence sequence shows, as in `lmms_plugin.analysis.findings`.

    A difference within the margin is too small to count, as in every analysis of a study. The ends of the sequence are
    not needed for it: they exclude a value exactly if the capital of a bet against it is large enough.

    Args:
        sums: Sum of the documents' differences of each image, shape (images,).
        sizes: Number of documents of each image, shape (images,).
        bound: As of `confidence_sequence`.
        largest: As of `confidence_sequence`.
        level: Confidence level of the sequence.
        margin: Largest absolute difference that counts as none.
    """
    needed = math.log(2.0 / (1.0 - level))

    def excluded(mean: float, *, above: bool) -> bool:
        return log_capital(sums, sizes, mean, bound=bound, largest=largest, above=above) > needed

    if margin >= bound or (excluded(margin, above=False) and excluded(-margin, above=True)):
        return EQUIVALENT
    if excluded(0.0, above=True):
        return SHOWN
    return REVERSE if excluded(0.0, above=False) else OPEN


def answers_of(cell: FinishedCell, tasks: Sequence[str]) -> StageAnswers:
    """Return the answers of a finished cell image by image, sorted by the images' names.

    Raises:
        ValueError: The cell lacks a task, or its tasks differ in their documents.
    """
    right: dict[str, Floats] = {}
    for task in tasks:
        if task not in cell.run.tasks:
            raise ValueError(f"expected task {task} in cell {cell.name}, got {', '.join(sorted(cell.run.tasks))}")
        records, first = cell.run.tasks[task], cell.run.tasks[tasks[0]]
        if not (np.array_equal(records.ids, first.ids) and np.array_equal(records.images, first.images)):
            raise ValueError(f"expected the same documents in all tasks of {cell.name}, got others in {task}")
        _, index = np.unique(records.images, return_inverse=True)
        right[task] = np.bincount(index, weights=records.outcome).astype(np.float64)
    return StageAnswers(np.bincount(index).astype(np.float64), right)


def _groups(cells: Sequence[Placed]) -> Groups:
    return tuple(tuple(cell.axes for cell in group) for group in by_seed(cells))
