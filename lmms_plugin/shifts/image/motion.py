"""Displacement of pixels in blurred or shuffled pictures: motion trails and glass."""

# OpenCV ships no types here and numpy types much arithmetic as Any.
# mypy: disable-error-code="no-any-return"

import math

import numpy as np
import numpy.typing as npt

from lmms_plugin.shifts.image.opencv import cv2

Field = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]


def one_sided_trail(radius: int, sigma: float) -> npt.NDArray[np.float64]:
    """Return Hendrycks & Dietterich's motion weights, half a Gaussian: (2·radius + 1,), falling, sum 1."""
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def smear(image: npt.NDArray[np.generic], weights: npt.NDArray[np.float64], degrees: float, start: int) -> Field:
    """Return the weighted sum of copies of an image moved along a line.

    Args:
        image: Image (h, w) or (h, w, channels), uint8 or float32.
        weights: Weights (n,), one per copy.
        degrees: Direction of the movement; 0 is to the left, 90 up.
        start: Distance of the first copy, pixels; each next one is a pixel further. Edges are repeated.
    """
    x, y = copies_along(len(weights), degrees, start)
    reach = max(abs(start), abs(start + len(weights) - 1))
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    np.add.at(kernel, (y + reach, x + reach), weights)
    return cv2.filter2D(image, cv2.CV_32F, kernel, borderType=cv2.BORDER_REPLICATE)


def copies_along(count: int, degrees: float, start: int) -> tuple[Indices, Indices]:
    """Return how far to the left and up each copy of `smear` is moved, x and y, each (count,), whole pixels."""
    steps = start + np.arange(count)
    x = np.ceil(steps * math.cos(math.radians(degrees)) - 0.5).astype(int)
    y = np.ceil(steps * math.sin(math.radians(degrees)) - 0.5).astype(int)
    return x, y


def shuffle_sources(steps: Indices, reach: int) -> Indices:
    """Return the source of each pixel after one pass of the original's sequential shuffle, without its loop.

    The original walks from the last pixel to the first and sets pixel p to the current value at p + step (its "swap" of
    two array views copies one way). If p + step was visited already, its own source counts: those chains lead ever
    further towards the last pixel, so following them a step at a time, all at once, ends after a dozen short gathers.

    Args:
        steps: Step (h, w) of each pixel as a distance in the flattened image, dy · w + dx with dy and dx in [-reach,
            reach). Not used nearer than `reach` to the rim, nor one row and column more at the top and left.
        reach: Bound of dy and dx.

    Returns:
        (h·w,) flat indices of the sources.
    """
    height, width = steps.shape
    here = np.arange(height * width)
    copied = here.copy()
    inside = np.s_[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1]
    copied.reshape(height, width)[inside] += steps[inside]
    pending = np.flatnonzero(copied > here)
    source = copied.copy()
    at = copied.take(pending)
    while len(pending):
        source[pending] = further = copied.take(at)
        onward = further > at
        pending, at = pending[onward], further[onward]
    return source
