"""Runs put together: one line per configuration and condition, seeds averaged, each beside its 16-bit model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from lmms_plugin.metrics.bootstrap import Interval, interval
from lmms_plugin.metrics.weighted import METHODS
from lmms_plugin.report.axes import Config
from lmms_plugin.report.measuring import CLEAN, Family, Group, Task, between
from lmms_plugin.report.reading import Cost, Folder, Run


class Difference(NamedTuple):
    """A line less its 16-bit model, on the same images.

    Attributes:
        value: The difference.
        interval: Over images, drawn for both.
    """

    value: float
    interval: Interval


class Flips(NamedTuple):
    """Answers that changed sides against the 16-bit model, summed over tasks and runs.

    Attributes:
        lost: Right with 16 bits, wrong here.
        won: Wrong with 16 bits, right here.
        records: Answers compared.
    """

    lost: int
    won: int
    records: int


@dataclass(frozen=True, eq=False)
class Line:
    """One configuration under one condition.

    Attributes:
        config: What was run.
        family: On what.
        condition: `clean`, `shifted`, `shifted, severity 3` …
        runs: With which seeds; the numbers are means over them.
        group: The numbers.
        unparsed: Share of answers without a box.
        delta: Accuracy less that of the 16-bit model; None for that itself and where there is nothing to compare.
        flips: Against the 16-bit model; None where there is nothing to compare.
    """

    config: Config
    family: Family
    condition: str
    runs: tuple[Run, ...]
    group: Group
    unparsed: float
    delta: Difference | None
    flips: Flips | None

    @property
    def limited(self) -> bool:
        """Whether a run of it was stopped early by --limit."""
        return any(run.limit is not None for run in self.runs)

    @property
    def cost(self) -> Cost:
        """Mean cost of the runs, each number over those that tell it."""
        names = Cost.__dataclass_fields__
        told = {name: [x for run in self.runs if (x := getattr(run.cost, name)) is not None] for name in names}
        return Cost(**{name: float(np.mean(values)) if values else None for name, values in told.items()})


@dataclass(frozen=True, eq=False)
class Scope:
    """One model on one dataset: what a figure shows.

    Attributes:
        model: Checkpoint.
        family: Dataset and split.
        title: For headings.
        lines: All its lines.
    """

    model: str
    family: Family
    title: str
    lines: tuple[Line, ...]

    def under(self, condition: str) -> list[Line]:
        """Lines of one condition, 16 bits first."""
        return [line for line in self.lines if line.condition == condition]

    @property
    def conditions(self) -> list[str]:
        """Conditions that are means over a whole kind of task, clean first."""
        named = {line.condition for line in self.lines if ", severity" not in line.condition}
        return sorted(named, key=lambda name: (name != CLEAN, name))

    def severities(self, which: str) -> dict[int, str]:
        """Severity → condition."""
        begins = f"{which}, severity "
        found = {line.condition for line in self.lines if line.condition.startswith(begins)}
        return dict(sorted((int(condition.removeprefix(begins)), condition) for condition in found))


@dataclass(frozen=True, eq=False)
class Summary:
    """A folder of results, put together.

    Attributes:
        folder: The runs.
        runs: Those that count: the newest of each configuration and seed.
        superseded: How many older runs of the same configuration and seed were left out.
        scopes: By model and dataset.
        level: Of all intervals.
        common: What is set alike in all quantized runs.
    """

    folder: Folder
    runs: tuple[Run, ...]
    superseded: int
    scopes: tuple[Scope, ...]
    level: float
    common: tuple[str, ...]

    def details(self, config: Config) -> str:
        """What is set besides method and bits, and not alike everywhere, in one line."""
        return ", ".join(part for part in config.parts if part not in self.common)


def summarise(folder: Folder, level: float) -> Summary:
    """Put the runs of a folder together."""
    newest: dict[tuple[object, ...], Run] = {}
    for run in folder.runs:
        tasks = tuple(sorted(run.tasks))
        newest[run.axes.config, run.axes.seed, run.axes.cell, tasks] = run
    runs = tuple(newest.values())
    common = _common(runs)
    by_config: dict[Config, list[Run]] = {}
    for run in sorted(runs, key=lambda run: _order(run.axes.config)):
        by_config.setdefault(run.axes.config, []).append(run)
    dense: dict[str, list[Run]] = {}
    for config, members in by_config.items():
        if config.dense:
            dense.setdefault(config.model, []).extend(members)
    lines = [
        _line(config, family, condition, members, dense.get(config.model, []), level)
        for config, members in by_config.items()
        for family, condition in dict.fromkeys(key for run in members for key in run.measured.groups)
    ]
    return Summary(folder, runs, len(folder.runs) - len(runs), tuple(_scopes(lines)), level, common)


def _common(runs: Sequence[Run]) -> tuple[str, ...]:
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


def _line(
    config: Config,
    family: Family,
    condition: str,
    runs: Sequence[Run],
    dense: Sequence[Run],
    level: float,
) -> Line:
    key = family, condition
    members = [run for run in runs if key in run.measured.groups]
    group = _mean([run.measured.groups[key] for run in members])
    tasks = [run.measured.tasks[name] for run in members for name in run.measured.groups[key].tasks]
    unparsed = sum(task.unparsed for task in tasks) / sum(task.records for task in tasks)
    others = [run for run in dense if _paired(run.measured.groups.get(key), group)]
    delta, flips = None, None
    if others and not config.dense:
        base = _mean([run.measured.groups[key] for run in others])
        delta = _difference(group, base, "accuracy", level)
        flips = _flips(members, others[-1], key)
    return Line(config, family, condition, tuple(members), group, unparsed, delta, flips)


def _mean(groups: Sequence[Group]) -> Group:
    """The mean over runs; without resamples unless all drew the same images for the same tasks."""
    first = groups[0]
    if len(groups) == 1:
        return first
    paired = all(
        (g.drawn, g.tasks, g.resampled.shape) == (first.drawn, first.tasks, first.resampled.shape) for g in groups
    )
    value = np.mean([group.value for group in groups], axis=0)
    shape = first.resampled.shape
    resampled = np.mean([g.resampled for g in groups], axis=0) if paired else np.full(shape, np.nan, np.float32)
    return Group(first.tasks, first.drawn if paired else "", first.records, first.images, value, resampled)


def _paired(base: Group | None, group: Group) -> bool:
    """Whether two means are over the same tasks and images, so that their resamples are paired."""
    return base is not None and bool(base.drawn) and (base.drawn, base.tasks) == (group.drawn, group.tasks)


def _difference(group: Group, base: Group, metric: str, level: float) -> Difference | None:
    value = group.of(metric) - base.of(metric)
    if np.isnan(value):
        return None
    resampled = group.column(metric) - base.column(metric)
    return Difference(value, interval(value, resampled, level=level, method=METHODS.get(metric, "percentile")))


def _flips(runs: Sequence[Run], dense: Run, key: tuple[Family, str]) -> Flips | None:
    lost = won = records = 0
    for run in runs:
        for name in run.measured.groups[key].tasks:
            one, base = run.measured.tasks[name], dense.measured.tasks.get(name)
            if base is None or one.documents != base.documents or not (_binary(one) and _binary(base)):
                continue
            lost += int(np.sum(one.outcome < base.outcome))
            won += int(np.sum(one.outcome > base.outcome))
            records += one.records
    return Flips(lost, won, records) if records else None


def _binary(task: Task) -> bool:
    return bool(np.all((task.outcome == 0.0) | (task.outcome == 1.0)))


def spread(lines: Sequence[Line], metric: str, level: float) -> tuple[float, float, float]:
    """Mean over runs, and a band: lowest to highest run where there are several, else the interval over images."""
    runs = [run.measured.groups[line.family, line.condition] for line in lines for run in line.runs]
    values = np.array([group.of(metric) for group in runs])
    values = values[~np.isnan(values)]
    if not values.size:
        return (float("nan"),) * 3
    if values.size > 1:
        return float(values.mean()), float(values.min()), float(values.max())
    low, high = between(metric, runs[0].of(metric), runs[0].column(metric), level)
    return float(values[0]), low, high


def series(lines: Iterable[Line]) -> dict[tuple[str, int | None], list[Line]]:
    """Lines by method and bits: what a figure shows as one thing."""
    found: dict[tuple[str, int | None], list[Line]] = {}
    for line in lines:
        found.setdefault((line.config.method, line.config.bits), []).append(line)
    return found


def tasks_of(lines: Iterable[Line]) -> list[Task]:
    """Tasks of all runs of some lines."""
    return [
        run.measured.tasks[name]
        for line in lines
        for run in line.runs
        for name in run.measured.groups[line.family, line.condition].tasks
    ]
