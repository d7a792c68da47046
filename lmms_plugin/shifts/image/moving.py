"""Image shifts that move boxes: geometric ones on a canvas of their own, and the corruptions that displace the picture.

A shift is one function `f(size, rng, *level) -> Movement`: from the size of a picture to what moves where
(`lmms_plugin.shifts.image.movements`), with the `level` of each severity given to the decorator, which registers it in
`MOVING` and so in the tasks and the tests. Draws depend on the image, never on its target, so that all expressions
about a photograph share one moved picture and nothing about it tells where the target is.

The four corruptions are those of Hendrycks & Dietterich (ICLR 2019) as in Michaelis et al. (arXiv 1907.07484, package
imagecorruptions 1.1.2), pixel for pixel where draws are the same. The levels of the geometric shifts are ours: numbers
compare within this package only.
"""

# OpenCV ships no types here and numpy types much arithmetic as Any.
# mypy: disable-error-code="no-any-return"

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from lmms_plugin.shifts.image.corruptions import GLASS, MOTION, floored, through_glass
from lmms_plugin.shifts.image.motion import copies_along, one_sided_trail, smear
from lmms_plugin.shifts.image.movements import (
    LONGEST,
    CanvasSize,
    Copies,
    Displacement,
    Matrix,
    Movement,
    Offsets,
    Pixels,
    resized,
    translation,
    warped,
    warped_whole,
)
from lmms_plugin.shifts.image.opencv import cv2
from lmms_plugin.shifts.severities import SEVERITIES, checked, generator, named
from lmms_plugin.utils.images import to_rgb

Mover = Callable[..., Movement]
Kind = Literal["geometry", "corruption"]
Words = Literal["kept", "cropped", "mirrored", "turned"]
VISIBLE = 0.75
"""Least share of a target that a crop must leave in the picture; other documents are not asked."""


@dataclass(frozen=True)
class MovingShift:
    """Shift that moves boxes, with its five severities.

    Attributes:
        name: Name of the function.
        function: Function f(size, rng, *level) → movement.
        levels: Arguments of severity 1 to 5.
        kind: `corruption` for the four of ImageNet-C, on the same canvas; `geometry` for the others.
        words: What becomes of an expression, an entry of `lmms_plugin.shifts.language.directions.RULES`.
        visible: Least share of a target that must stay visible; 0 where none can leave.
    """

    name: str
    function: Mover
    levels: tuple[tuple[float, ...], ...]
    kind: Kind
    words: Words
    visible: float


MOVING: dict[str, MovingShift] = {}


def moving_shift(
    *levels: tuple[float, ...], kind: Kind = "geometry", words: Words = "kept", visible: float = 0.0
) -> Callable[[Mover], Mover]:
    """Register the decorated function in `MOVING` under its own name, with one tuple of arguments per severity."""
    if len(levels) != len(SEVERITIES):
        raise ValueError(f"expected {len(SEVERITIES)} levels, got {len(levels)}")

    def register(function: Mover) -> Mover:
        name = function.__name__
        MOVING[name] = MovingShift(name, function, levels, kind, words, visible)
        return function

    return register


# The expressions of an image come one after another.
@lru_cache(maxsize=4)
def movement(size: tuple[int, int], name: str, severity: int, key: str | int) -> Movement:
    """Return what the shift `name` does to a picture.

    The draws follow from (key, name, severity) alone, by hash, as those of `corruptions.apply` do.

    Args:
        size: Width and height of the upright picture, pixels.
        name: Key of `MOVING`.
        severity: Severity, 1 to 5.
        key: Key of the random draws, usually the image's id.

    Raises:
        ValueError: Unknown name (the message gives the nearest), severity not an integer from 1 to 5, empty picture, or
            one that is too long before or after.
        TypeError: A key that is neither text nor an integer.
    """
    chosen, severity = named(name, MOVING, "moving shift"), checked(severity, name)
    source = CanvasSize(*size)
    if min(source) < 1 or max(source) > LONGEST:
        raise ValueError(f"{name}: expected sides of 1 to {LONGEST} pixels, got {source.width}x{source.height}")
    found = chosen.function(source, generator(key, name, severity), *chosen.levels[severity - 1])
    if max(found.size) > LONGEST:
        width, height = found.size
        raise ValueError(f"{name}: expected sides of at most {LONGEST} pixels after it, got {width}x{height}")
    return found


