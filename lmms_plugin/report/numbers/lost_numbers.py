"""What quantization loses: accuracy, reliability, and the guarantee of an answer at a risk; what of it was shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lmms_plugin.analysis.axes import Config
from lmms_plugin.report.numbers.summary import BaselineDifference, Scope, Summary
from lmms_plugin.report.numbers.tables import shown as shown_number
from lmms_plugin.utils.messages import counted

_MOST_SCOPES = 3


class Loss(NamedTuple):
    """One thing that can be lost.

    Attributes:
        metric: Metric, named as in `lmms_plugin.analysis.groups`.
        title: Title of its panel.
        label: Name on the axis.
        column: Heading of its column.
        high_is_bad: Whether the metric is worse the higher it is.
        said: What happens, before "by" or "for" configurations.
    """

    metric: str
    title: str
    label: str
    column: str
    high_is_bad: bool
    said: str


LOSSES = (
    Loss("accuracy", "Accuracy lost", "accuracy", "\u0394 accuracy", False, "accuracy is lost by"),
    Loss("ece", "Reliability lost", "\u2212 ECE", "\u0394 ECE", True, "calibration (ECE) is worse for"),
    Loss(
        "coverage@0.05",
        "Guarantee lost",
        "coverage at 5 % risk",
        "\u0394 C@5%",
        False,
        "coverage at 5 % risk is lost by",
    ),
)


@dataclass(frozen=True)
class Lost:
    """Differences of one configuration under one condition from the unquantized model.

    Attributes:
        values: Metric → difference; None where it cannot be told.
    """

    values: Mapping[str, BaselineDifference | None]

    def of(self, loss: Loss) -> BaselineDifference | None:
        """Return the difference of one metric."""
        return self.values[loss.metric]


def lost(scope: Scope) -> dict[Config, dict[str, Lost]]:
    """Return the differences of every quantized configuration by condition, the largest loss of accuracy first."""
    found: dict[Config, dict[str, Lost]] = {}
    for condition in scope.conditions:
        for line in scope.under(condition):
            if line.base is not None:
                found.setdefault(line.config, {})[condition] = Lost(line.differences)
    return dict(sorted(found.items(), key=lambda item: _least(item[1])))


def _least(of: Mapping[str, Lost]) -> float:
    told = [one.value for each in of.values() if (one := each.of(LOSSES[0])) is not None]
    return min(told, default=math.inf)


def sentences(summary: Summary) -> Iterator[str]:
    """Yield what is lost, a sentence for each thing that can be: by how many configurations, and most by which."""
    scopes = [(scope, found) for scope in summary.scopes if (found := lost(scope))]
    for scope, found in scopes[:_MOST_SCOPES]:
        for loss in LOSSES:
            told = [said for name in scope.conditions if (said := _said(summary, found, name, loss))]
            if told:
                yield f"{scope.title}: {loss.said} {', '.join(told)}."
    if len(scopes) > _MOST_SCOPES:
        yield f"{counted(len(scopes) - _MOST_SCOPES, 'more data set')} below."


def _said(summary: Summary, found: Mapping[Config, Mapping[str, Lost]], condition: str, loss: Loss) -> str:
    """Return how many configurations were shown to lose under a condition; "" if nothing can be told."""
    sign = 1.0 if loss.high_is_bad else -1.0
    there = {config: one for config, of in found.items() if condition in of and (one := of[condition].of(loss))}
    if not there:
        return ""
    # An interval that lies on the bad side of 0 shows a loss.
    shown = {config: one for config, one in there.items() if _worse(one, loss)}
    where = f"{len(shown)} of {counted(len(there), 'quantized configuration')} on {condition} data"
    if not shown:
        return where
    worst = max(shown, key=lambda config: sign * shown[config].value)
    one = shown[worst]
    value, *ends = (shown_number(100 * number, "+.1f") for number in (one.value, *one.interval))
    return f"{where} (most: {summary.name(worst)}, {value} points [{', '.join(ends)}])"


def _worse(one: BaselineDifference, loss: Loss) -> bool:
    low, high = one.interval
    return low > 0.0 if loss.high_is_bad else high < 0.0
