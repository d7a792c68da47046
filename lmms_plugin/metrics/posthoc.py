"""Post-hoc calibrators: maps from a raw confidence to a probability, fitted on one split and applied to others.

A calibrator keeps the images it was fitted on and asks for the image of every record it is applied to: a record of an
image it has seen is an error, so a calibrated number is never measured where the map was fitted. Images and not
records, because expressions of one image are not independent.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression, minimize

from lmms_plugin.metrics._inputs import Floats, fractions, paired
from lmms_plugin.metrics.bins import ties

_CLIP = 1e-12
"""Confidences are kept this far from 0 and 1 before their logarithm is taken: joint probabilities can be tiny."""

_STEEPEST = 1e3


@dataclass(frozen=True)
class FittedOn:
    """What a calibrator was fitted on.

    Attributes:
        split: Its name, for people.
        records: How many records.
        images: Ids of their images.
    """

    split: str
    records: int
    images: frozenset[str]

    def refuse(self, images: Sequence[str], count: int) -> None:
        """Refuse records of images that were fitted on.

        Raises:
            ValueError: If one of them was, or there is not one image per record.
        """
        if len(images) != count:
            raise ValueError(f"expected one image per confidence, got {len(images)} images and {count} confidences")
        if seen := self.images.intersection(images):
            raise ValueError(
                f"expected images the calibrator has not seen, got {len(seen)} of its {len(self.images)} from split"
                f" {self.split!r}, e.g. {min(seen)!r}"
            )


@dataclass(frozen=True)
class Calibrator(ABC):
    """A non-decreasing map from confidence to probability, with what it was fitted on."""

    fitted_on: FittedOn

    @classmethod
    def fit(cls, confidence: npt.ArrayLike, outcome: npt.ArrayLike, images: Sequence[str], *, split: str) -> Self:
        """Fit by maximum likelihood (isotonic: least squares, which gives the same fit).

        Args:
            confidence: Shape (n,), in [0, 1].
            outcome: Shape (n,), in [0, 1]; 1 for right, 0 for wrong, between for a soft target.
            images: The n records' image ids.
            split: Name of the split, kept in `fitted_on`.

        Raises:
            ValueError: If lengths differ, values are outside [0, 1], or all outcomes are 0 or all are 1, of which
                nothing can be learnt.
        """
        c, y = paired(confidence, outcome)
        if len(images) != c.size:
            raise ValueError(f"expected one image per record, got {len(images)} images and {c.size} records")
        if not 0.0 < y.mean() < 1.0:
            raise ValueError(f"expected right and wrong outcomes to fit on, got {c.size} of {y[0]:g} only")
        return cls(FittedOn(split, c.size, frozenset(images)), **cls._solve(c, y))

    def apply(self, confidence: npt.ArrayLike, images: Sequence[str]) -> Floats:
        """Calibrated confidences, shape (n,), in [0, 1].

        Args:
            confidence: Shape (n,), in [0, 1].
            images: The n records' image ids.

        Raises:
            ValueError: If the calibrator was fitted on one of the images, lengths differ, or a confidence is not in
                [0, 1].
        """
        c = fractions("confidence", confidence)
        self.fitted_on.refuse(images, c.size)
        return np.clip(self._map(c), 0.0, 1.0)

    @classmethod
    @abstractmethod
    def _solve(cls, confidence: Floats, outcome: Floats) -> dict[str, Any]:
        """Parameters of the map, by the names of the dataclass fields."""

    @abstractmethod
    def _map(self, confidence: Floats) -> Floats:
        """The map itself, shape (n,) to shape (n,)."""


@dataclass(frozen=True)
class Temperature(Calibrator):
    """σ(logit(c) / temperature), Guo et al., ICML 2017. Keeps 0.5 where it is, so it cannot move an overall bias."""

    temperature: float

    @classmethod
    def _solve(cls, confidence: Floats, outcome: Floats) -> dict[str, Any]:
        slope = _logistic(_logit(confidence)[:, None], outcome, [(1.0 / _STEEPEST, _STEEPEST)])
        return {"temperature": float(1.0 / slope[0])}

    def _map(self, confidence: Floats) -> Floats:
        return _sigmoid(_logit(confidence) / self.temperature)


@dataclass(frozen=True)
class Platt(Calibrator):
    """σ(slope · logit(c) + intercept) with slope ≥ 0, Platt 1999 on the logit of the confidence."""

    slope: float
    intercept: float

    @classmethod
    def _solve(cls, confidence: Floats, outcome: Floats) -> dict[str, Any]:
        features = np.stack((_logit(confidence), np.ones_like(confidence)), axis=1)
        slope, intercept = _logistic(features, outcome, [(0.0, _STEEPEST), (None, None)])
        return {"slope": float(slope), "intercept": float(intercept)}

    def _map(self, confidence: Floats) -> Floats:
        return _sigmoid(self.slope * _logit(confidence) + self.intercept)


@dataclass(frozen=True)
class Beta(Calibrator):
    """σ(a · ln c − b · ln(1 − c) + intercept) with a, b ≥ 0, Kull et al., AISTATS 2017. With a = b it is Platt's."""

    a: float
    b: float
    intercept: float

    @classmethod
    def _solve(cls, confidence: Floats, outcome: Floats) -> dict[str, Any]:
        features = np.stack((*_logs(confidence), np.ones_like(confidence)), axis=1)
        a, b, intercept = _logistic(features, outcome, [(0.0, _STEEPEST), (0.0, _STEEPEST), (None, None)])
        return {"a": float(a), "b": float(b), "intercept": float(intercept)}

    def _map(self, confidence: Floats) -> Floats:
        right, wrong = _logs(confidence)
        return _sigmoid(self.a * right + self.b * wrong + self.intercept)


