"""Results folders of lmms-eval as columns: what was asked, what was answered, how confident the model was.

Reads the files alone (`<date>_results.json` and its `<date>_samples_<task>.jsonl`), without lmms-eval and without the
model: whole columns at once where logs are as our tasks write them, else row by row. Tasks whose log holds no record of
ours are left out; a log that is damaged or incomplete is an error, and so is one that the table of results does not
agree with: a metric of what happens to be left of a run is not one of the run.
"""

import glob
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmms_plugin import metrics
from lmms_plugin.analysis import columns
from lmms_plugin.analysis.columns import Wanted
from lmms_plugin.analysis.records import (
    KINDS,
    STRICTER,
    Floats,
    TaskKind,
    TaskRecords,
    Texts,
    coded,
    is_record,
    place_of,
)
from lmms_plugin.utils.files import json_object
from lmms_plugin.utils.reading.readable import problem

_RESULTS = "_results.json"
_MOST_DIGITS = 18
_TOLERANCE = 1e-6
_OF_CONFIDENCE = MappingProxyType(
    {
        False: {"ece": metrics.ece, "brier": metrics.brier, "auroc": metrics.auroc, "aurc": metrics.aurc},
        True: {"rejection_auroc": metrics.auroc},
    }
)
"""What is held against the table of results, of tasks without and with outcomes of their own."""
ALL = (None, 0, -1)
"""What lmms-eval takes as `--limit` and `--offset` for all documents."""

GIT_STATE = "git checkout of the working directory"
"""What that is called which lmms-eval logs as its version."""


def git_state(results: Mapping[str, Any]) -> str | None:
    """Branch and commit that lmms-eval logs as its version; None outside of a checkout.

    They are of the folder in which it was started, not of lmms-eval, whose version it does not log.
    """
    said = str(results.get("lmms_eval_version") or "")
    return None if not said or "unknown" in said else said


@dataclass(frozen=True, eq=False)
class LoggedRun:
    """One finished run.

    Attributes:
        file: Its results file.
        model: Name of the model in lmms-eval.
        model_args: Its arguments, as text.
        limit: Documents per task that the run was limited to, or the share of them below 1; None for all.
        tasks: Task name → records, for tasks of ours.
        others: Tasks that log no records of ours.
        results: Task name → metric → value of lmms-eval's table.
        content: All that the results file says.
    """

    file: Path
    model: str
    model_args: str
    limit: float | None
    tasks: Mapping[str, TaskRecords]
    others: tuple[str, ...]
    results: Mapping[str, Mapping[str, Any]]
    content: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def label(self) -> str:
        """Model and arguments in one line."""
        return f"{self.model} {self.model_args}".strip()

    def log(self, task: str) -> Path:
        """The log of a task's samples."""
        return log_of(self.file, task)


def log_of(file: Path, task: str) -> Path:
    """The log of a task's samples that belongs to a results file."""
    return _beside(file, f"samples_{task}.jsonl")


def logs_of(file: Path) -> list[Path]:
    """All logs of samples that belong to a results file, by name."""
    start = _beside(file, "samples_").name
    return sorted(file.parent.glob(f"{glob.escape(start)}*.jsonl"))


def _beside(file: Path, name: str) -> Path:
    """A file of the same run, which the beginning of its name tells."""
    return file.with_name(f"{file.name.removesuffix(_RESULTS)}_{name}")


def find(path: Path) -> list[Path]:
    """Results files at or under a path, oldest first; those in hidden folders are unfinished or put aside.

    Raises:
        ValueError: If there are none.
    """
    if path.is_file():
        return [path]
    below = (file for file in path.rglob(f"*{_RESULTS}") if not _hidden(file.relative_to(path)))
    files = sorted(below, key=lambda file: (file.name, str(file)))
    if not files:
        raise ValueError(f"expected a results file or a folder with *{_RESULTS} in it, got {path}")
    return files


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def read_one(path: Path, wanted: Wanted | None = None) -> LoggedRun:
    """The only run at or under a path.

    Raises:
        ValueError: If there is none or more than one, or as `read`.
    """
    files = find(path)
    if len(files) > 1:
        listed = ", ".join(str(file.relative_to(path)) for file in files[:4])
        raise ValueError(f"expected one run under {path}, got {len(files)}: {listed}; name the results file")
    return read(files[0], wanted)


