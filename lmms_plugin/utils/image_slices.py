"""A part of a dataset's images in a seeded random order: what a run asks when `LMMS_PLUGIN_IMAGES` is set.

The order is that of a hash of seed and image id, so that it depends on neither the order of rows nor the machine, and
tasks on the same dataset ask about the same images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lmms_plugin.utils.chance import uniform
from lmms_plugin.utils.variables import IMAGES

_DIGITS = 18
MOST = 10**_DIGITS - 1
"""Largest seed and place of a slice."""
_WRITTEN = re.compile(rf"(\d{{1,{_DIGITS}}}):(\d{{1,{_DIGITS}}}):(\d{{1,{_DIGITS}}})")


class ImageSlice(NamedTuple):
    """Images at places of a random order.

    Attributes:
        seed: Seed of the order.
        start: First place, from 0.
        stop: Place after the last one.
    """

    seed: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.seed}:{self.start}:{self.stop}"

    @classmethod
    def parse(cls, text: str) -> ImageSlice:
        """Parse `seed:start:stop`.

        Raises:
            ValueError: The text is something else, or the slice is empty.
        """
        found = _WRITTEN.fullmatch(text)
        made = None if found is None else cls(*map(int, found.groups()))
        if made is None or made.start >= made.stop:
            raise ValueError(
                f"{IMAGES}={text}: expected seed:start:stop, whole numbers with start below stop, as in 0:0:30; unset "
                "it to ask about all images"
            )
        return made

    @property
    def label(self) -> str:
        """What a report calls it: `images=30`, or `images=30-60` of a later stage; seeds other than 0 are named."""
        places = f"{self.start}-{self.stop}" if self.start else f"{self.stop}"
        return f"images={places}" + (f" (seed {self.seed})" if self.seed else "")

    def of(self, images: Iterable[str]) -> frozenset[str]:
        """Return the images of the slice, given the ids of all images of the dataset, in any order."""
        placed = sorted((uniform(f"{self.seed}:{image}"), image) for image in set(images))
        return frozenset(image for _, image in placed[self.start : self.stop])


def asked(environment: Mapping[str, str] = os.environ) -> ImageSlice | None:
    """Return the slice that the environment asks for; None for all images.

    Raises:
        ValueError: As `ImageSlice.parse`.
    """
    written = environment.get(IMAGES)
    return ImageSlice.parse(written) if written else None


def stages(images: int, first: int, growth: float = 2.0) -> tuple[int, ...]:
    """Return the numbers of images after each stage: `first`, each time `growth` as many, at last all.

    No later stage asks about fewer images than the one before it: loading every model again for a few is not worth it.

    Args:
        images: Number of all images, from 1.
        first: Number of images of the first stage, from 1.
        growth: Factor from one number to the next, above 1.
    """
    found: list[int] = []
    size = float(first)
    while round(size) < images:
        found.append(round(size))
        size = max(size * growth, size + 1.0)
    if len(found) > 1 and images - found[-1] < found[-1] - found[-2]:
        found.pop()
    return (*found, images)
