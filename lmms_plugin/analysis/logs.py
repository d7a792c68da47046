"""Reader of lmms-eval's results folders: questions, answers and confidences as columns.

It reads only files (`<date>_results.json` and its `<date>_samples_<task>.jsonl`), without lmms-eval and without the
model: whole columns at once where logs are as our tasks write them, else row by row. Tasks whose log holds no record of
ours are left out. A damaged or incomplete log is an error, and so is one that disagrees with the table of results: a
metric of the remaining part of a run is not a metric of the run.
"""

import glob
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

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
"""Confidence metrics that are compared with the table of results, of tasks without and with outcomes of their own."""
ALL = (None, 0, -1)
"""Values of lmms-eval's `--limit` and `--offset` that mean all documents."""

GIT_STATE = "git checkout of the working directory"
"""Name for what lmms-eval logs as its version."""


def git_state(results: Mapping[str, Any]) -> str | None:
    """Return branch and commit that lmms-eval logs as its version; None outside of a checkout.

    They belong to the folder in which it was started, not to lmms-eval, whose version it does not log.
    """
    said = str(results.get("lmms_eval_version") or "")
    return None if not said or "unknown" in said else said


_PLACES = frozenset(("report", "features", "save_quantized", "resume_folder", "shared_folder"))
"""Model arguments that name where files are kept, and change no answer."""


@dataclass(frozen=True, eq=False)
class LoggedRun:
    """One finished run.

    Attributes:
        file: Results file.
        model: Name of the model in lmms-eval.
        model_args: Model arguments, as text.
        limit: Documents per task that the run was limited to, or their share below 1; None for all.
        tasks: Task name → records, for tasks of ours.
        others: Tasks that log no records of ours.
        results: Task name → metric → value of lmms-eval's table.
        content: Full content of the results file.
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

    @property
    def title(self) -> str:
        """The label without arguments that name a place for files, such as those that a study adds to a cell's."""
        told = [part for part in self.model_args.split(",") if part.partition("=")[0].strip() not in _PLACES]
        return f"{self.model} {','.join(told)}".strip()

    def log(self, task: str) -> Path:
        """Return the log of a task's samples."""
        return log_of(self.file, task)


def log_of(file: Path, task: str) -> Path:
    """Return the log of a task's samples that belongs to a results file."""
    return _beside(file, f"samples_{task}.jsonl")


def logs_of(file: Path) -> list[Path]:
    """Return all logs of samples that belong to a results file, sorted by name."""
    start = _beside(file, "samples_").name
    return sorted(file.parent.glob(f"{glob.escape(start)}*.jsonl"))


def _beside(file: Path, name: str) -> Path:
    """Return a file of the same run, which has the same prefix."""
    return file.with_name(f"{file.name.removesuffix(_RESULTS)}_{name}")


def find(path: Path) -> list[Path]:
    """Find results files at or under a path, oldest first.

    Hidden folders are skipped: they hold unfinished or superseded runs.

    Raises:
        ValueError: There are none.
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
    """Read the only run at or under a path.

    Raises:
        ValueError: There is none or more than one, or as `read`.
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
    """Schema of the parts of a results file that are read; strict, so that a text is not taken for a number."""

    model_config = ConfigDict(extra="allow", strict=True)

    results: dict[str, dict[str, Any]]
    configs: dict[str, dict[str, Any]]
    counts: dict[str, _Counts] = Field(alias="n-samples")
    config: _Asked | None = None
    throughput: dict[str, Any] | None = None


