"""Parsing of the `analysis` entry of a study file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from lmms_plugin.confidence.estimators import ALL_ESTIMATORS
from lmms_plugin.metrics.bootstrap import MOST_RESAMPLES
from lmms_plugin.study.file.tasks import known
from lmms_plugin.utils.image_slices import MOST
from lmms_plugin.utils.reading.located import Entry
from lmms_plugin.utils.reading.validation import Expected, Number, OneOf, Problem, Text, Whole
from lmms_plugin.utils.suggest import near

Question = TypeVar("Question")

Names = Annotated[tuple[Text, ...], Field(min_length=1), Expected("a list of names")]
Margin = Annotated[Number, Field(gt=0), Expected("a number above 0")]
Level = Annotated[Number, Field(gt=0.5, lt=1), Expected("a number in (0.5, 1)")]
Resamples = Annotated[Whole, Field(ge=1, le=MOST_RESAMPLES), Expected(f"a whole number from 1 to {MOST_RESAMPLES}")]
# A run until decided asks about images in the order of its seed.
Seed = Annotated[Whole, Field(ge=0, le=MOST), Expected(f"a whole number from 0 to {MOST}")]
Estimator = Annotated[str, OneOf(lambda: ALL_ESTIMATORS, "an estimator of `lmms-plugin estimators`")]


class AskedError(ValueError):
    """Entries of an `analysis` are wrong.

    Attributes:
        problems: What is wrong, and where.
    """

    def __init__(self, name: str, text: str) -> None:
        self._tell([Problem((name,), f"{name}: {text}", of_name=False)])

    def _tell(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(f"analysis: {problem.text}" for problem in problems))
        self.problems = problems

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> AskedError:
        """Return the error for some problems."""
        error = cls.__new__(cls)
        error._tell(problems)
        return error


def located(error: ValueError, analysis: Entry) -> ValueError:
    """Return the error with the place in the file of each entry that it is about.

    Args:
        error: Error about an `analysis`.
        analysis: Entry of the study file.
    """
    if isinstance(error, AskedError):
        return analysis.refused(error.problems, "analysis: ")
    return ValueError(f"{analysis.where}: {error}")


def parse(kind: type[Question], given: Mapping[str, Any]) -> Question:
    """Parse a question from the study file.

    Args:
        kind: Dataclass decorated by `validation.validated`.
        given: `analysis` of the study file.

    Raises:
        AskedError: Entries are missing, unknown or of the wrong type.
    """
    try:
        made: Question = kind.__pydantic_validator__.validate_python(dict(given))  # type: ignore[attr-defined]
    except ValidationError as error:
        raise AskedError.of(Problem.all_of(error, kind, noun="setting", positions=False)) from error
    return made


def expect_metrics(metrics: Iterable[str], tasks: Collection[str], cells: Iterable[Collection[str]]) -> None:
    """Refuse tasks that no cell answers, and metrics that none of them has.

    Args:
        metrics: Requested metrics.
        tasks: Requested tasks; empty for all.
        cells: Tasks and groups of each cell.

    Raises:
        AskedError: A task or metric does not occur; names the first one.
    """
    names = {name for cell in cells for name in cell}
    measured = {task: found for one in known(sorted(names)).values() for task, found in one.metrics.items()}
    if missing := [task for task in tasks if task not in measured]:
        raise AskedError("tasks", f"expected a task of the study, got {missing[0]!r}{near(missing[0], measured)}")
    asked = [found for task, found in measured.items() if not tasks or task in tasks]
    there = {metric for found in asked for metric in found}
    # A task that declares no metrics may have any.
    if all(asked) and (missing := [metric for metric in metrics if metric not in there]):
        raise AskedError("metrics", f"expected a metric of the tasks, got {missing[0]!r}{near(missing[0], there)}")
