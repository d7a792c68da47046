"""Scores of the naturally shifted datasets: those of `grounding` and `rejection`, and the benchmarks' own metrics.

`scored` adds a document's tags to its record; `clicked` adds click accuracy; `judged` scores documents with and
without a target by rejection.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lmms_plugin.protocol.boxes import Box
from lmms_plugin.tasks.grounding import comprehension, rejection

NO_TARGET = "none"
# Far above the rounding error of a fraction, far below a pixel of any image.
_ROUNDING = 1e-9


def scored(doc: Mapping[str, Any], results: Sequence[str], estimator: str) -> dict[str, Any]:
    """Score as `grounding.process_results`, with the document's tags in the record."""
    output = comprehension.process_results(doc, results, estimator)
    output["mean_iou"]["tags"] = doc["tags"]
    return output


def clicked(doc: Mapping[str, Any], results: Sequence[str], estimator: str) -> dict[str, Any]:
    """Score as `scored`, and add `click_acc`: whether the centre of the predicted box is inside the true one.

    An answer without a box counts as a miss. The metric is ScreenSpot's (arXiv 2401.10935), for models that answer with
    a box.
    """
    output = scored(doc, results, estimator)
    record = output["mean_iou"]
    hit = record["box"] is not None and holds(Box(*record["target"]), centre(Box(*record["box"])))
    output["click_acc"] = {"score": float(hit), "image": record["image"], "id": record["id"]}
    return output


def centre(box: Box) -> tuple[float, float]:
    """Return the centre of a box, in its own frame."""
    return (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2


def holds(box: Box, point: tuple[float, float]) -> bool:
    """Return whether a point of the same frame is in a box or, within the rounding of fractions, on its edge."""
    x, y = point
    return box.x1 - _ROUNDING <= x <= box.x2 + _ROUNDING and box.y1 - _ROUNDING <= y <= box.y2 + _ROUNDING


def judged(doc: Mapping[str, Any], results: Sequence[str], estimator: str) -> dict[str, Any]:
    """Score as `rejection.process_results`, over documents with and without a target.

    They are not pairs: metrics that compare the two sides of a pair, or count changed expressions, are left out.
    """
    output = rejection.process_results(_as_asked(doc), results, estimator)
    record = output["box_rate"]
    record["tags"] = doc["tags"]
    for name in ("shifted_rate", "confidence_falls"):
        output.pop(name, None)
    if "box_rate_changed" in output:
        output["box_rate_no_target"] = output.pop("box_rate_changed")
    return output


def target(doc: Mapping[str, Any]) -> str:
    """Return the true box, written as the generic question asks for it; `none` without a target."""
    return NO_TARGET if doc["bbox"] is None else comprehension.doc_to_target(doc)


def _as_asked(doc: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document as `rejection` reads it, which ignores the box of one without a target."""
    return {
        **doc,
        "bbox": doc["bbox"] or [0.0, 0.0, float(doc["width"]), float(doc["height"])],
        "pair": doc["expression_id"],
        "matches": doc["bbox"] is not None,
        "original_expression": doc["expression"],
        "shifted_rate": 1.0,
    }


# Functions for a task's YAML.
scored_by_coordinate_mean = partial(scored, estimator="coordinate_mean")
clicked_by_coordinate_mean = partial(clicked, estimator="coordinate_mean")
judged_by_coordinate_mean = partial(judged, estimator="coordinate_mean")
