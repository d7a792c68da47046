"""Movements of a picture: where each of its points goes, and what the moved picture looks like.

Coordinates are continuous pixels from the picture's top left corner: pixel (i, j) covers [j, j + 1] × [i, i + 1], and a
box is (left, top, right, bottom). A movement depends on the picture's size alone, so that boxes can be moved without
decoding an image.
"""

# OpenCV ships no types here and numpy types much arithmetic as Any.
# mypy: disable-error-code="no-any-return"

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from lmms_plugin.shifts.image.opencv import cv2

Pixels = npt.NDArray[np.uint8]
Matrix = npt.NDArray[np.float64]
Offsets = npt.NDArray[np.float32]
Corners = tuple[float, float, float, float]

GREY = (127, 127, 127)
"""Colour beside a picture that no longer fills its canvas."""
LONGEST = 32766
"""Longest side, in pixels, that OpenCV's warps take."""


class CanvasSize(NamedTuple):
    """Width and height, pixels."""

    width: int
    height: int


@dataclass(frozen=True, eq=False)
class Movement(ABC):
    """Movement of a picture.

    Attributes:
        source: CanvasSize of the picture.
        size: CanvasSize of the moved picture.
        render: Function from the picture, (h, w, 3), to the moved one, of `size`. The same at every call.
    """

    source: CanvasSize
    size: CanvasSize
    render: Callable[[Pixels], Pixels]

    @abstractmethod
    def box(self, box: Corners) -> Corners:
        """Return the box of a moved box, cut at the edges of the moved picture; without area where nothing is left."""

    @abstractmethod
    def visible(self, box: Corners) -> float:
        """Return the share of a box that is still in the moved picture, in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Projection(Movement):
    """Movement of all points by one homography: shifts, mirrors, turns, scales, shears, perspectives.

    Attributes:
        matrix: Homography (3, 3) from coordinates of the picture to those of the moved one.
    """

    matrix: Matrix

    def box(self, box: Corners) -> Corners:
        """Return the bounding box of the four moved corners, exact for a box, cut at the edges."""
        return clipped(self._whole(box), self.size)

    def visible(self, box: Corners) -> float:
        """Return the share of the moved box's own bounding box that is in the moved picture."""
        return _kept(self._whole(box), self.size)

    def _whole(self, box: Corners) -> Corners:
        left, top, right, bottom = box
        return bounds(moved(self.matrix, [(left, top), (right, top), (right, bottom), (left, bottom)]))


@dataclass(frozen=True, eq=False)
class Copies(Movement):
    """Weighted mean of scaled and displaced copies of a picture on its own canvas, as blurs are that move.

    Attributes:
        weights: Weight of each copy, (n,), sum 1.
        scales: Scale of each copy, (n, 2), x and y.
        offsets: Displacement of each copy after scaling, pixels, (n, 2).
    """

    weights: Matrix
    scales: Matrix
    offsets: Matrix

    def box(self, box: Corners) -> Corners:
        """Return the mean of the copies' boxes, each cut at the edges; a side on an edge stays there.

        The edges of the picture are repeated beyond it, or enlarged away from it. A box of which no copy has area left
        is in the outermost rim, which these shifts leave in place.
        """
        mean = self.weights @ self._cut(box)
        found = tuple(float(side) for side in mean)
        return (found[0], found[1], found[2], found[3]) if area(found) > 0 else box

    def visible(self, box: Corners) -> float:
        """Return the share of the copies' area that is in the picture, by weight."""
        return float(self.weights @ [_kept(one, self.size) for one in self._boxes(box).tolist()])

    def _boxes(self, box: Corners) -> Matrix:
        return np.tile(self.scales, 2) * np.array(box) + np.tile(self.offsets, 2)

    def _cut(self, box: Corners) -> Matrix:
        edges = np.tile(self.size, 2)
        cut: Matrix = np.clip(self._boxes(box), 0, edges)
        at_start, at_end = np.array(box) <= 0, np.array(box) >= edges
        cut[:, at_start], cut[:, at_end] = 0, edges[at_end]
        return cut


