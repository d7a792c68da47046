"""Referring-expression comprehension as lmms-eval functions: document → messages, answer → record → metric.

One document is one expression (`lmms_plugin.tasks.expressions`). Boxes are xyxy fractions of the original image. A
task's YAML names these functions; its shift and severity are data, in `lmms_eval_specific_kwargs`.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from lmms_plugin import metrics
from lmms_plugin.boxes import Box, iou
from lmms_plugin.confidence import coordinate_mask, estimate_all, place_values
from lmms_plugin.dialects import DIALECTS
from lmms_plugin.response import Response
from lmms_plugin.tasks import shifts
from lmms_plugin.tasks.expressions import ExpressionDocs
from lmms_plugin.tasks.recent import Recent

Record = Mapping[str, Any]
GENERIC = DIALECTS["fractions"]
IOU_THRESHOLDS = (0.5, 0.75, 0.9)
# Every expression about an image asks for it under the same shift.
_SHIFTED: Recent[Image.Image] = Recent(8)


def process_docs(rows: Dataset) -> ExpressionDocs:
    """One document per expression of RefCOCO+-shaped rows; see `ExpressionDocs` for columns and errors."""
    return ExpressionDocs(rows)


def doc_to_visual(doc: Mapping[str, Any], task: Mapping[str, Any] | None = None) -> list[Image.Image]:
    """The document's image under the task's shift, as RGB on the original canvas."""
    name = (task or {}).get("shift")
    if name is None:
        return [shifts.to_rgb(doc["image"])]
    image, severity, key = doc["image"], int((task or {})["severity"]), doc["image_id"]
    content = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
    known_by = (content, image.mode, image.size, key, name, severity)
    return [_SHIFTED.get(known_by, lambda: shifts.apply(image, name, severity, key=key))]


def doc_to_text(doc: Mapping[str, Any], task: Mapping[str, Any] | None = None) -> str:
    """The question in words any model can answer: a box in fractions of the image."""
    return GENERIC.ask(doc["expression"])


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """The true box, written as the generic question asks for it."""
    return GENERIC.write(true_box(doc))


def doc_to_messages(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One user turn: image and question.

    The extra key `grounding` tells a model of this package to ask in its own dialect and to return log-probabilities
    with the answer; any other model never sees it and gets the generic question.
    """
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "url": doc_to_visual(doc, lmms_eval_specific_kwargs)[0]},
                {"type": "text", "text": doc_to_text(doc)},
            ],
            "grounding": {"expression": doc["expression"], "original_size": [doc["width"], doc["height"]]},
        }
    ]


def true_box(doc: Mapping[str, Any]) -> Box:
    """The annotated box as xyxy fractions of the original image, clipped to it."""
    x, y, width, height = doc["bbox"]
    return Box(
        max(x / doc["width"], 0.0),
        max(y / doc["height"], 0.0),
        min((x + width) / doc["width"], 1.0),
        min((y + height) / doc["height"], 1.0),
    )


def process_results(doc: Mapping[str, Any], results: Sequence[str], estimator: str) -> dict[str, Any]:
    """Score one answer; the first box counts, and its reading never depends on the true box.

    Args:
        doc: a document of `ExpressionDocs`.
        results: the model's answer, with or without the trailer of `lmms_plugin.response`.
        estimator: the confidence estimator whose value the calibration metrics use.

    Returns:
        One entry per metric; that of `mean_iou` is the whole record, which so reaches the log of samples (a key that is
        no metric would stand in lmms-eval's results table as an empty list). An answer without a box has IoU 0 and
        shows in `parse_rate`. Without a trailer (a model of another package) there are no probabilities, and the
        calibration metrics are absent, not zero. An answer for which the estimator has no value (coordinates, where
        there are none) is left out of them and shows in `confidence_rate`.
    """
    response = Response.decode(results[0])
    dialect = DIALECTS[response.dialect] if response.dialect else GENERIC
    size = (doc["width"], doc["height"])
    parsed = dialect.parse(response.text, original_size=size, model_size=response.model_size)
    target = true_box(doc)
    overlap = iou(parsed.box, target) if parsed.box else 0.0
    identity = {"image": doc["image_id"], "id": doc["expression_id"]}
    scores = {f"acc@{t:g}": float(overlap >= t) for t in IOU_THRESHOLDS}
    scores |= {"parse_rate": float(parsed.box is not None), "boxes_per_answer": float(parsed.count)}
    record: dict[str, Any] = {
        **identity,
        "score": overlap,
        "expression": doc["expression"],
        "answer": response.text,
        "box": list(parsed.box) if parsed.box else None,
        "target": list(target),
        "boxes": parsed.count,
    }
    output: dict[str, Any] = {name: {"score": value, **identity} for name, value in scores.items()}
    output["mean_iou"] = record
    if response.tokens:
        record["confidence"] = _confidences(response, parsed.coordinates)
        confidence = record["confidence"][estimator]
        output["confidence_rate"] = {"score": float(confidence is not None), **identity}
        calibrated = {"confidence": confidence, "correct": scores["acc@0.5"], **identity}
        output |= {name: calibrated for name in CALIBRATION}
    return output


def _confidences(response: Response, coordinates: Sequence[tuple[int, int]]) -> dict[str, float | None]:
    texts = [token.text for token in response.tokens]
    logprobs = np.array([token.logprob for token in response.tokens])
    estimates = estimate_all(logprobs, coordinate_mask(texts, coordinates), place_values(texts, coordinates))
    return {name: None if math.isnan(value) else value for name, value in estimates.items()}


def mean(records: Sequence[Record]) -> float:
    """Mean score. Exactly rounded, so that it does not depend on the order processes deliver records in."""
    return math.fsum(record["score"] for record in records) / len(records)


def _over_records(metric: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Sequence[Record]], float]:
    def aggregate(records: Sequence[Record]) -> float:
        # Processes deliver records in their own order; sums of floats must not depend on it.
        ordered = sorted((r for r in records if r["confidence"] is not None), key=lambda record: record["id"])
        if not ordered:
            # Shown as nan, so that a group's mean says that a part of it is missing.
            return math.nan
        confidence = np.array([record["confidence"] for record in ordered])
        correct = np.array([record["correct"] for record in ordered])
        return metric(confidence, correct)

    return aggregate


ece = _over_records(metrics.ece)
ace = _over_records(metrics.adaptive_ece)
brier = _over_records(metrics.brier)
auroc = _over_records(metrics.auroc)
CALIBRATION = ("ece", "ace", "brier", "auroc")
