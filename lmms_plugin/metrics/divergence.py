"""Divergence of one model from another over the tokens of an answer, and how well it foretells which answers flip."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import wasserstein_distance

from lmms_plugin.metrics._inputs import Floats, fractions
from lmms_plugin.metrics.bootstrap import Clusters

FLOOR = 1e-30
"""Least probability of any single token that the upper bound of a KL divergence assumes where tokens are not told."""
_SLACK = 1e-3
"""How far above 1 probabilities may add up, by rounding."""


class KlBounds(NamedTuple):
    """Bounds of a KL divergence, in nats."""

    low: float
    high: float


def kl_divergence(first: npt.ArrayLike, second: npt.ArrayLike) -> Floats:
    """Return the exact KL divergence Σ_v p(v)·(log p(v) − log q(v)) of distributions over one vocabulary, in nats.

    Source: Kullback & Leibler (1951). A token of probability 0 in the first adds nothing; one of probability 0 in the
    second alone makes it infinite.

    Args:
        first: Natural log-probabilities log p, shape (..., vocabulary).
        second: Those of the distribution whose distance from the first is meant, log q, of the same shape.

    Returns:
        Shape (...), at least 0.

    Raises:
        ValueError: The shapes differ, or a log-probability is NaN or above 0.
    """
    p, q = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if p.shape != q.shape or not p.ndim:
        raise ValueError(f"expected log-probabilities of one shape (..., vocabulary), got {p.shape} and {q.shape}")
    if not (np.all(p <= _SLACK) and np.all(q <= _SLACK)):
        raise ValueError("expected natural log-probabilities of at most 0")
    there = p > -np.inf
    terms = np.where(there, np.exp(p) * (np.where(there, p, 0.0) - np.where(there, q, 0.0)), 0.0)
    divergence: Floats = np.maximum(terms.sum(axis=-1), 0.0)
    return divergence


def kl_bounds(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    first_groups: npt.ArrayLike = (),
    second_groups: npt.ArrayLike = (),
    *,
    rounding: float = 0.0,
    group_rounding: float = 0.0,
    floor: float = FLOOR,
) -> KlBounds:
    """Return bounds of a KL divergence between distributions of which only some probabilities are told.

    Let p_i and q_i be the probabilities of the tokens that both distributions tell, and P_g, Q_g the masses of groups
    of tokens whose members are not told (the remainder of a top-k is one such group).

    - Low: Σ p_i·log(p_i/q_i) + Σ P_g·log(P_g/Q_g). To lump tokens together never raises a KL divergence (log-sum
      inequality; Cover & Thomas, Elements of Information Theory, theorem 2.7.1).
    - High: Σ p_i·log(p_i/q_i) + Σ P_g·log(P_g/ε). Within a group p_v ≤ P_g and q_v ≥ ε for each of its tokens v, so
      that Σ p_v·log(p_v/q_v) ≤ Σ p_v·log(P_g/ε) = P_g·log(P_g/ε). Without such an ε, how mass is spread over untold
      tokens is open, and no KL divergence is too large.

    With rounded probabilities each term is taken at its least and at its largest value within the rounding.

    Args:
        first: p_i, shape (k,).
        second: q_i of the same tokens, shape (k,).
        first_groups: P_g, shape (g,).
        second_groups: Q_g of the same groups, shape (g,).
        rounding: Largest error of each p_i and q_i.
        group_rounding: Largest error of each P_g and Q_g.
        floor: ε, least probability that the second distribution gives to a token of a group; 0 for none, which makes
            the high end infinite unless all P_g are 0.

    Raises:
        ValueError: Shapes do not fit, a number is not in [0, 1], or one distribution does not add up to 1.
    """
    p, q = (np.asarray(values, np.float64) for values in (first, second))
    p_groups, q_groups = (np.asarray(values, np.float64) for values in (first_groups, second_groups))
    if p.shape != q.shape or p_groups.shape != q_groups.shape or p.ndim != 1 or p_groups.ndim != 1:
        raise ValueError(
            f"expected as many probabilities of both, got {p.shape} and {q.shape}, groups {p_groups.shape} and "
            f"{q_groups.shape}"
        )
    slack = _SLACK + rounding * p.size + group_rounding * p_groups.size
    _expect_distribution("first", np.concatenate([p, p_groups]), slack)
    _expect_distribution("second", np.concatenate([q, q_groups]), slack)
    low = _least(p, q, rounding).sum() + _least(p_groups, q_groups, group_rounding).sum()
    high = _most(p, q, rounding, floor).sum() + _most(p_groups, np.zeros_like(p_groups), group_rounding, floor).sum()
    return KlBounds(max(float(low), 0.0), max(float(high), 0.0))


def _expect_distribution(name: str, values: Floats, slack: float) -> None:
    # Sums of parts end a last bit above 1.
    fractions(name, np.where(values > 1.0, values - _SLACK, values))
    if abs(values.sum() - 1.0) > slack:
        raise ValueError(f"expected probabilities of the {name} that add up to 1, got {values.sum():.6f}")


def _least(p: Floats, q: Floats, rounding: float) -> Floats:
    """Return the least p·log(p/q) within the rounding: at the largest q, and there the convex function's minimum."""
    q = np.minimum(q + rounding, 1.0)
    return _term(np.clip(q / np.e, np.maximum(p - rounding, 0.0), p + rounding), q)


