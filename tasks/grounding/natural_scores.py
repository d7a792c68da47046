"""Scores of the naturally shifted datasets: what `grounding` and `rejection` measure, and the benchmarks' own metrics.

`scored` adds a document's tags to its record; `clicked` adds click accuracy; `judged` scores documents with and
without a target by rejection.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lmms_plugin.protocol.boxes import Box
from lmms_plugin.tasks.grounding import comprehension, rejection

NO_TARGET = "none"
# Far above what rounding moves a fraction by, far below a pixel of any image.
_ROUNDING = 1e-9


def scored(doc: Mapping[str, Any], results: Sequence[str], estimator: str) -> dict[str, Any]:
    """As `grounding.process_results`, with the document's tags in the record."""
    output = comprehension.process_results(doc, results, estimator)
    output["mean_iou"]["tags"] = doc["tags"]
    return output


def clicked(doc: Mapping[str, Any], results: Sequence[str], estimator: str) -> dict[str, Any]:
    """As `scored`, and `click_acc`: is the centre of the answered box inside the true one? Without a box it is not.

    ScreenSpot's own metric (arXiv 2401.10935), for models that answer with a box.
    """
    output = scored(doc, results, estimator)
    record = output["mean_iou"]
    hit = record["box"] is not None and holds(Box(*record["target"]), centre(Box(*record["box"])))
    output["click_acc"] = {"score": float(hit), "image": record["image"], "id": record["id"]}
    return output


def centre(box: Box) -> tuple[float, float]:
    """The middle of a box, in its own frame."""
    return (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2


def holds(box: Box, point: tuple[float, float]) -> bool:
    """Whether a point of the same frame lies in a box or, within the rounding of fractions, on its edge."""
    x, y = point
    return box.x1 - _ROUNDING <= x <= box.x2 + _ROUNDING and box.y1 - _ROUNDING <= y <= box.y2 + _ROUNDING


def judged(doc: Mapping[str, Any], results: Sequence[str], estimator: str) -> dict[str, Any]:
    """As `rejection.process_results`, over documents with a target and documents without one.

    They are not pairs: what compares the two sides of a pair, or counts changed expressions, is left out.
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
    """The true box, written as the generic question asks for it; `none` where there is no target."""
    return NO_TARGET if doc["bbox"] is None else comprehension.doc_to_target(doc)


def _as_asked(doc: Mapping[str, Any]) -> dict[str, Any]:
    """A document as `rejection` reads it; the box of one without a target is never looked at there."""
    return {
        **doc,
        "bbox": doc["bbox"] or [0.0, 0.0, float(doc["width"]), float(doc["height"])],
        "pair": doc["expression_id"],
        "matches": doc["bbox"] is not None,
        "original_expression": doc["expression"],
        "shifted_rate": 1.0,
    }


# For a task's YAML to name.
scored_by_coordinate_mean = partial(scored, estimator="coordinate_mean")
clicked_by_coordinate_mean = partial(clicked, estimator="coordinate_mean")
judged_by_coordinate_mean = partial(judged, estimator="coordinate_mean")