def apply(image: Image.Image, name: str, severity: int, key: str | int) -> Image.Image:
    """Return `image`, upright, under the shift `name`, as RGB of the size that its `movement` has.

    Args:
        image: Image of at least one pixel, any mode that `lmms_plugin.utils.images.to_rgb` takes. Not changed.
        name: Key of `MOVING`.
        severity: Severity, 1 to 5.
        key: Key of the random draws, usually the image's id.

    Raises:
        ValueError: As `movement`; unfit mode.
        TypeError: A key that is neither text nor an integer.
    """
    upright = to_rgb(image)
    return Image.fromarray(movement(upright.size, name, severity, key).render(np.asarray(upright)))


def _sign(rng: np.random.Generator) -> int:
    return 1 if rng.integers(2) else -1


# Geometry


@moving_shift((0.95,), (0.9,), (0.8,), (0.7,), (0.6,), words="cropped", visible=VISIBLE)
def crop(size: CanvasSize, rng: np.random.Generator, keep: float) -> Movement:
    """Keep that share of each side, anywhere in the picture."""
    width, height = (max(1, round(keep * side)) for side in size)
    left, top = (int(rng.integers(whole - part + 1)) for whole, part in zip(size, (width, height), strict=True))
    return warped(size, translation(-left, -top), CanvasSize(width, height))


@moving_shift((0.1,), (0.25,), (0.5,), (0.75,), (1,), words="cropped")
def pad(size: CanvasSize, rng: np.random.Generator, extra: float) -> Movement:
    """Put the picture anywhere on a grey canvas whose sides are longer by that share."""
    width, height = (side + round(extra * side) for side in size)
    left, top = (int(rng.integers(whole - part + 1)) for whole, part in zip((width, height), size, strict=True))
    return warped(size, translation(left, top), CanvasSize(width, height))


