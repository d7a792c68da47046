"""Paired comparison of two runs on the same documents: tests, corrections for multiple tests, and equivalence."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from lmms_plugin.metrics._inputs import Floats, fractions
from lmms_plugin.metrics.bootstrap import ClusterParts, Draws, Interval, Method, interval, p_value
from lmms_plugin.metrics.intervals import METHODS


class Flips(NamedTuple):
    """Documents on which two runs differ.

    Attributes:
        lost: Number right in the first run and wrong in the second.
        won: Number wrong in the first run and right in the second.
    """

    lost: int
    won: int


class Difference(NamedTuple):
    """Second run − first run.

    Attributes:
        value: Difference.
        low: Lower end of its interval; NaN where there is none.
        high: Upper end of its interval.
        p: Two-sided p-value of no difference; NaN where there is none.
        equivalent: Whether the two are equivalent within the stated margin; None if none was stated.
    """

    value: float
    low: float
    high: float
    p: float
    equivalent: bool | None


def flips(first: npt.ArrayLike, second: npt.ArrayLike) -> Flips:
    """Count documents that flipped between two runs.

    Args:
        first: Outcomes of the first run, each 0 or 1, shape (n,).
        second: Outcomes of the second run on the same documents in the same order, shape (n,).

    Raises:
        ValueError: They differ in length, are empty, or hold anything but 0 and 1.
    """
    a, b = _binary("first outcome", first), _binary("second outcome", second)
    if a.size != b.size:
        raise ValueError(f"expected outcomes of the same documents, got {a.size} and {b.size}")
    return Flips(lost=int(np.sum(a > b)), won=int(np.sum(a < b)))


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value of McNemar's test that a document is as likely to be lost as to be won.

    It is the binomial test of the flipped documents (1 where there are none). It treats them as independent; where
    several belong to one image, prefer the p-value of `difference`.

    Raises:
        ValueError: A count is negative.
    """
    if min(lost, won) < 0:
        raise ValueError(f"expected counts of documents, got {lost} and {won}")
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def difference(
    first: Draws, second: Draws, name: str, *, level: float = 0.95, margin: float | None = None
) -> Difference:
    """Compare one number between two runs that were resampled together (`bootstrap` of both in one call).

    Args:
        first: Draws of the first run.
        second: Draws of the second run, from the same call.
        name: Name of the number.
        level: Confidence level of the interval.
        margin: Equivalence margin, largest absolute difference that counts as none; see `equivalent`.
    """
    (value_a, resampled_a), (value_b, resampled_b) = first.of(name), second.of(name)
    method = METHODS.get(name, "percentile")
    parts_a, parts_b = first.parts_of(name), second.parts_of(name)
    parts = None if parts_a is None or parts_b is None else parts_b - parts_a
    return from_resamples(value_b - value_a, resampled_b - resampled_a, method, level, margin, parts=parts, widest=1.0)


def interaction(
    clean_first: Draws,
    shifted_first: Draws,
    clean_second: Draws,
    shifted_second: Draws,
    name: str,
    *,
    level: float = 0.95,
    margin: float | None = None,
) -> Difference:
    """Difference in differences, (shifted − clean) of the second run − (shifted − clean) of the first.

    With the unquantized model first and the quantized one second, it tells whether quantization hurts more under shift
    than on clean data: a negative value of a metric that should be high means that it does. All four draws must come
    from one call of `bootstrap`, so that an image is drawn for all of them or for none.
    """
    all_four = clean_first, shifted_first, clean_second, shifted_second
    (a, a_drawn), (b, b_drawn), (c, c_drawn), (d, d_drawn) = (draws.of(name) for draws in all_four)
    method = METHODS.get(name, "percentile")
    drawn = (d_drawn - c_drawn) - (b_drawn - a_drawn)
    known = [part for draws in all_four if (part := draws.parts_of(name)) is not None]
    parts = (known[3] - known[2]) - (known[1] - known[0]) if len(known) == 4 else None
    return from_resamples((d - c) - (b - a), drawn, method, level, margin, parts=parts, widest=2.0)


