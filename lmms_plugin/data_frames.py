"""Results as pandas DataFrames: the answers, metrics and comparisons of a folder of runs.

    import lmms_plugin

    runs = lmms_plugin.read("results/")
    runs.metrics()                      # one row per run, task and metric
    runs[0].compare(runs[1]).groups     # one row per group of tasks and metric

Every number is that of the commands `metrics` and `compare` with the same settings; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import pandas as pd

from lmms_plugin.analysis import axes, comparison, logs, measure
from lmms_plugin.analysis import overview as overviews
from lmms_plugin.analysis.axes import RunAxes
from lmms_plugin.analysis.findings import sentences
from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.analysis.overview import Estimate
from lmms_plugin.analysis.records import TaskRecords

RUN_COLUMNS = ("run", "model", "method", "bits", "group_size", "components", "calibration", "seed")
"""Columns that every frame of several runs begins with; `run` is the place in `EvaluatedRuns`."""
ANSWER_COLUMNS = (
    *("task", "id", "image", "question", "truth", "score", "outcome", "answered", "reported", "shift", "severity"),
)
"""Columns of `answers`; `confidence_NAME` follows for every estimator that was logged."""
METRIC_COLUMNS = ("task", "metric", "value", "low", "high", "records", "images", "shift", "severity")
"""Columns of `metrics`."""


@dataclass(frozen=True, eq=False)
class RunComparison:
    """Comparison of two runs on the same documents, second less first.

    Attributes:
        sentences: Verdict: clean, under shift, and whether more is lost under shift.
        groups: Mean change of every group of tasks, one row per group and metric (`comparison.GroupChange`).
        changes: Change of every task, one row per task and metric (`comparison.Change`).
        flips: Answers that changed sides, one row per task (`comparison.Flipped`).
        interactions: What is lost more under shift, one row per clean task and metric (`comparison.Shifted`).
    """

    sentences: tuple[str, ...]
    groups: pd.DataFrame
    changes: pd.DataFrame
    flips: pd.DataFrame
    interactions: pd.DataFrame


@dataclass(frozen=True, eq=False)
class EvaluatedRun:
    """One finished run.

    Attributes:
        logged: Run as read from its logs, with columns of every task as numpy arrays.
        place: Model, method, bits and other axes.
        settings: Estimator, resamples, seed and level of all numbers.
    """

    logged: LoggedRun
    place: RunAxes
    settings: MeasurementSettings

    @property
    def file(self) -> Path:
        """Results file."""
        return self.logged.file

    @property
    def label(self) -> str:
        """Model and arguments in one line."""
        return self.logged.label

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that have records of this package."""
        return tuple(self.logged.tasks)

    def answers(self) -> pd.DataFrame:
        """Return every answer, one row each, with the columns `ANSWER_COLUMNS` and one for each estimator.

        Scores, outcomes and confidences are in [0, 1]; a confidence is NaN where the log has none. Boxes in `truth` are
        left, top, right, bottom in fractions of the original image.
        """
        frames = [_answers(records) for records in self.logged.tasks.values()]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(ANSWER_COLUMNS))

    def metrics(self) -> pd.DataFrame:
        """Return every metric of every task with its interval over images, with the columns `METRIC_COLUMNS`.

        Raises:
            ValueError: As `lmms_plugin.analysis.measure.measure`.
        """
        frame = pd.DataFrame(measure.measure(self.logged, self.settings), columns=measure.MetricValue._fields)
        places = {task: records.place for task, records in self.logged.tasks.items()}
        frame["shift"] = [places[task].shift for task in frame["task"]]
        frame["severity"] = pd.array([places[task].severity for task in frame["task"]], dtype="Int64")
        return frame

    def overview(self) -> pd.DataFrame:
        """Return accuracy, ECE beside its floor, AURC and coverage at 5 % risk of every group of tasks, one row each.

        Intervals are in columns of their own: `ece`, `ece_low`, `ece_high`.

        Raises:
            ValueError: As `lmms_plugin.analysis.overview.overview`.
        """
        rows = overviews.overview(self.logged, self.settings).groups
        return pd.DataFrame([_flat(row._asdict()) for row in rows])

    def compare(self, other: EvaluatedRun, margin: float | None = None) -> RunComparison:
        """Compare another run with this one, paired image by image.

        Args:
            other: Run in question, on the same documents.
            margin: Largest absolute difference that counts as none; None for no test of equivalence.

        Raises:
            ValueError: The runs differ in tasks or documents.
        """
        found = comparison.compare(self.logged, other.logged, self.settings, margin)
        return RunComparison(
            tuple(sentences(found, self.settings.level)),
            _table(found.groups, comparison.GroupChange),
            _table(found.changes, comparison.Change),
            _table(found.flips, comparison.Flipped),
            _table(found.shifted, comparison.Shifted),
        )


