"""Intervals of many runs at once: the draws are made once, and one pass over them gives every metric.

The numbers are those of `lmms_plugin.metrics.bootstrap` on the same seed: equal draws, equal formulas. Here all
resamples of a task are rows of one array, because a study has thousands of small tasks and a Python loop over
resamples would cost more than the arithmetic.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lmms_plugin.metrics.bootstrap import Clusters, Statistic, draw

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.uint16]
Whole = npt.NDArray[np.int32]

RISKS = (0.01, 0.05)
COSTS = (1, 10, 100)
SELECTIVE = ("aurc", *(f"coverage@{risk:g}" for risk in RISKS), "auroc")
_AT_ONCE = 100_000
"""Numbers per array: larger ones are given back to the system every time, and fetched anew."""
_ROUNDING = 1e-12


@lru_cache(maxsize=4)
def draws(clusters: int, resamples: int, seed: int) -> Counts:
    """How often each cluster is drawn, shape (1 + resamples, clusters); in the first row once each: the data."""
    drawn = [np.ones(clusters, np.uint16), *(draw(clusters, seed, k).astype(np.uint16) for k in range(resamples))]
    counts = np.stack(drawn)
    counts.flags.writeable = False
    return counts


def evaluate(statistics: Sequence[Statistic], counts: Counts) -> list[Floats]:
    """Values of each statistic, shape (1 + resamples, names)."""
    step = max(1, _AT_ONCE // max(counts.shape[1], 1))
    found: list[list[Floats]] = [[] for _ in statistics]
    for start in range(0, len(counts), step):
        rows = counts[start : start + step]
        # Column by column, as sparse products read them.
        columns = np.asfortranarray(rows, np.float64)
        for values, statistic in zip(found, statistics, strict=True):
            # Whole numbers stay what they are for those that add them up.
            values.append(statistic(rows) if isinstance(statistic, Selective) else statistic(columns))
    return [np.concatenate(values) for values in found]


class Selective:
    """AURC, coverage at risk and AUROC as functions of cluster counts, all resamples at once.

    Equal to `lmms_plugin.metrics.ranked.Ranked`, which takes one resample after the other and so suits millions of
    records.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        clusters: Of the n records.
    """

    names = SELECTIVE

    def __init__(self, confidence: Floats, outcome: Floats, clusters: Clusters) -> None:
        places = np.argsort(-confidence, kind="stable")
        ordered, loss = confidence[places], 1.0 - outcome[places]
        self._index = clusters.index[places]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        ends = np.append(starts[1:], ordered.size)
        self._wrong = np.flatnonzero(loss > 0.0)
        self._loss = loss[self._wrong]
        self._hard = bool(np.all(self._loss == 1.0))
        # Curves change their course only at confidences that a wrong answer has: everything is read off there.
        block = np.searchsorted(ends, self._wrong, side="right")
        first = np.flatnonzero(np.r_[True, block[1:] != block[:-1]]) if block.size else block
        self._starts, self._ends = starts[block[first]], ends[block[first]]
        self._bounds = np.append(first, self._wrong.size)
        self._width = ordered.size

    def __call__(self, counts: npt.NDArray[np.generic]) -> Floats:
        """Values of `names`, shape (resamples, names); NaN where undefined."""
        step = max(1, _AT_ONCE // max(self._width, 1))
        # Sums of 32-bit integers from the same are added up several times as fast as from others.
        whole = np.ascontiguousarray(counts, np.int32)
        return np.concatenate([self._rows(whole[k : k + step]) for k in range(0, len(whole), step)])

    def _rows(self, times: Whole) -> Floats:
        drawn = times.take(self._index, axis=1)
        errors = drawn.take(self._wrong, axis=1)
        answered = _sums(drawn)
        lost = _sums(errors if self._hard else errors * self._loss).take(self._bounds, axis=1).astype(np.float64)
        before, after, total = answered[:, self._starts], answered[:, self._ends], answered[:, -1]
        wrong = lost[:, -1]
        values = [_aurc(before, after, np.diff(lost, axis=1), total)]
        risk_before = lost[:, :-1] / np.maximum(before, 1)
        values += [_coverage(before, risk_before, wrong, total, risk) for risk in RISKS]
        values.append(_auroc(before, after, lost, total))
        found: Floats = np.stack(values, axis=1)
        found[total == 0] = np.nan
        return found


def _sums(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sums of the first 0, 1, … of each row."""
    sums = np.zeros((len(values), values.shape[1] + 1), values.dtype)
    np.cumsum(values, axis=1, dtype=values.dtype, out=sums[:, 1:])
    return sums


def _aurc(before: Whole, after: Whole, lost: Floats, total: Whole) -> Floats:
    # A record at rank k adds its loss to the risk at every rank from there on: loss · (H(total) − H(k − 1)).
    sums = _harmonic_sums(1 << int(total.max()).bit_length())
    records = (after - before).astype(np.float64)
    n = np.maximum(total, 1)
    harmonic = (sums[n] + n) / n
    parts = records * harmonic[:, None] - (sums[after] - sums[before])
    found: Floats = np.sum(lost / np.maximum(records, 1.0) * parts, axis=1) / n
    return found


def _coverage(before: Whole, risk_before: Floats, wrong: Floats, total: Whole, risk: float) -> Floats:
    n = np.maximum(total, 1)
    if not before.shape[1]:
        return np.ones(len(n))
    # Risk falls up to the next error, so its last admissible value lies just before one, the first at the latest.
    last = before.shape[1] - 1 - np.argmax((risk_before <= risk + _ROUNDING)[:, ::-1], axis=1)
    reached = before[np.arange(len(n)), last] / n
    found: Floats = np.where(wrong / n <= risk + _ROUNDING, 1.0, reached)
    return found


def _auroc(before: Whole, after: Whole, lost: Floats, total: Whole) -> Floats:
    here, above = np.diff(lost, axis=1), lost[:, :-1]
    wrong = lost[:, -1]
    right = total - wrong
    below = np.sum(here * (before - above + (after - before - here) / 2), axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where((right > 0) & (wrong > 0), below / (right * wrong), np.nan)
    return found


@lru_cache(maxsize=4)
def _harmonic_sums(size: int) -> Floats:
    """Σ of the harmonic numbers H(0) … H(k − 1) = k·H(k) − k for k < size."""
    ranks = np.arange(1, size)
    return np.concatenate(([0.0], ranks * np.cumsum(1.0 / ranks) - ranks))
