"""Summary of runs: one line per configuration and condition, seeds averaged, compared with the unquantized model."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np

from lmms_plugin.analysis.axes import Config, told_apart
from lmms_plugin.analysis.groups import METRICS, Task, TaskGroup, ends
from lmms_plugin.analysis.measure import Family
from lmms_plugin.analysis.records import CLEAN, Floats
from lmms_plugin.metrics import intervals
from lmms_plugin.metrics.bootstrap import Interval, interval
from lmms_plugin.report.numbers.results_folder import Cost, Folder, ReportedRun

_NAMED = 3
"""Maximum number of tasks that a condition's name lists."""
COMPARED = ("accuracy", "ece", "coverage@0.05")
"""Metrics whose difference from the unquantized model is told."""


class BaselineDifference(NamedTuple):
    """Difference of a line from its unquantized model, on the same images.

    Attributes:
        value: Line − unquantized.
        interval: Paired interval over images; NaN where runs were not on the same images.
    """

    value: float
    interval: Interval


class BaselineFlips(NamedTuple):
    """Flipped answers against the unquantized model, summed over tasks and runs.

    Attributes:
        lost: Number right without quantization and wrong here.
        won: Number wrong without quantization and right here.
        records: Number of answers compared.
    """

    lost: int
    won: int
    records: int


@dataclass(frozen=True, eq=False)
class Line:
    """One configuration under one condition.

    Attributes:
        config: Configuration without the seed.
        family: Evaluation family of the tasks.
        condition: `clean`, `shifted`, `shifted, severity 3` …; with task names where runs differ in their tasks.
        runs: Runs of all seeds; the numbers are means over them.
        groups: Means of each run, over the same tasks on the same documents.
        group: Mean of the groups.
        unparsed: Share of answers without a box.
        base: Line of the unquantized model that it is compared with; None for that model itself or without one.
        differences: Metric of `COMPARED` → difference from `base`, None where a value is undefined; empty without a
            comparison.
        flips: Flips against `base`; None without a comparison.
    """

    config: Config
    family: Family
    condition: str
    runs: tuple[ReportedRun, ...]
    groups: tuple[TaskGroup, ...]
    group: TaskGroup
    unparsed: float
    base: "Line | None" = None
    differences: Mapping[str, BaselineDifference | None] = field(default_factory=dict)
    flips: BaselineFlips | None = None

    @property
    def delta(self) -> BaselineDifference | None:
        """Difference of accuracy from `base`; None without a comparison."""
        return self.differences.get("accuracy")

    @property
    def limited(self) -> bool:
        """Whether --limit shortened one of the runs."""
        return any(run.limit is not None for run in self.runs)

    @property
    def tasks(self) -> list[Task]:
        """Tasks of all runs."""
        return [run.measured.tasks[name] for run in self.runs for name in self.group.tasks]

    @property
    def cost(self) -> Cost:
        """Mean cost of the runs, each number over the runs that log it."""
        names = Cost.__dataclass_fields__
        told = {name: [x for run in self.runs if (x := getattr(run.cost, name)) is not None] for name in names}
        return Cost(**{name: float(np.mean(values)) if values else None for name, values in told.items()})


@dataclass(frozen=True, eq=False)
class Scope:
    """One model on one dataset: the scope of a figure.

    Attributes:
        model: Checkpoint.
        family: Dataset and split.
        title: Title for headings.
        lines: All lines of the model and dataset.
    """

    model: str
    family: Family
    title: str
    lines: tuple[Line, ...]

    def under(self, condition: str) -> list[Line]:
        """Return the lines of one condition, the unquantized model first."""
        return [line for line in self.lines if line.condition == condition]

    @property
    def conditions(self) -> list[str]:
        """Return the conditions that are means over a whole kind of task, clean first."""
        named = {line.condition for line in self.lines if ", severity" not in line.condition}
        return sorted(named, key=lambda name: (name != CLEAN, name))

    def severities(self, which: str) -> dict[int, str]:
        """Return severity → condition."""
        begins = f"{which}, severity "
        found = {line.condition for line in self.lines if line.condition.startswith(begins)}
        return dict(sorted((int(condition.removeprefix(begins)), condition) for condition in found))


