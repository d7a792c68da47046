"""Real photographs without a download: captioned crops of the two that scikit-learn ships.

They serve to calibrate on natural images far from the evaluation data. They show only two places; with a dataset of
photographs at hand, calibrate on that.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

CAPTIONS = {
    "china.jpg": (
        "A temple with a curved roof stands between trees under a pale sky.",
        "Part of an old Chinese pavilion with painted beams and grey tiles.",
        "A part of a photograph of a palace garden on a cloudy day.",
    ),
    "flower.jpg": (
        "A pink dahlia in full bloom, seen from near.",
        "Petals of a flower in front of a dark green background.",
        "A part of a photograph of a flower.",
    ),
}
SMALLEST, LARGEST = 0.4, 1.0
"""Sides of a crop as shares of the photograph's."""


def load() -> list[tuple[np.ndarray, tuple[str, ...]]]:
    """Return each photograph as RGB of shape (height, width, 3), with its captions."""
    from sklearn.datasets import load_sample_image

    return [(load_sample_image(name), captions) for name, captions in CAPTIONS.items()]


def crop(photographs: list[tuple[np.ndarray, tuple[str, ...]]], rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Return a crop of one of the photographs, mirrored every other time, and a caption."""
    pixels, captions = photographs[rng.integers(len(photographs))]
    share = rng.uniform(SMALLEST, LARGEST)
    height, width = (max(1, round(side * share)) for side in pixels.shape[:2])
    top, left = rng.integers(pixels.shape[0] - height + 1), rng.integers(pixels.shape[1] - width + 1)
    part = pixels[top : top + height, left : left + width]
    part = part[:, ::-1] if rng.integers(2) else part
    return Image.fromarray(np.ascontiguousarray(part)), captions[rng.integers(len(captions))]
