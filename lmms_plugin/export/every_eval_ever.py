"""A run in the schema of Every Eval Ever 0.3.0: one record of the run, and one of each document.

The schema has no field for quantization or for confidence: the first goes into `additional_details`, the second into
the `metadata` of each document, both as text, as the schema requires.
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
from typing import Any, NamedTuple, get_args

from lmms_plugin import __version__
from lmms_plugin.analysis.logs import GIT_STATE, evaluated, git_state
from lmms_plugin.analysis.records import GROUNDING, REJECTION, VQA, TaskKind, TaskRecords
from lmms_plugin.export import facts, record_types, validator
from lmms_plugin.export.consistency import RescoredSample
from lmms_plugin.export.measured import VerifiedRun, VerifiedScore
from lmms_plugin.export.record_types import SAMPLES, VERSION, Bound, DocumentRecord, Relationship, RunRecord, refused
from lmms_plugin.utils import hashing
from lmms_plugin.utils.files import replace_all

RELATIONSHIPS: tuple[Relationship, ...] = get_args(Relationship)


def expect_relationship(given: str) -> Relationship:
    """Return the relationship of an organization to a model.

    Raises:
        ValueError: It is none of `RELATIONSHIPS`.
    """
    if given not in RELATIONSHIPS:
        raise ValueError(f"expected a relationship of {', '.join(RELATIONSHIPS)}, got {given!r}")
    return given


LONGEST_NAME = 200
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMPONENT = re.compile(r"[A-Za-z0-9][\w.-]*[\w-]|[A-Za-z0-9]")
_PRIMARY: Mapping[TaskKind, str] = {GROUNDING: "acc@0.5", VQA: "accuracy", REJECTION: "box_rate"}
"""Metric that the records of single documents belong to, by kind of task."""


@dataclass(frozen=True)
class EvaluationSource:
    """Facts that no results file tells: who ran the evaluation, and the name of the model.

    Attributes:
        model_id: Id of the evaluated model, `organization/name`.
        organization: Organization that ran the evaluation.
        relationship: Its relationship to the model, of `RELATIONSHIPS`.
        collection: Collection under which the records are filed.
        timestamp: Time of the records, in seconds since 1970.

    Raises:
        ValueError: A value is missing, unknown or unfit for a path.
    """

    model_id: str
    organization: str
    relationship: Relationship
    collection: str
    timestamp: int

    def __post_init__(self) -> None:
        if not HUB_ID.fullmatch(self.model_id) or not all(map(_COMPONENT.fullmatch, self.model_id.split("/"))):
            raise ValueError(f"expected a model id as organization/name, got {self.model_id!r}")
        if not _COMPONENT.fullmatch(self.collection) or self.collection == "data":
            raise ValueError(f"expected letters, digits, '.', '-' and '_' as collection, got {self.collection!r}")
        if not self.organization.strip():
            raise ValueError("expected the organization that ran the evaluation, got none")
        # Characters that change the writing direction or clear a terminal could disguise the value.
        if not self.organization.isprintable() or len(self.organization) > LONGEST_NAME:
            raise ValueError(f"expected at most {LONGEST_NAME} printable characters, got {self.organization!r}")
        if type(self.timestamp) is not int or self.timestamp < 0:
            raise ValueError(f"expected a timestamp in whole seconds since 1970, got {self.timestamp!r}")
        expect_relationship(self.relationship)

    @property
    def evaluation_id(self) -> str:
        """Return the id of this run, as the schema requires."""
        return f"{self.collection}/{self.model_id}/{self.timestamp}"


class Files(NamedTuple):
    """Paths of the records, relative to the folder of an export."""

    aggregate: Path
    instances: Path


class WrittenRecords(NamedTuple):
    """Paths of written records, relative to the folder of the export, and a line on who validated them."""

    files: Files
    checked: str


def paths(measured: VerifiedRun, source: EvaluationSource) -> Files:
    """Return the paths of a run's records, named by the content of its results file."""
    digest = hashlib.sha256(measured.run.file.read_bytes()).digest()
    name = uuid.UUID(bytes=digest[:16], version=4)
    folder = Path("data", source.collection, *source.model_id.split("/"))
    return Files(folder / f"{name}.json", folder / f"{name}{SAMPLES}")


def write(measured: VerifiedRun, source: EvaluationSource, folder: Path) -> WrittenRecords:
    """Write both records below a folder, and validate them by Every Eval Ever's own validator where it is installed.

    Raises:
        ValueError: The format cannot hold a value, or the validator refuses a file; then neither file is kept.
    """
    files = paths(measured, source)
    rows = [record.line() + "\n" for record in instances(measured, source)]
    lines = "".join(rows).encode()
    whole = aggregate(measured, source, files, lines, len(rows))
    (folder / files.aggregate).parent.mkdir(parents=True, exist_ok=True)
    replace_all({folder / files.instances: lines, folder / files.aggregate: whole.file().encode()})
    try:
        return WrittenRecords(files, validator.check(folder, *files))
    except ValueError:
        for file in files:
            (folder / file).unlink()
        raise


