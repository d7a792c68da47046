"""Answers of one task as columns: question, score and confidence of each document."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lmms_plugin.confidence.estimators import obtaining
from lmms_plugin.metrics.selective import REPORTED

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Texts = npt.NDArray[np.str_]

STRICTER = (0.75, 0.9)
"""IoU thresholds of further accuracies, above the one from which an answer counts as right."""


class TaskKind(NamedTuple):
    """A kind of task, defined by its records.

    Attributes:
        record: Key of the samples log that holds the whole record.
        score: Key of the record with its score, in [0, 1].
        estimator: Default confidence estimator.
        right: Score from which an answer counts as right; None where the score itself is the (soft) outcome.
        outcome: Key of the record with the outcome that confidence is to predict, 1 or 0; None where that is the score.
    """

    record: str
    score: str
    estimator: str
    right: float | None
    outcome: str | None = None

    def named(self, metric: str) -> str:
        """Return the metric's name in lmms-eval's table: `acc@0.5` where a threshold decides what is right."""
        if self.outcome is not None:
            return f"rejection_{metric}" if metric in ("auroc", "fpr@0.95") else metric
        return f"acc@{self.right:g}" if metric == "accuracy" and self.right is not None else metric


GROUNDING = TaskKind("mean_iou", "score", "coordinate_mean", 0.5)
VQA = TaskKind("accuracy", "accuracy", "joint", None)
REJECTION = TaskKind("box_rate", "score", "coordinate_mean", None, outcome="matches")
"""Rejection: some expressions match something and others match nothing; confidence is to separate them."""
KINDS = (GROUNDING, VQA, REJECTION)


SHIFTED = ("image", "language", "image and language", "geometry")
"""What a shift can change; means over shifts are taken separately for each. Geometry: shape and frame of the image."""
CLEAN, SHIFTED_IMAGES = "clean", "shifted"


class EvaluationSet(NamedTuple):
    """Evaluation set of a task; tasks that differ only in shift and severity ask about the same documents.

    Attributes:
        dataset: Name of the dataset in the task's configuration.
        split: Split of the dataset.
        shift: Name of the corruption, of the language shift, or of both; None for neither.
        severity: Severity of the shift; None without a shift.
        shifts: Shifted input, one of `SHIFTED`; `image` also without a shift.
    """

    dataset: str
    split: str
    shift: str | None
    severity: int | None
    shifts: str = "image"

    @property
    def condition(self) -> str:
        """Group of tasks on the same documents that a mean is taken over: `clean`, or what is shifted."""
        if self.shift is None:
            return CLEAN
        return SHIFTED_IMAGES if self.shifts == SHIFTED[0] else f"shifted {self.shifts}"


_SHIFT_KEYS = (("shift", "severity"), ("text_shift", "text_severity"))


@dataclass(frozen=True, eq=False)
class TaskRecords:
    """The n answers of one task, sorted by document id. Arrays have shape (n,) unless stated otherwise.

    Attributes:
        task: Name of the task.
        kind: Kind of its records.
        place: Evaluation set of the task.
        ids: Document ids, unique.
        numbers: Numbers of the documents in lmms-eval; -1 where not logged.
        image: Index of each document's image in `names`.
        names: Names of the images, sorted, shape (images,): the clusters of every interval.
        questions: Questions, texts or null.
        truths: True answers: boxes, texts or lists of texts.
        parts: Part of the split each document belongs to; "" where the task has no split of its own.
        score: IoU with the true box (0 without a box), VQA accuracy, or whether there was a box, in [0, 1].
        parsed: Whether the answer held a box; for tasks without boxes, whether there was an answer at all.
        confidence: Estimator → confidences in [0, 1], NaN where there was nothing to estimate from. Empty for a model
            without probabilities.
        matches: Whether the expression matches something in its image, 1 or 0; None where all do.
        pairs: Id of the true expression that a document belongs to; None where documents are not paired.
        strata: Stratum of each document, by which a metric ends (`distractors_2-3`), "" where it is unknown; None where
            the log has none.
    """

    task: str
    kind: TaskKind
    place: EvaluationSet
    ids: Texts
    numbers: npt.NDArray[np.int64]
    image: npt.NDArray[np.int32]
    names: Texts
    questions: pa.Array
    truths: pa.Array
    parts: Texts
    score: Floats
    parsed: Bools
    confidence: Mapping[str, Floats]
    matches: Floats | None = None
    pairs: Texts | None = None
    strata: Texts | None = None

    @property
    def outcome(self) -> Floats:
        """Outcomes that confidence is to predict, shape (n,): 1 if right or matching, 0 if not, or the soft score."""
        if self.matches is not None:
            return self.matches
        return self.score if self.kind.right is None else (self.score >= self.kind.right).astype(np.float64)

    @cached_property
    def images(self) -> Texts:
        """Name of each document's image, shape (n,)."""
        return self.names[self.image]

    @cached_property
    def asked(self) -> Texts:
        """Question and true answer as text, by which runs are compared, shape (n,)."""
        both = zip(self.questions.to_pylist(), self.truths.to_pylist(), strict=True)
        return np.array([json.dumps(pair) for pair in both], np.str_)

    @cached_property
    def documents(self) -> str:
        """Fingerprint of ids, images, questions and true answers: equal for runs on the same documents."""
        return fingerprint(self.ids, self.images, self.questions, self.truths)

    @cached_property
    def reported(self) -> Bools:
        """Mask of the records that results are reported on, shape (n,): all, unless the task has a split of its own."""
        if np.any(self.parts != ""):
            return np.equal(self.parts, REPORTED)
        return np.ones(self.parts.size, np.bool_)

    def only(self, keep: Bools) -> "TaskRecords":
        """Return the records of a mask of shape (n,)."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "names"}
        kept: dict[str, Any] = {name: array[keep] for name, array in arrays.items() if isinstance(array, np.ndarray)}
        kept |= {name: array.filter(pa.array(keep)) for name, array in arrays.items() if isinstance(array, pa.Array)}
        return replace(self, **kept, confidence={name: values[keep] for name, values in self.confidence.items()})

    def confidence_by(self, estimator: str | None) -> Floats:
        """Return confidences of one estimator, shape (n,), NaN where missing; None for the default of the kind of task.

        Raises:
            ValueError: The log does not hold this estimator; if it holds none at all, all are NaN.
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


