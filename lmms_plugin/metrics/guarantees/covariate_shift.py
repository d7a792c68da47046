"""Weights that make images of one distribution stand for another, as far as features tell the two apart.

The density ratio of the features is estimated by the odds of a penalised logistic regression that tells where an image
comes from (Tibshirani et al., "Conformal prediction under covariate shift", NeurIPS 2019). It is cross-fitted: the
weight of an image is of a regression that has seen neither this image nor any label, and so is what is said of how well
the two sets are told apart. Features that outnumber the images are rotated into principal components.

Given the features of all images, the weights are constants, and images that are independent have independent losses. A
bet of constant size λ on what a weighted image gains then multiplies its capital by Π(1 + λ μ) on average, where the
means μ of these images add up to at most 0 if the risk is not kept; that is at most 1, because a geometric mean is at
most the arithmetic one. So a promise with these weights is exact for images with the features of those at hand, counted
with their weights (`risk_bounds` bets so). It is one of the other images only as far as the ratio is right and answers
to images with equal features are as often right in both. Neither can be tested without labels.

Weights are clipped, which changes the images that the promise is of, and the effective number of images says what is
left of it. Where features tell the two sets apart almost always they hardly overlap, and no weight makes one stand for
the other: `overlaps` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from lmms_plugin.metrics._inputs import Floats
from lmms_plugin.metrics.selective import auroc

QUANTILE = 0.99
"""Weights end at this quantile of those of the images that are weighted."""
RIDGES = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)
"""Penalties of the squared coefficients of standardised features, strongest first; the first leaves hardly any
weights. The one that tells images best which it was not fitted to is taken."""
FOLDS = 5
COMPONENTS = 100
"""Largest number of principal components."""
APART = 0.95
"""AUROC from which two sets count as without overlap; the penalty would make the weights look harmless there."""
_STEEPEST = 30.0

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class DensityRatio:
    """Estimated ratio of two densities of features at the images of the first.

    Attributes:
        weights: Weight of each image, clipped, shape (n,); about 1 on average.
        heaviest: Weight at which larger ones are clipped.
        auroc: How well the features tell the two sets apart: 0.5 for not at all, 1 for no overlap.
        ridge: Penalty that was taken, of `RIDGES`.
    """

    weights: Floats
    heaviest: float
    auroc: float
    ridge: float

    @property
    def overlaps(self) -> bool:
        """Whether the two sets overlap enough for weights to mean anything."""
        return self.auroc < APART


def density_ratio(source: npt.ArrayLike, target: npt.ArrayLike, *, seed: int = 0) -> DensityRatio:
    """Estimate how much more often each image of `source` would occur among those of `target`.

    Args:
        source: Features of images that labels are known of, shape (n, features).
        target: Features of images that are to be stood for, shape (m, features); their labels are not needed.
        seed: Seed of the folds of cross-fitting.

    Raises:
        ValueError: A set has fewer than 2 images, numbers of features differ, or a feature is not finite.
    """
    ours, theirs = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1] != theirs.shape[1] or min(len(ours), len(theirs)) < 2:
        raise ValueError(f"expected features of 2 images or more each, got shapes {ours.shape} and {theirs.shape}")
    both = np.concatenate([ours, theirs])
    if not np.isfinite(both).all():
        raise ValueError("expected finite features, got others")
    spread = both.std(axis=0)
    standard = (both - both.mean(axis=0)) / np.where(spread > 0.0, spread, 1.0)
    smaller = min(len(ours), len(theirs))
    rotated = principal_components(standard, min(smaller - 1, COMPONENTS))
    of_target = np.repeat([0.0, 1.0], [len(ours), len(theirs)])
    ridge, logits = _cross_fitted(rotated, of_target, _folds((len(ours), len(theirs)), min(FOLDS, smaller), seed))
    weights = np.exp(logits[: len(ours)])
    heaviest = float(np.quantile(weights, QUANTILE))
    told = auroc(np.exp(-np.logaddexp(0.0, -logits)), of_target)
    return DensityRatio(np.minimum(weights, heaviest), heaviest, told, ridge)


def principal_components(standard: Floats, most: int) -> Floats:
    """Return features, or if there are more than `most` of them as many principal components, shape (n, components)."""
    images, features = standard.shape
    if features <= most:
        return standard
    if features <= images:
        _, directions = np.linalg.eigh(standard.T @ standard)
        return np.asarray(standard @ directions[:, ::-1][:, :most])
    values, vectors = np.linalg.eigh(standard @ standard.T)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0)))[:, ::-1][:, :most])


def _folds(sizes: tuple[int, int], folds: int, seed: int) -> Indices:
    """Return the fold of every image, of both sets as many."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(size) % folds for size in sizes])


def _cross_fitted(features: Floats, of_target: Floats, fold: Indices) -> tuple[float, Floats]:
    """Return the best penalty and each image's log-odds by the regression that was not fitted to it."""
    share = _shares(of_target)
    best = (np.inf, RIDGES[0], np.zeros(of_target.size))
    for ridge, logits in _paths(features, of_target, fold):
        loss = float(share @ (np.logaddexp(0.0, logits) - of_target * logits))
        if loss >= best[0]:
            # Weaker penalties tell other images worse still.
            break
        best = (loss, ridge, logits)
    return best[1], best[2]


def _paths(features: Floats, of_target: Floats, fold: Indices) -> Iterator[tuple[float, Floats]]:
    """Yield the log-odds of all images for weaker and weaker penalties."""
    folds = range(int(fold.max()) + 1)
    fitted = [np.zeros(features.shape[1] + 1) for _ in folds]
    for ridge in RIDGES:
        logits = np.empty(of_target.size)
        for one in folds:
            out = fold == one
            fitted[one] = _fit(features[~out], of_target[~out], ridge, fitted[one])
            logits[out] = features[out] @ fitted[one][1:] + fitted[one][0]
        yield ridge, np.clip(logits, -_STEEPEST, _STEEPEST)


def _fit(features: Floats, of_target: Floats, ridge: float, start: Floats) -> Floats:
    share = _shares(of_target)

    def loss(coefficients: Floats) -> tuple[float, Floats]:
        logit = features @ coefficients[1:] + coefficients[0]
        value = share @ (np.logaddexp(0.0, logit) - of_target * logit) + ridge * coefficients[1:] @ coefficients[1:]
        off = share * (np.exp(-np.logaddexp(0.0, -logit)) - of_target)
        return float(value), np.concatenate([[off.sum()], features.T @ off + 2.0 * ridge * coefficients[1:]])

    fitted: Floats = minimize(loss, start, jac=True, method="L-BFGS-B").x
    return fitted


def _shares(of_target: Floats) -> Floats:
    """Return what each image weighs in a fit: both sets alike, so that odds tell nothing of their sizes."""
    there = of_target.sum()
    shares: Floats = np.where(of_target > 0.0, 0.5 / there, 0.5 / (of_target.size - there))
    return shares


def effective_images(weights: Floats) -> float:
    """Return how many equally weighted images say as much: (Σ w)² ÷ Σ w²."""
    squares = float(np.sum(weights**2))
    return float(np.sum(weights)) ** 2 / squares if squares > 0.0 else 0.0
