"""What the answers of one run have in common, whatever the model: a log in which they do not was edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmms_plugin.confidence import LEARNED
from lmms_plugin.response import Response

if TYPE_CHECKING:
    from lmms_plugin.export.rescoring import Sample


def expect_told(response: Response) -> None:
    """Check that an answer claims no confidence that is computed from its tokens.

    Raises:
        ValueError: If it brings a value for another than a learned estimator, which would stand for the computed one.
    """
    if claimed := sorted(response.confidence.keys() - {*LEARNED}):
        raise ValueError(f"expected no confidence of an answer's own but {', '.join(LEARNED)}, got {claimed[0]}")


def expect_one_model(task: str, samples: Sequence[Sample]) -> None:
    """Check that all answers are in one dialect, and that an image has one size, in pixels, wherever it is asked about.

    Boxes are read by dialect and sizes: chosen answer by answer, they would move boxes.

    Raises:
        ValueError: If they are not.
    """
    dialects = sorted({str(sample.response.dialect) for sample in samples})
    if len(dialects) > 1:
        raise ValueError(f"task {task}: expected answers in one dialect, got {', '.join(dialects)}")
    known: dict[str, object] = {}
    for sample in samples:
        image, response = str(sample.record["image"]), sample.response
        sizes = (response.original_size, response.model_size)
        if any(side < 1 for size in sizes for side in size or ()):
            raise ValueError(f"task {task}: expected sizes of at least 1 pixel for image {image}, got {sizes}")
        if known.setdefault(image, sizes) != sizes:
            raise ValueError(f"task {task}: expected one size of image {image}, got {known[image]} and {sizes}")
