"""Referring-expression comprehension as lmms-eval functions: document → messages, answer → record → metric.

One document is one expression (`lmms_plugin.tasks.grounding.expressions`). Boxes are xyxy fractions of the original
image. A task's YAML names these functions; its shift and severity are data, in `lmms_eval_specific_kwargs`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from loguru import logger
from PIL import Image

from lmms_plugin.confidence.agreement import Agreement
from lmms_plugin.confidence.departure import departure
from lmms_plugin.confidence.digits import AnsweredBox, numbers_of
from lmms_plugin.confidence.estimators import (
    LEARNED,
    NEEDS,
    Evidence,
    coordinate_mask,
    estimate_all,
    leading_mask,
    obtaining,
    place_values,
)
from lmms_plugin.protocol.boxes import Box, iou
from lmms_plugin.protocol.dialects import DIALECTS, Dialect, Parsed
from lmms_plugin.protocol.reasoning import REMEDY
from lmms_plugin.protocol.response import Response
from lmms_plugin.protocol.verbalised import stated_confidence
from lmms_plugin.shifts.image import corruptions, moving
from lmms_plugin.tasks.grounding.aggregations import BESIDE, CALIBRATION, FlipOutcome, GroundingOutcome
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.sources.recent import Recent
from lmms_plugin.utils.images import to_rgb, told_apart

Record = Mapping[str, Any]
GENERIC = DIALECTS["fractions"]
IOU_THRESHOLDS = (0.5, 0.75, 0.9)
RIGHT = IOU_THRESHOLDS[0]
PREDICTS = "box_shift"
"""Measure of distance by which flips are predicted; answers of the reference without a box have none."""
IN_STRATUM = ("acc@0.5", "ece")
"""Metrics that are also computed by the number of distractors, where it is known, as `ece_distractors_2-3`."""
# All expressions of an image use it under the same shift.
_SHIFTED: Recent[Image.Image] = Recent(8)


def process_docs(rows: Dataset) -> ExpressionDocs:
    """Return one document per expression of RefCOCO+-shaped rows; see `ExpressionDocs` for columns and errors."""
    return ExpressionDocs(rows)


def doc_to_visual(doc: Mapping[str, Any], task: Mapping[str, Any] | None = None) -> list[Image.Image]:
    """Return the document's image under the task's shift, as RGB; on the original canvas unless the shift moves boxes.

    Raises:
        ValueError: The shift moves boxes, and the document has them where they were; or the other way round.
    """
    name, moved_by = (task or {}).get("shift"), doc.get("moved_by")
    moves = name in moving.MOVING
    if moved_by is not None and not moves:
        raise ValueError(
            f"the document's box was moved by {moved_by[0]} at severity {moved_by[1]}, its picture would not be: got "
            f"shift: {name}; give the task's metadata the shift and severity of its process_docs"
        )
    if name is None:
        return [to_rgb(doc["image"])]
    image, severity, key = doc["image"], int((task or {})["severity"]), doc["image_id"]
    if moves and moved_by != [name, severity]:
        raise ValueError(
            f"{name} at severity {severity} moves boxes: expected documents whose boxes it moved, got moved_by: "
            f"{moved_by}; set process_docs to lmms_plugin.tasks.grounding.moving_shifts.Moved, as the "
            f"generated tasks ending in {name}_{severity} do"
        )
    known_by = (told_apart(image), key, name, severity)
    shifted = moving.apply if moves else corruptions.apply
    return [_SHIFTED.get(known_by, lambda: shifted(image, name, severity, key=key))]


def doc_to_text(doc: Mapping[str, Any], task: Mapping[str, Any] | None = None) -> str:
    """Return the question in words any model can answer: a box in fractions of the image."""
    return GENERIC.ask(doc["expression"])


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """Return the true box, written as the generic question asks for it."""
    return GENERIC.write(true_box(doc))


def doc_to_messages(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return one user turn: image and question.

    The extra key `grounding` tells a model of this package to ask in its own dialect and to return log-probabilities
    with the answer, and for digit tokens also those of the other digits. Other models never see it and get the generic
    question.
    """
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "url": doc_to_visual(doc, lmms_eval_specific_kwargs)[0]},
                {"type": "text", "text": doc_to_text(doc)},
            ],
            "grounding": {
                "expression": doc["expression"],
                "original_size": [doc["width"], doc["height"]],
                "digits": True,
            },
        }
    ]


