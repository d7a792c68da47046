"""Analysis of method × shift, with intervals, equivalence bounds and a verdict in words.

A study file asks for it:

    analysis:
      question: Does ... ?
      clean: shapes_rec
      shifted: [shapes_shift_gaussian_noise_1, shapes_shift_gaussian_noise_3]
      margin: 0.02
      arms:
        zero-shot: {method: [awq, mbq], calibration: [noise, self]}
        data-free: {method: [rtn, hqq]}
      contrasts: [[zero-shot, data-free]]

For every contrast and every number of bits, two questions are tested on accuracy. *Under shift*: is the first arm right
more often on shifted data? *Interaction*: does it lose less from clean to shifted data, (shifted − clean) of the first
arm − (shifted − clean) of the second? The first test says which arm to use, the second whether robustness explains the
difference. p-values are adjusted by Holm over all contrasts and bits, separately for the two questions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmms_plugin.metrics.paired import Difference, holm
from lmms_plugin.study.file.analyses import MethodByShift
from lmms_plugin.study.file.asked import AskedError
from lmms_plugin.study.file.tasks import known
from lmms_plugin.study.verdicts.arms import (
    UNTOUCHED,
    FinishedCell,
    Placed,
    ResampledCells,
    ResampledNumber,
    by_seed,
    expect_places,
    flipped,
    one_reference,
    parse_rate,
    read_cells,
    select,
)
from lmms_plugin.study.verdicts.conclusions import ExpectedCell

BROKEN = 0.5
"""An arm is broken if it keeps less than this share of the unquantized model's clean accuracy."""


class Contrast(NamedTuple):
    """Two arms at the same bits.

    Attributes:
        first: Arm in question.
        second: Arm it is compared with.
        bits: Bits per weight of both.
        clean: First − second on clean data.
        under_shift: First − second on shifted data, mean over shifted tasks.
        interaction: under_shift − clean: how much less the first loses from clean to shifted data.
        by_severity: Severity → interaction with the shifted tasks of that severity.
        retained: Difference of shifted ÷ clean accuracy.
        p_under_shift: p-value of `under_shift`, adjusted by Holm over all contrasts.
        p_interaction: p-value of `interaction`, adjusted by Holm over all contrasts.
        calibration_error: Interaction of ECE; above 0 where the first becomes less calibrated under shift.
        broken: Arms that keep less than half of the unquantized model's clean accuracy.
    """

    first: str
    second: str
    bits: int
    clean: Difference
    under_shift: Difference
    interaction: Difference
    by_severity: Mapping[int, Difference]
    retained: Difference
    p_under_shift: float
    p_interaction: float
    calibration_error: Difference
    broken: tuple[str, ...]


class ContrastRow(NamedTuple):
    """One method with one source of calibration data at one number of bits, mean over seeds.

    Attributes:
        method: Quantization backend.
        calibration: Source of calibration data; None for methods without calibration.
        bits: Bits per weight, 16 for the unquantized model; None where there is no single number.
        seeds: Number of cells.
        clean: Accuracy on clean data.
        shifted: Accuracy on shifted data, mean over tasks.
        spread: Standard deviation of `shifted` between seeds; NaN for one seed.
        lost_more: (shifted − clean) − (shifted − clean) of the unquantized model; below 0 where quantization hurts more
            under shift.
        ece_clean: ECE on clean data.
        ece_shifted: ECE on shifted data.
        flips_clean: Answers lost and won against the unquantized model, as shares of the documents.
        flips_shifted: The same on shifted data.
        parsed: Share of shifted answers that hold a box.
    """

    method: str
    calibration: str | None
    bits: int | None
    seeds: int
    clean: float
    shifted: float
    spread: float
    lost_more: Difference | None
    ece_clean: float
    ece_shifted: float
    flips_clean: tuple[float, float] | None
    flips_shifted: tuple[float, float] | None
    parsed: float


class Analysis(NamedTuple):
    """All findings for one model.

    Attributes:
        model: Value of `pretrained`.
        question: Question of the study.
        contrasts: Arms compared.
        rows: Every method and source of calibration data.
        documents: Task → number of documents.
        images: Number of images they belong to.
        limit: Documents per task that the runs were limited to; None for all.
    """

    model: str
    question: MethodByShift
    contrasts: list[Contrast]
    rows: list[ContrastRow]
    documents: Mapping[str, int]
    images: int
    limit: float | None


