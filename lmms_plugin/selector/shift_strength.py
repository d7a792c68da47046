"""How strong the shifts of a run are, by what the model itself sees of the images: an axis to plot accuracy against.

No label and no answer is used: of each image the largest value of every feature over its positions, and the distance
between those of the clean and of the shifted images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.measure import MeasurementSettings, families, key_numbers
from lmms_plugin.analysis.records import TaskRecords
from lmms_plugin.metrics.distance import frechet, mmd
from lmms_plugin.selector.features import Store
from lmms_plugin.selector.training import features_of

SCORES = ("accuracy", "ece", "aurc")


class Strength(NamedTuple):
    """One task against the clean task on the same documents.

    Attributes:
        task: Name of the task.
        mmd: Squared maximum mean discrepancy of the images' features; for the clean task that of two halves of its
            images, which is what to expect of no shift.
        frechet: Fréchet distance of the same; NaN where there are not more images than features.
        images: How many images.
        scores: Accuracy, ECE and AURC, as `lmms-plugin metrics` has them.
    """

    task: str
    mmd: float
    frechet: float
    images: int
    scores: Mapping[str, float]


def strengths(run: LoggedRun, store: Store, settings: MeasurementSettings) -> list[Strength]:
    """Strength of every shift of a run that has a clean task on the same documents.

    Raises:
        ValueError: If there is no such pair, or features are missing or belong to other answers.
    """
    found: list[Strength] = []
    for tasks in families(run.tasks.values()):
        clean = [records for records in tasks if records.place.shift is None]
        shifted = [records for records in tasks if records.place.shift is not None]
        if len(clean) != 1 or not shifted:
            continue
        before = _by_image(clean[0], store)
        even, odd = before[::2], before[1::2]
        found.append(_strength(clean[0], even, odd, settings, paired=False)._replace(images=len(before)))
        for records in shifted:
            if not np.array_equal(np.unique(records.images), np.unique(clean[0].images)):
                raise ValueError(f"expected the same images in {clean[0].task} and {records.task}")
            found.append(_strength(records, before, _by_image(records, store), settings, paired=True))
    if not found:
        raise ValueError(f"expected a clean task and shifted ones on the same documents in {run.file}")
    return found


def _strength(
    records: TaskRecords,
    first: npt.NDArray[Any],
    second: npt.NDArray[Any],
    settings: MeasurementSettings,
    *,
    paired: bool,
) -> Strength:
    enough = min(len(first), len(second)) > first.shape[1]
    numbers = key_numbers(records, settings)
    return Strength(
        records.task,
        mmd(first, second, paired=paired),
        frechet(first, second) if enough else math.nan,
        len(second),
        {name: numbers[name] for name in SCORES},
    )


def _by_image(records: TaskRecords, store: Store) -> npt.NDArray[Any]:
    """Features of every image once, sorted by id, shape (images, width)."""
    _, first = np.unique(records.images, return_index=True)
    features = features_of(records, store).image.float().numpy()[first]
    if not np.isfinite(features).all():
        raise ValueError(f"expected an image with every question of {records.task}")
    return features
