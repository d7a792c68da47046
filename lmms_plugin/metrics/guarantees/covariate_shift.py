"""Weights that make images of one distribution stand for another, as far as features tell the two apart.

The density ratio of the features is estimated by the odds of a logistic regression that tells where an image comes
from (Tibshirani et al., "Conformal prediction under covariate shift", NeurIPS 2019). A promise with these weights is of
the weighted images, exactly; it is one of the other images only as far as the ratio is right and answers to images with
equal features are as often right in both. Neither can be tested without labels. Weights are clipped, which changes the
images that the promise is of, and the effective number of images says what is left of it. Where features tell the two
sets apart almost always they hardly overlap, and no weight makes one stand for the other: `overlaps` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from lmms_plugin.metrics._inputs import Floats
from lmms_plugin.metrics.selective import auroc

QUANTILE = 0.99
"""Weights end at this quantile of those that the ratio was estimated from."""
RIDGE = 1e-2
"""Penalty of the squared coefficients of standardised features, per image."""
APART = 0.95
"""AUROC from which two sets count as without overlap; the penalty would make the weights look harmless there."""


@dataclass(frozen=True, eq=False)
class DensityRatio:
    """Estimated ratio of two densities of features, up to a constant.

    Attributes:
        centre: Mean of each feature, shape (features,).
        scale: Standard deviation of each feature; 1 where it does not vary.
        slope: Coefficients of the standardised features.
        heaviest: Weight at which larger ones are clipped.
        auroc: How well the features tell the two sets apart: 0.5 for not at all, 1 for no overlap.
    """

    centre: Floats
    scale: Floats
    slope: Floats
    heaviest: float
    auroc: float

    @property
    def overlaps(self) -> bool:
        """Whether the two sets overlap enough for weights to mean anything."""
        return self.auroc < APART

    def weights(self, features: npt.ArrayLike) -> Floats:
        """Return the weight of each image, shape (n,), from features of shape (n, features)."""
        found: Floats = np.minimum(np.exp(self._logits(features)), self.heaviest)
        return found

    def _logits(self, features: npt.ArrayLike) -> Floats:
        logits: Floats = ((np.asarray(features, np.float64) - self.centre) / self.scale) @ self.slope
        return logits


def density_ratio(source: npt.ArrayLike, target: npt.ArrayLike) -> DensityRatio:
    """Estimate how much more often each image of `source` would occur among those of `target`.

    Args:
        source: Features of images that labels are known of, shape (n, features); none of these may be tested on later.
        target: Features of images that are to be stood for, shape (m, features); their labels are not needed.

    Raises:
        ValueError: A set has fewer than 2 images, numbers of features differ, or a feature is not finite.
    """
    ours, theirs = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1] != theirs.shape[1] or min(len(ours), len(theirs)) < 2:
        raise ValueError(f"expected features of 2 images or more each, got shapes {ours.shape} and {theirs.shape}")
    both = np.concatenate([ours, theirs])
    if not np.isfinite(both).all():
        raise ValueError("expected finite features, got others")
    centre, spread = both.mean(axis=0), both.std(axis=0)
    scale = np.where(spread > 0.0, spread, 1.0)
    of_target = np.repeat([0.0, 1.0], [len(ours), len(theirs)])
    # Both sets weigh alike, so that the intercept tells nothing of their sizes.
    share = np.repeat([0.5 / len(ours), 0.5 / len(theirs)], [len(ours), len(theirs)])
    standard = (both - centre) / scale

    def loss(coefficients: Floats) -> tuple[float, Floats]:
        logit = standard @ coefficients[1:] + coefficients[0]
        value = share @ (np.logaddexp(0.0, logit) - of_target * logit) + RIDGE * coefficients[1:] @ coefficients[1:]
        off = share * (np.exp(-np.logaddexp(0.0, -logit)) - of_target)
        return float(value), np.concatenate([[off.sum()], standard.T @ off + 2.0 * RIDGE * coefficients[1:]])

    fitted: Floats = minimize(loss, np.zeros(both.shape[1] + 1), jac=True, method="L-BFGS-B").x
    logits = standard @ fitted[1:]
    heaviest = float(np.quantile(np.exp(logits[: len(ours)]), QUANTILE))
    odds = np.exp(-np.logaddexp(0.0, -logits))
    return DensityRatio(centre, scale, fitted[1:], heaviest, auroc(odds, of_target))


def effective_images(weights: Floats) -> float:
    """Return how many equally weighted images say as much: (Σ w)² ÷ Σ w²."""
    squares = float(np.sum(weights**2))
    return float(np.sum(weights)) ** 2 / squares if squares > 0.0 else 0.0
