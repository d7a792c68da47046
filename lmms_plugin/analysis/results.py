"""Results folders of lmms-eval as arrays: what was asked, what was answered, how confident the model was.

Reads the files alone (`<date>_results.json` and its `<date>_samples_<task>.jsonl`), without lmms-eval and without the
model. Tasks whose log holds no record of ours are left out; a log that is damaged or incomplete is an error, because a
metric of what happens to be left of a run is not one of the run.
"""

import glob
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmms_plugin.confidence.estimators import obtaining
from lmms_plugin.metrics.selective import REPORTED
from lmms_plugin.utils.readable import problem

Floats = npt.NDArray[np.float64]
Texts = npt.NDArray[np.str_]

_RESULTS = "_results.json"
_MOST_DIGITS = 18
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


class Kind(NamedTuple):
    """A kind of task, by what its records hold.

    Attributes:
        record: Key of the samples log under which the whole record stands.
        score: Key of the record with its score, in [0, 1].
        estimator: The confidence estimator used unless told otherwise.
        right: Score from which an answer counts as right; None where the score itself is the (soft) outcome.
        outcome: Key of the record with the outcome that confidence is to tell, 1 or 0; None where that is the score.
    """

    record: str
    score: str
    estimator: str
    right: float | None
    outcome: str | None = None

    def named(self, metric: str) -> str:
        """The metric as lmms-eval's table calls it: `acc@0.5` where right is a matter of a threshold."""
        if self.outcome is not None:
            return f"rejection_{metric}" if metric in ("auroc", "fpr@0.95") else metric
        return f"acc@{self.right:g}" if metric == "accuracy" and self.right is not None else metric


GROUNDING = Kind("mean_iou", "score", "coordinate_mean", 0.5)
VQA = Kind("accuracy", "accuracy", "joint", None)
REJECTION = Kind("box_rate", "score", "coordinate_mean", None, outcome="matches")
"""Expressions that match something and others that match nothing: confidence is to tell them apart."""
KINDS = (GROUNDING, VQA, REJECTION)


SHIFTED = ("image", "language", "image and language")
"""What a shift may shift: means over shifts are taken for each of these apart."""
_SHIFT_KEYS = (("shift", "severity"), ("text_shift", "text_severity"))


class Place(NamedTuple):
    """What a task asks about: tasks that differ in shift and severity alone ask about the same documents.

    Attributes:
        dataset: Its dataset as the task names it.
        split: Split of the dataset.
        shift: Name of the corruption, of the language shift, or of both; None for neither.
        severity: Its severity; None without a shift.
        shifts: What is shifted, of `SHIFTED`; `image` also without a shift.
    """

    dataset: str
    split: str
    shift: str | None
    severity: int | None
    shifts: str = "image"


