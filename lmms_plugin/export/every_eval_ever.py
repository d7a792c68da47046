"""A run in the schema of Every Eval Ever 0.3.0: one record of the run, and one of each document.

The schema has no place for quantization or for confidence: the first goes into `additional_details`, the second into
the `metadata` of each document, both as text, as the schema wants it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin import __version__
from lmms_plugin.export import facts
from lmms_plugin.export.measured import Measured, Score
from lmms_plugin.export.rescoring import Sample
from lmms_plugin.export.schema import VERSION, expect_aggregate, expect_instances
from lmms_plugin.results import GROUNDING, REJECTION, VQA, Kind, TaskRecords

RELATIONSHIPS = ("first_party", "third_party", "collaborative", "other")
LONGEST_NAME = 200
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DATE = re.compile(r"(\d{4})(\d\d)(\d\d)_(\d\d)(\d\d)(\d\d)")
_COMPONENT = re.compile(r"[A-Za-z0-9][\w.-]*[\w-]|[A-Za-z0-9]")
_PRIMARY: Mapping[Kind, str] = {GROUNDING: "acc@0.5", VQA: "accuracy", REJECTION: "box_rate"}
"""Which metric the records of single documents belong to."""


@dataclass(frozen=True)
class Source:
    """What no results file tells: who ran it, and what the model is called.

    Attributes:
        model_id: Of the evaluated model, `organization/name`.
        organization: That ran the evaluation.
        relationship: Its relationship to the model, of `RELATIONSHIPS`.
        collection: Under which the records are filed.
        timestamp: When the records are made, in seconds since 1970.

    Raises:
        ValueError: If one of them is missing, unknown or unfit for a path.
    """

    model_id: str
    organization: str
    relationship: str
    collection: str
    timestamp: int

    def __post_init__(self) -> None:
        if not HUB_ID.fullmatch(self.model_id) or not all(map(_COMPONENT.fullmatch, self.model_id.split("/"))):
            raise ValueError(f"expected a model id as organization/name, got {self.model_id!r}")
        if not _COMPONENT.fullmatch(self.collection) or self.collection == "data":
            raise ValueError(f"expected letters, digits, '.', '-' and '_' as collection, got {self.collection!r}")
        if not self.organization.strip():
            raise ValueError("expected the organization that ran the evaluation, got none")
        # Characters that change direction or clear a terminal would make it look like another.
        if not self.organization.isprintable() or len(self.organization) > LONGEST_NAME:
            raise ValueError(f"expected at most {LONGEST_NAME} printable characters, got {self.organization!r}")
        if type(self.timestamp) is not int or self.timestamp < 0:
            raise ValueError(f"expected a timestamp in whole seconds since 1970, got {self.timestamp!r}")
        if self.relationship not in RELATIONSHIPS:
            raise ValueError(f"expected a relationship of {', '.join(RELATIONSHIPS)}, got {self.relationship!r}")

    @property
    def evaluation_id(self) -> str:
        """Of this run, as the schema writes it."""
        return f"{self.collection}/{self.model_id}/{self.timestamp}"


class Files(NamedTuple):
    """Where the records lie, relative to the folder of an export."""

    aggregate: Path
    instances: Path


def paths(measured: Measured, source: Source) -> Files:
    """Where the records of a run lie; named by the content of its results file."""
    digest = hashlib.sha256(measured.run.file.read_bytes()).digest()
    name = uuid.UUID(bytes=digest[:16], version=4)
    folder = Path("data", source.collection, *source.model_id.split("/"))
    return Files(folder / f"{name}.json", folder / f"{name}_samples.jsonl")


def write(measured: Measured, source: Source, folder: Path) -> Files:
    """Write both records below a folder, validated.

    Raises:
        ValueError: If one is not valid.
    """
    files = paths(measured, source)
    rows = list(instances(measured, source))
    expect_instances(rows, files.instances)
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    whole = aggregate(measured, source, files, lines.encode(), len(rows))
    expect_aggregate(whole, files.aggregate)
    (folder / files.aggregate).parent.mkdir(parents=True, exist_ok=True)
    (folder / files.instances).write_bytes(lines.encode())
    text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / files.aggregate).write_text(text + "\n", encoding="utf-8")
    return files


def aggregate(measured: Measured, source: Source, files: Files, lines: bytes, rows: int) -> dict[str, Any]:
    """The record of the run.

    Args:
        measured: The run.
        source: Who says so.
        files: Where the records will lie.
        lines: The records of single documents as they are written.
        rows: How many these are.
    """
    started = _evaluated(measured.results)
    return {
        "schema_version": VERSION,
        "evaluation_id": source.evaluation_id,
        **({"evaluation_timestamp": started} if started else {}),
        "retrieved_timestamp": str(source.timestamp),
        "source_metadata": {
            "source_name": "lmms-plugin",
            "source_type": "evaluation_run",
            "source_organization_name": source.organization,
            "evaluator_relationship": source.relationship,
        },
        "eval_library": {
            "name": "lmms_eval",
            "version": _lmms_eval_version(measured),
            "additional_details": {"lmms_plugin": __version__} | facts.versions(measured.run),
        },
        "model_info": _model(measured, source),
        "evaluation_results": list(_results(measured)),
        "detailed_evaluation_results": {
            "format": "jsonl",
            "file_path": files.instances.as_posix(),
            "hash_algorithm": "sha256",
            "checksum": hashlib.sha256(lines).hexdigest(),
            "total_rows": rows,
        },
    }


def instances(measured: Measured, source: Source) -> Iterator[dict[str, Any]]:
    """The record of each document, task by task, in the log's order."""
    for task, rescored in measured.tasks.items():
        kind = measured.run.tasks[task].kind
        for sample in rescored.samples:
            yield _instance(task, kind, sample, source)


