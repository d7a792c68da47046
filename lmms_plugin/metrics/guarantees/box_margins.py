"""Boxes that are grown until they contain the true one with a stated probability.

Split conformal prediction on boxes (de Grancey et al., "Object detection with probabilistic guarantees", 2022), with
images as the exchangeable units. Documents of an image are not exchangeable with those of others, so an image counts
once, its documents with equal shares (Lee, Barber and Willett, "Distribution-free inference with hierarchical data",
2023). Of other ways that hold, the largest score of an image promises more than is asked, that all of its boxes contain
theirs, and one document drawn from each image makes the margin depend on the draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmms_plugin.metrics._inputs import ROUNDING, Floats, one_fraction


@dataclass(frozen=True)
class BoxMargin:
    """How far boxes are to be grown.

    Attributes:
        margin: Share of its own width and height by which a box grows on each side; infinite where no margin that was
            seen is enough, because of answers that are far off, or of too few images.
        probability: Probability that a random box of a new image, grown so, contains the true one.
        images: Number of images it was chosen on.
        boxes: Number of their boxes.
    """

    margin: float
    probability: float
    images: int
    boxes: int


def growth_needed(predicted: npt.ArrayLike, true: npt.ArrayLike) -> Floats:
    """Return by which share of its own width and height each box must grow on every side to contain the true one.

    Args:
        predicted: Boxes as left, top, right, bottom in any frame, shape (n, 4).
        true: True boxes in the same frame, shape (n, 4).

    Returns:
        Shares, shape (n,): 0 where the true box is inside already, infinite for a box without width or height that
        would have to grow.

    Raises:
        ValueError: The shapes differ, or a box ends before it begins.
    """
    ours, theirs = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    if ours.shape != theirs.shape or ours.ndim != 2 or ours.shape[1] != 4:
        raise ValueError(f"expected boxes of shape (n, 4) each, got {ours.shape} and {theirs.shape}")
    sides = ours[:, 2:] - ours[:, :2]
    if not np.all(sides >= 0.0):
        raise ValueError("expected boxes as left, top, right, bottom, got one that ends before it begins")
    beyond = np.maximum(np.concatenate([ours[:, :2] - theirs[:, :2], theirs[:, 2:] - ours[:, 2:]], axis=1), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(beyond > 0.0, beyond / np.tile(sides, 2), 0.0)
    found: Floats = shares.max(axis=1)
    return found


def grown(boxes: npt.ArrayLike, margin: float) -> Floats:
    """Return boxes grown by a share of their own width and height on every side, shape (n, 4)."""
    array = np.asarray(boxes, np.float64)
    added = margin * np.tile(array[:, 2:] - array[:, :2], 2)
    return np.asarray(array + added * np.array([-1.0, -1.0, 1.0, 1.0]))


def box_margin(
    needed: npt.ArrayLike,
    image: npt.NDArray[np.intp],
    probability: float,
    *,
    weights: Floats | None = None,
    heaviest: float = 1.0,
) -> BoxMargin:
    """Choose the smallest margin with which a random box of a new image contains the true one.

    The quantile of the images' scores, each image with its weight, dealt equally to its boxes, and the new image, of
    which nothing is known, with its own at infinity (Tibshirani et al., "Conformal prediction under covariate shift",
    NeurIPS 2019; without weights all images weigh alike).

    Args:
        needed: What each box would have to grow by, as of `growth_needed`, shape (n,); infinite for no box.
        image: Index of each box's image, shape (n,).
        probability: Probability, in (0, 1), over draws of these images and the new one.
        weights: Density ratio of each image in [0, images), shape (images,); None for 1.
        heaviest: Largest weight that the new image can have.
    """
    scores, wanted = np.asarray(needed, np.float64), one_fraction("probability", probability)
    if np.isnan(scores).any() or scores.shape != image.shape:
        raise ValueError("expected one number per box, got NaN or another shape")
    names, index, boxes = np.unique(image, return_inverse=True, return_counts=True)
    weight = np.ones(names.size) if weights is None else np.asarray(weights, np.float64)[names]
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum((weight / boxes)[index][order]) / (weight.sum() + heaviest)
    place = int(np.searchsorted(reached, wanted - ROUNDING))
    margin = float(scores[order][place]) if place < scores.size else float("inf")
    return BoxMargin(margin, wanted, int(names.size), int(scores.size))