@dataclass(frozen=True, eq=False)
class TaskRecords:
    """The n answers of one task, sorted by document id. All arrays have shape (n,).

    Attributes:
        task: Name of the task.
        kind: What its records are.
        place: What it asks about.
        ids: Document ids, unique.
        numbers: Numbers of the documents in lmms-eval; -1 where the log does not tell.
        images: Ids of the images, the clusters of every interval.
        asked: Question and true answer as text, by which runs are compared.
        parts: Part of the split each document belongs to; "" where the task brings no split of its own.
        score: IoU with the true box (0 without a box), VQA accuracy, or whether there was a box, in [0, 1].
        matches: Whether the expression matches something in its image, 1 or 0; None where all do.
        pairs: Id of the true expression that a document belongs to; None where documents are no pairs.
        parsed: Whether the answer held a box; where no box was asked for, whether there was an answer at all.
        confidence: Estimator → confidences in [0, 1], NaN where there was nothing to estimate from. Empty for a model
            that tells no probabilities.
    """

    task: str
    kind: Kind
    place: Place
    ids: Texts
    numbers: npt.NDArray[np.int64]
    images: Texts
    asked: Texts
    parts: Texts
    score: Floats
    parsed: npt.NDArray[np.bool_]
    confidence: Mapping[str, Floats]
    matches: Floats | None = None
    pairs: Texts | None = None

    @property
    def outcome(self) -> Floats:
        """What confidence is to tell: 1 for right (or matching) and 0 for wrong, or the soft score, shape (n,)."""
        if self.matches is not None:
            return self.matches
        return self.score if self.kind.right is None else (self.score >= self.kind.right).astype(np.float64)

    def only(self, keep: npt.NDArray[np.bool_]) -> "TaskRecords":
        """The records of a mask of shape (n,)."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        kept: dict[str, Any] = {name: array[keep] for name, array in arrays.items() if isinstance(array, np.ndarray)}
        return replace(self, **kept, confidence={name: values[keep] for name, values in self.confidence.items()})

    def confidence_by(self, estimator: str | None) -> Floats:
        """Confidences of one estimator, shape (n,), NaN where missing; that of the kind of task if None.

        Raises:
            ValueError: If the log does not hold it; all are NaN if it holds no estimator at all.
        """
        if not self.confidence:
            return np.full(self.ids.size, np.nan)
        name = estimator or self.kind.estimator
        if name not in self.confidence:
            known = ", ".join(sorted(self.confidence))
            raise ValueError(
                f"expected task {self.task} to log one of the estimators {known}, got {name!r}{obtaining(name)}"
            )
        return self.confidence[name]


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run.

    Attributes:
        file: Its results file.
        model: Name of the model in lmms-eval.
        model_args: Its arguments, as text.
        limit: Documents per task that the run was limited to, or the share of them below 1; None for all.
        tasks: Task name → records, for tasks of ours.
        others: Tasks that log no records of ours.
        results: Task name → metric → value of lmms-eval's table.
    """

    file: Path
    model: str
    model_args: str
    limit: float | None
    tasks: Mapping[str, TaskRecords]
    others: tuple[str, ...]
    results: Mapping[str, Mapping[str, Any]]

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


def read_one(path: Path) -> Run:
    """The only run at or under a path.

    Raises:
        ValueError: If there is none or more than one, or as `read`.
    """
    files = find(path)
    if len(files) > 1:
        listed = ", ".join(str(file.relative_to(path)) for file in files[:4])
        raise ValueError(f"expected one run under {path}, got {len(files)}: {listed}; name the results file")
    return read(files[0])


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
    results = _json(file, file.read_bytes(), _bounded)
    if not file.name.endswith(_RESULTS) or not {"configs", "n-samples", "results"} <= set(results):
        raise ValueError(f"expected a results file of lmms-eval (*{_RESULTS}), got {file}")
    try:
        _Table.model_validate(results)
    except ValidationError as error:
        raise ValueError(f"{file} is damaged: {problem(error)}") from error
    if lacking := [task for task in results["n-samples"] if task not in results["configs"]]:
        raise ValueError(f"{file} is damaged: expected the configuration of {lacking[0]!r:.80}, got none")
    return results


def read(file: Path) -> Run:
    """Read a results file and the logs of samples beside it.

    Raises:
        ValueError: If it is no results file, a task of ours has no log (the run was without --log_samples), or a log
            is damaged, holds a document twice, holds fewer or more documents than the run scored, or does not agree
            with the table of results.
    """
    results = table(file)
    tasks, others = {}, []
    for task in results["n-samples"]:
        records = read_task(file, results, task)
        if records is None:
            others.append(task)
        else:
            tasks[task] = records
    config = results.get("config") or {}
    return Run(
        file,
        str(config.get("model") or ""),
        str(config.get("model_args", "")),
        limit_of(config),
        MappingProxyType(tasks),
        tuple(others),
        results["results"],
    )


def limit_of(config: Mapping[str, Any]) -> float | None:
    """Documents per task, or their share below 1, that a run was limited to; None for all, however that was said."""
    limit: float | None = config.get("limit")
    return None if limit in ALL else limit


