"""Decisions of a study that stops when it knows: which comparisons are settled after each stage of images.

A comparison is a model, a contrast, bits, and a question: under shift or interaction. It is settled when a rule
(`lmms_plugin.study.verdicts.boundaries`) finds a difference or that there is none, and stays as it was then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.analysis.findings import OPEN, REVERSE, SHOWN
from lmms_plugin.metrics.bootstrap import Interval
from lmms_plugin.study.file.analyses import MethodByShift
from lmms_plugin.study.file.grid import CellAxes
from lmms_plugin.study.verdicts.arms import FinishedCell, Placed, by_seed, one_reference, select
from lmms_plugin.study.verdicts.boundaries import ComparisonEvidence, Family, Judgement, StoppingRule
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
        interval: Interval at this number of images, by the rule of the study.
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
    """Answers of a cell to the images of one stage, or of several.

    Attributes:
        sizes: Number of documents of each image, shape (images,).
        right: Task → number of right answers of each image, shape (images,).
    """

    sizes: Floats
    right: Mapping[str, Floats]

    @classmethod
    def joined(cls, stages: Sequence[StageAnswers]) -> StageAnswers:
        """Return the answers to several stages in sequence."""
        right = {task: np.concatenate([one.right[task] for one in stages]) for task in stages[0].right}
        return cls(np.concatenate([one.sizes for one in stages]), right)


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
        rule: When a comparison is settled.
        members: ArmComparison → its cells, of `comparisons`.
        found: ArmComparison → its latest state.
    """

    question: MethodByShift
    rule: StoppingRule
    members: Mapping[ArmComparison, ComparedCells]
    found: dict[ArmComparison, Decision] = field(default_factory=dict)
    _seen: dict[CellAxes, list[StageAnswers]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, question: MethodByShift, cells: Sequence[Placed], rule: Callable[[MethodByShift, int], StoppingRule]
    ) -> Decisions:
        """Return the comparisons that cells allow, of which nothing is known yet.

        Args:
            question: Question of the study.
            cells: Its cells.
            rule: Function of the question and the number of comparisons that returns when one is settled.

        Raises:
            AskedError: An arm has no cell, or two arms differ in bits.
        """
        members = comparisons(question, cells)
        return cls(question, rule(question, len(members)), members)

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
        for axes in self.needed():
            self._seen.setdefault(axes, []).append(answers[axes])
        stage = max(map(len, self._seen.values())) - 1
        whole = {axes: StageAnswers.joined(self._seen[axes]) for axes in self.needed()}
        evidence = {one: self._evidence(one, whole) for one in self.open()}
        shown = Counter(_family(one) for one, state in self.found.items() if state.finding in (SHOWN, REVERSE))
        unshown = Counter(map(_family, self.members))
        unshown.subtract(shown)
        judged = self.rule.judge(stage, evidence, unshown)
        self.found |= {one: self._decision(one, evidence[one], judged[one], whole) for one in evidence}

    def _evidence(self, one: ArmComparison, answers: Mapping[CellAxes, StageAnswers]) -> ComparisonEvidence:
        cells = self.members[one]
        sums = differences(one.asked, right_answers(self.question, cells.first, cells.second, answers))
        by_seed = differences_by_seed(one.asked, self.question, cells.first, cells.second, answers)
        return ComparisonEvidence(sums, answers[cells.reference].sizes, by_seed, BOUNDS[one.asked], _family(one))

    def _decision(
        self, one: ArmComparison, known: ComparisonEvidence, judged: Judgement, answers: Mapping[CellAxes, StageAnswers]
    ) -> Decision:
        cells, clean = self.members[one], self.question.clean
        right = right_answers(self.question, cells.first, cells.second, answers)
        floor = BROKEN * answers[cells.reference].right[clean].sum()
        arms = {one.first: right["first clean"], one.second: right["second clean"]}
        return Decision(
            judged.finding,
            float(known.sums.sum() / known.sizes.sum()),
            judged.interval,
            known.sizes.size,
            int(known.sizes.sum()),
            tuple(name for name, own in arms.items() if own.sum() < floor),
        )


def comparisons(question: MethodByShift, cells: Sequence[Placed]) -> dict[ArmComparison, ComparedCells]:
    """Return the comparisons that cells allow.

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
    return members


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


def differences_by_seed(
    asked: str, question: MethodByShift, first: Groups, second: Groups, answers: Mapping[CellAxes, StageAnswers]
) -> tuple[Floats, ...]:
    """Return what every source of calibration data adds to `differences` with each of its seeds.

    Seeds of a source are the same for all methods that calibrate with it, and have nothing to do with those of another
    one, as in the resamples of the whole analysis.

    Returns:
        One array of shape (seeds, images) for each source with several seeds.
    """
    parts: dict[tuple[str | None, tuple[int | None, ...]], list[Floats]] = {}
    for sign, arm in ((1.0, first), (-1.0, second)):
        for group in (group for group in arm if len(group) > 1):
            kept = np.stack([_kept(asked, question, answers[axes]) for axes in group])
            source = group[0].calibration, tuple(axes.seed for axes in group)
            parts.setdefault(source, []).append(sign / len(arm) * kept)
    return tuple(np.sum(several, axis=0) for several in parts.values())


def _kept(asked: str, question: MethodByShift, answers: StageAnswers) -> Floats:
    """Return what a cell adds to `differences`: right answers under shift, for an interaction less those on clean."""
    shifted: Floats = np.mean([answers.right[task] for task in question.shifted], axis=0)
    return shifted - answers.right[question.clean] if asked == INTERACTION else shifted


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


def _family(one: ArmComparison) -> Family:
    return one.model, one.asked
