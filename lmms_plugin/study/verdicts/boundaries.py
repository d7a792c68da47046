"""When a comparison of a study in stages is settled: two rules, one for planned stages and one for any stopping at all.

`Planned` makes the tests of the whole analysis (`contrasts`) at every stage, with the error spent over the stages:
differences by Holm over the contrasts and bits of a model and question, equality by two one-sided tests of each
comparison. `AnyTime` has confidence sequences, which assume nothing of the data but their bounds and hold whenever one
looks, with every comparison counted for every claim; they are several times as wide.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from scipy.stats import norm

from lmms_plugin.analysis.findings import EQUIVALENT, OPEN, REVERSE, SHOWN
from lmms_plugin.metrics._inputs import Floats
from lmms_plugin.metrics.bootstrap import Interval
from lmms_plugin.metrics.confidence_sequences import confidence_sequence, log_capital
from lmms_plugin.metrics.group_sequential import DifferenceEstimate, boundaries

PLANNED, ANY_TIME = "planned", "any-time"
RULES = (PLANNED, ANY_TIME)
"""Names of the rules; the first one is the default."""
EQUALITY = 0.8
"""Share of the error that tests of equality are made at.

Where by chance too few answers flip, a difference and its standard error are both too small. In simulations of answers
that flip together, at up to 600 images, arms that differ by the margin were called equal up to 1.2 times as often as
the error allows.
"""
Compared = TypeVar("Compared", bound=Hashable)
"""What names a comparison."""
Family = tuple[str, str]
"""Model and question: what the tests of the whole analysis are adjusted over."""


class ComparisonEvidence(NamedTuple):
    """What is known of a comparison.

    Attributes:
        sums: Sum of the documents' differences of each image, shape (images,).
        sizes: Number of documents of each image, shape (images,).
        by_seed: What each source of calibration data adds to the sums with each of its seeds, each of shape (seeds,
            images); empty where there is one seed.
        bound: Largest absolute difference of one document: 1 for accuracies, 2 for a difference of two differences.
        family: What it is adjusted with.
    """

    sums: Floats
    sizes: Floats
    by_seed: tuple[Floats, ...]
    bound: float
    family: Family


class Judgement(NamedTuple):
    """What a rule says of a comparison.

    Attributes:
        finding: As in `lmms_plugin.analysis.findings`.
        interval: Interval of its difference.
    """

    finding: str
    interval: Interval


class StoppingRule(Protocol):
    """Rule of a study in stages."""

    def judge(
        self, stage: int, found: Mapping[Compared, ComparisonEvidence], unshown: Mapping[Family, int]
    ) -> dict[Compared, Judgement]:
        """Judge the comparisons that are open after a stage.

        Args:
            stage: Number of the stage, from 0.
            found: Comparison → what is known of it.
            unshown: Family → number of its comparisons of which no difference was shown so far, settled or open.
        """
        ...

    def legend(self) -> str:
        """Return in words what its intervals and findings mean."""
        ...


@dataclass(frozen=True)
class Planned:
    """Tests at the planned stages; see `lmms_plugin.metrics.group_sequential`.

    Holm's steps are those of Maurer and Bretz (Statistics in Biopharmaceutical Research 2013): what an earlier finding
    has not used passes to the others, at every stage.

    Attributes:
        level: Confidence level of the study.
        margin: Largest absolute difference that counts as none.
        images: Number of images after each stage.
    """

    level: float
    margin: float
    images: tuple[int, ...]

    def judge(
        self, stage: int, found: Mapping[Compared, ComparisonEvidence], unshown: Mapping[Family, int]
    ) -> dict[Compared, Judgement]:
        """Judge the comparisons that are open after a stage; arguments as of `StoppingRule`."""
        estimates = {one: DifferenceEstimate.of(known.sums, known.sizes, known.by_seed) for one, known in found.items()}
        error, shown = 1.0 - self.level, set[Compared]()
        for family, tests in unshown.items():
            ranked = sorted(
                (estimates[one].p_difference(), k, one) for k, one in enumerate(found) if found[one].family == family
            )
            for step, (p, _, one) in enumerate(ranked):
                if p > 2.0 * self.nominal(stage, error / (tests - step) / 2.0):
                    break
                shown.add(one)
        equal, level = self.nominal_equality(stage), 1.0 - 2.0 * self.nominal(stage, error / 2.0)
        return {
            one: Judgement(
                EQUIVALENT if estimate.p_equivalence(self.margin) <= equal else _direction(estimate, one in shown),
                _within(estimate.interval(level), found[one].bound),
            )
            for one, estimate in estimates.items()
        }

    def nominal(self, stage: int, error: float) -> float:
        """Return the one-sided level of a test at a stage, for an error at all of them together."""
        shares = tuple(count / self.images[-1] for count in self.images)
        return float(norm.sf(boundaries(shares, error)[stage]))

    def nominal_equality(self, stage: int) -> float:
        """Return the one-sided level of a test of equality at a stage."""
        return self.nominal(stage, EQUALITY * (1.0 - self.level))

    def legend(self) -> str:
        """Return in words what its intervals and findings mean."""
        return (
            f"Intervals of {100 * self.level:g} % over images and calibration seeds, wider at earlier stages, so that"
            " all stages together have that level; differences are adjusted by Holm over contrasts and bits, tests of"
            " equality are not, as in a study without stages."
        )


def _within(interval: Interval, bound: float) -> Interval:
    return Interval(max(-bound, interval.low), min(bound, interval.high))


def _direction(estimate: DifferenceEstimate, shown: bool) -> str:
    return OPEN if not shown else SHOWN if estimate.value > 0.0 else REVERSE


@dataclass(frozen=True)
class AnyTime:
    """Confidence sequences, whose error is divided among all comparisons (Bonferroni).

    With probability `level`, no difference is claimed that is none, and no equivalence of arms that differ by more than
    the margin, whenever the study stops.

    Attributes:
        level: Confidence level of the study.
        margin: Largest absolute difference that counts as none.
        comparisons: Number of comparisons.
        largest: Largest number of documents of an image in the whole dataset.
    """

    level: float
    margin: float
    comparisons: int
    largest: int

    @property
    def level_of_each(self) -> float:
        """Confidence level of each sequence, so that all of them together have that of the study."""
        return 1.0 - (1.0 - self.level) / self.comparisons

    def judge(
        self, stage: int, found: Mapping[Compared, ComparisonEvidence], unshown: Mapping[Family, int]
    ) -> dict[Compared, Judgement]:
        """Judge the comparisons that are open after a stage; arguments as of `StoppingRule`."""
        return {one: Judgement(self.finding(known), self._interval(known)) for one, known in found.items()}

    def _interval(self, known: ComparisonEvidence) -> Interval:
        return confidence_sequence(
            known.sums, known.sizes, bound=known.bound, largest=self.largest, level=self.level_of_each
        )

    def finding(self, known: ComparisonEvidence) -> str:
        """Return what a confidence sequence shows, as in `lmms_plugin.analysis.findings`.

        A difference within the margin is too small to count, as in every analysis of a study. The ends of the sequence
        are not needed for it: they exclude a value exactly if the capital of a bet against it is large enough.
        """
        needed = math.log(2.0 / (1.0 - self.level_of_each))

        def excluded(mean: float, *, above: bool) -> bool:
            gained = log_capital(known.sums, known.sizes, mean, bound=known.bound, largest=self.largest, above=above)
            return gained > needed

        if self.margin >= known.bound or (excluded(self.margin, above=False) and excluded(-self.margin, above=True)):
            return EQUIVALENT
        if excluded(0.0, above=True):
            return SHOWN
        return REVERSE if excluded(0.0, above=False) else OPEN

    def legend(self) -> str:
        """Return in words what its intervals and findings mean."""
        return (
            f"Intervals are confidence sequences over images, which hold at all stages together; all {self.comparisons}"
            f" comparisons together are right with a probability of {100 * self.level:g} %"
            f" ({100 * self.level_of_each:.4g} % each). Calibration seeds are those of the cells: other seeds may give"
            " others."
        )