def read_task(file: Path, results: Mapping[str, Any], task: str) -> TaskRecords | None:
    """One task of a run; None if its log holds no record of ours.

    Args:
        file: Results file of the run.
        results: What is in it.
        task: Name of the task.

    Raises:
        ValueError: As `read`.
    """
    log = log_of(file, task)
    records = _task(task, results["configs"][task], log)
    if records is None:
        return None
    expected = results["n-samples"][task]["effective"]
    if records.ids.size != expected:
        raise ValueError(f"expected {expected} documents in {log}, got {records.ids.size}")
    _agree(records, results["results"].get(task, {}), log)
    return records


def match(first: TaskRecords, second: TaskRecords) -> None:
    """Check that two runs answered the same documents.

    Raises:
        ValueError: If they did not; says what differs.
    """
    task = first.task
    for one, other, where in ((first, second, "second"), (second, first, "first")):
        missing = np.setdiff1d(one.ids, other.ids)
        if missing.size:
            raise ValueError(
                f"task {task}: expected the same documents in both runs, but the {where} lacks {missing.size} of"
                f" {one.ids.size}, e.g. {missing[0]}"
            )
    for name in ("images", "asked", "parts"):
        differ = np.flatnonzero(getattr(first, name) != getattr(second, name))
        if differ.size:
            k = differ[0]
            raise ValueError(
                f"task {task}: expected the same {name} in both runs, but {differ.size} documents differ, e.g."
                f" {first.ids[k]}: {getattr(first, name)[k]} and {getattr(second, name)[k]}"
            )


def reported(records: TaskRecords) -> npt.NDArray[np.bool_]:
    """Which records results are reported on, shape (n,)."""
    return reported_parts(records.parts)


def reported_parts(parts: Texts) -> npt.NDArray[np.bool_]:
    """Which of n records results are reported on, by the part of each: all, unless the task brings its own split."""
    if np.any(parts != ""):
        return np.equal(parts, REPORTED)
    return np.ones(parts.size, np.bool_)


def _agree(records: TaskRecords, table: Mapping[str, Any], log: Path) -> None:
    """Refuse a log that is not the one of the results table: edited, or of another run."""
    said, keep = table.get(f"{records.kind.record},none"), reported(records)
    if not isinstance(said, float | int) or math.isnan(said) or not keep.any():
        return
    found = records.score[keep].mean()
    if not math.isclose(said, found, abs_tol=1e-6):
        raise ValueError(
            f"expected the log of the same run in {log}, got a {records.kind.record} of {found:.6f} where the table of"
            f" results says {said:.6f}"
        )