@dataclass(frozen=True, eq=False)
class Summary:
    """Summary of a folder of results.

    Attributes:
        folder: All runs.
        runs: Runs that count: the newest of each configuration and seed.
        superseded: Number of older runs of the same configuration and seed, which are left out.
        partial: Condition that is named with its tasks, since other lines are means over other tasks → those tasks.
        scopes: Scopes by model and dataset.
        level: Confidence level of all intervals.
        common: Settings that all quantized runs share.
    """

    folder: Folder
    runs: tuple[ReportedRun, ...]
    superseded: int
    partial: Mapping[str, tuple[str, ...]]
    scopes: tuple[Scope, ...]
    level: float
    common: tuple[str, ...]

    @property
    def lines(self) -> list[Line]:
        """All lines."""
        return [line for scope in self.scopes for line in scope.lines]

    def name(self, config: Config) -> str:
        """Return method and bits, and the settings that differ between runs."""
        return ", ".join(part for part in (config.label, self.details(config)) if part)

    def details(self, config: Config) -> str:
        """Return the settings besides method and bits that differ between runs, in one line."""
        return ", ".join(part for part in config.parts if part not in self.common)


def summarise(folder: Folder, level: float) -> Summary:
    """Summarise the runs of a folder."""
    apart = told_apart([run.axes for run in folder.runs])
    newest: dict[tuple[object, ...], ReportedRun] = {}
    for run, axes in zip(folder.runs, apart, strict=True):
        newest[axes.config, axes.seed, tuple(sorted(run.tasks))] = replace(run, axes=axes)
    runs = tuple(newest.values())
    together = _together(runs)
    names = _conditions(together)
    drawn = [_line(place, names[place.where], tuple(members.values()), level) for place, members in together.items()]
    lines = _compared(drawn, level)
    partial = {names[place.where]: place.tasks for place in together if names[place.where] != place.condition}
    left_out = len(folder.runs) - len(runs)
    return Summary(folder, runs, left_out, partial, tuple(_scopes(lines)), level, _common(runs))


class _LineKey(NamedTuple):
    """Key of the runs that a line averages: tasks and documents are equal within a mean."""

    config: Config
    family: Family
    condition: str
    tasks: tuple[str, ...]
    documents: tuple[str, ...]

    @property
    def where(self) -> tuple[str, Family, str, tuple[str, ...]]:
        """Key within which a line's name is unique."""
        return self.config.model, self.family, self.condition, self.tasks


def _together(runs: Iterable[ReportedRun]) -> dict[_LineKey, dict[int | None, ReportedRun]]:
    """Return the newest run of each seed, by line."""
    found: dict[_LineKey, dict[int | None, ReportedRun]] = {}
    for run in runs:
        for (family, condition), group in run.measured.groups.items():
            documents = tuple(run.measured.tasks[name].documents for name in group.tasks)
            place = _LineKey(run.axes.config, family, condition, group.tasks, documents)
            found.setdefault(place, {})[run.axes.seed] = run
    return found


def _conditions(
    together: Mapping[_LineKey, Mapping[int | None, ReportedRun]],
) -> dict[tuple[str, Family, str, tuple[str, ...]], str]:
    """Return the name of each condition: with its tasks, where most runs have other tasks under the same name."""
    counts: dict[tuple[str, Family, str], Counter[tuple[str, ...]]] = {}
    for place, members in together.items():
        counts.setdefault(place.where[:3], Counter())[place.tasks] += len(members)
    names = {}
    for where, tasks in counts.items():
        usual = max(tasks, key=lambda some: (tasks[some], len(some), some))
        for some in tasks:
            names[*where, some] = where[2] if some == usual else _over(where[2], some)
    return names


def _over(condition: str, tasks: Sequence[str]) -> str:
    which, comma, severity = condition.partition(", severity ")
    named = ", ".join(tasks) if len(tasks) <= _NAMED else f"{len(tasks)} tasks from {tasks[0]} to {tasks[-1]}"
    return f"{which} over {named}{comma}{severity}"


def _common(runs: Sequence[ReportedRun]) -> tuple[str, ...]:
    quantized = [set(run.axes.config.parts) for run in runs if not run.axes.config.dense]
    first = next((run.axes.config.parts for run in runs if not run.axes.config.dense), ())
    return tuple(part for part in first if all(part in parts for parts in quantized))


def _order(config: Config) -> tuple[object, ...]:
    known = [("" if value is None else value) for value in (config.group_size, config.components, config.calibration)]
    return (config.model, not config.dense, config.method, -(config.bits or 0), *map(str, known), config.options)


def _scopes(lines: Iterable[Line]) -> Iterator[Scope]:
    def key(line: Line) -> tuple[str, Family]:
        return line.config.model, line.family

    ordered = sorted(lines, key=lambda line: (key(line), line.condition))
    models = {line.config.model for line in ordered}
    for (model, family), members in groupby(ordered, key):
        kept = sorted(members, key=lambda line: _order(line.config))
        clean = next(
            (line.group.tasks[0] for line in kept if line.condition == CLEAN), f"{family.dataset} {family.split}"
        )
        title = f"{model}, {clean}" if len(models) > 1 else clean
        yield Scope(model, family, title, tuple(kept))