def true_box(doc: Mapping[str, Any]) -> Box:
    """Return the annotated box as xyxy fractions of the original image, clipped to it."""
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
        doc: Document of `ExpressionDocs`.
        results: Model's answer, with or without the trailer of `lmms_plugin.protocol.response`.
        estimator: Confidence estimator whose value the calibration metrics use.

    Returns:
        One entry per metric. The entry of `mean_iou` is the whole record, which thereby reaches the log of samples (a
        key that is no metric would be an empty list in the table). Reasoning is not part of the answer. An answer
        without a box has IoU 0 and counts in `parse_rate`; so does one that ends inside its reasoning, which also
        counts in `unfinished_rate` and has no confidence, and one whose box is none because its numbers are in another
        scale, which also counts in `other_scale_rate`. Without a trailer (a model of another package) there are no
        probabilities, and the calibration metrics are absent, not zero. An answer for which the estimator has no value
        is left out of them and counts in `confidence_rate`. Estimators that need more than log-probabilities (`NEEDS`,
        `LEARNED`), and the distance from a reference, have metrics of their own; some are repeated for the stratum.

    Raises:
        ValueError: The model returns log-probabilities, but not what `estimator` needs; says how to obtain it.
    """
    response = Response.decode(results[0])
    dialect = DIALECTS[response.dialect] if response.dialect else GENERIC
    size = (doc["width"], doc["height"])
    parsed = dialect.parse(response.text, original_size=size, model_size=response.model_size, opened=response.opened)
    target = true_box(doc)
    overlap = iou(parsed.box, target) if parsed.box else 0.0
    identity = {"image": doc["image_id"], "id": doc["expression_id"]}
    scores = {f"acc@{t:g}": float(overlap >= t) for t in IOU_THRESHOLDS} | _counted(parsed, response)
    record: dict[str, Any] = {
        **identity,
        "score": overlap,
        "expression": doc["expression"],
        "answer": response.parts.said_text,
        "box": list(parsed.box) if parsed.box else None,
        "target": list(target),
        "boxes": parsed.count,
        **reasoned(response),
    }
    output: dict[str, Any] = {name: {"score": value, **identity} for name, value in scores.items()}
    output["mean_iou"] = record
    if response.tokens:
        evidence = _evidence(response, parsed, dialect, size)
        record["confidence"] = logged(estimate_all(evidence) | dict(response.confidence), response)
        record |= _gathered(response, evidence)
        outcome = GroundingOutcome(doc["expression_id"], None, scores["acc@0.5"], overlap)
        output |= _of_confidence(record["confidence"], estimator, outcome)
        for name, value in _rates(response, evidence, of(estimator, record["confidence"])).items():
            output[name] = {"score": value, **identity}
    return _with_stratum(output | _of_reference(response, dialect, size, record), doc.get("stratum"))


def _of_reference(
    response: Response, dialect: Dialect, size: tuple[int, int], record: dict[str, Any]
) -> dict[str, Any]:
    """Record the distance from a reference, and return the entries of its metrics; empty without one."""
    if response.forced is None:
        return {}
    record["reference"] = apart = _departed(response, dialect, size, Box(*record["target"]))
    identity = {name: record[name] for name in ("image", "id")}
    found: dict[str, Any] = {name: {"score": value, **identity} for name, value in apart.items() if name != "score"}
    return found | flips_entry(record["id"], apart.get(PREDICTS), apart["score"] >= RIGHT, record["score"] >= RIGHT)


def _departed(response: Response, dialect: Dialect, size: tuple[int, int], target: Box) -> dict[str, float]:
    """Return how far the model is from its reference at the reference's answer, and as `score` the IoU of that."""
    reference, _ = response.of_reference
    sizes: dict[str, Any] = {"original_size": size, "model_size": response.model_size}
    parsed = dialect.parse(reference.text, opened=reference.opened, **sizes)
    if parsed.box is None:
        return {"score": 0.0, **departure(response)}
    read = partial(dialect.boxes, **sizes)
    return {"score": iou(parsed.box, target), **departure(response, parsed.coordinates, read, dialect.largest)}


def flips_entry(identity: str, distance: float | None, was: bool, now: bool) -> dict[str, FlipOutcome]:
    """Return the entry of `flips_predicted`; empty without a distance.

    Args:
        identity: Id of the document.
        distance: Distance from the reference that is to predict flips; None where the answer has none.
        was: Whether the reference's answer is right.
        now: Whether the model's answer is right.
    """
    return {} if distance is None else {"flips_predicted": FlipOutcome(identity, distance, float(was != now))}


def _with_stratum(output: dict[str, Any], stratum: str | None) -> dict[str, Any]:
    """Return the entries of metrics with those of the document's stratum, if it is in one."""
    if not stratum:
        return output
    output["mean_iou"]["stratum"] = stratum
    return output | {f"{name}_{stratum}": output[name] for name in IN_STRATUM if name in output}


