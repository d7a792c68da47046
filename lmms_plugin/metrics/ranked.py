"""Metrics that depend on the order of confidences, as functions of how often each cluster counts.

Records are sorted once. All metrics but one are computed at the wrong answers only, because a curve changes its course
nowhere else: between two wrong answers risk only falls, and the contribution of right answers to an area depends only
on their number. What a resample has of records between two wrong answers is then a sum of small integers, for many
resamples in one product with a sparse matrix. With integer counts each metric equals that of the records repeated that
often; the metric of the plain records has every count 1.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from lmms_plugin.metrics._inputs import ROUNDING, Floats, paired
from lmms_plugin.metrics.bins import DEFAULT_BINS, equal_mass_cuts
from lmms_plugin.metrics.bootstrap import Clusters

RISKS: tuple[float, ...] = (0.005, 0.01, 0.05, 0.1, 0.2)
"""Tolerated risks at which coverage is reported."""

Whole = npt.NDArray[np.integer]
Places = npt.NDArray[np.intp]

_SMALL = np.iinfo(np.int32).max
NUMBERS_AT_ONCE = 50_000
"""Numbers per array: larger ones are returned to the system every time, and allocated again."""


class Curve:
    """Risk–coverage curves of some resamples, from the highest confidence down, at every confidence with an error.

    Attributes:
        order: Sorted records.
        times: Number of times each cluster was drawn, shape (resamples, clusters).
    """

    def __init__(self, order: "Order", times: Whole) -> None:
        self.order, self.times = order, times

    @cached_property
    def drawn(self) -> Whole:
        """Number of times each record was drawn, shape (resamples, n)."""
        return self.times.take(self.order.index, axis=1)

    @cached_property
    def answered(self) -> Whole:
        """Records drawn among the k most confident, shape (resamples, n + 1)."""
        return _cumulative(self.drawn)

    @cached_property
    def _between(self) -> Whole:
        """Records drawn of each row of `Order.between`, shape (resamples, rows)."""
        highest = int(self.times.max(initial=0))
        kind = np.int32 if highest * self.order.index.size <= _SMALL else np.int64
        counted: Whole = self.order.between @ self.times.T.astype(kind, copy=False)
        # Sums along rows, below, take a third of the time of sums down columns.
        return np.ascontiguousarray(counted.T)

    @cached_property
    def _upto(self) -> Whole:
        """Records drawn above each point and at it, one after the other, and all, shape (resamples, 2 · points + 1)."""
        points = self.order.starts.size
        return np.cumsum(self._between[:, : 2 * points + 1], axis=1, dtype=self._between.dtype)

    @cached_property
    def total(self) -> Whole:
        """Records drawn, shape (resamples,); 1 where there are none, of which every metric is undefined."""
        return np.maximum(self._upto[:, -1], 1)

    @property
    def empty(self) -> npt.NDArray[np.bool_]:
        """Whether no record was drawn, shape (resamples,)."""
        return np.equal(self._upto[:, -1], 0)

    @cached_property
    def before(self) -> Whole:
        """Records of a higher confidence, shape (resamples, points)."""
        return np.ascontiguousarray(self._upto[:, :-1:2])

    @cached_property
    def after(self) -> Whole:
        """Records of this or a higher confidence, shape (resamples, points)."""
        return np.ascontiguousarray(self._upto[:, 1::2])

    @cached_property
    def _wrong(self) -> Floats:
        order, rows = self.order, 2 * self.order.starts.size + 1
        if order.loss is None:
            return _cumulative(self._between[:, rows:]).astype(np.float64)
        drawn = self.times.take(order.index[order.wrong], axis=1)
        return _cumulative(drawn * order.loss).take(order.bounds, axis=1)

    @property
    def wrong_before(self) -> Floats:
        """1 − outcome summed over records of a higher confidence, shape (resamples, points)."""
        return self._wrong[:, :-1]

    @property
    def wrong(self) -> Floats:
        """1 − outcome summed over all records, shape (resamples,)."""
        return self._wrong[:, -1]

    @property
    def right(self) -> Floats:
        """Outcomes summed over all records, shape (resamples,)."""
        return self.total - self.wrong

    @cached_property
    def lost(self) -> Floats:
        """1 − outcome summed over records of this confidence, shape (resamples, points)."""
        return np.diff(self._wrong, axis=1)

    @cached_property
    def records(self) -> Floats:
        """Records of this confidence, shape (resamples, points)."""
        return np.subtract(self.after, self.before, dtype=np.float64)

    @cached_property
    def right_before(self) -> Floats:
        """Outcomes summed over records of a higher confidence, shape (resamples, points)."""
        return self.before - self.wrong_before

    @cached_property
    def risk_before(self) -> Floats:
        """Risk of answering all of a higher confidence, shape (resamples, points); 0 where there is none."""
        return self.wrong_before / np.maximum(self.before, 1)

    @cached_property
    def aurc(self) -> Floats:
        """Area under the risk–coverage curve, shape (resamples,)."""
        if self.order.blocks is None and self.order.loss is None:
            # Each point is one record, and wrong.
            return _area(self.before, self.records, None, self.after, self.total)
        return _area(self.before, self.records, self.lost / np.maximum(self.records, 1.0), self.after, self.total)

    @cached_property
    def ideal_aurc(self) -> Floats:
        """Area of these records in the best order, by outcome, shape (resamples,)."""
        if self.order.loss is not None:
            return Curve(self.order.best, self.times).aurc
        after = self.total[:, None]
        before = after - self.wrong.astype(after.dtype)[:, None]
        return _area(before, np.subtract(after, before, dtype=np.float64), None, after, self.total)

    def where_mixed(self, values: Callable[[], Floats]) -> Floats:
        """Return values of shape (resamples,), NaN where all answers are right or all are wrong."""
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Floats = np.where(np.minimum(self.wrong, self.right) > 0.0, values(), np.nan)
        return found


Metric = Callable[[Curve], Floats]
"""Function from curves to one value of each, shape (resamples,)."""


def _area(before: Whole, records: Floats, loss: Floats | None, after: Whole, total: Whole) -> Floats:
    # A record at rank k adds its loss to the risk at every rank from there: loss · (H(total) − H(k − 1)). Of records
    # that share a confidence each has their mean loss (None: 1), and Σ H(k − 1) over their ranks is a difference of ΣH.
    sums = _harmonic_sums(1 << int(total.max()).bit_length())
    harmonic = (sums[total] + total) / total
    parts = records * harmonic[:, None]
    parts -= sums[after] - sums[before]
    if loss is not None:
        parts *= loss
    # A risk in [0, 1], up to rounding.
    area: Floats = np.clip(np.sum(parts, axis=1) / total, 0.0, 1.0)
    return area


def aurc(curve: Curve) -> Floats:
    """Area under the risk–coverage curve, as `lmms_plugin.metrics.selective.aurc`."""
    return curve.aurc


def e_aurc(curve: Curve) -> Floats:
    """Excess AURC over the best possible ranking."""
    # Both areas are sums in different orders: no ranking is better than the best one but for rounding.
    found: Floats = np.maximum(curve.aurc - curve.ideal_aurc, 0.0)
    return found


def coverage(curve: Curve, risk: float) -> Floats:
    """Coverage at a risk."""
    bound = risk + ROUNDING
    if not curve.before.shape[1]:
        return np.ones(curve.total.size)
    # Risk falls up to the next error, so its last admissible value lies just before one, the first at the latest.
    last = curve.before.shape[1] - 1 - np.argmax((curve.risk_before <= bound)[:, ::-1], axis=1)
    reached = curve.before[np.arange(last.size), last] / curve.total
    found: Floats = np.where(curve.wrong / curve.total <= bound, 1.0, reached)
    return found


def auroc(curve: Curve) -> Floats:
    """Probability that a right answer has a higher confidence than a wrong one; NaN without both."""
    below = np.sum(curve.lost * (curve.right_before + (curve.records - curve.lost) / 2), axis=1)
    return curve.where_mixed(lambda: below / (curve.right * curve.wrong))


def aupr_error(curve: Curve) -> Floats:
    """Average precision of finding errors; NaN without both right and wrong answers."""
    found = curve.wrong[:, None] - curve.wrong_before
    looked_at = np.maximum(curve.total[:, None] - curve.before, 1)
    return curve.where_mixed(lambda: np.sum(curve.lost * (found / looked_at), axis=1) / curve.wrong)


def fpr_at_tpr(curve: Curve, tpr: float = 0.95) -> Floats:
    """Share of errors above the threshold that accepts that share of right answers; NaN without both."""
    points = curve.lost.shape[1]
    if not points:
        return np.full(curve.total.size, np.nan)
    # Accepted are the errors that fewer right answers than required precede.
    above = np.count_nonzero(curve.right_before < ((tpr - ROUNDING) * curve.right)[:, None], axis=1)
    accepted = curve.wrong_before[np.arange(above.size), np.minimum(above, points - 1)]
    return curve.where_mixed(lambda: np.where(above < points, accepted / curve.wrong, 1.0))


def adaptive_ece(curve: Curve, n_bins: int = DEFAULT_BINS) -> Floats:
    """Calibration error over bins of equal mass."""
    blocks = curve.order.blocks
    ends = curve.answered[:, 1:] if blocks is None else curve.answered.take(blocks, axis=1)
    gaps = curve.drawn * curve.order.residual
    found = np.empty(curve.total.size)
    # Bins differ between resamples.
    for row, (total, upto, gap) in enumerate(zip(curve.total.tolist(), ends, gaps, strict=True)):
        cuts = equal_mass_cuts(upto, n_bins)
        # Cuts count blocks; the corresponding record index is the end of the preceding block.
        places = cuts if blocks is None else np.where(cuts > 0, blocks[cuts - 1], 0)
        parts = [gap[start:stop].sum() for start, stop in pairwise((0, *places.tolist(), gap.size))]
        found[row] = np.abs(parts).sum() / total
    return found


RANKED: Mapping[str, Metric] = MappingProxyType(
    {
        "aurc": aurc,
        "e_aurc": e_aurc,
        **{f"coverage@{risk:g}": partial(coverage, risk=risk) for risk in RISKS},
        "auroc": auroc,
        "aupr_error": aupr_error,
        "fpr_at_tpr": fpr_at_tpr,
        "adaptive_ece": adaptive_ece,
    }
)
"""Name → metric that depends on the order of confidences."""


class Ranked:
    """Metrics of `RANKED` as a `Statistic`: selective prediction, ranking, and calibration over bins of equal mass.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        clusters: Clusters of the n records.
        names: Names of the metrics; all by default. The cost of the cumulative sums is shared.
    """

    def __init__(
        self,
        confidence: npt.ArrayLike,
        outcome: npt.ArrayLike,
        clusters: Clusters,
        names: Sequence[str] = tuple(RANKED),
    ) -> None:
        c, y = paired(confidence, outcome)
        self.names, self.present = tuple(names), clusters.present
        self._order = Order(c, y, clusters.index, clusters.count)

    def __call__(self, counts: npt.NDArray[Any]) -> Floats:
        """Return the values of `names`, shape (resamples, names); NaN for a resample without records.

        Raises:
            ValueError: A count is not an integer of at least 0.
        """
        points = self._order.starts.size
        step = max(1, NUMBERS_AT_ONCE // (self._order.index.size if "adaptive_ece" in self.names else 2 * points + 1))
        times = _whole(counts, many=step > 1)
        return np.concatenate([self._rows(times[k : k + step]) for k in range(0, len(times), step)])

    def everywhere(self) -> tuple[Floats, Floats, Floats]:
        """Return confidence, coverage and risk of the data, as the function of this name."""
        return _everywhere(self._order)

    def _rows(self, times: Whole) -> Floats:
        curve = Curve(self._order, times)
        found: Floats = np.stack([RANKED[name](curve) for name in self.names], axis=1)
        found[curve.empty] = np.nan
        return found


def plain(metric: Metric, confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Evaluate a metric on the plain records.

    Raises:
        ValueError: As `lmms_plugin.metrics.selective`.
    """
    c, y = paired(confidence, outcome)
    return float(metric(Curve(Order(c, y, np.zeros(c.size, np.intp), 1), np.ones((1, 1), np.int32)))[0])


