"""Types of the records of Every Eval Ever 0.3.0 that this package writes: of a run and of one document.

The format has more (other kinds of sources, conversations, judges), which no run of this package has. A model here
accepts nothing that the format refuses, and of the format only what this package writes: any other field is an error.
A field with `left_out` as its default may be missing, and is then not written; null is not a value for it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from lmms_plugin.utils.reading.validation import Problem, left_out

Version = Literal["0.3.0"]
VERSION: Version = "0.3.0"
Relationship = Literal["first_party", "third_party", "collaborative", "other"]
SAMPLES = "_samples.jsonl"
"""Suffix of the file with the records of documents, after the name of the run's own."""

Details = Mapping[str, str]
"""Further facts as text: the format takes no numbers here."""
# JSON has lists where a frozen record has tuples.
Texts = Annotated[tuple[str, ...], Strict(False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Bound = float | Literal["Infinity", "-Infinity"]
"""An end of a metric's range; JSON has no infinite numbers."""
T = TypeVar("T", bound="RecordPart")
_ENDS = {ord(end): json.dumps(end)[1:-1] for end in "\x85\u2028\u2029"}
"""Unicode line separators that JSON allows in text → their escapes."""


class RecordPart(BaseModel):
    """A part of a record. It is immutable, refuses other fields, and converts no value to another type."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    def content(self) -> dict[str, Any]:
        """Return the part for JSON, fields in the order of their definition, without those that were left out."""
        return self.model_dump(mode="json", exclude_unset=True)

    def line(self) -> str:
        """Return the part as one line of JSON, also for readers that end lines at other characters than a line feed."""
        return json.dumps(self.content(), ensure_ascii=False, allow_nan=False).translate(_ENDS)


# --- The run ---------------------------------------------------------------------------------------------------------


class SourceMetadata(RecordPart):
    """Evaluating organization, and its relationship to the model."""

    source_name: str
    source_type: Literal["evaluation_run"]
    source_organization_name: str
    evaluator_relationship: Relationship


class Library(RecordPart):
    """Library that evaluated the model, with versions of its components."""

    name: str
    version: str
    additional_details: Details


class InferenceEngine(RecordPart):
    """Engine that computed the answers."""

    name: str
    version: str = left_out()


class ModelDetails(RecordPart, extra="allow"):
    """How the model was run and whether its weights are available; quantization is added as text."""

    __pydantic_extra__: dict[str, str]
    deployment_type: Literal["self_deployed", "externally_managed", "unknown"]
    model_availability: Literal["open_weights", "closed_weights", "unknown"]


class EvaluatedModel(RecordPart):
    """The evaluated model; its id is `organization/name`."""

    name: str
    id: str
    developer: str
    inference_engine: InferenceEngine
    additional_details: ModelDetails


class HubData(RecordPart):
    """A dataset on the Hugging Face hub."""

    dataset_name: str
    source_type: Literal["hf_dataset"]
    hf_repo: str
    hf_split: str
    samples_number: Count
    additional_details: Details


class OtherData(RecordPart):
    """A dataset without a public address."""

    dataset_name: str
    source_type: Literal["other"]
    additional_details: Details


class Metric(RecordPart):
    """A metric on a continuous scale, which needs both ends of its range."""

    evaluation_description: str
    metric_id: str
    metric_name: str
    metric_kind: str
    metric_unit: str
    lower_is_better: bool
    score_type: Literal["continuous"]
    min_score: Bound
    max_score: Bound
    additional_details: Details


class ConfidenceInterval(RecordPart):
    """Interval of the score at a confidence level, and its method."""

    lower: float
    upper: float
    confidence_level: Share
    method: str


class Uncertainty(RecordPart):
    """Number of documents of a score; with resamples, their number and result."""

    confidence_interval: ConfidenceInterval = left_out()
    num_samples: Count
    num_bootstrap_samples: Count = left_out()


class ScoreDetails(RecordPart):
    """Value of a metric, in its own unit."""

    score: float
    details: Details
    uncertainty: Uncertainty


class GenerationArguments(RecordPart):
    """Arguments of generation, as far as the run tells."""

    temperature: float = left_out()
    max_tokens: Annotated[int, Field(ge=1)] = left_out()
    execution_command: str = left_out()


class GenerationDetails(RecordPart):
    """Details of generation, with what the user set in lmms-eval's terms."""

    generation_args: GenerationArguments
    additional_details: Details = left_out()


class Result(RecordPart):
    """One metric of one task.

    Raises:
        ValueError: The score lies outside the metric's range.
    """

    evaluation_result_id: str
    evaluation_name: str
    source_data: Annotated[HubData | OtherData, Field(discriminator="source_type")]
    metric_config: Metric
    score_details: ScoreDetails
    generation_config: GenerationDetails

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        low, high = float(self.metric_config.min_score), float(self.metric_config.max_score)
        if not low <= self.score_details.score <= high:
            raise ValueError(f"expected a score from {low} to {high}, got {self.score_details.score}")
        return self


def _samples_path(text: str) -> str:
    """Check a path: `data/<collection>/<organization>/<model>/<UUID of version 4>_samples.jsonl`."""
    *folders, name = text.split("/")
    stem = name.removesuffix(SAMPLES)
    named = len(folders) == 4 and folders[0] == "data" and all(folders) and name != stem and "\n" not in text
    if not named or not _random_uuid(stem):
        raise ValueError(f"expected data/<collection>/<organization>/<model>/<UUID 4>{SAMPLES}, got {text!r}")
    return text


def _random_uuid(text: str) -> bool:
    try:
        found = uuid.UUID(text)
    except ValueError:
        return False
    return found.version == 4 and str(found) == text


class DocumentRecordsFile(RecordPart):
    """Path of the records of documents, and their hash."""

    format: Literal["jsonl"]
    file_path: Annotated[str, AfterValidator(_samples_path)]
    hash_algorithm: Literal["sha256"]
    checksum: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    total_rows: Count


class RunRecord(RecordPart):
    """A run with all metrics of its tasks; times are ISO 8601 for the evaluation, Unix time for the record."""

    schema_version: Version
    evaluation_id: str
    evaluation_timestamp: str = left_out()
    retrieved_timestamp: str
    source_metadata: SourceMetadata
    eval_library: Library
    model_info: EvaluatedModel
    evaluation_results: Annotated[tuple[Result, ...], Strict(False)]
    detailed_evaluation_results: DocumentRecordsFile

    def file(self) -> str:
        """Return the content of the record's file."""
        return json.dumps(self.content(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# --- One document ----------------------------------------------------------------------------------------------------


class Input(RecordPart):
    """Question, its text as the model saw it if known, and true answer."""

    raw: str
    formatted: str | None
    reference: Texts


class Output(RecordPart):
    """Answer of the model."""

    raw: Texts


class Attribution(RecordPart):
    """Value extracted from the answer, and how."""

    turn_idx: Count
    source: str
    extracted_value: str
    extraction_method: str
    is_terminal: bool


class Evaluation(RecordPart):
    """Score of the answer."""

    score: float
    is_correct: bool


class DocumentRecord(RecordPart):
    """A document with its answer of one turn: it has an output, and no messages."""

    schema_version: Version
    evaluation_id: str
    model_id: str
    evaluation_name: str
    evaluation_result_id: str
    sample_id: str
    sample_hash: str
    interaction_type: Literal["single_turn"]
    input: Input
    output: Output
    answer_attribution: Annotated[tuple[Attribution, ...], Strict(False)]
    evaluation: Evaluation
    metadata: Details


# --- Reading ---------------------------------------------------------------------------------------------------------


def read(kind: type[T], content: Any, where: object) -> T:
    """Parse a record from JSON content.

    Args:
        kind: Type of the record.
        content: Parsed JSON.
        where: Name of the record for errors.

    Raises:
        ValueError: The record is invalid; names the place, in one line.
    """
    with refused(where, kind):
        return kind.model_validate(content)


@contextmanager
def refused(where: object, kind: type[RecordPart] | None = None) -> Iterator[None]:
    """Reduce errors of pydantic, which have several lines, to one line.

    Args:
        where: Name of the record.
        kind: Type of the record, where there is one.

    Raises:
        ValueError: The record is invalid; names the record, the field, what it should be and what it is.
    """
    try:
        yield
    except ValidationError as error:
        told = Problem.of(error, kind).text
        raise ValueError(f"{where} is not valid in Every Eval Ever {VERSION}: {told}") from error