def _task(task: str, config: Mapping[str, Any], log: Path) -> TaskRecords | None:
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
    records = sorted((_record(row, kind, log) for row in chain((first,), rows)), key=lambda record: str(record["id"]))
    ids = _texts(record["id"] for record in records)
    if twice := {str(a) for a, b in zip(ids[1:], ids[:-1], strict=True) if a == b}:
        raise ValueError(f"expected every document once in {log}, got {min(twice)} twice")
    return TaskRecords(
        task=task,
        kind=kind,
        place=place_of(config),
        ids=ids,
        numbers=np.array([record["doc_id"] for record in records], dtype=np.int64),
        images=_texts(record["image"] for record in records),
        asked=_texts(_asked(record) for record in records),
        parts=_texts(record.get("part", "") for record in records),
        score=_fractions(kind.score, [record[kind.score] for record in records], ids, log),
        parsed=np.array([_is_answer(record) for record in records]),
        confidence=_confidences(records, log),
        matches=_fractions(kind.outcome, [r[kind.outcome] for r in records], ids, log) if kind.outcome else None,
        pairs=_texts(record["pair"] for record in records) if kind.outcome else None,
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
            yield _json(f"{log}:{number}", line)


def _confidences(records: list[dict[str, Any]], log: Path) -> dict[str, Floats]:
    logged = [record.get("confidence") or {} for record in records]
    names = sorted(set().union(*logged))
    for record, values in zip(records, logged, strict=True):
        # One answer without probabilities among answers with them would silently drop out of every metric.
        if names and not values:
            raise ValueError(f"expected a confidence by {', '.join(names)} for {record['id']} in {log}, got none")
    ids = [record["id"] for record in records]
    # A missing value is NaN here, and may have been written as such.
    columns = {name: [math.nan if (x := values.get(name)) is None else x for values in logged] for name in names}
    return {name: _fractions(f"confidence {name}", column, ids, log, missing=True) for name, column in columns.items()}


def _fractions(name: str, values: list[Any], ids: Sequence[str] | Texts, log: Path, *, missing: bool = False) -> Floats:
    numbers = all(isinstance(value, float | int) for value in values)
    # JSON's whole numbers may be larger than any that numpy takes.
    bounded = [math.inf if isinstance(value, int) and not 0 <= value <= 1 else value for value in values]
    array = np.array(bounded if numbers else [math.inf], dtype=np.float64)
    bad = ~((array >= 0.0) & (array <= 1.0)) & ~(np.isnan(array) & missing)
    if bad.any():
        worst = int(bad.argmax()) if numbers else [isinstance(value, float | int) for value in values].index(False)
        raise ValueError(f"expected {name} in [0, 1] for {ids[worst]} in {log}, got {values[worst]!r:.80}")
    return array


def place_of(config: Mapping[str, Any]) -> Place:
    """What a task asks about, by its configuration in a results file."""
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise ValueError(f"expected a mapping as metadata of a task, got {metadata!r:.80}")
    # Local copies of all datasets are loaded as "parquet".
    dataset = metadata.get("dataset") or config.get("dataset_path")
    place = str(dataset), str(config.get("test_split"))
    kinds = [_shift(metadata, key, of) for key, of in _SHIFT_KEYS if metadata.get(key) is not None]
    if not kinds:
        return Place(*place, None, None)
    name, severity = "_and_".join(name for name, _ in kinds), kinds[0][1]
    if severity != kinds[-1][1]:
        name += f"_{kinds[-1][1]}"
    which = SHIFTED[2] if len(kinds) == 2 else SHIFTED["text_shift" in metadata]
    return Place(*place, name, severity, which)


def _shift(metadata: Mapping[str, Any], key: str, of: str) -> tuple[str, int]:
    name, severity = metadata[key], metadata.get(of)
    if not isinstance(name, str) or not isinstance(severity, int):
        raise ValueError(f"expected a name as {key} and a whole number as {of}, got {name!r:.80} and {severity!r:.80}")
    return name, severity


def is_record(value: Any, kind: Kind) -> bool:
    """Whether a value of a log is a record of that kind."""
    keys = {"id", "image", kind.score} | ({kind.outcome} if kind.outcome else set())
    return isinstance(value, dict) and keys <= set(value)


def _record(row: Mapping[str, Any], kind: Kind, log: Path) -> dict[str, Any]:
    record = row.get(kind.record)
    if not is_record(record, kind):
        raise ValueError(f"expected a record under {kind.record!r} for document {row.get('doc_id')} in {log}")
    number, confidence = row.get("doc_id", -1), (record or {}).get("confidence")
    wrong = not isinstance(number, int) or abs(number) >= 2**63
    if (
        wrong
        or not (confidence is None or isinstance(confidence, dict))
        or (kind.outcome and "pair" not in (record or {}))
    ):
        raise ValueError(f"expected a whole record under {kind.record!r} for document {number!r:.80} in {log}")
    return {**(record or {}), "doc_id": number}


def _is_answer(record: Mapping[str, Any]) -> bool:
    return record["box"] is not None if "box" in record else not record.get("unfinished", False)


def _asked(record: Mapping[str, Any]) -> str:
    question = record.get("expression", record.get("question"))
    return json.dumps([question, record.get("target", record.get("answers"))])


def _texts(values: Any) -> Texts:
    return np.array([str(value) for value in values], dtype=np.str_)


def _bounded(digits: str) -> int:
    """A whole number that any number of a table can be computed with."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"expected at most {_MOST_DIGITS} digits, got {digits[:_MOST_DIGITS]}...")
    return int(digits)


def _json(where: object, text: bytes, whole: Callable[[str], int] | None = None) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_int=whole)
    # Python parses by recursion, and no integer of more than 4,300 digits.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {where}, which is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {where}, got {text[:60]!r}")
    return value
