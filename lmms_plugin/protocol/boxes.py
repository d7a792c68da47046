"""Boxes as fractions of the original image, and their intersection over union."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

OVERSHOOT = 0.05
"""How far a box may reach beyond its frame, as a fraction of the frame's side, and still be cut at the edge.

Annotations and answers overshoot an edge by rounding. A coordinate further out is not in the scale it was declared
in (pixels read as thousandths, xyxy read as xywh): cutting that at the edge would turn a misunderstanding into a
valid-looking box.
"""


class Box(NamedTuple):
    """Axis-aligned box: left, top, right, bottom as fractions of the original image, origin at the top left.

    The constructors `clip`, `from_xyxy` and `from_xywh` give 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1.
    """

    x1: float
    y1: float
    x2: float
    y2: float

    @classmethod
    def clip(cls, x1: float, y1: float, x2: float, y2: float) -> Box | None:
        """Clip fractions of the image at its edges.

        Returns:
            The part inside the image; None where no area is left, which includes inverted corners and NaN.
        """
        box = cls(max(x1, 0.0), max(y1, 0.0), min(x2, 1.0), min(y2, 1.0))
        return box if box.x1 < box.x2 and box.y1 < box.y2 else None

    @classmethod
    def from_xyxy(cls, xyxy: Sequence[float], size: tuple[int, int]) -> Box:
        """Build a box from corners in pixels.

        Args:
            xyxy: Left, top, right, bottom in pixels of the image.
            size: (width, height) of the image in pixels.

        Raises:
            ValueError: Not four numbers, an empty image, no area, or more than `OVERSHOOT` outside the image.
        """
        width, height = size
        if len(xyxy) != 4:
            raise ValueError(f"Expected 4 numbers x1, y1, x2, y2 but got {len(xyxy)}: {xyxy}")
        if width <= 0 or height <= 0:
            raise ValueError(f"Expected an image of positive width and height but got {width}x{height}")
        x1, y1, x2, y2 = (value / side for value, side in zip(xyxy, (width, height, width, height), strict=True))
        box = cls.clip(x1, y1, x2, y2)
        if box is None:
            raise ValueError(f"Expected a box with area inside the {width}x{height} image but got xyxy {list(xyxy)}")
        if min(x1, y1) < -OVERSHOOT or max(x2, y2) > 1 + OVERSHOOT:
            raise ValueError(f"Expected a box inside the {width}x{height} image but got xyxy {list(xyxy)}")
        return box

    @classmethod
    def from_xywh(cls, xywh: Sequence[float], size: tuple[int, int]) -> Box:
        """Build a box from its top left corner, width and height in pixels (COCO, RefCOCO+).

        Args:
            xywh: Left, top, width, height in pixels of the image.
            size: (width, height) of the image in pixels.

        Raises:
            ValueError: As in `from_xyxy`.
        """
        if len(xywh) != 4:
            raise ValueError(f"Expected 4 numbers x, y, width, height but got {len(xywh)}: {xywh}")
        x, y, width, height = xywh
        return cls.from_xyxy((x, y, x + width, y + height), size)


def iou(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes in the same frame.

    Fractions of pixels are rounded to floats, so an overlap of exactly one half could come out below it. An IoU within
    the rounding of the corners of a number with four decimals (0.5, 0.75, 0.9) is set to that number, so that
    `iou(a, b) >= threshold` decides as in whole pixels.

    Returns:
        A fraction in [0, 1]; 0 where either box has no area or inverted corners.
    """
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    if intersection == 0:  # the product of two tiny sides underflows
        return 0.0
    union = (a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - intersection
    overlap = intersection / union
    threshold = round(overlap, _DECIMALS)
    return threshold if abs(overlap - threshold) <= _rounding(width, height) else overlap


_DECIMALS = 4
_EPSILON = 32 * sys.float_info.epsilon
_MOST = 1e-9


def _rounding(width: float, height: float) -> float:
    """Return the largest change of an IoU by rounding of corners, for boxes that share `width` and `height`.

    With ε for the spacing of floats at 1, a corner is off by less than 4ε: it was divided by the image's side, and may
    have been converted to corner and side and back. So every side is off by less than 8ε, which relative to itself is
    at most 8ε over the shared side; the intersection by 8ε (1/width + 1/height), the union by at most three times that,
    the IoU by 32ε (1/width + 1/height). Boxes of whole pixels with an IoU above 0.5 that is no fraction of 10⁴ are
    further from the next one than that in every image of up to 10⁹ pixels, so that no false ties arise.
    """
    return min(_EPSILON * (1 / width + 1 / height), _MOST)