def metric_bounds(metric: str) -> tuple[float, float | str]:
    """Smallest and largest value a metric can have, as the schema writes them."""
    if metric in ("nll", "boxes_per_answer"):
        return 0.0, "Infinity"
    name, _, cost = metric.partition("@")
    return (-float(cost), 1.0) if name == "phi" else (0.0, 1.0)


def _results(measured: Measured) -> Iterator[dict[str, Any]]:
    for task, scores in measured.scores.items():
        rescored, records = measured.tasks[task], measured.run.tasks[task]
        for metric, score in scores.items():
            yield {
                "evaluation_result_id": f"{task}/{metric}",
                "evaluation_name": task,
                "source_data": _data(records),
                "metric_config": _metric(metric, rescored.definition.higher_is_better[metric], records),
                "score_details": _score(score, measured),
                "generation_config": _generation(measured, task),
            }


def _metric(metric: str, higher_is_better: bool, records: TaskRecords) -> dict[str, Any]:
    low, high = metric_bounds(metric)
    return {
        "evaluation_description": f"{metric} of {records.task}, by lmms-plugin",
        "metric_id": metric,
        "metric_name": metric,
        "metric_kind": metric.partition("@")[0],
        "metric_unit": {"nll": "nats", "boxes_per_answer": "boxes"}.get(metric, "proportion"),
        "lower_is_better": not higher_is_better,
        "score_type": "continuous",
        "min_score": low,
        "max_score": high,
        "additional_details": {"confidence_estimator": records.kind.estimator},
    }


def _score(score: Score, measured: Measured) -> dict[str, Any]:
    details = {"images": str(score.images), "records": str(score.records)}
    if math.isnan(score.low):
        return {"score": score.value, "details": details, "uncertainty": {"num_samples": score.records}}
    interval = {
        "lower": score.low,
        "upper": score.high,
        "confidence_level": measured.settings.level,
        "method": f"bootstrap over images, seed {measured.settings.seed}",
    }
    uncertainty = {
        "confidence_interval": interval,
        "num_samples": score.records,
        "num_bootstrap_samples": measured.settings.resamples,
    }
    return {"score": score.value, "details": details, "uncertainty": uncertainty}


def _data(records: TaskRecords) -> dict[str, Any]:
    place = records.place
    details = {"documents": str(records.ids.size), "images": str(len(set(records.images.tolist())))}
    if place.shift is not None:
        details |= {"shift": place.shift, "severity": str(place.severity), "shifted": place.shifts}
    if not HUB_ID.fullmatch(place.dataset):
        # A folder of this machine says nothing to anybody else.
        name = records.task if "/" in place.dataset else place.dataset
        return {
            "dataset_name": name,
            "source_type": "other",
            "additional_details": details | {"split": place.split},
        }
    return {
        "dataset_name": place.dataset,
        "source_type": "hf_dataset",
        "hf_repo": place.dataset,
        "hf_split": place.split,
        "samples_number": int(records.ids.size),
        "additional_details": details,
    }