@dataclass(frozen=True, eq=False)
class Displacement(Movement):
    """Movement by a field on the same canvas: pixel (i, j) shows the picture at (i + dy[i, j], j + dx[i, j]).

    Attributes:
        dx: Horizontal offset of the shown point, pixels, (h, w).
        dy: Vertical offset, (h, w).
    """

    dx: Offsets
    dy: Offsets

    def box(self, box: Corners) -> Corners:
        """Return the bounding box of the pixels that show a point of the box; to the pixel.

        The edges mirror what lies behind them, as OpenCV's BORDER_REFLECT does.
        """
        left, top, right, bottom = box
        reach = 1 + math.ceil(max(float(np.abs(self.dx).max()), float(np.abs(self.dy).max())))
        x0, x1 = max(0, math.floor(left) - reach), min(self.size.width, math.ceil(right) + reach)
        y0, y1 = max(0, math.floor(top) - reach), min(self.size.height, math.ceil(bottom) + reach)
        x = _mirrored(np.arange(x0, x1) + 0.5 + self.dx[y0:y1, x0:x1], self.size.width)
        y = _mirrored(np.arange(y0, y1)[:, None] + 0.5 + self.dy[y0:y1, x0:x1], self.size.height)
        shown = (left <= x) & (x < right) & (top <= y) & (y < bottom)
        if not shown.any():
            # Thinner than a pixel: the pixel that shows the point nearest to its middle.
            away = (x - (left + right) / 2) ** 2 + (y - (top + bottom) / 2) ** 2
            shown = away == away.min()
        columns, rows = np.flatnonzero(shown.any(axis=0)), np.flatnonzero(shown.any(axis=1))
        return float(x0 + columns[0]), float(y0 + rows[0]), float(x0 + columns[-1] + 1), float(y0 + rows[-1] + 1)

    def visible(self, box: Corners) -> float:
        """Return 1: the edges mirror what lies behind them, and nothing leaves the canvas."""
        return 1.0


def _mirrored(places: npt.NDArray[np.floating[Any]], side: int) -> npt.NDArray[np.floating[Any]]:
    """Return which places of a picture, from 0 to `side`, are shown where edges mirror what lies behind them."""
    within = places % (2 * side)
    return np.minimum(within, 2 * side - within)


def moved(matrix: Matrix, points: Sequence[tuple[float, float]]) -> Matrix:
    """Apply a homography (3, 3) to points (n, 2)."""
    homogeneous = np.column_stack((np.array(points, dtype=np.float64), np.ones(len(points)))) @ matrix.T
    return homogeneous[:, :2] / homogeneous[:, 2:]


def bounds(points: Matrix) -> Corners:
    """Return the bounding box of points (n, 2)."""
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    return float(left), float(top), float(right), float(bottom)


def clipped(box: Corners, size: CanvasSize) -> Corners:
    """Cut a box at the edges of a picture; without area where it lies outside."""
    left, top, right, bottom = box
    x0, y0 = min(max(left, 0.0), float(size.width)), min(max(top, 0.0), float(size.height))
    return x0, y0, max(x0, min(right, float(size.width))), max(y0, min(bottom, float(size.height)))


def _kept(box: Corners, size: CanvasSize) -> float:
    """Return the share of a box that lies in a picture; a side without length counts as a whole where it lies there."""
    cut = clipped(box, size)
    shares = []
    for start, end, first, last, edge in zip(box[:2], box[2:], cut[:2], cut[2:], size, strict=True):
        inside = float(0 <= start <= edge)
        shares.append((last - first) / (end - start) if end > start else inside)
    return shares[0] * shares[1]


def area(box: Sequence[float]) -> float:
    """Return the area of a box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def warped(source: CanvasSize, matrix: Matrix, size: CanvasSize) -> Projection:
    """Return the movement by a homography onto a canvas; grey where the picture does not reach.

    Pixels are interpolated linearly, which is exact where they fall on pixels again (crops, mirrors, quarter turns).
    """
    centre = translation(0.5, 0.5)
    between = translation(-0.5, -0.5) @ matrix @ centre
    flags = {"flags": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_CONSTANT, "borderValue": GREY}
    return Projection(source, size, lambda image: cv2.warpPerspective(image, between, size, **flags), matrix)


def warped_whole(source: CanvasSize, matrix: Matrix) -> Projection:
    """Return the movement by a homography onto the smallest canvas that holds the whole moved picture."""
    width, height = source
    left, top, right, bottom = bounds(moved(matrix, [(0, 0), (width, 0), (width, height), (0, height)]))
    # Without the rounding of sines, which would add a line of pixels.
    size = CanvasSize(math.ceil(right - left - 1e-6), math.ceil(bottom - top - 1e-6))
    return warped(source, translation(-left, -top) @ matrix, size)


def resized(source: CanvasSize, size: CanvasSize) -> Projection:
    """Return the movement by a change of size, by bicubic interpolation over all pixels that a new one covers."""
    matrix = np.diag([size.width / source.width, size.height / source.height, 1.0])

    def render(image: Pixels) -> Pixels:
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))

    return Projection(source, size, render, matrix)


def translation(x: float, y: float) -> Matrix:
    """Return the matrix (3, 3) of a displacement."""
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])