def _of_confidence(
    confidences: Mapping[str, float | None], estimator: str, outcome: GroundingOutcome
) -> dict[str, GroundingOutcome]:
    """Return the entries of metrics of confidence: by the task's estimator, and by those that need more evidence."""
    found = dict.fromkeys(CALIBRATION, outcome._replace(confidence=of(estimator, confidences)))
    for beside in confidences.keys() & {*LEARNED, *NEEDS}:
        found |= dict.fromkeys(
            [f"{name}_{beside}" for name in BESIDE], outcome._replace(confidence=confidences[beside])
        )
    return found


def _counted(parsed: Parsed, response: Response) -> dict[str, float]:
    """Return whether there is a box, how many there are, in what scale, and whether the reasoning has no end."""
    found = {"parse_rate": float(parsed.box is not None), "boxes_per_answer": float(parsed.count)}
    found["other_scale_rate"] = float(parsed.other_scale)
    return found | {"unfinished_rate": float(not response.parts.finished)}


def _rates(response: Response, evidence: Evidence, confidence: float | None) -> dict[str, float]:
    """Return whether there is a confidence, how many samples hold a box, and whether a statement could be read."""
    found = {"confidence_rate": float(confidence is not None)}
    if evidence.agreement is not None and response.samples:
        found["sample_parse_rate"] = evidence.agreement.usable / len(response.samples)
    if evidence.stated is not None:
        found["verbalised_rate"] = float(not math.isnan(evidence.stated))
    return found


def _evidence(response: Response, parsed: Parsed, dialect: Dialect, size: tuple[int, int]) -> Evidence:
    tokens, start = response.spoken
    texts = [token.text for token in tokens]
    coordinates = [(first - start, last - start) for first, last in parsed.coordinates]
    sizes = {"original_size": size, "model_size": response.model_size}
    return Evidence(
        logprobs=[token.logprob for token in tokens],
        selected=coordinate_mask(texts, coordinates),
        place_value=place_values(texts, coordinates),
        leading=leading_mask(texts, coordinates),
        digits=_answered_box(response, parsed, dialect, sizes) if response.records_digits else None,
        agreement=_agreement(response, parsed.box, dialect, sizes),
        stated=None if response.stated is None else stated_confidence(response.stated),
    )


def _answered_box(response: Response, parsed: Parsed, dialect: Dialect, sizes: Mapping[str, Any]) -> AnsweredBox:
    found = numbers_of(response.tokens, parsed.coordinates, dialect.largest) if parsed.box else None
    return AnsweredBox(found or (), partial(dialect.boxes, **sizes))


def _agreement(response: Response, box: Box | None, dialect: Dialect, sizes: Mapping[str, Any]) -> Agreement | None:
    if response.samples is None:
        return None
    boxes = [dialect.parse(sample, opened=response.opened, **sizes).box for sample in response.samples]
    return Agreement.of_boxes(box, boxes)


def reasoned(response: Response) -> dict[str, str]:
    """Return an answer's reasoning for its record; empty without reasoning."""
    return {"reasoning": response.parts.reasoning_text} if response.parts.reasoned else {}


def _gathered(response: Response, evidence: Evidence) -> dict[str, Any]:
    """Return the evidence beyond log-probabilities, for the log of samples."""
    gathered: dict[str, Any] = {}
    if evidence.agreement is not None and response.samples is not None:
        gathered["samples"] = {"asked": len(response.samples), "usable": evidence.agreement.usable}
    if response.statement is not None:
        gathered["statement"] = response.statement
    return gathered


def logged(estimates: Mapping[str, float], response: Response) -> dict[str, float | None]:
    """Return estimates for the log of samples: None for a missing one, and for an empty answer."""
    missing = not response.parts.finished
    return {name: None if missing or math.isnan(value) else value for name, value in estimates.items()}


def of(estimator: str, confidences: Mapping[str, float | None]) -> float | None:
    """Return one answer's confidence by one estimator; None where that has no value.

    Raises:
        ValueError: The model returned no evidence for the estimator; says how to obtain it.
    """
    if estimator not in confidences:
        raise ValueError(
            f"expected the model to bring what the estimator {estimator!r} needs{obtaining(estimator)}, got evidence"
            f" for {', '.join(confidences)}"
        )
    return confidences[estimator]


def mean(records: Sequence[Record]) -> float:
    """Return the mean score, exactly rounded, so that it does not depend on the order of the records."""
    return math.fsum(record["score"] for record in records) / len(records)


def unfinished(records: Sequence[Record]) -> float:
    """Return the share of answers that end inside their reasoning; above 0, warn and name the remedy."""
    share = mean(records)
    if share > 0.0:
        logger.warning("{:.1%} of {} answers end inside their reasoning, {}", share, len(records), REMEDY)
    return share


ece, ace, brier, auroc, aurc = (CALIBRATION[name] for name in ("ece", "ace", "brier", "auroc", "aurc"))