def _most(p: Floats, q: Floats, rounding: float, floor: float) -> Floats:
    """Return the largest p·log(p/q) within the rounding: at the least q, and there at an end of p's interval."""
    q = np.maximum(q - rounding, floor)
    ends = np.maximum(p - rounding, 0.0), np.minimum(p + rounding, 1.0)
    return np.maximum(_term(ends[0], q), _term(ends[1], q))


def _term(p: Floats, q: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0.0, p * (np.log(p) - np.log(q)), 0.0)


def mean_shift(
    first_values: npt.ArrayLike, first: npt.ArrayLike, second_values: npt.ArrayLike, second: npt.ArrayLike
) -> float:
    """Return by how much a number moves on average from one distribution to the other, in its own units.

    It is the Wasserstein distance W₁: the mean |x − y| of the nearest pairs of draws, 0 only for equal distributions
    and |x − y| of two certain numbers. Source: Villani, Optimal Transport (2009), chapter 6.

    Args:
        first_values: Values of the first distribution, shape (n,).
        first: Their probabilities, shape (n,); of a sum below 1 the remainder is no number, and not counted.
        second_values: Values of the second distribution, shape (m,).
        second: Their probabilities, shape (m,).

    Returns:
        Distance; NaN where one of them holds no number.
    """
    if not (np.sum(first) > 0.0 and np.sum(second) > 0.0):
        return float("nan")
    return float(wasserstein_distance(first_values, second_values, first, second))


class FlipsPredicted:
    """Share of the flipped answers that are among as many answers of the highest score (R-precision).

    With F flipped answers, the F answers of the highest score are predicted to flip; the number is the share of the
    flipped ones among them. Of equal scores across that edge the expected share counts. A score without meaning gets
    F/n on average, a perfect one 1. Source: Manning, Raghavan & Schütze, Introduction to Information Retrieval, §8.4.

    Args:
        score: Score of each answer, high where a flip is expected; finite, shape (n,).
        flipped: Whether each answer flipped, 1 or 0, shape (n,).
        clusters: Clusters of the n answers.

    Raises:
        ValueError: The arrays differ in shape, or a score is not finite.
    """

    names = ("flips_predicted",)

    def __init__(self, score: npt.ArrayLike, flipped: npt.ArrayLike, clusters: Clusters) -> None:
        scores, flips = np.asarray(score, np.float64), fractions("flip", flipped)
        if scores.shape != flips.shape or not np.isfinite(scores).all():
            raise ValueError(f"expected a finite score for each of {flips.size} answers, got shape {scores.shape}")
        order = np.argsort(-scores, kind="stable")
        self._index, self._flips = clusters.index[order], flips[order]
        # First answer of each run of equal scores.
        self._starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0.0)

    def __call__(self, counts: Floats) -> Floats:
        """Return shares, shape (resamples, 1); NaN where nothing flipped."""
        drawn = counts[:, self._index]
        size = np.add.reduceat(drawn, self._starts, axis=1)
        flips = np.add.reduceat(drawn * self._flips, self._starts, axis=1)
        total = flips.sum(axis=1, keepdims=True)
        before = np.cumsum(size, axis=1) - size
        taken = np.clip(total - before, 0.0, size)
        with np.errstate(divide="ignore", invalid="ignore"):
            hits = np.where(size > 0.0, flips * taken / size, 0.0).sum(axis=1, keepdims=True)
            share: Floats = hits / total
        return share
