"""What this package writes of Every Eval Ever 0.3.0, as types: the record of a run and the record of one document.

The format has more (other kinds of sources, conversations, judges), which no run of this package has. A model here
takes nothing that the format refuses, and of the format only what this package writes: any other field is an error.
A field with `left_out` as its default may be missing, and is then not written; null is no value for it.
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
"""How the file with the records of documents is called, behind the name of the run's own."""

Details = Mapping[str, str]
"""Whatever else is told, as text: the format takes no number here."""
# JSON has lists where a frozen record has tuples.
Texts = Annotated[tuple[str, ...], Strict(False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Bound = float | Literal["Infinity", "-Infinity"]
"""An end of a metric's range; JSON has no infinite numbers."""
T = TypeVar("T", bound="RecordPart")
_ENDS = {ord(end): json.dumps(end)[1:-1] for end in "\x85\u2028\u2029"}
"""Ends of lines by Unicode that JSON takes for text → as JSON can write them, too."""


class RecordPart(BaseModel):
    """A part of a record. It cannot be changed, takes no other fields, and converts no value to another type."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    def content(self) -> dict[str, Any]:
        """As JSON holds it, fields in the order of their definition, without those that were left out."""
        return self.model_dump(mode="json", exclude_unset=True)

    def line(self) -> str:
        """As one line of JSON, for those, too, who take other characters than a line feed for the end of a line."""
        return json.dumps(self.content(), ensure_ascii=False, allow_nan=False).translate(_ENDS)


# --- The run ---------------------------------------------------------------------------------------------------------


class SourceMetadata(RecordPart):
    """Who evaluated, and how they stand to the model."""

    source_name: str
    source_type: Literal["evaluation_run"]
    source_organization_name: str
    evaluator_relationship: Relationship


class Library(RecordPart):
    """What evaluated the model, with the versions of what it is made of."""

    name: str
    version: str
    additional_details: Details


class InferenceEngine(RecordPart):
    """What computed the answers."""

    name: str
    version: str = left_out()


class ModelDetails(RecordPart, extra="allow"):
    """How the model was run and whether its weights are to be had; quantization stands beside them, as text."""

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
    """A dataset that can be named but not pointed at."""

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
    """Where the score may lie at a level of confidence, and how that was found."""

    lower: float
    upper: float
    confidence_level: Share
    method: str


class Uncertainty(RecordPart):
    """How many documents a score is of; where resamples were drawn, how many and what they gave."""

    confidence_interval: ConfidenceInterval = left_out()
    num_samples: Count
    num_bootstrap_samples: Count = left_out()


class ScoreDetails(RecordPart):
    """A metric's value, in its own unit."""

    score: float
    details: Details
    uncertainty: Uncertainty


class GenerationArguments(RecordPart):
    """How answers were made, as far as the run tells."""

    temperature: float = left_out()
    max_tokens: Annotated[int, Field(ge=1)] = left_out()
    execution_command: str = left_out()


class GenerationDetails(RecordPart):
    """How answers were made, and what the user said of it in words of lmms-eval."""

    generation_args: GenerationArguments
    additional_details: Details = left_out()


class Result(RecordPart):
    """One metric of one task.

    Raises:
        ValueError: If the score lies outside the metric's range.
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
    """Where the records of documents lie, and what tells that they are those."""

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
        """As its file holds it."""
        return json.dumps(self.content(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# --- One document ----------------------------------------------------------------------------------------------------


class Input(RecordPart):
    """What was asked, what the model saw of it as text if that is known, and what is right."""

    raw: str
    formatted: str | None
    reference: Texts


class Output(RecordPart):
    """What the model answered."""

    raw: Texts


class Attribution(RecordPart):
    """What was taken from the answer, and how."""

    turn_idx: Count
    source: str
    extracted_value: str
    extraction_method: str
    is_terminal: bool


class Evaluation(RecordPart):
    """What the answer is worth."""

    score: float
    is_correct: bool


class DocumentRecord(RecordPart):
    """A document with its answer, of one turn: so there is an output, and there are no messages."""

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
    """A record from what its JSON holds.

    Args:
        kind: What it must be.
        content: As parsed.
        where: How the record is called if it is refused.

    Raises:
        ValueError: If it is not valid; says where it is not, in one line.
    """
    with refused(where, kind):
        return kind.model_validate(content)


@contextmanager
def refused(where: object, kind: type[RecordPart] | None = None) -> Iterator[None]:
    """Refusals of pydantic, which take several lines, in one.

    Args:
        where: How the record is called.
        kind: What it must be, where that is one.

    Raises:
        ValueError: If there was one; names the record, the field, what it should be and what it is.
    """
    try:
        yield
    except ValidationError as error:
        told = Problem.of(error, kind).text
        raise ValueError(f"{where} is not valid in Every Eval Ever {VERSION}: {told}") from error