def expect(question: MethodByShift, cells: Sequence[ExpectedCell]) -> None:
    """Refuse a study that will lack cells or tasks of the question.

    Raises:
        ValueError: An arm has no cell, two arms of a contrast differ in bits, the unquantized model is missing, or a
            cell of an arm does not answer a task.
    """
    expect_places(cells)
    for model in dict.fromkeys(cell.axes.model for cell in cells):
        own = select(cells, {"model": model})
        needed = [one_reference(own), *(cell for name in question.arms for cell in arm_cells(own, name, question))]
        for cell in needed:
            answered = {task for described in known(cell.tasks).values() for task in described.tasks}
            for task in (question.clean, *question.shifted):
                if task not in answered:
                    name = "clean" if task == question.clean else "shifted"
                    raise AskedError(name, f"expected task {task} in every cell, got {', '.join(cell.tasks)}")
        for pair in question.contrasts:
            shared_bits(own, pair, question)
    _expect_values(question, cells)


def _expect_values(question: MethodByShift, cells: Sequence[ExpectedCell]) -> None:
    """Refuse values of an arm that no cell has: the arm would differ from what its author intends."""
    for name, wanted in question.arms.items():
        for axis, values in wanted.items():
            there = {getattr(cell.axes, axis) for cell in cells}
            if missing := [value for value in (values if isinstance(values, list) else [values]) if value not in there]:
                raise AskedError("arms", f"{name!r}: expected {axis} of a cell of the study, got {missing[0]!r}")


def analyse(
    study: Path, question: MethodByShift, only: Collection[str] | None = None, *, workers: int = 1
) -> list[Analysis]:
    """Answer a question from a study's finished cells, for each of its models.

    Raises:
        ValueError: An arm of a contrast has no cell at some bits that the other one has, there is no cell with the
            unquantized model, or cells answered different documents.
    """
    cells = read_cells(study, only)
    models = dict.fromkeys(cell.axes.model for cell in cells)
    return [_of_one_model(select(cells, {"model": model}), question, workers) for model in models]


def _of_one_model(cells: Sequence[FinishedCell], question: MethodByShift, workers: int) -> Analysis:
    reference = one_reference(cells)
    chosen = [cell for name in question.arms for cell in arm_cells(cells, name, question)]
    members = list({cell.name: cell for cell in (reference, *chosen)}.values())
    tasks = (question.clean, *question.shifted)
    drawn = ResampledCells(
        members,
        tasks,
        estimator=question.estimator,
        resamples=question.resamples,
        seed=question.seed,
        workers=workers,
    )
    contrasts = [
        _contrast(pair, bits, cells, reference, drawn, question)
        for pair in question.contrasts
        for bits in shared_bits(cells, pair, question)
    ]
    rows = [_row(group, reference, drawn, question) for group in by_seed(members)]
    limits = {cell.run.limit for cell in members}
    if len(limits) > 1:
        raise ValueError(f"expected all cells with the same --limit, got {sorted(map(str, limits))}")
    return Analysis(
        cells[0].axes.model, question, _adjusted(contrasts), rows, drawn.documents, drawn.images, limits.pop()
    )


def arm_cells(cells: Sequence[Placed], name: str, question: MethodByShift) -> list[Placed]:
    """Return the cells of an arm.

    Raises:
        AskedError: There are none.
    """
    found = select(cells, question.arms[name])
    if not found:
        raise AskedError("arms", f"no cell belongs to arm {name!r} ({dict(question.arms[name])})")
    return found


def shared_bits(cells: Sequence[Placed], pair: tuple[str, str], question: MethodByShift) -> list[int]:
    """Return the bits at which two arms are compared, most first.

    Raises:
        AskedError: Their bits differ, or an arm is empty or has cells without a number of bits.
    """
    bits = [_bits(arm_cells(cells, name, question), name) for name in pair]
    if bits[0] != bits[1]:
        told = [", ".join(map(str, sorted(each))) for each in bits]
        raise AskedError(
            "contrasts",
            f"expected the same bits in {pair[0]!r} and {pair[1]!r}, got {told[0]} and {told[1]}: are cells missing?",
        )
    return sorted(bits[0], reverse=True)


