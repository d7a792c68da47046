"""Cluster bootstrap: the sampling variation of a number over images.

Expressions of one image are not independent, so images are resampled together with all their records. A resample is
one row of counts: how often each cluster was drawn. Statistics take counts, not copies of records
(`lmms_plugin.metrics.sums` and `ranked`), so that 10⁶ records are sorted once and not once per resample.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lmms_plugin.metrics._inputs import ROUNDING, Floats, one_fraction, positive_int

RESAMPLES = 1000
"""Default number of resamples of an interval."""

MOST_RESAMPLES = 1_000_000
"""Maximum number of resamples: more take time and memory without a benefit to the interval."""
_COUNTS_AT_ONCE = 4_000_000
"""Maximum number of counts that one worker holds in memory at a time: 32 MB."""
_COUNTS_IN_CACHE = 100_000
"""Number of counts that fit into a processor's cache; as many resamples as that are evaluated at once."""
_COUNTS_KEPT = 5_000_000
"""Maximum number of counts (10 MB) cached for further statistics on as many clusters: a study has thousands."""

MOST_FLIPPED = 14
"""Maximum number of clusters whose 2ⁿ signs are all tried; of more, the resamples say about the same."""

_UNDEFINED = 0.01
"""Share of resamples in which a statistic may be undefined before its interval is NaN."""


Method = Literal["percentile", "centred", "basic"]
"""Method that turns resamples into an interval (Davison & Hinkley 1997, §5.2).

`percentile`: quantiles of the resamples. `centred`: these quantiles, moved so that the mean of the resamples is the
value; for estimates that are unbiased on the data but not under resampling. `basic`: 2·value less the quantiles; for
numbers that are biased upwards on the data and again under resampling, as every calibration error is.
"""


class Statistic(Protocol):
    """Numbers as a function of how often each cluster was drawn."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the numbers, in their order."""

    def __call__(self, counts: Floats) -> Floats:
        """Return values, shape (resamples, names), for counts of shape (resamples, clusters); NaN where undefined."""


@runtime_checkable
class SumOverClusters(Protocol):
    """Statistic that is a sum of what each cluster adds, over a total that all runs on the same records share."""

    def parts(self) -> Floats:
        """Return what each cluster adds on the data themselves, shape (clusters, names)."""


@runtime_checkable
class OfRecords(Protocol):
    """Statistic of records, which not every cluster needs to have."""

    present: npt.NDArray[np.bool_]
    """Whether each cluster has a record, shape (clusters,)."""


@dataclass(frozen=True)
class ClusterParts:
    """What each cluster adds to one number, or to a difference of several.

    Attributes:
        added: What it adds, shape (clusters,); NaN where the number is no sum over clusters.
        present: Whether it has a record that the number is of, shape (clusters,).
    """

    added: Floats
    present: npt.NDArray[np.bool_]

    def __sub__(self, other: "ClusterParts") -> "ClusterParts":
        return ClusterParts(self.added - other.added, self.present | other.present)

    @classmethod
    def mean(cls, several: Sequence["ClusterParts | None"]) -> "ClusterParts | None":
        """Return what each cluster adds to the mean of several numbers; None where that of one is not known."""
        known = [one for one in several if one is not None]
        if len(known) < len(several):
            return None
        return cls(np.mean([one.added for one in known], axis=0), np.any([one.present for one in known], axis=0))

    @property
    def unlike(self) -> "ClusterParts":
        """Return the parts of a number of the same clusters that is no sum over them."""
        return ClusterParts(np.full_like(self.added, np.nan), self.present)

    def least_p(self) -> float:
        """Return the two-sided p-value below which none can be that the number is 0.

        Where nothing differs, what a cluster adds is as likely to have the other sign. So it is that of the exact
        sign-flip test (Fisher 1935) for a sum over at most `MOST_FLIPPED` clusters that add anything, else 2 ÷ 2ⁿ, the
        least that this test gives for n clusters, those that agree. Resamples of few clusters hardly ever change their
        sign, so that their share alone claims any certainty that one has the patience to draw.
        """
        telling = self.added[self.present & ~(np.abs(self.added) <= ROUNDING)]
        if telling.size > MOST_FLIPPED or np.isnan(telling).any():
            return float(min(1.0, 2.0 ** (1 - telling.size)))
        sums = np.abs(_signs(telling.size) @ telling)
        return float(np.mean(sums >= abs(telling.sum()) - ROUNDING * max(1, telling.size)))


