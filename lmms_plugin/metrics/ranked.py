"""The metrics that depend on the order of confidences, as functions of how often each cluster counts.

Records are sorted once. A resample then is one gather and one cumulative sum of small integers; everything else is read
off where an answer was wrong, because a curve changes its course nowhere else: between two wrong answers risk only
falls, and right answers add to an area what their number says. With whole counts each metric equals the one of the
same name on the records repeated that often, of which `lmms_plugin.metrics.bootstrap` makes intervals.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from lmms_plugin.metrics._inputs import Floats, paired
from lmms_plugin.metrics.bootstrap import Clusters
from lmms_plugin.metrics.calibration import DEFAULT_BINS
from lmms_plugin.metrics.selective import RISKS

Whole = npt.NDArray[np.integer]
Places = npt.NDArray[np.intp]

_ROUNDING = 1e-12
_SMALL = np.iinfo(np.int32).max


class Curve:
    """The risk–coverage curve of a resample, from the highest confidence down, at every confidence with an error.

    Attributes:
        order: The sorted records.
        times: Shape (clusters,), how often each cluster was drawn.
        total: Records drawn.
    """

    def __init__(self, order: "_Order", times: Whole, total: int) -> None:
        self.order, self.times, self.total = order, times, total

    @cached_property
    def drawn(self) -> Whole:
        """Shape (n,), how often each record was drawn."""
        return self.times.take(self.order.index)

    @cached_property
    def answered(self) -> Whole:
        """Shape (n + 1,), records drawn among the k most confident."""
        return _cumulative(self.drawn, self.total)

    @cached_property
    def before(self) -> Whole:
        """Shape (points,), records of a higher confidence."""
        return self.answered.take(self.order.starts)

    @cached_property
    def after(self) -> Whole:
        """Shape (points,), records of this or a higher confidence."""
        return self.answered.take(self.order.ends)

    @cached_property
    def _wrong(self) -> Floats:
        drawn = self.drawn.take(self.order.wrong)
        if self.order.loss is None:
            found = _cumulative(drawn, self.total)
        else:
            found = np.concatenate(([0.0], np.cumsum(drawn * self.order.loss)))
        return found.take(self.order.bounds).astype(np.float64)

    @property
    def wrong_before(self) -> Floats:
        """Shape (points,), 1 − outcome summed over records of a higher confidence."""
        return self._wrong[:-1]

    @property
    def wrong(self) -> float:
        """1 − outcome summed over all records."""
        return float(self._wrong[-1])

    @property
    def right(self) -> float:
        """Outcomes summed over all records."""
        return self.total - self.wrong

    @cached_property
    def lost(self) -> Floats:
        """Shape (points,), 1 − outcome summed over records of this confidence."""
        return np.diff(self._wrong)

    @cached_property
    def records(self) -> Floats:
        """Shape (points,), records of this confidence."""
        return np.subtract(self.after, self.before, dtype=np.float64)

    @cached_property
    def right_before(self) -> Floats:
        """Shape (points,), outcomes summed over records of a higher confidence."""
        return self.before - self.wrong_before

    @cached_property
    def risk_before(self) -> Floats:
        """Shape (points,), risk of answering all of a higher confidence; 0 where there is none."""
        return self.wrong_before / np.maximum(self.before, 1)

    @cached_property
    def aurc(self) -> float:
        """Area under the risk–coverage curve."""
        mean = self.lost / np.maximum(self.records, 1.0)
        return _area(self.before, self.after, mean, self.total)

    @cached_property
    def ideal_aurc(self) -> float:
        """The same of these records in the best order: by outcome."""
        if self.order.loss is None:
            ends = np.array([0, round(self.right), self.total])
            return _area(ends[:-1], ends[1:], np.array([0.0, 1.0]), self.total)
        index, bounds, loss = self.order.by_outcome
        ends = _cumulative(self.times.take(index), self.total).take(bounds)
        return _area(ends[:-1], ends[1:], loss, self.total)


def _area(before: Whole, after: Whole, loss: Floats, total: int) -> float:
    # A record at rank k adds its loss to the risk at every rank from there: loss · (H(total) − H(k − 1)). Of records
    # that share a confidence each has their mean loss, and Σ H(k − 1) over their ranks is a difference of ΣH.
    sums = _harmonic_sums(1 << total.bit_length())
    harmonic = (sums[total] + total) / total
    parts = (after - before) * harmonic - (sums.take(after) - sums.take(before))
    return float(loss @ parts / total)


def _aurc(curve: Curve) -> float:
    return curve.aurc


def _e_aurc(curve: Curve) -> float:
    return curve.aurc - curve.ideal_aurc


def _coverage(curve: Curve, risk: float) -> float:
    bound = risk + _ROUNDING
    if curve.wrong / curve.total <= bound:
        return 1.0
    # Risk falls up to the next error, so its last admissible value lies just before one, the first at the latest.
    within = curve.risk_before[::-1] <= bound
    return float(curve.before[-1 - int(within.argmax())] / curve.total)


def _auroc(curve: Curve) -> float:
    if min(curve.wrong, curve.right) <= 0.0:
        return float("nan")
    below = curve.lost @ (curve.right_before + (curve.records - curve.lost) / 2)
    return float(below / (curve.right * curve.wrong))


def _aupr_error(curve: Curve) -> float:
    if min(curve.wrong, curve.right) <= 0.0:
        return float("nan")
    found, looked_at = curve.wrong - curve.wrong_before, np.maximum(curve.total - curve.before, 1)
    return float(curve.lost @ (found / looked_at) / curve.wrong)


def _fpr(curve: Curve, tpr: float = 0.95) -> float:
    if min(curve.wrong, curve.right) <= 0.0:
        return float("nan")
    # Accepted are the errors above which too few right answers are.
    above = np.searchsorted(curve.right_before, (tpr - _ROUNDING) * curve.right)
    return float(curve.wrong_before[above] / curve.wrong) if above < curve.lost.size else 1.0


def _adaptive_ece(curve: Curve, n_bins: int = DEFAULT_BINS) -> float:
    blocks, total = curve.order.blocks, curve.total
    ends = curve.answered[1:] if blocks is None else curve.answered.take(blocks)
    # A block's middle rank from below, times 2, is 2·total − 1 − (records above it + records above the next).
    sought = ((2 * total - 1) * n_bins - 2 * total * np.arange(n_bins - 1, 0, -1)) / n_bins
    first = np.searchsorted(ends, sought / 2, side="right")
    cuts = first + (ends[first].astype(np.float64) + np.where(first > 0, ends[first - 1], 0) <= sought)
    # Cuts count blocks: as places of records they are where the block before them ends.
    places = cuts if blocks is None else np.where(cuts > 0, blocks[cuts - 1], 0)
    gaps = curve.drawn * curve.order.residual
    parts = [gaps[start:stop].sum() for start, stop in pairwise((0, *places.tolist(), gaps.size))]
    return float(np.abs(parts).sum() / total)


RANKED: Mapping[str, Callable[[Curve], float]] = MappingProxyType(
    {
        "aurc": _aurc,
        "e_aurc": _e_aurc,
        **{f"coverage@{risk:g}": partial(_coverage, risk=risk) for risk in RISKS},
        "auroc": _auroc,
        "aupr_error": _aupr_error,
        "fpr_at_tpr": _fpr,
        "adaptive_ece": _adaptive_ece,
    }
)
"""Metrics that depend on the order of confidences, by name."""


class Ranked:
    """Metrics of `RANKED`: selective prediction, ranking, and calibration over bins of equal mass.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        clusters: Of the n records.
        names: Which of them; all by default. The cost of the cumulative sums is shared.
    """

    def __init__(
        self,
        confidence: npt.ArrayLike,
        outcome: npt.ArrayLike,
        clusters: Clusters,
        names: Sequence[str] = tuple(RANKED),
    ) -> None:
        c, y = paired(confidence, outcome)
        self.names = tuple(names)
        self._order = _Order(c, y, clusters.index)
        self._sizes = np.bincount(clusters.index, minlength=clusters.count).astype(np.float64)

    def __call__(self, counts: Floats) -> Floats:
        """Values of `names`, shape (resamples, names); NaN for a resample without records.

        Raises:
            ValueError: If a count is not a whole number of at least 0.
        """
        totals = (counts @ self._sizes).tolist()
        return np.array([self._one(row, int(total)) for row, total in zip(_whole(counts), totals, strict=True)])

    def _one(self, times: Whole, total: int) -> list[float]:
        curve = Curve(self._order, times, total)
        return [RANKED[name](curve) if total else float("nan") for name in self.names]


class _Order:
    """Records from the highest confidence down.

    Attributes:
        index: Shape (n,), cluster of each.
        residual: Shape (n,), confidence − outcome.
        blocks: Shape (blocks,), where each block of equal confidences ends; None if all confidences differ.
        wrong: Shape (wrong records,), places of those with an outcome below 1.
        loss: Shape (wrong records,), their 1 − outcome; None if all are 1.
        starts: Shape (points,), where the blocks with a wrong record start.
        ends: Shape (points,), where they end.
        bounds: Shape (points + 1,), how many wrong records lie above each of those blocks, and how many there are.
    """

    def __init__(self, confidence: Floats, outcome: Floats, index: Places) -> None:
        places = np.argsort(-confidence, kind="stable")
        c, self._outcome, self.index = confidence[places], outcome[places], index[places].astype(np.intp)
        self.residual = c - self._outcome
        starts = _starts(c)
        ends = np.append(starts[1:], c.size)
        self.blocks = None if starts.size == c.size else ends
        self.wrong = np.flatnonzero(self._outcome < 1.0)
        loss = 1.0 - self._outcome[self.wrong]
        self.loss = None if np.all(loss == 1.0) else loss
        block = np.searchsorted(ends, self.wrong, side="right")
        first = _starts(block)
        self.starts, self.ends = starts[block[first]], ends[block[first]]
        self.bounds = np.append(first, self.wrong.size)

    @cached_property
    def by_outcome(self) -> tuple[Places, Places, Floats]:
        """In the order of outcomes, best first: clusters (n,), bounds (levels + 1,) and 1 − outcome (levels,)."""
        places = np.argsort(-self._outcome, kind="stable")
        y = self._outcome[places]
        starts = _starts(y)
        return self.index[places], np.append(starts, y.size), 1.0 - y[starts]


def _starts(ordered: npt.NDArray[np.generic]) -> Places:
    """Where blocks of equal values start; none in an empty array."""
    changed = np.ones(ordered.size, np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=changed[1:])
    return np.flatnonzero(changed)


def _cumulative(drawn: Whole, total: int) -> Whole:
    """Sums of the first 0, 1, … n, shape (n + 1,); numpy adds 32-bit integers up several times as fast as others."""
    sums: Whole = np.empty(drawn.size + 1, np.int32 if total <= _SMALL else np.int64)
    sums[0] = 0
    np.cumsum(drawn, dtype=sums.dtype, out=sums[1:])
    return sums


def _whole(counts: Floats) -> Whole:
    """Counts as the smallest integers that hold them, row after row."""
    highest = counts.max()
    kind = np.uint8 if highest < 2**8 else np.uint16 if highest < 2**16 else np.int64
    with np.errstate(invalid="ignore"):
        times: Whole = counts.astype(kind, order="C")
    if not np.array_equal(times, counts):
        raise ValueError("expected whole counts of clusters, got others")
    return times


@lru_cache(maxsize=4)
def _harmonic_sums(size: int) -> Floats:
    """Σ of the harmonic numbers H(0) … H(k − 1) = k·H(k) − k for k < size."""
    ranks = np.arange(1, size)
    table: Floats = np.concatenate(([0.0], ranks * np.cumsum(1.0 / ranks) - ranks))
    table.flags.writeable = False
    return table