class _Counts(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    effective: int


class _Asked(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    model: str | None = None
    limit: float | None = Field(None, allow_inf_nan=False)


class _Table(BaseModel):
    """What is read of a results file; strict, for no number is a text."""

    model_config = ConfigDict(extra="allow", strict=True)

    results: dict[str, dict[str, Any]]
    configs: dict[str, dict[str, Any]]
    counts: dict[str, _Counts] = Field(alias="n-samples")
    config: _Asked | None = None
    throughput: dict[str, Any] | None = None


def table(file: Path) -> dict[str, Any]:
    """What a results file says.

    Raises:
        ValueError: If it is damaged, or none of lmms-eval.
    """
    results = json_object(file.read_bytes(), str(file), _bounded)
    if not file.name.endswith(_RESULTS) or not {"configs", "n-samples", "results"} <= set(results):
        raise ValueError(f"expected a results file of lmms-eval (*{_RESULTS}), got {file}")
    try:
        _Table.model_validate(results)
    except ValidationError as error:
        raise ValueError(f"{file} is damaged: {problem(error)}") from error
    if lacking := [task for task in results["n-samples"] if task not in results["configs"]]:
        raise ValueError(f"{file} is damaged: expected the configuration of {lacking[0]!r:.80}, got none")
    return results


def read(file: Path, wanted: Wanted | None = None) -> LoggedRun:
    """Read a results file and the logs of samples beside it.

    Args:
        file: The results file.
        wanted: By kind of task, the estimators whose confidences are read; None for all.

    Raises:
        ValueError: If it is no results file, a task of ours has no log (the run was without --log_samples), or a log
            is damaged, holds a document twice, holds fewer or more documents than the run scored, or does not agree
            with the table of results.
    """
    results = table(file)
    tasks, others = {}, []
    for task in results["n-samples"]:
        records = _read_task(file, results, task, wanted)
        if records is None:
            others.append(task)
        else:
            tasks[task] = records
    config = results.get("config") or {}
    return LoggedRun(
        file,
        str(config.get("model") or ""),
        str(config.get("model_args", "")),
        limit_of(config),
        MappingProxyType(tasks),
        tuple(others),
        results["results"],
        results,
    )


def limit_of(config: Mapping[str, Any]) -> float | None:
    """Documents per task, or their share below 1, that a run was limited to; None for all, however that was said."""
    limit: float | None = config.get("limit")
    return None if limit in ALL else limit


def _read_task(file: Path, results: Mapping[str, Any], task: str, wanted: Wanted | None) -> TaskRecords | None:
    """One task of a run; None if its log holds no record of ours."""
    log, config = log_of(file, task), results["configs"][task]
    try:
        records: TaskRecords | None = columns.read(task, config, log, wanted)
    # Whatever stops that reader, parsing row by row reads the log or names what is wrong.
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
        records = by_rows(task, config, log)
        wanted = None
    if records is None:
        return None
    expected = results["n-samples"][task]["effective"]
    if records.ids.size != expected:
        raise ValueError(f"expected {expected} documents in {log}, got {records.ids.size}")
    try:
        _agree(records, results["results"], file)
    except ValueError:
        if wanted is None:
            raise
        # The table may be of an estimator that is not wanted.
        return _read_task(file, results, task, None)
    return records


def _agree(records: TaskRecords, table: Mapping[str, Any], file: Path) -> None:
    """Refuse a log that is not the one of the results table: either was edited, or it is of another run."""
    if records.task not in table:
        raise ValueError(f"expected the results of task {records.task} in {file}, got none")
    for metric, values in _recomputed(records):
        said = table[records.task].get(f"{metric},none")
        if not isinstance(said, float | int) or math.isnan(said):
            continue
        apart: list[tuple[float, float, str]] = []
        for by, value in values:
            apart.append((abs(value - said), value, by))
            if apart[-1][0] <= _TOLERANCE:
                break
        if apart and apart[-1][0] > _TOLERANCE:
            _, nearest, by = min(apart)
            raise ValueError(
                f"expected the log of the same run in {log_of(file, records.task)}, got {metric} {nearest:.6f}{by}"
                f" where the table of results says {said:.6f} ({file})"
            )


def _recomputed(records: TaskRecords) -> Iterator[tuple[str, Iterator[tuple[str, float]]]]:
    """Metrics of a table of results with their values by the log; those of confidence by one estimator after the other.

    A task's YAML may name another estimator than that of its kind, which comes first.
    """
    keep = records.reported
    if not keep.any():
        return
    score, outcome, own = records.score[keep], records.outcome[keep], records.kind.estimator
    yield records.kind.record, iter([("", float(score.mean()))])
    if records.kind.right is not None:
        for threshold in (records.kind.right, *STRICTER):
            yield f"acc@{threshold:g}", iter([("", float((score >= threshold).mean()))])
        yield "parse_rate", iter([("", float(records.parsed[keep].mean()))])
    for metric, function in _OF_CONFIDENCE[records.kind.outcome is not None].items():
        names = sorted(records.confidence, key=lambda name: (name != own, name))
        yield metric, _by_estimator(function, {name: records.confidence[name][keep] for name in names}, outcome)


def _by_estimator(
    function: Callable[[Floats, Floats], float], confidence: Mapping[str, Floats], outcome: Floats
) -> Iterator[tuple[str, float]]:
    for name, values in confidence.items():
        known = ~np.isnan(values)
        value = function(values[known], outcome[known]) if known.any() else math.nan
        if not math.isnan(value):
            yield f" by {name}", value


def by_rows(task: str, config: Mapping[str, Any], log: Path) -> TaskRecords | None:
    """The answers of one task of a run, parsed row by row; None if its log holds no record of ours.

    Raises:
        ValueError: If the log is missing, damaged, or holds a document twice.
    """
    if not log.exists():
        if _is_ours(config):
            raise ValueError(f"expected the log of samples {log}: run lmms-eval with --log_samples")
        return None
    rows = _rows(log)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"expected documents in {log}, got an empty file")
    kind = next((kind for kind in KINDS if is_record(first.get(kind.record), kind)), None)
    if kind is None and _is_ours(config):
        raise ValueError(f"expected a record of this package in the first line of {log}, got none")
    if kind is None:
        return None
    # Everything but the records is let go at once: logs hold prompts and whole answers.
    found = (_record(row, kind, f"{log}:{number}") for number, row in enumerate(chain((first,), rows), start=1))
    records = sorted(found, key=lambda record: str(record["id"]))
    ids = _texts(record["id"] for record in records)
    if twice := {str(a) for a, b in zip(ids[1:], ids[:-1], strict=True) if a == b}:
        raise ValueError(f"expected every document once in {log}, got {min(twice)} twice")
    index, names = coded(_texts(record["image"] for record in records))
    return TaskRecords(
        task,
        kind,
        place_of(config),
        ids,
        np.array([record["doc_id"] for record in records], dtype=np.int64),
        index,
        names,
        _column([record.get("expression", record.get("question")) for record in records], text=True),
        _column([record.get("target", record.get("answers")) for record in records]),
        _texts(record.get("part", "") for record in records),
        _fractions(kind.score, [record[kind.score] for record in records], ids, log),
        np.array([_is_answer(record) for record in records]),
        _confidences(records, log),
        _fractions(kind.outcome, [r[kind.outcome] for r in records], ids, log) if kind.outcome else None,
        _texts(record["pair"] for record in records) if kind.outcome else None,
    )


def _is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a task logs records of ours, by its configuration; tasks of others may say their metrics in any way."""
    listed = config.get("metric_list")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    metrics = {str(entry.get("metric")) for entry in entries}
    return any(kind.record in metrics for kind in KINDS) and bool({"ece", "rejection_auroc"} & metrics)


def _rows(log: Path) -> Iterator[dict[str, Any]]:
    # A file's own lines: str.splitlines would also part an answer at a separator that JSON leaves as it is.
    with log.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield json_object(line, f"{log}:{number}")


def _confidences(records: list[dict[str, Any]], log: Path) -> dict[str, Floats]:
    logged = [record.get("confidence") or {} for record in records]
    names = sorted(set().union(*logged))
    for record, values in zip(records, logged, strict=True):
        # One answer without probabilities among answers with them would silently drop out of every metric.
        if names and not values:
            raise ValueError(f"expected a confidence by {', '.join(names)} for {record['id']} in {log}, got none")
    ids = [record["id"] for record in records]
    columns = {name: [values.get(name) for values in logged] for name in names}
    return {name: _missing_or_fractions(name, column, ids, log) for name, column in columns.items()}


def _missing_or_fractions(name: str, values: list[Any], ids: Sequence[str], log: Path) -> Floats:
    """Confidences, NaN where there is none; one that is written as NaN is no number and not a missing one."""
    there = np.array([value is not None for value in values])
    told = [value for value in values if value is not None]
    found = np.full(len(values), np.nan)
    found[there] = _fractions(f"confidence {name}", told, [ids[k] for k in np.flatnonzero(there).tolist()], log)
    return found


def _fractions(name: str, values: list[Any], ids: Sequence[str] | Texts, log: Path) -> Floats:
    numbers = all(isinstance(value, float | int) for value in values)
    # JSON's whole numbers may be larger than any that numpy takes.
    bounded = [math.inf if isinstance(value, int) and not 0 <= value <= 1 else value for value in values]
    array = np.array(bounded if numbers else [math.inf], dtype=np.float64)
    bad = ~((array >= 0.0) & (array <= 1.0))
    if bad.any():
        worst = int(bad.argmax()) if numbers else [isinstance(value, float | int) for value in values].index(False)
        raise ValueError(f"expected {name} in [0, 1] for {ids[worst]} in {log}, got {values[worst]!r:.80}")
    return array


def _record(row: Mapping[str, Any], kind: TaskKind, where: str) -> dict[str, Any]:
    record = row.get(kind.record)
    if not is_record(record, kind):
        raise ValueError(f"expected a record under {kind.record!r} for document {row.get('doc_id')} in {where}")
    number, confidence = row.get("doc_id", -1), record.get("confidence")
    wrong = not isinstance(number, int) or abs(number) >= 2**63
    if wrong or not (confidence is None or isinstance(confidence, dict)) or (kind.outcome and "pair" not in record):
        raise ValueError(f"expected a whole record under {kind.record!r} for document {number!r:.80} in {where}")
    for key in ("id", "image"):
        # An image without a name would be one of its own.
        if not isinstance(record[key], str | int):
            raise ValueError(f"expected the {key} of document {number} in {where}, got {record[key]!r:.80}")
    return {**record, "doc_id": number}


def _is_answer(record: Mapping[str, Any]) -> bool:
    return record["box"] is not None if "box" in record else not record.get("unfinished", False)


def _column(values: list[Any], *, text: bool = False) -> pa.Array:
    """Values as pyarrow holds them, whole numbers as others; as JSON where it cannot."""
    try:
        array = pa.array([None if value is None else str(value) for value in values] if text else values)
        whole = pa.types.is_list(array.type) and pa.types.is_integer(array.type.value_type)
        return array.cast(pa.list_(pa.float64())) if whole else array
    # Texts that are no Unicode, values of several types.
    except (ValueError, TypeError, pa.ArrowInvalid):
        return pa.array([json.dumps(value) for value in values])


def _texts(values: Any) -> Texts:
    return np.array([str(value) for value in values], dtype=np.str_)


def _bounded(digits: str) -> int:
    """A whole number that any number of a table can be computed with."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"expected at most {_MOST_DIGITS} digits, got {digits[:_MOST_DIGITS]}...")
    return int(digits)