class Clusters(NamedTuple):
    """Cluster of each record.

    Attributes:
        index: Index of each record's cluster, integers in [0, count), shape (n,).
        count: Number of clusters.
    """

    # Tuples have methods of these names, which nobody calls here.
    index: npt.NDArray[np.intp]  # type: ignore[assignment]
    count: int  # type: ignore[assignment]

    @classmethod
    def of(cls, labels: npt.ArrayLike) -> "Clusters":
        """Make clusters of records with equal labels (for example image ids), shape (n,)."""
        _, index = np.unique(np.asarray(labels), return_inverse=True)
        return cls(index.astype(np.intp), int(index.max()) + 1 if index.size else 0)

    @classmethod
    def one(cls, records: int) -> "Clusters":
        """Put all records into one cluster."""
        return cls(np.zeros(records, np.intp), 1)

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """Return whether each cluster has a record, shape (count,)."""
        return np.bincount(self.index, minlength=self.count) > 0

    def repeated(self, times: int) -> "Clusters":
        """Return the clusters of the records repeated several times in sequence."""
        return Clusters(np.tile(self.index, times), self.count)


class Draws(NamedTuple):
    """Values of a statistic on the data and on every resample.

    Attributes:
        names: Names of the numbers.
        value: Values on the data themselves, shape (names,).
        resampled: Values on the resamples, shape (resamples, names).
        parts: What each cluster adds to the values, shape (clusters, names), NaN where a number is no sum over
            clusters; None where nothing was resampled.
        present: Whether each cluster has a record that a number is of, shape (clusters, names); None like `parts`.
    """

    names: tuple[str, ...]
    value: Floats
    resampled: Floats
    parts: Floats | None = None
    present: npt.NDArray[np.bool_] | None = None

    def of(self, name: str) -> tuple[float, Floats]:
        """Return the value and the resamples, shape (resamples,), of one number."""
        column = self.names.index(name)
        return float(self.value[column]), self.resampled[:, column]

    def parts_of(self, name: str) -> ClusterParts | None:
        """Return what each cluster adds to one number."""
        if self.parts is None or self.present is None:
            return None
        column = self.names.index(name)
        return ClusterParts(self.parts[:, column], self.present[:, column])


class Interval(NamedTuple):
    """A confidence interval; both ends NaN where there is none."""

    low: float
    high: float


def affordable(resamples: int) -> int:
    """Check a number of resamples.

    Raises:
        ValueError: It is not from 1 to `MOST_RESAMPLES`.
    """
    if positive_int("resamples", resamples) > MOST_RESAMPLES:
        raise ValueError(f"expected at most {MOST_RESAMPLES:,} resamples, got {resamples:,}")
    return resamples


