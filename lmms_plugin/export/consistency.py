"""Consistency of the answers of one run, for any model: a log that fails these checks was edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.records import EvaluationSet, TaskRecords
from lmms_plugin.confidence.estimators import LEARNED
from lmms_plugin.protocol.response import Response
from lmms_plugin.utils import hashing


class RescoredSample(NamedTuple):
    """One line of a log whose rescored values equal the logged ones.

    Attributes:
        number: Number of the document in lmms-eval.
        record: Whole record of the document.
        response: Model's answer.
        prompt: Question that lmms-eval logged; "" if it did not.
        target: True answer as text.
    """

    number: int
    record: Mapping[str, Any]
    response: Response
    prompt: str
    target: str


def expect_told(response: Response) -> None:
    """Check that an answer claims no confidence that is computed from its tokens.

    Raises:
        ValueError: The answer has a value for an estimator that is not learned, which would replace the computed one.
    """
    if claimed := sorted(response.confidence.keys() - {*LEARNED}):
        raise ValueError(f"expected no confidence of an answer's own but {', '.join(LEARNED)}, got {claimed[0]}")


def expect_place(records: TaskRecords, place: EvaluationSet) -> None:
    """Check that a results file and the task's own definition agree on its shift.

    Raises:
        ValueError: They disagree.
    """
    said, known = records.place[2:], place[2:]
    if said != known:
        raise ValueError(f"task {records.task}: expected the shift, severity and what is shifted {known}, got {said}")


def expect_shifted(run: LoggedRun, samples: Mapping[str, Sequence[RescoredSample]]) -> None:
    """Check that no two tasks with differently shifted images have identical logs.

    Raises:
        ValueError: Two logs are equal to the last digit of every log-probability.
    """
    seen: dict[str, str] = {}
    for task, answered in samples.items():
        # A language shift may leave every expression of a small dataset unchanged.
        if run.tasks[task].place.shifts == "language" or not any(sample.response.tokens for sample in answered):
            continue
        other = seen.setdefault(digest(answered), task)
        if run.tasks[other].place[2:] != run.tasks[task].place[2:]:
            raise ValueError(f"tasks {other} and {task}: expected answers to differently shifted images, got the same")


def digest(samples: Sequence[RescoredSample]) -> str:
    """Return the SHA-256 of documents and answers with their log-probabilities, independent of formatting."""
    answers = sorted((str(sample.record["id"]), repr(sample.response)) for sample in samples)
    return hashing.of_value(answers)


def expect_one_model(task: str, samples: Sequence[RescoredSample]) -> None:
    """Check that all answers have one dialect and one opening of reasoning, and that an image has one size.

    Boxes are parsed by dialect and by sizes in pixels, after reasoning; choosing these per answer would move boxes.

    Raises:
        ValueError: Answers differ.
    """
    dialects = sorted({str(sample.response.dialect) for sample in samples})
    if len(dialects) > 1:
        raise ValueError(f"task {task}: expected answers in one dialect, got {', '.join(dialects)}")
    openings = sorted({sample.response.opened for sample in samples})
    if len(openings) > 1:
        raise ValueError(f"task {task}: expected one opening of reasoning by the prompt, got {openings}")
    known: dict[str, object] = {}
    for sample in samples:
        image, response = str(sample.record["image"]), sample.response
        sizes = (response.original_size, response.model_size)
        if any(side < 1 for size in sizes for side in size or ()):
            raise ValueError(f"task {task}: expected sizes of at least 1 pixel for image {image}, got {sizes}")
        if known.setdefault(image, sizes) != sizes:
            raise ValueError(f"task {task}: expected one size of image {image}, got {known[image]} and {sizes}")
