"""What a study file may ask of an analysis, by its `kind`; `lmms_plugin.study.verdicts` answers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from lmms_plugin.analysis import comparison, component_importance
from lmms_plugin.analysis.measure import PRINTED, MeasurementSettings
from lmms_plugin.analysis.records import KINDS
from lmms_plugin.metrics.bootstrap import RESAMPLES
from lmms_plugin.study.file.asked import AskedError, Estimator, Level, Margin, Names, Resamples, Seed, parse
from lmms_plugin.study.file.grid import CellAxes
from lmms_plugin.utils import suggest
from lmms_plugin.utils.reading.validation import Expected, Text, refused, validated
from lmms_plugin.utils.suggest import near

AXES = tuple(field.name for field in fields(CellAxes))
DEFAULT = "method_by_shift"
COMPARED = frozenset(kind.named(PRINTED.get(name, name)) for kind in KINDS for name in comparison.compared(kind))
"""Metrics of `lmms-plugin compare`."""


def _compared(metrics: tuple[str, ...]) -> tuple[str, ...]:
    for number, metric in enumerate(metrics):
        if metric not in COMPARED:
            expected = f"expected metrics that are compared ({', '.join(sorted(COMPARED))})"
            raise refused(f"{expected}, got {metric!r}{near(metric, COMPARED)}", number, value=metric)
    return metrics


def _of_axes(arm: Mapping[str, Any]) -> Mapping[str, Any]:
    if unknown := sorted(set(arm) - set(AXES)):
        raise suggest.unknown("axis", unknown[0], AXES)
    return arm


Arm = Annotated[Mapping[str, Any], AfterValidator(_of_axes)]
"""Axis → value or values."""


@validated
class MethodByShift:
    """What is asked of a study.

    Attributes:
        question: In words.
        clean: Task without shift.
        shifted: Tasks with shift, on the same documents; numbers are means over them.
        arms: Name → axis → value or values; which cells belong together.
        contrasts: Pairs of arms, the first less the second.
        margin: Largest difference of accuracies, either way, that counts as none.
        level: Confidence level of intervals; 1 − level is the error rate of the tests.
        resamples: Of the images and seeds.
        seed: Of the resamples.
        estimator: Confidence estimator; None for that of the kind of task.
    """

    question: Text
    clean: Annotated[Text, Expected("the name of a task")]
    shifted: Annotated[tuple[Text, ...], Field(min_length=1), Expected("a list of at least one task")]
    arms: Annotated[Mapping[str, Arm], Field(min_length=1)]
    contrasts: Annotated[tuple[tuple[Text, Text], ...], Field(min_length=1), Expected("a list of pairs of arms")]
    margin: Margin = 0.02
    level: Level = 0.95
    resamples: Resamples = RESAMPLES
    seed: Seed = 0
    estimator: Estimator | None = None

    def __post_init__(self) -> None:
        for number, pair in enumerate(self.contrasts):
            if set(pair) - set(self.arms):
                expected = f"expected two of {', '.join(self.arms)}"
                raise refused(f"{expected}, got {list(pair)}", "contrasts", number, value=pair)


@validated
class AgainstReference:
    """What is asked of a study.

    Attributes:
        question: In words.
        metrics: As in `lmms-plugin compare`.
        tasks: Which; empty for all of ours.
        margin: Largest difference that counts as none; None to leave equivalence out.
        level: Confidence level of the intervals.
        resamples: Of the images.
        seed: Of the resamples.
        estimator: Confidence estimator; None for that of the kind of task.
    """

    question: Text
    metrics: Annotated[Names, AfterValidator(_compared)]
    tasks: Names = ()
    margin: Margin | None = None
    level: Level = 0.95
    resamples: Resamples = RESAMPLES
    seed: Seed = 0
    estimator: Estimator | None = None

    def settings(self, workers: int) -> MeasurementSettings:
        """As the comparison takes them."""
        return MeasurementSettings(self.estimator, self.resamples, self.seed, self.level, workers=workers)


@validated
class ComponentBits:
    """What is asked of a study.

    Attributes:
        question: In words.
        metrics: As in lmms-eval's table.
        tasks: Which; empty for all.
        resamples: Of the cells, for intervals.
        seed: Of forests, permutations and resamples.
    """

    question: Text
    metrics: Names
    tasks: Names = ()
    resamples: Resamples = component_importance.RESAMPLES
    seed: Seed = 0


Question = MethodByShift | AgainstReference | ComponentBits
QUESTIONS: Mapping[str, type[Question]] = MappingProxyType(
    {DEFAULT: MethodByShift, "against_reference": AgainstReference, "components": ComponentBits}
)
"""Kind → what its entries in a study file make."""


def question(asked: Mapping[str, Any]) -> Question:
    """What an `analysis` asks.

    Raises:
        AskedError: Something in it is unknown, missing or of the wrong kind.
    """
    given = dict(asked)
    name = given.pop("kind", DEFAULT)
    if not isinstance(name, str) or name not in QUESTIONS:
        raise AskedError("kind", f"expected one of {', '.join(QUESTIONS)}, got {name!r}{near(str(name), QUESTIONS)}")
    return parse(QUESTIONS[name], given)