class _DrawnLine(NamedTuple):
    """A line, and the values of its metrics on the resamples, shape (resamples, metrics), which it does not keep."""

    line: Line
    resampled: Floats


def _line(place: _LineKey, name: str, runs: tuple[ReportedRun, ...], level: float) -> _DrawnLine:
    where = place.family, place.condition
    groups = tuple(run.measured.groups[where] for run in runs)
    group, resampled = _mean(groups, [run.measured.resampled[where] for run in runs], level)
    tasks = [run.measured.tasks[task] for run in runs for task in place.tasks]
    unparsed = sum(task.unparsed for task in tasks) / sum(task.records for task in tasks)
    return _DrawnLine(Line(place.config, place.family, name, runs, groups, group, unparsed), resampled)


def _compared(drawn: Sequence[_DrawnLine], level: float) -> list[Line]:
    """Compare each quantized line with the most similar unquantized line of the same questions."""
    dense: dict[tuple[object, ...], dict[Config, _DrawnLine]] = {}
    for one in drawn:
        if one.line.config.dense:
            dense.setdefault(_asked(one.line), {})[one.line.config] = one
    found = []
    for one in drawn:
        of = {} if one.line.config.dense else dense.get(_asked(one.line), {})
        nearest = one.line.config.nearest(of)
        found.append(one.line if nearest is None else _beside(one, of[nearest], level))
    return found


def _asked(line: Line) -> tuple[object, ...]:
    """Return condition, tasks and documents."""
    tasks = line.runs[0].measured.tasks
    return line.family, line.condition, *((name, tasks[name].documents) for name in line.group.tasks)


def _beside(one: _DrawnLine, base: _DrawnLine, level: float) -> Line:
    differences = {metric: _difference(one, base, metric, level) for metric in COMPARED}
    return replace(one.line, base=base.line, differences=differences, flips=_flips(one.line, base.line))


def _mean(groups: Sequence[TaskGroup], resampled: Sequence[Floats], level: float) -> tuple[TaskGroup, Floats]:
    """Average over runs; without resamples unless all drew the same images for the same tasks."""
    first = groups[0]
    if len(groups) == 1:
        return first, resampled[0]
    shape = resampled[0].shape
    paired = all((g.drawn, g.tasks) == (first.drawn, first.tasks) for g in groups) and all(
        values.shape == shape for values in resampled
    )
    value = np.mean([group.value for group in groups], axis=0)
    mean = np.mean(resampled, axis=0) if paired else np.full(shape, np.nan)
    drawn = first.drawn if paired else ""
    return TaskGroup(first.tasks, drawn, first.records, first.images, value, *ends(value, mean, level)), mean


def _difference(one: _DrawnLine, base: _DrawnLine, metric: str, level: float) -> BaselineDifference | None:
    group, other, column = one.line.group, base.line.group, METRICS.index(metric)
    value = group.of(metric) - other.of(metric)
    if np.isnan(value):
        return None
    # Resamples are paired only where the same images were drawn.
    paired = group.drawn and group.drawn == other.drawn and one.resampled.shape == base.resampled.shape
    resampled = one.resampled[:, column] - base.resampled[:, column] if paired else np.empty(0)
    method = intervals.METHODS.get(metric, "percentile")
    return BaselineDifference(value, interval(value, resampled, level=level, method=method))


def _flips(line: Line, base: Line) -> BaselineFlips | None:
    lost = won = records = 0
    for one in line.tasks:
        # The unquantized model does not depend on seeds: its newest run counts.
        other = base.runs[-1].measured.tasks[one.task]
        if _binary(one) and _binary(other):
            lost += int(np.sum(one.outcome < other.outcome))
            won += int(np.sum(one.outcome > other.outcome))
            records += one.records
    return BaselineFlips(lost, won, records) if records else None


def _binary(task: Task) -> bool:
    return bool(np.all((task.outcome == 0.0) | (task.outcome == 1.0)))


def spread(lines: Sequence[Line], metric: str) -> tuple[float, float, float]:
    """Return the mean over runs and a band: lowest to highest run, or for a single run the interval over images."""
    runs = [group for line in lines for group in line.groups]
    values = np.array([group.of(metric) for group in runs])
    values = values[~np.isnan(values)]
    if not values.size:
        return (float("nan"),) * 3
    if values.size > 1:
        return float(values.mean()), float(values.min()), float(values.max())
    low, high = runs[0].interval(metric)
    return float(values[0]), low, high


def series(lines: Iterable[Line]) -> dict[tuple[str, int | None], list[Line]]:
    """Group lines by method and bits, the series of a figure."""
    found: dict[tuple[str, int | None], list[Line]] = {}
    for line in lines:
        found.setdefault((line.config.method, line.config.bits), []).append(line)
    return found