@dataclass(frozen=True)
class Isotonic(Calibrator):
    """The best non-decreasing map, linear between its knots and constant beyond them (Zadrozny & Elkan, KDD 2002).

    It ties confidences that it cannot tell apart, which changes what selective prediction can reach.

    Attributes:
        knots: Confidences, ascending.
        values: Probabilities there, non-decreasing.
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]

    @classmethod
    def _solve(cls, confidence: Floats, outcome: Floats) -> dict[str, Any]:
        blocks = ties(confidence, outcome)
        fitted = isotonic_regression(blocks.outcome / blocks.records, weights=blocks.records).x
        # Only the ends of each level are needed.
        change = np.concatenate(([True], fitted[1:] != fitted[:-1]))
        keep = change | np.append(change[1:], True)
        return {"knots": tuple(blocks.confidence[keep].tolist()), "values": tuple(fitted[keep].tolist())}

    def _map(self, confidence: Floats) -> Floats:
        return np.interp(confidence, self.knots, self.values)


CALIBRATORS: Mapping[str, type[Calibrator]] = MappingProxyType(
    {"temperature": Temperature, "platt": Platt, "isotonic": Isotonic, "beta": Beta}
)
"""Every calibrator by the name under which it is chosen and stored."""


def _logs(confidence: Floats) -> tuple[Floats, Floats]:
    clipped = np.clip(confidence, _CLIP, 1.0 - _CLIP)
    return np.log(clipped), -np.log1p(-clipped)


def _logit(confidence: Floats) -> Floats:
    right, wrong = _logs(confidence)
    return right + wrong


def _sigmoid(logit: Floats) -> Floats:
    positive: Floats = np.exp(-np.logaddexp(0.0, -logit))
    return positive


def _logistic(features: Floats, outcome: Floats, bounds: Sequence[tuple[float | None, float | None]]) -> Floats:
    """Coefficients of the least cross-entropy within bounds, shape (features,); the problem is convex."""

    def loss(coefficients: Floats) -> tuple[float, Floats]:
        logit = features @ coefficients
        gradient = features.T @ (_sigmoid(logit) - outcome) / outcome.size
        return float(np.mean(np.logaddexp(0.0, logit) - outcome * logit)), gradient

    start = np.array([0.0 if low is None else 1.0 for low, _ in bounds])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-14, "gtol": 1e-9})
    coefficients: Floats = found.x
    return coefficients