@moving_shift((), (), (), (), (), words="mirrored")
def horizontal_flip(size: CanvasSize, _: np.random.Generator) -> Movement:
    """Mirror the picture; every severity is the same."""
    return warped(size, np.array([[-1.0, 0.0, size.width], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), size)


@moving_shift((), (), (), (), (), words="turned")
def quarter_turn(size: CanvasSize, rng: np.random.Generator) -> Movement:
    """Turn the picture by 90° to one side or the other; the severities are five draws of the side."""
    return warped_whole(size, _turn(90 * _sign(rng)))


@moving_shift((2,), (4,), (7,), (10,), (15,))
def rotation(size: CanvasSize, rng: np.random.Generator, degrees: float) -> Movement:
    """Turn the picture by that angle to one side or the other, on a canvas that holds all of it.

    The box of a turned box is wider than the turned object: for a disc in a square, IoU 1 / (1 + sin 2a).
    """
    return warped_whole(size, _turn(degrees * _sign(rng)))


def _turn(degrees: float) -> Matrix:
    angle = math.radians(degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


@moving_shift((1.15,), (1.3,), (1.6,), (2,), (2.5,))
def aspect_ratio(size: CanvasSize, rng: np.random.Generator, factor: float) -> Movement:
    """Make the picture wider or taller by that factor, with as many pixels as before."""
    stretch = math.sqrt(factor) ** _sign(rng)
    return resized(size, CanvasSize(max(1, round(size.width * stretch)), max(1, round(size.height / stretch))))


@moving_shift((0.75,), (0.5,), (0.35,), (0.25,), (0.15,))
def downscale(size: CanvasSize, _: np.random.Generator, factor: float) -> Movement:
    """Shrink the picture and its canvas."""
    return _scaled(size, factor)


@moving_shift((1.25,), (1.5,), (2,), (2.5,), (3,))
def upscale(size: CanvasSize, _: np.random.Generator, factor: float) -> Movement:
    """Enlarge the picture and its canvas."""
    return _scaled(size, factor)


def _scaled(size: CanvasSize, factor: float) -> Movement:
    return resized(size, CanvasSize(*(max(1, round(factor * side)) for side in size)))


@moving_shift((0.05,), (0.1,), (0.15,), (0.2,), (0.3,))
def shear(size: CanvasSize, rng: np.random.Generator, slope: float) -> Movement:
    """Shear the picture to the left or right by that slope, on a canvas that holds all of it."""
    return warped_whole(size, np.array([[1.0, _sign(rng) * slope, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))


@moving_shift((0.04,), (0.08,), (0.12,), (0.18,), (0.25,))
def perspective(size: CanvasSize, rng: np.random.Generator, depth: float) -> Movement:
    """Move each corner inwards by up to that share of the sides, at least by half of it."""
    width, height = size
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float32)
    inwards = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * (width, height)
    target = corners + rng.uniform(depth / 2, depth, (4, 2)) * inwards
    matrix: Matrix = cv2.getPerspectiveTransform(corners, target.astype(np.float32))
    return warped(size, matrix, size)


# Corruptions of ImageNet-C that displace the picture


@moving_shift(*MOTION, kind="corruption")
def motion_blur(size: CanvasSize, rng: np.random.Generator, radius: int, sigma: float) -> Movement:
    """Blur by camera shake along a random direction within 45° of horizontal, to one side only, as the original."""
    degrees, trail = rng.uniform(-45, 45), one_sided_trail(radius, sigma)
    x, y = copies_along(len(trail), degrees, start=0)
    offsets = -np.column_stack((x, y)).astype(np.float64)
    return Copies(
        size, size, lambda image: floored(smear(image, trail, degrees, start=0)), trail, np.ones_like(offsets), offsets
    )


@moving_shift(*GLASS, kind="corruption")
def glass_blur(size: CanvasSize, rng: np.random.Generator, sigma: float, reach: int, passes: int) -> Movement:
    """Blur, shuffle locally by up to `reach` pixels, `passes` times, and blur again, as the original.

    A pass displaces the picture to the right and down by `glass_drift(reach)`, and boxes with it.
    """
    seed = int(rng.integers(2**63))

    def render(image: Pixels) -> Pixels:
        return through_glass(image, np.random.Generator(np.random.PCG64(seed)), sigma, reach, [False] * passes)

    offsets = np.full((1, 2), passes * glass_drift(reach))
    return Copies(size, size, render, np.ones(1), np.ones((1, 2)), offsets)


def glass_drift(reach: int) -> float:
    """Return the mean displacement of one pass of glass_blur to the right and down, pixels.

    A pixel takes over what lies a random step away, each coordinate uniform in [-reach, reach); where that pixel was
    visited before (it is further to the end), what it took over itself, and so on. The steps add up to the first one
    that does not lead further to the end: on average (Wald's identity) their number times the mean step of -1/2.
    """
    down = (reach - 1) / (2 * reach)
    onwards = down + down / (2 * reach)
    return 0.5 / (1 - onwards)


# From, to and step of the factors by which copies are enlarged.
@moving_shift((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03), kind="corruption")
def zoom_blur(size: CanvasSize, _: np.random.Generator, end: float, step: float) -> Movement:
    """Blur by zooming in while the shutter is open: the mean of the picture and of enlarged ones, as the original."""
    factors = np.arange(1, end, step).tolist()
    zooms = [(_zoom(size.width, factor), _zoom(size.height, factor)) for factor in factors]
    weights = np.full(1 + len(zooms), 1 / (1 + len(zooms)))
    scales = np.array([(1.0, 1.0), *((x[0], y[0]) for x, y in zooms)])
    starts = np.array([(0.0, 0.0), *((x[1], y[1]) for x, y in zooms)])
    # Points are scaled about the centre of the first pixel.
    offsets = 0.5 + scales * (-0.5 - starts)

    def render(image: Pixels) -> Pixels:
        field = image.astype(np.float32)
        total = field.copy()
        for (across, left), (down, top) in zooms:
            grid = np.array([[1 / across, 0, left], [0, 1 / down, top]])
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            total += cv2.warpAffine(field, grid, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
        return floored(total * np.float32(weights[0]))

    return Copies(size, size, render, weights, scales, offsets)


def _zoom(side: int, factor: float) -> tuple[float, int]:
    """Return the scale of an enlarged copy along one side, and its first pixel in the picture.

    The original cuts out the middle, enlarges that with the corners of both grids aligned, and keeps what fits the
    canvas from the top left.
    """
    kept = math.ceil(side / factor)
    return max(round(kept * factor) - 1, 1) / max(kept - 1, 1), (side - kept) // 2


@moving_shift((12.5,), (16.25,), (21.25,), (25,), (30,), kind="corruption")
def elastic_transform(size: CanvasSize, rng: np.random.Generator, strength: float) -> Movement:
    """Displace every pixel by a smooth random field, as the original."""
    width, height = size
    dx, dy = (strength * _smooth(rng.uniform(-0.005, 0.005, (height, width)) * height) for _ in range(2))
    rows, columns = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)

    def render(image: Pixels) -> Pixels:
        flags = {"interpolation": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_REFLECT}
        return floored(cv2.remap(image.astype(np.float32), columns + dx, rows + dy, **flags))

    return Displacement(size, size, render, dx, dy)


def _smooth(noise: Matrix) -> Offsets:
    """Blur a field by a Gaussian of a hundredth of each side, cut at three standard deviations."""
    height, width = noise.shape
    taps = tuple(2 * int(3 * 0.01 * side + 0.5) + 1 for side in (width, height))
    sigmas = {"sigmaX": 0.01 * width, "sigmaY": 0.01 * height}
    return cv2.GaussianBlur(noise, taps, **sigmas, borderType=cv2.BORDER_REFLECT).astype(np.float32)