class EvaluatedRuns(Sequence[EvaluatedRun]):
    """Runs of a folder, oldest first.

    Args:
        runs: Runs.
    """

    def __init__(self, runs: Iterable[EvaluatedRun]) -> None:
        self._runs = tuple(runs)

    def __len__(self) -> int:
        return len(self._runs)

    @overload
    def __getitem__(self, index: int) -> EvaluatedRun: ...

    @overload
    def __getitem__(self, index: slice) -> EvaluatedRuns: ...

    def __getitem__(self, index: int | slice) -> EvaluatedRun | EvaluatedRuns:
        return EvaluatedRuns(self._runs[index]) if isinstance(index, slice) else self._runs[index]

    def __iter__(self) -> Iterator[EvaluatedRun]:
        return iter(self._runs)

    def configurations(self) -> pd.DataFrame:
        """Return one row per run: `RUN_COLUMNS`, other options, number of tasks and the results file."""
        rows = [
            [*_axes(number, run), ", ".join(run.place.config.options), len(run.tasks), str(run.file)]
            for number, run in enumerate(self)
        ]
        return _typed(pd.DataFrame(rows, columns=[*RUN_COLUMNS, "options", "tasks", "file"]))

    def answers(self) -> pd.DataFrame:
        """Return the answers of all runs, `EvaluatedRun.answers` after `RUN_COLUMNS`."""
        return self._of_each(lambda run: run.answers())

    def metrics(self) -> pd.DataFrame:
        """Return the metrics of all runs, `EvaluatedRun.metrics` after `RUN_COLUMNS`."""
        return self._of_each(lambda run: run.metrics())

    def overview(self) -> pd.DataFrame:
        """Return the overviews of all runs, `EvaluatedRun.overview` after `RUN_COLUMNS`."""
        return self._of_each(lambda run: run.overview())

    def against_unquantized(self, margin: float | None = None) -> pd.DataFrame:
        """Compare every run with the unquantized run of its model: `RunComparison.groups` after `RUN_COLUMNS`.

        Runs of a model without an unquantized run that was asked the same are left out.

        Args:
            margin: As in `EvaluatedRun.compare`.

        Raises:
            ValueError: No run has an unquantized one, or as `EvaluatedRun.compare`.
        """
        dense = {run.place.config: run for run in self if run.place.config.dense}
        pairs = [(number, run, run.place.config.nearest(dense)) for number, run in enumerate(self)]
        frames = [
            _with_axes(number, run, dense[config].compare(run, margin).groups)
            for number, run, config in pairs
            if config is not None and not run.place.config.dense
        ]
        if not frames:
            raise ValueError("expected a quantized run and an unquantized one of the same model, got none")
        return _typed(pd.concat(frames, ignore_index=True))

    def _of_each(self, frame: Callable[[EvaluatedRun], pd.DataFrame]) -> pd.DataFrame:
        frames = [_with_axes(number, run, frame(run)) for number, run in enumerate(self)]
        return _typed(pd.concat(frames, ignore_index=True))


def read(path: str | Path, settings: MeasurementSettings) -> EvaluatedRuns:
    """Read all runs at or under a path; see `lmms_plugin.read`."""
    root = Path(path)
    found = [logs.read(file) for file in logs.find(root)]
    places = axes.told_apart([axes.of(run.file, root, run.content) for run in found])
    return EvaluatedRuns(EvaluatedRun(run, place, settings) for run, place in zip(found, places, strict=True))


def _axes(number: int, run: EvaluatedRun) -> list[Any]:
    config = run.place.config
    own = [config.model, config.method, config.bits, config.group_size, config.components, config.calibration]
    return [number, *own, run.place.seed]


def _with_axes(number: int, run: EvaluatedRun, frame: pd.DataFrame) -> pd.DataFrame:
    for place, (name, value) in enumerate(zip(RUN_COLUMNS, _axes(number, run), strict=True)):
        frame.insert(place, name, [value] * len(frame))
    return frame


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame whose whole numbers stay such where some are missing."""
    return frame.astype({name: "Int64" for name in ("bits", "group_size", "seed")})


def _answers(records: TaskRecords) -> pd.DataFrame:
    columns = {
        "task": records.task,
        "id": records.ids,
        "image": records.images,
        "question": records.questions.to_pylist(),
        "truth": records.truths.to_pylist(),
        "score": records.score,
        "outcome": records.outcome,
        "answered": records.parsed,
        "reported": records.reported,
        "shift": records.place.shift,
        "severity": pd.array([records.place.severity] * records.ids.size, dtype="Int64"),
    }
    return pd.DataFrame(columns | {f"confidence_{name}": values for name, values in records.confidence.items()})


def _table(rows: Sequence[Any], kind: Any) -> pd.DataFrame:
    flat = [_flat(row._asdict()) for row in rows]
    return pd.DataFrame(flat) if flat else pd.DataFrame(columns=list(kind._fields))


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without tuples within: the interval of a value gets columns of its own."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Estimate):
            found |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        elif hasattr(value, "_asdict"):
            ends = value._asdict()
            found |= {name: ends.pop("value")} | ends
        else:
            found[name] = value
    return found
