"""Questions that a study file may ask, by `kind`; `lmms_plugin.study.verdicts` answers them."""

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
    """Question about the interaction of method and shift.

    Attributes:
        question: Question in words.
        clean: Task without shift.
        shifted: Tasks with shift, on the same documents; results are means over them.
        arms: Name → axis → value or values; selects the cells of each arm.
        contrasts: Pairs of arms; the difference is first minus second.
        margin: Equivalence margin: largest absolute difference of accuracies that counts as none.
        level: Confidence level of intervals; 1 − level is the error rate of the tests.
        resamples: Number of resamples of images and seeds.
        seed: Seed of the resamples.
        estimator: Confidence estimator; None for the default of the kind of task.
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
    """Question about every cell against the unquantized model.

    Attributes:
        question: Question in words.
        metrics: Metrics as in `lmms-plugin compare`.
        tasks: Tasks; empty for all of this package.
        margin: Equivalence margin; None for no test of equivalence.
        level: Confidence level of the intervals.
        resamples: Number of resamples of the images.
        seed: Seed of the resamples.
        estimator: Confidence estimator; None for the default of the kind of task.
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
        """Return the settings of the comparison."""
        return MeasurementSettings(self.estimator, self.resamples, self.seed, self.level, workers=workers)


@validated
class ComponentBits:
    """Question about the importance of each component's bits.

    Attributes:
        question: Question in words.
        metrics: Metrics as in lmms-eval's table.
        tasks: Tasks; empty for all.
        resamples: Number of resamples of the cells, for intervals.
        seed: Seed of forests, permutations and resamples.
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
"""Kind → class of the question."""


def question(asked: Mapping[str, Any]) -> Question:
    """Parse the question of an `analysis`.

    Raises:
        AskedError: An entry is unknown, missing or of the wrong type.
    """
    given = dict(asked)
    name = given.pop("kind", DEFAULT)
    if not isinstance(name, str) or name not in QUESTIONS:
        raise AskedError("kind", f"expected one of {', '.join(QUESTIONS)}, got {name!r}{near(str(name), QUESTIONS)}")
    return parse(QUESTIONS[name], given)