def everywhere(confidence: Floats, outcome: Floats) -> tuple[Floats, Floats, Floats]:
    """Return confidence, coverage and risk at every distinct confidence, descending; shape (points,) each."""
    return _everywhere(Order(confidence, outcome, np.zeros(confidence.size, np.intp), 1))


def _everywhere(order: "Order") -> tuple[Floats, Floats, Floats]:
    size = order.confidence.size
    ends = np.arange(1, size + 1) if order.blocks is None else order.blocks
    lost = np.cumsum(1.0 - order.outcome)[ends - 1]
    return order.confidence[ends - 1], ends / size, lost / ends


class Order:
    """Records sorted from the highest confidence down.

    Attributes:
        confidence: Confidences, shape (n,).
        outcome: Outcomes, shape (n,).
        index: Cluster of each record, shape (n,).
        residual: Confidence − outcome, shape (n,).
        blocks: End of each block of equal confidences, shape (blocks,); None if all confidences differ.
        wrong: Indices of records with an outcome below 1, shape (wrong records,).
        loss: Their 1 − outcome, shape (wrong records,); None if all are 1.
        starts: Start of each block with a wrong record, shape (points,).
        ends: End of each block with a wrong record, shape (points,).
        bounds: Number of wrong records above each of those blocks, and their total, shape (points + 1,).
        limits: Where the records above the first of those blocks start, that block, those between it and the next, …,
            and the end of those below the last, shape (2 · points + 2,).
        between: Number of records of each cluster above the first of those blocks, in it, between it and the next, …,
            and below the last; where `loss` is None, below them the wrong ones in each block. Integers, sparse, shape
            (2 · points + 1, clusters) or (3 · points + 1, clusters).
    """

    def __init__(self, confidence: Floats, outcome: Floats, index: Places, count: int) -> None:
        self._count = count
        places = np.argsort(-confidence, kind="stable")
        self.confidence, self.outcome = confidence[places], outcome[places]
        self.index = index[places].astype(np.intp)
        starts = _starts(self.confidence)
        ends = np.append(starts[1:], confidence.size)
        self.blocks = None if starts.size == confidence.size else ends
        self.wrong = np.flatnonzero(self.outcome < 1.0)
        loss = 1.0 - self.outcome[self.wrong]
        self.loss = None if np.all(loss == 1.0) else loss
        block = np.searchsorted(ends, self.wrong, side="right")
        first = _starts(block)
        self.starts, self.ends = starts[block[first]], ends[block[first]]
        self.bounds = np.append(first, self.wrong.size)
        blocks = np.stack((self.starts, self.ends), axis=1)
        self.limits = np.concatenate(([0], blocks.ravel(), [confidence.size]))

    @cached_property
    def residual(self) -> Floats:
        """Confidence − outcome, shape (n,)."""
        return self.confidence - self.outcome

    @cached_property
    def between(self) -> Any:
        """Records of each cluster between the points, and wrong ones at them."""
        places, limits = self.index, self.limits
        if self.loss is None:
            places = np.concatenate((places, places[self.wrong]))
            limits = np.concatenate((limits, self.index.size + self.bounds[1:]))
        ones = np.ones(places.size, np.int32)
        return csr_array((ones, places, limits), shape=(limits.size - 1, self._count))

    @cached_property
    def best(self) -> "Order":
        """Return the same records in the order of their outcomes."""
        return Order(self.outcome, self.outcome, self.index, self._count)