def table(file: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: It is damaged, or not from lmms-eval.
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


DEFAULT_ZONE = "Asia/Singapore"
"""Time zone of lmms-eval's dates unless `--timezone` names another; results do not say which."""
_DATE = re.compile(r"(\d{4})(\d\d)(\d\d)_(\d\d)(\d\d)(\d\d)")


def evaluated(results: Mapping[str, Any]) -> str | None:
    """Return when lmms-eval ran, as ISO 8601 in the time zone of its `--timezone` (see `DEFAULT_ZONE`).

    Args:
        results: Content of a results file.

    Returns:
        Date and time without an offset from UTC; None if unknown.
    """
    found = _DATE.fullmatch(str(results.get("date")))
    return "{}-{}-{}T{}:{}:{}".format(*found.groups()) if found else None


def read(file: Path, wanted: Wanted | None = None) -> LoggedRun:
    """Read a results file and the logs of samples beside it.

    Args:
        file: Results file.
        wanted: Kind of task → estimators whose confidences are read; None for all.

    Raises:
        ValueError: It is not a results file, a task of ours has no log (the run was without --log_samples), or a log
            is damaged, holds a document twice, holds fewer or more documents than the run scored, or disagrees with the
            table of results.
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
    """Return the documents per task, or their share below 1, that a run was limited to; None for all."""
    limit: float | None = config.get("limit")
    return None if limit in ALL else limit


def _read_task(file: Path, results: Mapping[str, Any], task: str, wanted: Wanted | None) -> TaskRecords | None:
    """Read one task of a run; None if its log holds no record of ours."""
    log, config = log_of(file, task), results["configs"][task]
    try:
        records: TaskRecords | None = columns.read(task, config, log, wanted)
    # Whatever stops the fast reader, parsing row by row reads the log or names what is wrong.
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
        # The table may be of an estimator that was not requested.
        return _read_task(file, results, task, None)
    return records


def _agree(records: TaskRecords, table: Mapping[str, Any], file: Path) -> None:
    """Refuse a log that disagrees with the results table: one of them was edited, or they are of different runs."""
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
    """Yield metrics of the table of results with their values by the log, for each estimator in turn.

    A task's YAML may name another estimator than the default of its kind, which comes first.
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
    """Read the answers of one task of a run row by row; None if its log holds no record of ours.

    Raises:
        ValueError: The log is missing, damaged, or holds a document twice.
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
    # Everything but the records is released at once: logs hold prompts and complete answers.
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
        _texts(record.get("stratum") or "" for record in records) if any(r.get("stratum") for r in records) else None,
    )


class LoggedAnswer(NamedTuple):
    """One answer as a model gave it.

    Attributes:
        id: Id of the document.
        answer: Answer with its trailer, if the model is one of ours.
        box: Predicted box, left, top, right, bottom in fractions of the original image; None without one.
    """

    id: str
    answer: str
    box: tuple[float, float, float, float] | None


def answers(run: LoggedRun, task: str) -> Iterator[LoggedAnswer]:
    """Yield the answers of one task of ours, in the order of the log.

    Raises:
        ValueError: The log is damaged, or holds no answers.
    """
    log, kind = run.log(task), run.tasks[task].kind
    for number, row in enumerate(_rows(log), start=1):
        where = f"{log}:{number}"
        record, said = _record(row, kind, where), row.get("filtered_resps", row.get("resps"))
        while isinstance(said, list) and len(said) == 1:
            (said,) = said
        if not isinstance(said, str):
            raise ValueError(f"expected the answer as a text under filtered_resps in {where}, got {said!r:.80}")
        box = record.get("box")
        yield LoggedAnswer(str(record["id"]), said, None if box is None else _box(box, where))


def references(run: LoggedRun, task: str) -> dict[str, Mapping[str, Any] | None]:
    """Return the distance from the reference of every answer to one task of ours, by id; None where there is none.

    Raises:
        ValueError: The log is damaged.
    """
    log, kind = run.log(task), run.tasks[task].kind
    found: dict[str, Mapping[str, Any] | None] = {}
    for number, row in enumerate(_rows(log), start=1):
        record = _record(row, kind, f"{log}:{number}")
        reference = record.get("reference")
        if reference is not None and not (isinstance(reference, dict) and all(map(_is_finite, reference.values()))):
            raise ValueError(f"expected numbers under 'reference' in {log}:{number}, got {reference!r:.80}")
        found[str(record["id"])] = reference
    return found


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _box(value: Any, where: str) -> tuple[float, float, float, float]:
    if not (isinstance(value, list) and len(value) == 4 and all(isinstance(side, int | float) for side in value)):
        raise ValueError(f"expected a box of four numbers in {where}, got {value!r:.80}")
    left, top, right, bottom = map(float, value)
    return left, top, right, bottom


def _is_ours(config: Mapping[str, Any]) -> bool:
    """Return whether a task logs records of ours, by its configuration; other tasks may declare metrics in any form."""
    listed = config.get("metric_list")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    metrics = {str(entry.get("metric")) for entry in entries}
    return any(kind.record in metrics for kind in KINDS) and bool({"ece", "rejection_auroc"} & metrics)


def _rows(log: Path) -> Iterator[dict[str, Any]]:
    # Lines of the file: str.splitlines would also split at separators that JSON leaves unescaped within an answer.
    with log.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield json_object(line, f"{log}:{number}")


def _confidences(records: list[dict[str, Any]], log: Path) -> dict[str, Floats]:
    logged = [record.get("confidence") or {} for record in records]
    names = sorted(set().union(*logged))
    for record, values in zip(records, logged, strict=True):
        # An answer without probabilities among answers with them would be dropped silently from every metric.
        if names and not values:
            raise ValueError(f"expected a confidence by {', '.join(names)} for {record['id']} in {log}, got none")
    ids = [record["id"] for record in records]
    columns = {name: [values.get(name) for values in logged] for name in names}
    return {name: _missing_or_fractions(name, column, ids, log) for name, column in columns.items()}


def _missing_or_fractions(name: str, values: list[Any], ids: Sequence[str], log: Path) -> Floats:
    """Return confidences, NaN where missing; a confidence that is written as NaN is an error."""
    there = np.array([value is not None for value in values])
    told = [value for value in values if value is not None]
    found = np.full(len(values), np.nan)
    found[there] = _fractions(f"confidence {name}", told, [ids[k] for k in np.flatnonzero(there).tolist()], log)
    return found


def _fractions(name: str, values: list[Any], ids: Sequence[str] | Texts, log: Path) -> Floats:
    numbers = all(isinstance(value, float | int) for value in values)
    # JSON integers may exceed numpy's range.
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
        # An image without a name would count as an image of its own.
        if not isinstance(record[key], str | int):
            raise ValueError(f"expected the {key} of document {number} in {where}, got {record[key]!r:.80}")
    return {**record, "doc_id": number}


def _is_answer(record: Mapping[str, Any]) -> bool:
    return record["box"] is not None if "box" in record else not record.get("unfinished", False)


def _column(values: list[Any], *, text: bool = False) -> pa.Array:
    """Return values as a pyarrow array, integers as floats; as JSON where pyarrow cannot hold them."""
    try:
        array = pa.array([None if value is None else str(value) for value in values] if text else values)
        whole = pa.types.is_list(array.type) and pa.types.is_integer(array.type.value_type)
        return array.cast(pa.list_(pa.float64())) if whole else array
    # Texts that are not valid Unicode, or values of several types.
    except (ValueError, TypeError, pa.ArrowInvalid):
        return pa.array([json.dumps(value) for value in values])


def _texts(values: Any) -> Texts:
    return np.array([str(value) for value in values], dtype=np.str_)


def _bounded(digits: str) -> int:
    """Parse an integer with so few digits that floats can be computed from it."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"expected at most {_MOST_DIGITS} digits, got {digits[:_MOST_DIGITS]}...")
    return int(digits)