def aggregate(measured: VerifiedRun, source: EvaluationSource, files: Files, lines: bytes, rows: int) -> RunRecord:
    """Return the record of the run.

    Args:
        measured: Run.
        source: Source of the evaluation.
        files: Paths of the records.
        lines: Records of single documents as they are written.
        rows: Number of these records.

    Raises:
        ValueError: The format cannot hold a value.
    """
    started = evaluated(measured.results)
    with refused(files.aggregate):
        return RunRecord(
            schema_version=VERSION,
            evaluation_id=source.evaluation_id,
            **({"evaluation_timestamp": started} if started else {}),
            retrieved_timestamp=str(source.timestamp),
            source_metadata=record_types.SourceMetadata(
                source_name="lmms-plugin",
                source_type="evaluation_run",
                source_organization_name=source.organization,
                evaluator_relationship=source.relationship,
            ),
            eval_library=record_types.Library(
                name="lmms_eval",
                version=facts.versions(measured.run).get("lmms_eval", "unknown"),
                additional_details=_library_details(measured),
            ),
            model_info=_model(measured, source),
            evaluation_results=tuple(_results(measured)),
            detailed_evaluation_results=record_types.DocumentRecordsFile(
                format="jsonl",
                file_path=files.instances.as_posix(),
                hash_algorithm="sha256",
                checksum=hashing.of_bytes(lines),
                total_rows=rows,
            ),
        )


def instances(measured: VerifiedRun, source: EvaluationSource) -> Iterator[DocumentRecord]:
    """Yield the record of each document, task by task, in the log's order.

    Raises:
        ValueError: The format cannot hold a value.
    """
    for task, rescored in measured.tasks.items():
        kind = measured.run.tasks[task].kind
        for sample in rescored.samples:
            with refused(f"task {task}, document {sample.record['id']}"):
                record = _instance(task, kind, sample, source)
            yield record


def metric_bounds(metric: str) -> tuple[float, Bound]:
    """Return the smallest and largest value a metric can have, as the schema writes them."""
    if metric in ("nll", "boxes_per_answer"):
        return 0.0, "Infinity"
    name, _, cost = metric.partition("@")
    return (-float(cost), 1.0) if name == "phi" else (0.0, 1.0)


def _results(measured: VerifiedRun) -> Iterator[record_types.Result]:
    for task, scores in measured.scores.items():
        rescored, answered = measured.tasks[task], measured.run.tasks[task]
        for metric, score in scores.items():
            yield record_types.Result(
                evaluation_result_id=f"{task}/{metric}",
                evaluation_name=task,
                source_data=_data(answered),
                metric_config=_metric(metric, rescored.definition.higher_is_better[metric], answered),
                score_details=_score(score, measured),
                generation_config=_generation(measured, task),
            )


def _metric(metric: str, higher_is_better: bool, answered: TaskRecords) -> record_types.Metric:
    low, high = metric_bounds(metric)
    return record_types.Metric(
        evaluation_description=f"{metric} of {answered.task}, by lmms-plugin",
        metric_id=metric,
        metric_name=metric,
        metric_kind=metric.partition("@")[0],
        metric_unit={"nll": "nats", "boxes_per_answer": "boxes"}.get(metric, "proportion"),
        lower_is_better=not higher_is_better,
        score_type="continuous",
        min_score=low,
        max_score=high,
        additional_details={"confidence_estimator": answered.kind.estimator},
    )


def _score(score: VerifiedScore, measured: VerifiedRun) -> record_types.ScoreDetails:
    details = {"images": str(score.images), "records": str(score.records)}
    if math.isnan(score.low):
        uncertainty = record_types.Uncertainty(num_samples=score.records)
    else:
        interval = record_types.ConfidenceInterval(
            lower=score.low,
            upper=score.high,
            confidence_level=measured.settings.level,
            method=f"bootstrap over images, seed {measured.settings.seed}",
        )
        uncertainty = record_types.Uncertainty(
            confidence_interval=interval,
            num_samples=score.records,
            num_bootstrap_samples=measured.settings.resamples,
        )
    return record_types.ScoreDetails(score=score.value, details=details, uncertainty=uncertainty)


