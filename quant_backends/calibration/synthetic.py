"""Synthetic images and words drawn from a seed, for calibration without any data."""

from __future__ import annotations

import random
import string

import numpy as np
from PIL import Image, ImageDraw

SIZES = ((448, 448), (448, 336), (336, 448))
"""(width, height) in pixels of the images made here: the shapes of common photographs, small enough to be quick."""

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "triangle")


def noise_image(rng: np.random.Generator) -> Image.Image:
    """Return an RGB image of independent uniform noise."""
    width, height = SIZES[rng.integers(len(SIZES))]
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def scene(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Return an image of coloured shapes on a shaded, grainy background, and an expression for one of them."""
    width, height = SIZES[rng.integers(len(SIZES))]
    image = _ground(rng, width, height)
    draw = ImageDraw.Draw(image)
    expression = ""
    for _ in range(int(rng.integers(2, 6))):
        colour, shape = COLOURS[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))]
        radius = int(rng.integers(height // 12, height // 5))
        _draw(
            draw,
            shape,
            colour,
            int(rng.integers(radius, width - radius)),
            int(rng.integers(radius, height - radius)),
            radius,
        )
        expression = f"the {colour} {shape}"
    return image, expression


def words(rng: random.Random, count: int) -> str:
    """Return `count` words of random lower-case letters."""
    return " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8))) for _ in range(count))


def _ground(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    corners = rng.uniform(40, 215, (2, 2, 3))
    down, across = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    top = corners[0, 0] * (1 - across) + corners[0, 1] * across
    bottom = corners[1, 0] * (1 - across) + corners[1, 1] * across
    shaded = top * (1 - down) + bottom * down + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(shaded.clip(0, 255).astype(np.uint8))


def _draw(draw: ImageDraw.ImageDraw, shape: str, colour: str, x: int, y: int, radius: int) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
