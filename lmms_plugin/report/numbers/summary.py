"""Summary of runs: one line per configuration and condition, seeds averaged, compared with the unquantized model."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np

from lmms_plugin.analysis.axes import Config, told_apart
from lmms_plugin.analysis.groups import Task, TaskGroup
from lmms_plugin.analysis.measure import Family
from lmms_plugin.analysis.records import CLEAN
from lmms_plugin.metrics.bootstrap import Interval, interval
from lmms_plugin.metrics.intervals import METHODS, between
from lmms_plugin.report.numbers.results_folder import Cost, Folder, ReportedRun

_NAMED = 3
"""Maximum number of tasks that a condition's name lists."""


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
        delta: Difference of accuracy from `base`; None without a comparison.
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
    delta: BaselineDifference | None = None
    flips: BaselineFlips | None = None

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
    lines = [_line(place, names[place.where], tuple(members.values())) for place, members in together.items()]
    lines = _compared(lines, level)
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


def _line(place: _LineKey, name: str, runs: tuple[ReportedRun, ...]) -> Line:
    groups = tuple(run.measured.groups[place.family, place.condition] for run in runs)
    group = _mean(groups)
    tasks = [run.measured.tasks[task] for run in runs for task in place.tasks]
    unparsed = sum(task.unparsed for task in tasks) / sum(task.records for task in tasks)
    return Line(place.config, place.family, name, runs, groups, group, unparsed)


def _compared(lines: Sequence[Line], level: float) -> list[Line]:
    """Compare each quantized line with the most similar unquantized line of the same questions."""
    dense: dict[tuple[object, ...], dict[Config, Line]] = {}
    for line in lines:
        if line.config.dense:
            dense.setdefault(_asked(line), {})[line.config] = line
    found = []
    for line in lines:
        of = {} if line.config.dense else dense.get(_asked(line), {})
        nearest = line.config.nearest(of)
        found.append(line if nearest is None else _beside(line, of[nearest], level))
    return found


def _asked(line: Line) -> tuple[object, ...]:
    """Return condition, tasks and documents."""
    tasks = line.runs[0].measured.tasks
    return line.family, line.condition, *((name, tasks[name].documents) for name in line.group.tasks)


def _beside(line: Line, base: Line, level: float) -> Line:
    compared = replace(line, base=base, flips=_flips(line, base))
    return replace(compared, delta=difference_from_base(compared, "accuracy", level))


def _mean(groups: Sequence[TaskGroup]) -> TaskGroup:
    """Average over runs; without resamples unless all drew the same images for the same tasks."""
    first = groups[0]
    if len(groups) == 1:
        return first
    paired = all(
        (g.drawn, g.tasks, g.resampled.shape) == (first.drawn, first.tasks, first.resampled.shape) for g in groups
    )
    value = np.mean([group.value for group in groups], axis=0)
    shape = first.resampled.shape
    resampled = np.mean([g.resampled for g in groups], axis=0) if paired else np.full(shape, np.nan)
    return TaskGroup(first.tasks, first.drawn if paired else "", first.records, first.images, value, resampled)


def _difference(group: TaskGroup, base: TaskGroup, metric: str, level: float) -> BaselineDifference | None:
    value = group.of(metric) - base.of(metric)
    if np.isnan(value):
        return None
    # Resamples are paired only where the same images were drawn.
    paired = group.drawn and group.drawn == base.drawn and group.resampled.shape == base.resampled.shape
    resampled = group.column(metric) - base.column(metric) if paired else np.empty(0)
    return BaselineDifference(value, interval(value, resampled, level=level, method=METHODS.get(metric, "percentile")))


def difference_from_base(line: Line, metric: str, level: float) -> BaselineDifference | None:
    """Return the difference of a line from its unquantized model; None without one, or where a value is undefined."""
    return None if line.base is None else _difference(line.group, line.base.group, metric, level)


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


def spread(lines: Sequence[Line], metric: str, level: float) -> tuple[float, float, float]:
    """Return the mean over runs and a band: lowest to highest run, or for a single run the interval over images."""
    runs = [group for line in lines for group in line.groups]
    values = np.array([group.of(metric) for group in runs])
    values = values[~np.isnan(values)]
    if not values.size:
        return (float("nan"),) * 3
    if values.size > 1:
        return float(values.mean()), float(values.min()), float(values.max())
    low, high = between(metric, runs[0].of(metric), runs[0].column(metric), level)
    return float(values[0]), low, high


def series(lines: Iterable[Line]) -> dict[tuple[str, int | None], list[Line]]:
    """Group lines by method and bits, the series of a figure."""
    found: dict[tuple[str, int | None], list[Line]] = {}
    for line in lines:
        found.setdefault((line.config.method, line.config.bits), []).append(line)
    return found
