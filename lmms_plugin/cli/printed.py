"""What `metrics`, `compare` and `estimators` print: tables for people."""

import math
from collections.abc import Sequence

from rich.table import Table

from lmms_plugin.analysis.comparison import Comparison, Flipped
from lmms_plugin.analysis.estimator_ranking import RankedEstimator
from lmms_plugin.analysis.measure import MeasurementSettings, MetricValue, Robustness
from lmms_plugin.metrics.bootstrap import Interval
from lmms_plugin.metrics.paired import Difference
from lmms_plugin.utils.messages import counted


def metrics_table(numbers: Sequence[MetricValue], title: str, level: float) -> Table:
    """Numbers for people to read."""
    shown = Table(title=title)
    for heading in ("task", "metric"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("value", f"{100 * level:g} % interval", "records", "images"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for k, number in enumerate(numbers):
        task = number.task if k == 0 or numbers[k - 1].task != number.task else ""
        between = "" if math.isnan(number.low) else f"{number.low:z.4f} … {number.high:z.4f}"
        value = "undefined" if math.isnan(number.value) else f"{number.value:z.4f}"
        row = (task, number.metric, value, between, str(number.records), str(number.images))
        shown.add_row(*row)
    return shown


def robustness_table(rows: Sequence[Robustness], title: str) -> Table:
    """Robustness for people to read."""
    severities = list(rows[0].per_severity)
    caption = (
        "shifted: plain mean over the shifts at these severities; retained: that ÷ clean;"
        " per severity: share lost (accuracy, coverage) or what is added (ece, aurc)"
    )
    shown = Table(title=f"{title} under shift", caption=caption)
    shown.add_column("metric", no_wrap=True)
    for heading in ("clean", "shifted", "retained", *(f"severity {severity}" for severity in severities)):
        shown.add_column(heading, justify="right")
    for row in rows:
        values = (row.clean, row.mean, row.retained, *row.per_severity.values())
        shown.add_row(row.metric, *("" if math.isnan(value) else f"{value:z.4f}" for value in values))
    return shown


def changes_table(comparison: Comparison, settings: MeasurementSettings, margin: float | None) -> Table:
    """Changes for people to read."""
    within = "" if margin is None else f"; equivalent: within ±{margin:g} at {100 * settings.level:g} %"
    tests = len({row.task for row in comparison.changes})
    least = min(1.0, 2 * tests / (settings.resamples + 1))
    least_p = f"with {counted(settings.resamples, 'resample')} no lower than {least:.2g}"
    caption = f"p Holm: adjusted for {tests} task{'s' * (tests > 1)}, {least_p}{within}"
    shown = Table(title="Second run less first run", caption=caption)

    for heading in ("task", "metric"):
        shown.add_column(heading, no_wrap=True)
    headings = ["first", "second", "difference", f"{100 * settings.level:g} % interval", "p", "p Holm", "records"]
    for heading in headings + ([] if margin is None else ["equivalent"]):
        shown.add_column(heading, justify="right", no_wrap=True)
    for k, row in enumerate(comparison.changes):
        task = row.task if k == 0 or comparison.changes[k - 1].task != row.task else ""
        d = row.difference
        cells = [task, row.metric, *(_number(x) for x in (row.first, row.second)), _signed(d.value), _between(d)]
        cells += [_p(d.p), _p(row.p_holm), str(row.records)]
        shown.add_row(*cells, *([] if d.equivalent is None else ["yes" if d.equivalent else "not shown"]))
    return shown


def flips_table(rows: Sequence[Flipped]) -> Table:
    """Flips for people to read."""
    caption = "McNemar's p takes the expressions of an image for independent"
    shown = Table(title="Answers that changed sides", caption=caption)
    shown.add_column("task", no_wrap=True)
    for heading in ("right → wrong", "wrong → right", "p McNemar", "records"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(row.task, str(row.lost), str(row.won), _p(row.p), str(row.records))
    return shown


def shifted_table(comparison: Comparison) -> Table:
    """Interaction of the change with shift, for people to read."""
    errors = "; ".join(
        f"errors under shift ÷ those of the first run, mean over {row.shifts} shifts at severity"
        f" {', '.join(map(str, row.severities))}: {row.error_ratio:.3f}{_ends(row.error_ratio_interval)}; of the errors"
        f" beyond those on clean data: {row.added_error_ratio:.3f}{_ends(row.added_error_ratio_interval)}"
        for row in comparison.corruption_errors
    )
    shown = Table(
        title="Does the second run lose more under shift? (shifted less clean), second less first", caption=errors
    )
    shown.add_column("task", no_wrap=True)
    for heading in ("metric", "shifted tasks", "interaction", "interval", "p"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.shifted:
        d = row.interaction
        shown.add_row(row.task, row.metric, str(row.cells), _signed(d.value), _between(d), _p(d.p))
    return shown


def estimators_table(judged: list[RankedEstimator], title: str, level: float) -> Table:
    """Estimators for people to read."""
    shown = Table(title=title, caption=f"in brackets: {100 * level:g} % intervals over images")
    for heading in ("task", "estimator"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("records", "missing", "accuracy", "auroc", "aurc", "ece", "ece floor"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for k, one in enumerate(judged):
        task = one.task if k == 0 or judged[k - 1].task != one.task else ""
        with_intervals = (
            _with_interval(getattr(one, m), getattr(one, f"{m}_interval")) for m in ("auroc", "aurc", "ece")
        )
        counts = str(one.records), str(one.missing), f"{one.accuracy:.3f}"
        shown.add_row(task, one.estimator, *counts, *with_intervals, f"{one.ece_floor:.3f}")
    return shown


def _with_interval(value: float, between: Interval) -> str:
    return f"{value:.3f}" + ("" if math.isnan(between.low) else f" [{between.low:.3f}, {between.high:.3f}]")


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:z.4f}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else _number(value)


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+z.4f}"


def _ends(found: Interval) -> str:
    return "" if math.isnan(found.low) else f" [{found.low:.3f}, {found.high:.3f}]"


def _between(found: Difference) -> str:
    return "" if math.isnan(found.low) else f"{found.low:+z.4f} … {found.high:+z.4f}"
