"""Seeded generator of small scenes: one to four coloured shapes on a varied background.

A scene is a pure function of its generator: the same seed gives the same pixels, boxes and expressions.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lmms_plugin.demo.wording import COLOURS, FILLS, SHAPES, SIZES, Attributes, expressions

SIDE = 112
MAX_OBJECTS = 4
SPLITS = {"train": 0, "val": 1, "test": 2, "dev": 3}

RGB = {
    "red": (215, 35, 35),
    "green": (40, 165, 60),
    "blue": (40, 75, 220),
    "yellow": (238, 218, 50),
    "purple": (130, 45, 175),
    "cyan": (60, 210, 220),
}
_SIDES = {"small": (22, 30), "large": (38, 50)}
_FILL_ODDS = np.cumsum([0.75, 0.25])

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape of a scene.

    Attributes:
        attributes: What can be said about it.
        box: x, y, width, height in pixels, tight around its silhouette; the right and lower edges are exclusive.
        expressions: One to three ways to mean this object and no other of the scene.
    """

    attributes: Attributes
    box: tuple[int, int, int, int]
    expressions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: RGB pixels, (SIDE, SIDE, 3), 0 to 255.
        owner: (SIDE, SIDE), the index in `objects` whose silhouette covers each pixel, -1 for background.
        objects: One to four objects whose boxes do not overlap.
    """

    image: Pixels
    owner: NDArray[np.int8]
    objects: tuple[SceneObject, ...]


def _outlines() -> dict[str, NDArray[np.float64]]:
    """Outline of each shape, (n, 2) x and y, inside the unit circle's bounding square."""
    turn = 2 * np.pi * np.arange(40) / 40
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    arm = 0.36
    cross = [
        (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
        (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
    ]  # fmt: skip
    return {
        "circle": circle,
        "square": np.array([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
        "triangle": np.array([(0, -1), (1, 0.85), (-1, 0.85)]),
        "cross": np.array(cross, dtype=float),
    }


_OUTLINE = _outlines()
_GRID_Y, _GRID_X = np.mgrid[:SIDE, :SIDE].astype(np.float32)


def _background(rng: np.random.Generator) -> Pixels:
    """A plain, graded, patterned or noisy ground in a muted tone, with some thin clutter on it."""
    grey = float(rng.uniform(40, 215))
    base = grey + rng.uniform(-22, 22, 3)
    kind = int(rng.integers(4))
    ground = np.empty((SIDE, SIDE, 3), np.float32)
    ground[:] = base
    angle = rng.uniform(0, 2 * np.pi)
    along = _GRID_X * np.float32(np.cos(angle)) + _GRID_Y * np.float32(np.sin(angle))
    if kind == 1:
        ground += (along * np.float32(rng.uniform(0.2, 0.6)))[..., None]
    elif kind == 2:
        wave = np.sin(along * np.float32(2 * np.pi / rng.uniform(6, 22))) * np.float32(rng.uniform(6, 16))
        ground += wave[..., None]
    elif kind == 3:
        coarse = rng.uniform(-25, 25, (8, 8)).astype(np.float32)
        ground += cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)[..., None]
    image = np.clip(ground, 0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(4))):
        start, step = rng.integers(0, SIDE, 2), rng.integers(-14, 15, 2)
        tone = tuple(int(c) for c in rng.integers(0, 256, 3))
        cv2.line(image, tuple(map(int, start)), tuple(map(int, start + step)), tone, 1)
    return image


def _silhouette(shape: str, side: int, rng: np.random.Generator) -> Pixels:
    """Mask of a shape, 0 or 1, cropped to its pixels."""
    tilt = rng.uniform(-0.2, 0.2)
    turned = _OUTLINE[shape] @ np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    points = np.round((turned * side / 2 + side) * 16).astype(np.int32)
    mask = np.zeros((2 * side + 2, 2 * side + 2), np.uint8)
    cv2.fillPoly(mask, [points], 1, shift=4)
    x, y, w, h = cv2.boundingRect(mask)
    return mask[y : y + h, x : x + w]


def _paint(patch: Pixels, mask: Pixels, look: Attributes, rng: np.random.Generator) -> None:
    """Draw a shape over `patch` (h, w, 3) in place where `mask` (h, w) is 1; of a hollow one only the rim."""
    colour = np.clip(np.array(RGB[look.colour]) + rng.integers(-14, 15, 3), 0, 255).astype(np.uint8)
    drawn = mask.copy()
    if look.fill == "hollow":
        rim = 4 if look.size == "small" else 6
        framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        drawn -= cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=rim - 1)[1:-1, 1:-1]
    patch[drawn == 1] = colour


def _look(known: list[Attributes], crowded: bool, rng: np.random.Generator) -> Attributes:
    """Draw attributes; often those of an earlier object, so that one attribute alone seldom identifies.

    Args:
        known: Attributes of the objects already there.
        crowded: Whether large objects must be rarer for all to find room.
        rng: Source of randomness.
    """
    shape, colour = SHAPES[int(rng.integers(len(SHAPES)))], COLOURS[int(rng.integers(len(COLOURS)))]
    if known and rng.random() < 0.3:
        colour = known[int(rng.integers(len(known)))].colour
    if known and rng.random() < 0.3:
        shape = known[int(rng.integers(len(known)))].shape
    size = SIZES[int(rng.random() > (0.7 if crowded else 0.5))]
    return Attributes(shape, colour, size, FILLS[int(np.searchsorted(_FILL_ODDS, rng.random()))])


def _place(
    shape: tuple[int, int], taken: list[tuple[int, int, int, int]], rng: np.random.Generator
) -> tuple[int, int] | None:
    """Find a corner where a (height, width) box keeps a pixel's distance from all others and the border."""
    h, w = shape
    for _ in range(25):
        x, y = int(rng.integers(1, SIDE - w)), int(rng.integers(1, SIDE - h))
        if all(x > bx + bw or bx > x + w or y > by + bh or by > y + h for bx, by, bw, bh in taken):
            return x, y
    return None


def draw(rng: np.random.Generator, max_objects: int = MAX_OBJECTS) -> Scene:
    """Draw a scene.

    Args:
        rng: Its only source of randomness.
        max_objects: The scene holds one to this many objects, fewer when no room is left.
    """
    image = _background(rng)
    owner = np.full((SIDE, SIDE), -1, np.int8)
    looks: list[Attributes] = []
    boxes: list[tuple[int, int, int, int]] = []
    count = int(rng.integers(1, max_objects + 1))
    for _ in range(count):
        look = _look(looks, count > 3, rng)
        mask = _silhouette(look.shape, int(rng.integers(*_SIDES[look.size])), rng)
        corner = _place((mask.shape[0], mask.shape[1]), boxes, rng)
        if corner is None or look in looks:
            continue
        x, y, h, w = *corner, *mask.shape
        _paint(image[y : y + h, x : x + w], mask, look, rng)
        owner[y : y + h, x : x + w][mask == 1] = len(looks)
        looks.append(look)
        boxes.append((x, y, w, h))
    grain = int(rng.integers(1, 7))
    image = cv2.add(
        image, rng.integers(-grain, grain + 1, image.shape, dtype=np.int8).astype(np.int16), dtype=cv2.CV_8U
    )
    objects = tuple(
        SceneObject(look, box, expressions(look, looks[:i] + looks[i + 1 :], rng))
        for i, (look, box) in enumerate(zip(looks, boxes, strict=True))
    )
    return Scene(image, owner, objects)


def scene(split: str, index: int, *, seed: int = 0, max_objects: int = MAX_OBJECTS) -> Scene:
    """Return one scene of a split; splits never share a seed.

    Args:
        split: "train", "val", "test" or "dev".
        index: Which scene, from 0.
        seed: Another stream of the same split.
        max_objects: See `draw`.

    Raises:
        KeyError: If there is no such split.
    """
    return draw(np.random.default_rng([SPLITS[split], seed, index]), max_objects)