def _starts(ordered: npt.NDArray[np.generic]) -> Places:
    """Return where blocks of equal values start; empty for an empty array."""
    changed = np.ones(ordered.size, np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=changed[1:])
    return np.flatnonzero(changed)


def _cumulative(drawn: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the sums of the first 0, 1, … n of each row; numpy adds 32-bit integers much faster than others."""
    kind: npt.DTypeLike = np.float64
    if drawn.dtype.kind in "iu":
        highest = int(drawn.max(initial=0))
        kind = np.int32 if highest * drawn.shape[1] <= _SMALL else np.int64
    sums = np.empty((len(drawn), drawn.shape[1] + 1), kind)
    sums[:, 0] = 0
    np.cumsum(drawn, axis=1, dtype=sums.dtype, out=sums[:, 1:])
    return sums


def _whole(counts: npt.NDArray[Any], *, many: bool) -> Whole:
    """Return counts as they lie in memory: in 32 bits where many rows are summed, else in as few as hold them."""
    highest = counts.max()
    small = np.int32 if many else np.uint8 if highest < 2**8 else np.uint16
    kind = small if highest < 2**16 else np.int64
    with np.errstate(invalid="ignore"):
        times: Whole = counts.astype(kind)
    if counts.min() < 0 or not np.array_equal(times, counts):
        raise ValueError("expected whole counts of clusters, got others")
    return times


@lru_cache(maxsize=4)
def _harmonic_sums(size: int) -> Floats:
    """Return Σ of the harmonic numbers H(0) … H(k − 1) = k·H(k) − k for k < size."""
    ranks = np.arange(1, size)
    table: Floats = np.concatenate(([0.0], ranks * np.cumsum(1.0 / ranks) - ranks))
    table.flags.writeable = False
    return table