def from_resamples(
    value: float,
    resampled: Floats,
    method: Method,
    level: float,
    margin: float | None,
    *,
    parts: ClusterParts | None = None,
    widest: float = float("inf"),
) -> Difference:
    """Return a difference with its interval, p-value and, given a margin, equivalence.

    Few images show little, whatever the resamples say: p is at least that of a sign-flip test of the images that differ
    (`bootstrap.ClusterParts.least_p`), and equivalence takes so many that a one-sided test of them could show it.

    Args:
        value: Value on the data themselves.
        resampled: Values on the resamples, shape (resamples,).
        method: Method that turns resamples into an interval.
        level: Confidence level of the interval.
        margin: Equivalence margin, see `equivalent`; None for no test of equivalence.
        parts: What each cluster adds to the difference; None where their number is not known.
        widest: Largest possible absolute difference: an interval that is not of quantiles ends there.
    """
    low, high = interval(value, resampled, level=level, method=method)
    if method == "basic":
        low, high = np.clip((low, high), -widest, widest).tolist()
    # Two one-sided tests at 1 − level each: the interval of level 2·level − 1.
    narrow = interval(value, resampled, level=2 * level - 1, method=method)
    enough = parts is None or 0.5 ** np.count_nonzero(parts.present) <= 1 - level
    decided = None if margin is None else bool(enough and equivalent(narrow, margin))
    least = 0.0 if parts is None else parts.least_p()
    return Difference(value, low, high, p_value(value, resampled, method=method, least=least), decided)


def equivalent(inside: Interval, margin: float) -> bool:
    """Test equivalence: whether an interval of level 1 − 2α lies inside (−margin, margin).

    These are two one-sided tests at α (Schuirmann 1987).

    False means "not shown", not "different"; an undefined interval shows nothing.

    Raises:
        ValueError: The margin is not above 0.
    """
    if not margin > 0.0:
        raise ValueError(f"expected a margin above 0, got {margin}")
    return bool(-margin < inside.low and inside.high < margin)


def holm(p: npt.ArrayLike) -> Floats:
    """Holm's adjusted p-values: with those below α called significant, any error at all has probability α at most.

    The bound holds for any dependence between the tests.

    Args:
        p: p-values in [0, 1], shape (tests,). NaN is a test that could not be made: it stays NaN and does not count.
    """
    return _adjusted(p, lambda ranked: np.maximum.accumulate(ranked * np.arange(ranked.size, 0, -1)))


def benjamini_hochberg(p: npt.ArrayLike) -> Floats:
    """Benjamini and Hochberg's adjusted p-values: those below α have a false discovery rate of at most α.

    For independent or positively dependent tests.

    Args:
        p: p-values in [0, 1], shape (tests,). NaN is a test that could not be made: it stays NaN and does not count.
    """

    def adjust(ranked: Floats) -> Floats:
        scaled = ranked * ranked.size / np.arange(1, ranked.size + 1)
        adjusted: Floats = np.minimum.accumulate(scaled[::-1])[::-1]
        return adjusted

    return _adjusted(p, adjust)


def _adjusted(p: npt.ArrayLike, adjust: Callable[[Floats], Floats]) -> Floats:
    values = np.asarray(p, dtype=np.float64)
    made = np.flatnonzero(~np.isnan(values))
    adjusted = np.full(values.shape, np.nan)
    if made.size:
        order = made[np.argsort(fractions("p-value", values[made]), kind="stable")]
        adjusted[order] = np.minimum(adjust(values[order]), 1.0)
    return adjusted


def _binary(name: str, values: npt.ArrayLike) -> Floats:
    array = fractions(name, values)
    if np.any((array != 0.0) & (array != 1.0)):
        raise ValueError(f"expected every {name} to be 0 or 1, got {array[(array != 0.0) & (array != 1.0)][0]}")
    return array