def _data(answered: TaskRecords) -> record_types.HubData | record_types.OtherData:
    place = answered.place
    details = {"documents": str(answered.ids.size), "images": str(len(set(answered.images.tolist())))}
    if place.shift is not None:
        details |= {"shift": place.shift, "severity": str(place.severity), "shifted": place.shifts}
    if not HUB_ID.fullmatch(place.dataset):
        # A folder of this machine is meaningless elsewhere.
        name = answered.task if "/" in place.dataset else place.dataset
        return record_types.OtherData(
            dataset_name=name, source_type="other", additional_details=details | {"split": place.split}
        )
    return record_types.HubData(
        dataset_name=place.dataset,
        source_type="hf_dataset",
        hf_repo=place.dataset,
        hf_split=place.split,
        samples_number=int(answered.ids.size),
        additional_details=details,
    )


def _generation(measured: VerifiedRun, task: str) -> record_types.GenerationDetails:
    longest, command = measured.tasks[task].definition.max_new_tokens, facts.command(measured.run)
    given = measured.results.get("config", {}).get("gen_kwargs")
    # Tasks of this package decode greedily, unless the user set something else.
    told: dict[str, Any] = {"temperature": 0.0} if not given else {}
    told |= {} if longest is None or given else {"max_tokens": longest}
    told |= {} if command is None else {"execution_command": command}
    details = {"additional_details": {"gen_kwargs": str(given)}} if given else {}
    return record_types.GenerationDetails(generation_args=record_types.GenerationArguments(**told), **details)


def _model(measured: VerifiedRun, source: EvaluationSource) -> record_types.EvaluatedModel:
    organization, _, name = source.model_id.partition("/")
    engine = facts.versions(measured.run).get("transformers")
    details = {"deployment_type": "self_deployed", "model_availability": "unknown"}
    details |= facts.quantization(measured.run, measured.results)
    return record_types.EvaluatedModel(
        name=name,
        id=source.model_id,
        developer=organization,
        inference_engine=record_types.InferenceEngine(name="transformers", **({"version": engine} if engine else {})),
        additional_details=record_types.ModelDetails.model_validate(details),
    )


def _instance(task: str, kind: TaskKind, sample: RescoredSample, source: EvaluationSource) -> DocumentRecord:
    record, asked = sample.record, str(sample.record.get("expression", sample.record.get("question")))
    reference = tuple(record["answers"]) if kind is VQA else (sample.target,)
    score = float(record["score"] >= (kind.right or 0.0)) if kind is GROUNDING else float(record[kind.score])
    return DocumentRecord(
        schema_version=VERSION,
        evaluation_id=source.evaluation_id,
        model_id=source.model_id,
        evaluation_name=task,
        evaluation_result_id=f"{task}/{_PRIMARY[kind]}",
        sample_id=str(record["id"]),
        sample_hash=hashing.of_bytes("".join([asked, *reference]).encode()),
        interaction_type="single_turn",
        input=record_types.Input(raw=asked, formatted=sample.prompt or None, reference=reference),
        output=record_types.Output(raw=(sample.response.text,)),
        answer_attribution=(_attribution(record, kind),),
        evaluation=record_types.Evaluation(score=score, is_correct=_is_correct(record, kind)),
        metadata=_metadata(record, kind),
    )


def _is_correct(record: Mapping[str, Any], kind: TaskKind) -> bool:
    if kind is REJECTION:
        # Right is a box where there is a target, and no box where there is none.
        return bool(record["score"] == record["matches"])
    return bool(record[kind.score] >= (0.5 if kind.right is None else kind.right))


def _attribution(record: Mapping[str, Any], kind: TaskKind) -> record_types.Attribution:
    box = record.get("box")
    return record_types.Attribution(
        turn_idx=0,
        source="output.raw",
        extracted_value=record["answer"] if kind is VQA else json.dumps(box) if box else "",
        extraction_method="exact_match" if kind is VQA else "regex",
        is_terminal=True,
    )


def _metadata(record: Mapping[str, Any], kind: TaskKind) -> dict[str, str]:
    """Return what the schema has no field for, as text: image, IoU, boxes and confidences."""
    told = {"image": str(record["image"]), "confidence_estimator": kind.estimator}
    if kind is GROUNDING:
        told |= {"iou": repr(float(record["score"])), "boxes": str(record["boxes"])}
        told |= {"box_xyxy": json.dumps(record["box"]), "target_xyxy": json.dumps(record["target"])}
    for name in ("part", "matches", "pair", "original_expression", "annotated"):
        if name in record:
            told[name] = str(record[name])
    confidences = {name: value for name, value in (record.get("confidence") or {}).items() if value is not None}
    if kind.estimator in confidences:
        told["confidence"] = repr(float(confidences[kind.estimator]))
    return told | {f"confidence_{name}": repr(float(value)) for name, value in confidences.items()}


def _library_details(measured: VerifiedRun) -> dict[str, str]:
    state = git_state(measured.results)
    told = {} if state is None else {GIT_STATE: state}
    return {"lmms_plugin": __version__} | told | facts.versions(measured.run)
