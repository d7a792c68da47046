"""What the answers of one run have in common, whatever the model: a log in which they do not was edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.records import EvaluationSet, TaskRecords
from lmms_plugin.confidence.estimators import LEARNED
from lmms_plugin.protocol.response import Response
from lmms_plugin.utils import hashing


class RescoredSample(NamedTuple):
    """One line of a log whose scores were made again and are the same.

    Attributes:
        number: Of the document in lmms-eval.
        record: The whole record of the document.
        response: The answer.
        prompt: What lmms-eval logged as the question; "" where it did not.
        target: The true answer as text.
    """

    number: int
    record: Mapping[str, Any]
    response: Response
    prompt: str
    target: str


def expect_told(response: Response) -> None:
    """Check that an answer claims no confidence that is computed from its tokens.

    Raises:
        ValueError: If it brings a value for another than a learned estimator, which would stand for the computed one.
    """
    if claimed := sorted(response.confidence.keys() - {*LEARNED}):
        raise ValueError(f"expected no confidence of an answer's own but {', '.join(LEARNED)}, got {claimed[0]}")


def expect_place(records: TaskRecords, place: EvaluationSet) -> None:
    """Check that a results file says of a task's shift what the task's own definition does.

    Raises:
        ValueError: If it says something else.
    """
    said, known = records.place[2:], place[2:]
    if said != known:
        raise ValueError(f"task {records.task}: expected the shift, severity and what is shifted {known}, got {said}")


def expect_shifted(run: LoggedRun, samples: Mapping[str, Sequence[RescoredSample]]) -> None:
    """Check that no two tasks with differently shifted images were answered by the very same log.

    Raises:
        ValueError: If they were, to the last digit of every log-probability.
    """
    seen: dict[str, str] = {}
    for task, answered in samples.items():
        # A language shift may leave every expression of a small dataset as it is.
        if run.tasks[task].place.shifts == "language" or not any(sample.response.tokens for sample in answered):
            continue
        other = seen.setdefault(digest(answered), task)
        if run.tasks[other].place[2:] != run.tasks[task].place[2:]:
            raise ValueError(f"tasks {other} and {task}: expected answers to differently shifted images, got the same")


def digest(samples: Sequence[RescoredSample]) -> str:
    """SHA-256 of documents and answers with their log-probabilities, however the log wrote them."""
    answers = sorted((str(sample.record["id"]), repr(sample.response)) for sample in samples)
    return hashing.of_value(answers)


def expect_one_model(task: str, samples: Sequence[RescoredSample]) -> None:
    """Check that all answers are in one dialect and after one opening of reasoning, and that an image has one size.

    Boxes are read by dialect and sizes, in pixels, and behind reasoning: chosen one by one, they would move boxes.

    Raises:
        ValueError: If they are not.
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