def is_record(value: Any, kind: TaskKind) -> TypeGuard[dict[str, Any]]:
    """Return whether a value of a log is a record of that kind."""
    keys = {"id", "image", kind.score} | ({kind.outcome} if kind.outcome else set())
    return isinstance(value, dict) and keys <= set(value)


def place_of(config: Mapping[str, Any]) -> EvaluationSet:
    """Return the evaluation set of a task, by its configuration in a results file."""
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise ValueError(f"expected a mapping as metadata of a task, got {metadata!r:.80}")
    # Local copies of all datasets are loaded as "parquet".
    dataset = metadata.get("dataset") or config.get("dataset_path")
    place = str(dataset), str(config.get("test_split"))
    kinds = [_shift(metadata, key, of) for key, of in _SHIFT_KEYS if metadata.get(key) is not None]
    if not kinds:
        return EvaluationSet(*place, None, None)
    name, severity = "_and_".join(name for name, _ in kinds), kinds[0][1]
    if severity != kinds[-1][1]:
        name += f"_{kinds[-1][1]}"
    which = SHIFTED[2] if len(kinds) == 2 else SHIFTED["text_shift" in metadata]
    if metadata.get("shifted") == SHIFTED[3]:
        which = SHIFTED[3]
    return EvaluationSet(*place, name, severity, which)


def _shift(metadata: Mapping[str, Any], key: str, of: str) -> tuple[str, int]:
    name, severity = metadata[key], metadata.get(of)
    if not isinstance(name, str) or not isinstance(severity, int):
        raise ValueError(f"expected a name as {key} and a whole number as {of}, got {name!r:.80} and {severity!r:.80}")
    return name, severity


def match(first: TaskRecords, second: TaskRecords) -> None:
    """Check that two runs answered the same documents.

    Raises:
        ValueError: They did not; says what differs.
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


def fingerprint(ids: Texts, images: Texts, questions: pa.Array, truths: pa.Array) -> str:
    """Return the fingerprint of documents by their ids, images, questions and true answers, each of shape (n,)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (_lines(ids), _lines(images), _joined(questions), _truths(truths)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def coded(images: Texts) -> tuple[npt.NDArray[np.int32], Texts]:
    """Return the index of each image among the sorted names, and the names."""
    names, index = np.unique(images, return_inverse=True)
    return index.astype(np.int32), names


def _lines(texts: Texts) -> bytes:
    return "\n".join(texts.tolist()).encode("utf-8", "surrogatepass")


def _truths(column: pa.Array) -> bytes:
    """Serialise the true answers, boxes or texts, one after the other."""
    values = column.flatten() if pa.types.is_list(column.type) else column
    if pa.types.is_floating(values.type) or pa.types.is_integer(values.type):
        return np.asarray(values.to_numpy(zero_copy_only=False), np.float64).tobytes()
    return _joined(values)


def _joined(texts: pa.Array) -> bytes:
    array = pc.fill_null(texts.cast(pa.string()), "")
    whole = pa.ListArray.from_arrays(pa.array([0, len(array)], pa.int32()), array)
    return bytes(pc.binary_join(whole, "\n")[0].as_buffer())
