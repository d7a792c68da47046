"""Documents about pictures that a shift moved, and their scoring in the moved picture's own frame.

A document is that of its dataset with `width`, `height` and `bbox` of the moved picture, with an `expression` that is
true of it, and with `annotated`, the box where it was annotated, in fractions of the picture as it was. Documents whose
expression cannot be kept true, and those whose target leaves the picture, are not asked; `shifted_rate` is the share of
those that are.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from loguru import logger

from lmms_plugin.protocol.boxes import Box, iou
from lmms_plugin.shifts.image import moving
from lmms_plugin.shifts.image.movements import Corners, Movement
from lmms_plugin.shifts.language.directions import RULES
from lmms_plugin.tasks.grounding import comprehension, reworded
from lmms_plugin.tasks.grounding.reworded import PickedExpression, RewordedDocs
from lmms_plugin.tasks.sources.documents import Documents
from lmms_plugin.utils.copies import DatasetError


class MovedDocs(RewordedDocs):
    """Documents of a dataset in the frames of their moved pictures.

    Args:
        source: Documents of the dataset.
        name: Name of the shift, a key of `lmms_plugin.shifts.image.moving.MOVING`.
        severity: Severity, 1 to 5.

    Raises:
        DatasetError: No document is left; here or on access, a picture is too long to be moved.
    """

    def __init__(self, source: Documents, name: str, severity: int) -> None:
        self._shift, self._severity = moving.MOVING[name], severity
        picks, unclear, gone = [], 0, 0
        for i in range(len(source)):
            doc = source.content(i)
            expression = RULES[self._shift.words](doc["expression"])
            if expression is None:
                unclear += 1
            elif not self._stays(doc):
                gone += 1
            else:
                picks.append(PickedExpression(i, {"expression": expression}))
        super().__init__(source, picks, len(source), f"{name} at severity {severity}")
        if unclear or gone:
            told = "{} at severity {}: {} of {} expressions are not asked: {} may not be true of the moved picture, {}"
            left = " have less than {:.0%} of their target in it"
            logger.info(told + left, name, severity, unclear + gone, len(source), unclear, gone, self._shift.visible)

    def content(self, i: int) -> dict[str, Any]:
        """Return a document without its image."""
        doc = super().content(i)
        movement = self._movement(doc)
        annotated = comprehension.true_box(doc)
        left, top, right, bottom = movement.box(_pixels(annotated, doc))
        return {
            **doc,
            "width": movement.size.width,
            "height": movement.size.height,
            "bbox": [left, top, right - left, bottom - top],
            "annotated": list(annotated),
            "moved_by": [self._shift.name, self._severity],
        }

    def _stays(self, doc: Mapping[str, Any]) -> bool:
        if not self._shift.visible:
            return True
        return self._movement(doc).visible(_pixels(comprehension.true_box(doc), doc)) >= self._shift.visible

    def _movement(self, doc: Mapping[str, Any]) -> Movement:
        size = doc["width"], doc["height"]
        try:
            return moving.movement(size, self._shift.name, self._severity, doc["image_id"])
        except ValueError as error:
            raise DatasetError(f"picture {doc['image_id']}: {error}; leave it or this shift out") from error


def _pixels(box: Box, doc: Mapping[str, Any]) -> Corners:
    width, height = doc["width"], doc["height"]
    return box.x1 * width, box.y1 * height, box.x2 * width, box.y2 * height


def process_results(doc: Mapping[str, Any], results: Sequence[str], estimator: str) -> dict[str, Any]:
    """Score one answer as `reworded.process_results` does, in the frame of the moved picture.

    `acc@0.5_unmoved` scores the same answer against the box as it was annotated, in fractions of the picture as it was.
    Benchmarks of corruptions score so (Michaelis et al., arXiv 1907.07484). Under a geometric shift it tells of answers
    that do not depend on the picture shown.
    """
    output = reworded.process_results(doc, results, estimator)
    record = output["mean_iou"]
    record["annotated"] = doc["annotated"]
    overlap = iou(Box(*record["box"]), Box(*doc["annotated"])) if record["box"] else 0.0
    output["acc@0.5_unmoved"] = {"score": float(overlap >= 0.5), "image": record["image"], "id": record["id"]}
    return output


# Functions for a task's YAML.
scored_by_coordinate_mean = partial(process_results, estimator="coordinate_mean")