def bootstrap(
    statistics: Sequence[Statistic], clusters: int, *, resamples: int = RESAMPLES, seed: int = 0, workers: int = 1
) -> list[Draws]:
    """Draw clusters with replacement and evaluate every statistic on the same draws.

    Statistics of two runs over the same clusters are thereby paired: the difference of their resamples is the resample
    of their difference.

    Args:
        statistics: Functions of cluster counts.
        clusters: Number of clusters, at least 2.
        resamples: Number of resamples, each of as many clusters drawn with replacement.
        seed: Seed of the draws. Each resample has a stream of its own, so the result depends neither on `workers` nor
            on what else is evaluated.
        workers: Number of threads.

    Raises:
        ValueError: There are fewer than 2 clusters, whose spread is unknown, or too many resamples.
    """
    if clusters < 2:
        raise ValueError(f"expected at least 2 clusters to resample, got {clusters}")
    size = max(1, min(32, _COUNTS_AT_ONCE // clusters), _COUNTS_IN_CACHE // clusters)
    chunks = list(_chunks(affordable(resamples), size))
    cached = _draws(clusters, seed, resamples) if resamples * clusters <= _COUNTS_KEPT else None

    def evaluate(chunk: range) -> list[Floats]:
        # Column by column, as sparse products read them.
        rows = _some_draws(clusters, seed, chunk) if cached is None else cached[chunk.start : chunk.stop]
        counts = np.asfortranarray(rows, np.float64)
        return [statistic(counts) for statistic in statistics]

    if positive_int("workers", workers) == 1:
        evaluated = list(map(evaluate, chunks))
    else:
        with ThreadPoolExecutor(workers) as pool:
            evaluated = list(pool.map(evaluate, chunks))
    once = np.ones((1, clusters))
    return [
        Draws(
            statistic.names,
            statistic(once)[0],
            np.concatenate([values[k] for values in evaluated]),
            *_parts_of(statistic, clusters),
        )
        for k, statistic in enumerate(statistics)
    ]


def _parts_of(statistic: Statistic, clusters: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
    shape = clusters, len(statistic.names)
    parts = statistic.parts() if isinstance(statistic, SumOverClusters) else np.full(shape, np.nan)
    present = statistic.present if isinstance(statistic, OfRecords) else np.ones(clusters, np.bool_)
    return parts, np.broadcast_to(present[:, None], shape)


@lru_cache(maxsize=MOST_FLIPPED + 1)
def _signs(count: int) -> Floats:
    """Return all signs of so many numbers, the first positive, since both directions count alike."""
    rest = max(0, count - 1)
    signs = np.ones((2**rest, count))
    signs[:, 1:] -= 2.0 * (np.arange(2**rest)[:, None] >> np.arange(rest) & 1)
    signs.flags.writeable = False
    return signs


@lru_cache(maxsize=4)
def _draws(clusters: int, seed: int, resamples: int) -> npt.NDArray[np.uint16]:
    counts = _some_draws(clusters, seed, range(resamples)).astype(np.uint16, order="F")
    counts.flags.writeable = False
    return counts


def _some_draws(clusters: int, seed: int, resamples: range) -> npt.NDArray[np.intp]:
    return np.stack([draw(clusters, seed, resample) for resample in resamples])


def draw(clusters: int, seed: int, resample: int) -> npt.NDArray[np.intp]:
    """Return how often each cluster is drawn in one resample, shape (clusters,)."""
    drawn = np.random.default_rng([seed, resample]).integers(0, clusters, clusters)
    return np.bincount(drawn, minlength=clusters)


def interval(value: float, resampled: Floats, *, level: float = 0.95, method: Method = "percentile") -> Interval:
    """Return a confidence interval from resamples.

    Args:
        value: Value on the data themselves.
        resampled: Values on the resamples, shape (resamples,).
        level: Confidence level, in [0, 1].
        method: Method that turns resamples into an interval.

    Returns:
        The interval; NaN without resamples, or if the value or more than 1 % of its resamples are undefined.
    """
    one_fraction("level", level)
    moved = _moved(value, resampled, method)
    if moved is None:
        return Interval(float("nan"), float("nan"))
    # np.quantile gives the same and takes ten times as long for so few numbers, of which a report has many thousands.
    places = np.array([(1 - level) / 2, (1 + level) / 2]) * (moved.size - 1)
    low, high = np.interp(places, np.arange(moved.size), np.sort(moved))
    return Interval(float(low), float(high))


def p_value(value: float, resampled: Floats, *, method: Method = "percentile", least: float = 0.0) -> float:
    """Return the two-sided p-value of "the number is 0", by inverting `interval`; NaN where that is NaN.

    It is the smallest 1 − level whose interval excludes 0, with one resample added on either side, so never 0.

    Args:
        value: Value on the data themselves.
        resampled: Values on the resamples, shape (resamples,).
        method: Method that turns resamples into an interval.
        least: Least p-value that the clusters can give, from `ClusterParts.least_p`.
    """
    moved = _moved(value, resampled, method)
    if moved is None:
        return float("nan")
    tail = min(np.count_nonzero(moved <= 0.0), np.count_nonzero(moved >= 0.0))
    return float(min(1.0, max(least, 2 * (tail + 1) / (moved.size + 1))))


def _moved(value: float, resampled: Floats, method: Method) -> Floats | None:
    unknown = np.isnan(resampled)
    defined = resampled[~unknown] if unknown.any() else resampled
    # Nothing is resampled where all records belong to one cluster.
    if np.isnan(value) or not defined.size or defined.size < (1 - _UNDEFINED) * resampled.size:
        return None
    if method == "basic":
        return 2 * value - defined
    return defined - (defined.mean() - value) if method == "centred" else defined


def _chunks(total: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, total)) for start in range(0, total, size))
