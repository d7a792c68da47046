"""Rescoring of logged answers: the claims of a run are compared with scores recomputed from its own answers.

The log of samples holds the model's raw answers with the log-probabilities of their tokens. Everything after them is
recomputed by the task's own functions: the box, its overlap with the true one, whether it counts as right, every
confidence, and from these every metric of the table of results.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.records import GROUNDING, REJECTION, TaskKind
from lmms_plugin.export.consistency import RescoredSample, expect_one_model, expect_place, expect_told
from lmms_plugin.export.definitions import Definition, definition
from lmms_plugin.protocol.response import Response
from lmms_plugin.utils.reading.readable import readable

_TOLERANCE = 1e-9
_DECIMAL, _LAST_DECIMAL = re.compile(r"\d+\.\d+"), 0.01
_NOT_METRICS = ("alias", "samples")
_LOGGED = frozenset(
    {
        *("doc_id", "target", "filtered_resps", "resps", "token_counts", "doc_hash", "input_media", "input"),
        *("doc", "arguments", "filter", "reasoning_token_counts"),
    }
)
"""Keys of a log line that lmms-eval writes itself; all others are metrics."""


class Rescored(NamedTuple):
    """A task of a run whose claims hold.

    Attributes:
        samples: Samples of all documents, in the log's order.
        metrics: Metric → value, for all metrics of lmms-eval's table.
        images: Metric → images of the documents that count for it, one entry per document.
        definition: Definition of the task.
    """

    samples: tuple[RescoredSample, ...]
    metrics: Mapping[str, float]
    images: Mapping[str, Sequence[str]]
    definition: Definition


def rescore(run: LoggedRun, task: str) -> Rescored:
    """Score the answers of a task of a run again.

    Raises:
        ValueError: A line of the log or the table of results disagrees; names document and metric.
    """
    log, found = run.log(task), definition(task)
    expect_place(run.tasks[task], found.place)
    samples: list[RescoredSample] = []
    entries: defaultdict[str, list[Any]] = defaultdict(list)
    images: defaultdict[str, list[str]] = defaultdict(list)
    for row in _rows(log):
        # A true box may be missing, and a prompt may be a number.
        with readable(f"{log}: document {row.get('doc_id')!r:.20}"):
            sample, output = _scored(row, run.tasks[task].kind, found, log)
        samples.append(sample)
        for metric, entry in output.items():
            entries[metric].append(entry)
            # An answer without a value of an estimator counts for none of its metrics.
            if getattr(entry, "confidence", 0.0) is not None:
                images[metric].append(str(sample.record["image"]))
    expect_one_model(task, samples)
    unknown = entries.keys() - found.aggregations.keys()
    if unknown:
        raise ValueError(f"task {task}: expected an aggregation for every metric, got none for {sorted(unknown)}")
    metrics = {name: float(found.aggregations[name](entries[name])) for name in found.aggregations if name in entries}
    _expect_table(run, task, metrics)
    return Rescored(tuple(samples), metrics, images, found)


def claimed(run: LoggedRun, task: str) -> dict[str, float]:
    """Return the metrics of a task in the table of results, without standard errors."""
    table = {}
    for key, value in run.results.get(task, {}).items():
        metric, _, _ = key.partition(",")
        if metric not in _NOT_METRICS and "_stderr" not in metric:
            table[metric] = value
    return table


def _rows(log: Path) -> Iterator[dict[str, Any]]:
    with log.open("rb") as lines:
        for line in lines:
            row: dict[str, Any] = json.loads(line)
            yield row


def _scored(
    row: Mapping[str, Any], kind: TaskKind, definition: Definition, log: Path
) -> tuple[RescoredSample, Mapping[str, Any]]:
    record, answer = row[kind.record], row.get("filtered_resps")
    if not isinstance(answer, str):
        raise ValueError(f"{log}: expected one answer for {record['id']}, got {str(answer)[:80]}")
    response = Response.decode(answer)
    expect_told(response)
    doc = _document(record, row, response, kind, definition)
    output = definition.score(doc, [answer])
    logged = {key: value for key, value in row.items() if key not in _LOGGED}
    differs = difference(output, logged)
    if differs:
        raise ValueError(f"{log}: the answer to {record['id']}, scored anew, is not what the log says: {differs}")
    target = definition.target(doc) if kind is not REJECTION else str(row.get("target", ""))
    if not _told_alike(target, str(row.get("target", target)), kind):
        raise ValueError(f"{log}: expected the target {target} for {record['id']}, got {row['target']}")
    prompt = row.get("input")
    return RescoredSample(row["doc_id"], record, response, prompt if isinstance(prompt, str) else "", target), output


def _told_alike(expected: str, found: str, kind: TaskKind) -> bool:
    """Return whether two true answers are the same; of boxes, whose text is rounded, up to its last decimal.

    A side that is half a hundredth, as 0.375, may be rounded up from pixels and down from the log's fractions. Scores
    come from the fractions.
    """
    if expected == found or kind is not GROUNDING:
        return expected == found
    told = [[float(number) for number in _DECIMAL.findall(text)] for text in (expected, found)]
    alike = _DECIMAL.sub("", expected) == _DECIMAL.sub("", found) and len(told[0]) == len(told[1])
    return alike and all(abs(a - b) < 1.5 * _LAST_DECIMAL for a, b in zip(*told, strict=True))


def _document(
    record: Mapping[str, Any], row: Mapping[str, Any], response: Response, kind: TaskKind, definition: Definition
) -> dict[str, Any]:
    """Return the document as far as scores depend on it, from the log."""
    if kind is GROUNDING or kind is REJECTION:
        return _expression(record, row, response, kind, definition)
    names = ("part", "question", "answers")
    return {name: record[name] for name in names} | {"image_id": record["image"], "question_id": record["id"]}


def _expression(
    record: Mapping[str, Any], row: Mapping[str, Any], response: Response, kind: TaskKind, definition: Definition
) -> dict[str, Any]:
    # Without a trailer the answer is parsed as fractions, for which any size works.
    width, height = response.original_size or (1, 1)
    doc = {
        "image_id": record["image"],
        "expression_id": record["id"],
        "expression": record["expression"],
        "width": width,
        "height": height,
    }
    optional = ("original_expression", "annotated", "pair", "matches", "change", "tags")
    doc |= {name: record[name] for name in optional if name in record}
    doc["clean"] = (record.get("tags") or {}).get("clean")
    if "shifted_rate" in row:
        doc["shifted_rate"] = row["shifted_rate"]["score"]
    if kind is REJECTION:
        whole = [0.0, 0.0, float(width), float(height)]
        # Documents without a target have no box in benchmarks with such documents, else the box of their pair.
        without = not record["matches"] and "box_rate_no_target" in definition.aggregations
        return doc | {"bbox": None if without else whole}
    x1, y1, x2, y2 = record["target"]
    return doc | {"bbox": [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]}


def difference(expected: Any, found: Any, where: str = "") -> str | None:
    """Return where two JSON-like values differ, in words; None if they are equal up to rounding."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for key in sorted(expected.keys() | found.keys(), key=str):
            if key not in expected or key not in found:
                return f"{where}{key!s:.80} is {'missing' if key in expected else 'unknown'}"
            if differs := difference(expected[key], found[key], f"{where}{key!s:.80}: "):
                return differs
        return None
    if _is_list(expected) and _is_list(found) and len(expected) == len(found):
        parts = (difference(a, b, where) for a, b in zip(expected, found, strict=True))
        return next((part for part in parts if part), None)
    return None if _same(expected, found) else f"{where}expected {expected!r:.200}, got {found!r:.200}"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _same(expected: Any, found: Any) -> bool:
    if _is_number(expected) and _is_number(found):
        # JSON integers may exceed any float.
        with suppress(OverflowError):
            both_nan = math.isnan(expected) and math.isnan(found)
            return both_nan or math.isclose(expected, found, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
        return False
    return bool(expected == found) and isinstance(expected, bool) == isinstance(found, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _expect_table(run: LoggedRun, task: str, metrics: Mapping[str, float]) -> None:
    differs = difference(dict(metrics), claimed(run, task))
    if differs:
        raise ValueError(f"{run.file}: the table of results is not that of the log of {task}: {differs}")