def _generation(measured: Measured, task: str) -> dict[str, Any]:
    longest, command = measured.tasks[task].definition.max_new_tokens, facts.command(measured.run)
    given = measured.results.get("config", {}).get("gen_kwargs")
    # Tasks of this package decode greedily, unless the user said something else.
    arguments: dict[str, Any] = {"temperature": 0.0} if not given else {}
    arguments |= {} if longest is None or given else {"max_tokens": longest}
    arguments |= {} if command is None else {"execution_command": command}
    return {"generation_args": arguments} | ({"additional_details": {"gen_kwargs": str(given)}} if given else {})


def _model(measured: Measured, source: Source) -> dict[str, Any]:
    details = {"deployment_type": "self_deployed", "model_availability": "unknown"}
    engine = facts.versions(measured.run).get("transformers")
    return {
        "name": source.model_id.partition("/")[2],
        "id": source.model_id,
        "developer": source.model_id.partition("/")[0],
        "inference_engine": {"name": "transformers"} | ({"version": engine} if engine else {}),
        "additional_details": details | facts.quantization(measured.run, measured.results),
    }


def _instance(task: str, kind: Kind, sample: Sample, source: Source) -> dict[str, Any]:
    record, asked = sample.record, str(sample.record.get("expression", sample.record.get("question")))
    reference = list(record["answers"]) if kind is VQA else [sample.target]
    score = float(record["score"] >= (kind.right or 0.0)) if kind is GROUNDING else float(record[kind.score])
    return {
        "schema_version": VERSION,
        "evaluation_id": source.evaluation_id,
        "model_id": source.model_id,
        "evaluation_name": task,
        "evaluation_result_id": f"{task}/{_PRIMARY[kind]}",
        "sample_id": str(record["id"]),
        "sample_hash": hashlib.sha256("".join([asked, *reference]).encode()).hexdigest(),
        "interaction_type": "single_turn",
        "input": {"raw": asked, "formatted": sample.prompt or None, "reference": reference},
        "output": {"raw": [sample.response.text]},
        "answer_attribution": [_attribution(record, kind)],
        "evaluation": {"score": score, "is_correct": _is_correct(record, kind)},
        "metadata": _metadata(record, kind),
    }


def _is_correct(record: Mapping[str, Any], kind: Kind) -> bool:
    if kind is REJECTION:
        # Only a box where there is something, and none where there is nothing.
        return bool(record["score"] == record["matches"])
    return bool(record[kind.score] >= (0.5 if kind.right is None else kind.right))


def _attribution(record: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    box = record.get("box")
    return {
        "turn_idx": 0,
        "source": "output.raw",
        "extracted_value": record["answer"] if kind is VQA else json.dumps(box) if box else "",
        "extraction_method": "exact_match" if kind is VQA else "regex",
        "is_terminal": True,
    }


def _metadata(record: Mapping[str, Any], kind: Kind) -> dict[str, str]:
    """What the schema has no field for, as text: image, IoU, boxes and confidences."""
    told = {"image": str(record["image"]), "confidence_estimator": kind.estimator}
    if kind is GROUNDING:
        told |= {"iou": repr(float(record["score"])), "boxes": str(record["boxes"])}
        told |= {"box_xyxy": json.dumps(record["box"]), "target_xyxy": json.dumps(record["target"])}
    for name in ("part", "matches", "pair", "original_expression"):
        if name in record:
            told[name] = str(record[name])
    confidences = {name: value for name, value in (record.get("confidence") or {}).items() if value is not None}
    if kind.estimator in confidences:
        told["confidence"] = repr(float(confidences[kind.estimator]))
    return told | {f"confidence_{name}": repr(float(value)) for name, value in confidences.items()}


def _evaluated(results: Mapping[str, Any]) -> str | None:
    """When lmms-eval ran as ISO 8601, in the time zone it was told, which it does not log; None if it does not say."""
    found = _DATE.fullmatch(str(results.get("date")))
    return "{}-{}-{}T{}:{}:{}".format(*found.groups()) if found else None


def _lmms_eval_version(measured: Measured) -> str:
    said = facts.versions(measured.run).get("lmms_eval") or str(measured.results.get("lmms_eval_version", ""))
    return said if said and not said.startswith("unknown") else "unknown"