def _bits(cells: Sequence[Placed], arm: str) -> set[int]:
    """Return the bits of an arm's cells, at which it can be compared with another arm."""
    if without := [cell.axes for cell in cells if cell.axes.bits is None]:
        one = without[0]
        told = one.method if one.components is None else f"{one.method} of {one.components}"
        raise AskedError(
            "arms",
            f"expected cells with one number of bits in arm {arm!r}, got {told}: checkpoints that came"
            " quantized and components with bits of their own cannot be compared at equal bits"
            " (kind against_reference compares them with the unquantized model)",
        )
    return {cell.axes.bits for cell in cells}


def _contrast(
    pair: tuple[str, str],
    bits: int,
    cells: Sequence[FinishedCell],
    reference: FinishedCell,
    drawn: ResampledCells,
    question: MethodByShift,
) -> Contrast:
    arms = [select(arm_cells(cells, name, question), {"bits": bits}) for name in pair]

    def judged(value: ResampledNumber, number: str = "accuracy", margin: float | None = question.margin) -> Difference:
        return value.judged(level=question.level, margin=margin, number=number)

    def gain(tasks: Sequence[str], number: str = "accuracy") -> ResampledNumber:
        return drawn.over(arms[0], tasks, number) - drawn.over(arms[1], tasks, number)

    clean, shifted = gain([question.clean]), gain(question.shifted)
    kept = [drawn.over(arm, question.shifted) / drawn.over(arm, [question.clean]) for arm in arms]
    floor = BROKEN * drawn.of(reference, question.clean).value
    return Contrast(
        *pair,
        bits=bits,
        clean=judged(clean),
        under_shift=judged(shifted),
        interaction=judged(shifted - clean),
        by_severity={
            severity: judged(gain(tasks) - clean) for severity, tasks in _by_severity(reference, question).items()
        },
        retained=judged(kept[0] - kept[1], margin=None),
        p_under_shift=math.nan,
        p_interaction=math.nan,
        calibration_error=judged(gain(question.shifted, "ece") - gain([question.clean], "ece"), "ece", None),
        broken=tuple(
            name for name, arm in zip(pair, arms, strict=True) if drawn.over(arm, [question.clean]).value < floor
        ),
    )


def _by_severity(reference: FinishedCell, question: MethodByShift) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for task in question.shifted:
        found.setdefault(int(reference.run.tasks[task].place.severity or 0), []).append(task)
    return dict(sorted(found.items()))


def _row(
    cells: Sequence[FinishedCell], reference: FinishedCell, drawn: ResampledCells, question: MethodByShift
) -> ContrastRow:
    axes = cells[0].axes
    untouched = axes.method == UNTOUCHED
    shifted = [float(np.mean([drawn.of(cell, task).value for task in question.shifted])) for cell in cells]

    def lost(group: Sequence[FinishedCell]) -> ResampledNumber:
        return drawn.over(group, question.shifted) - drawn.over(group, [question.clean])

    more = None
    if not untouched:
        more = (lost(cells) - lost([reference])).judged(level=question.level, margin=question.margin)
    return ContrastRow(
        axes.method,
        axes.calibration,
        axes.bits,
        len(cells),
        drawn.over(cells, [question.clean]).value,
        drawn.over(cells, question.shifted).value,
        float(np.std(shifted, ddof=1)) if len(cells) > 1 else math.nan,
        more,
        drawn.over(cells, [question.clean], "ece").value,
        drawn.over(cells, question.shifted, "ece").value,
        None if untouched else flipped(cells, reference, [question.clean]),
        None if untouched else flipped(cells, reference, question.shifted),
        parse_rate(cells, question.shifted),
    )


def _adjusted(contrasts: Sequence[Contrast]) -> list[Contrast]:
    shifted = holm([one.under_shift.p for one in contrasts])
    kept = holm([one.interaction.p for one in contrasts])
    return [
        one._replace(p_under_shift=float(p), p_interaction=float(q))
        for one, p, q in zip(contrasts, shifted, kept, strict=True)
    ]
