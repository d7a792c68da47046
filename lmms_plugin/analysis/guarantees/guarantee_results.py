"""What is promised, and where it was found to be kept."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lmms_plugin.analysis.guarantees.covariate import Covariate
from lmms_plugin.analysis.guarantees.guarded_loss import GuardedLoss
from lmms_plugin.metrics.guarantees.box_margins import BoxMargin
from lmms_plugin.metrics.guarantees.risk_bounds import Bound
from lmms_plugin.metrics.guarantees.thresholds import ChosenThreshold


class Survival(StrEnum):
    """Whether a guarantee holds elsewhere."""

    HOLDS = "holds"
    OPEN = "open"
    BROKEN = "broken"
    NOTHING_ACCEPTED = "nothing accepted"


@dataclass(frozen=True)
class GuaranteeSettings:
    """What is promised, and on which images it is chosen.

    Attributes:
        risk: Largest risk that is promised.
        level: Probability with which it is, and of every verdict.
        loss: What is promised to be rare.
        estimator: Confidence estimator; None for the default of the kind of task.
        per_image: Whether images count alike, instead of answers.
        bound: Bound of the risk; None for the strongest that holds.
        calibrate: Task to choose on; None for the only clean one.
        share: Share of its images to choose on; the others are judged. None for a half where no other task is judged,
            or others have the same images, and else for all.
        pilot: Share of the images to choose on from which the thresholds to test are learned.
        seed: Seed of these choices of images.
        reweigh: Whether thresholds are also chosen with the images weighted as if they were those they are judged on.
        reweigh_by: What these weights are by; None for kept features where all runs have some, else confidences.
        contain: Probability with which grown boxes of accepted answers are to contain the true ones; None for no
            margin.

    Raises:
        ValueError: On construction, if a share is not inside (0, 1), or the loss does not go with what else is asked.
    """

    risk: float = 0.05
    level: float = 0.95
    loss: GuardedLoss = GuardedLoss.ERROR
    estimator: str | None = None
    per_image: bool = False
    bound: Bound | None = None
    calibrate: str | None = None
    share: float | None = None
    pilot: float = 0.25
    seed: int = 0
    reweigh: bool = False
    contain: float | None = None
    reweigh_by: Covariate | None = None

    def __post_init__(self) -> None:
        for name in ("risk", "level", "share", "pilot", "contain"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < 1.0:
                raise ValueError(f"--{name}: expected a share between 0 and 1, as 0.05 for 5 %, got {value:g}")
        if self.loss is GuardedLoss.FALSE_POSITIVE and (self.reweigh or self.contain is not None):
            raise ValueError("expected no weights and no margin of boxes with false positives, got one of them")


@dataclass(frozen=True)
class Reweighing:
    """What images are weighted by.

    Attributes:
        by: What it is.
        lacking: Name of a run that kept no features, which is why it is the confidences; "" for no such reason.
    """

    by: Covariate
    lacking: str


@dataclass(frozen=True)
class ReweighedThreshold:
    """A threshold that was chosen with the weights of what it is judged on.

    Attributes:
        threshold: Threshold; infinite where none was shown to keep the risk.
        auroc: How well the features tell apart what it is chosen and what it is judged on.
        overlaps: Whether they overlap at all; if not, nothing is chosen.
        effective_images: How many equally weighted images say as much as those that it is tested on.
        risk: Risk on what it is judged on; NaN where nothing is accepted.
        coverage: Share that it accepts there.
        verdict: Whether the promised risk is kept there.
    """

    threshold: float
    auroc: float
    overlaps: bool
    effective_images: float
    risk: float
    coverage: float
    verdict: Survival


@dataclass(frozen=True)
class JudgedCell:
    """The chosen threshold on one task of one run.

    Attributes:
        run: Name of the run.
        task: Name of the task.
        condition: `clean`, or what is shifted.
        shift: Shift and severity; "" for none.
        documents: Number of documents that are judged.
        images: Number of their images.
        accepted: Number of accepted documents.
        coverage: Share of the documents that is accepted.
        risk: Risk on these images; NaN where nothing is accepted.
        low: Lower bound of the risk, which holds with the level's probability.
        high: Upper bound of the risk, likewise.
        p_broken: p-value of "the risk is at most the promised one", adjusted by Holm over all cells.
        verdict: Whether it is shown to hold, or to be broken.
        flipped: Share of documents that are accepted, and wrong where the run that it was chosen on is right; None for
            that run itself, for other documents and for soft outcomes.
        flipped_high: Upper bound of that share.
        contained: Share of accepted boxes that contain the true one when grown by the margin; None without a margin.
        contained_verdict: Whether that probability is kept.
        reweighed: Threshold chosen anew with weights; None where it is not asked for.
    """

    run: str
    task: str
    condition: str
    shift: str
    documents: int
    images: int
    accepted: int
    coverage: float
    risk: float
    low: float
    high: float
    p_broken: float
    verdict: Survival
    flipped: float | None = None
    flipped_high: float | None = None
    contained: float | None = None
    contained_verdict: Survival | None = None
    reweighed: ReweighedThreshold | None = None


@dataclass(frozen=True)
class ChosenAnew:
    """The threshold that another run's own answers to the same task would give.

    Attributes:
        run: Name of the run.
        chosen: Its threshold.
    """

    run: str
    chosen: ChosenThreshold


@dataclass(frozen=True)
class RunGuarantee:
    """A guarantee, and where it survives.

    Attributes:
        run: Name of the run that it was chosen on.
        task: Task that it was chosen on.
        settings: What is promised, and how it was chosen.
        chosen: Threshold, with what it was chosen on.
        needed: Number of images without any error that it takes at least.
        margin: Margin of boxes; None where it was not asked for.
        cells: Judged tasks of all runs.
        anew: Thresholds chosen anew for the other runs that answered the task.
        reweighing: What images are weighted by; None where no weights were asked for.
    """

    run: str
    task: str
    settings: GuaranteeSettings
    chosen: ChosenThreshold
    needed: int
    margin: BoxMargin | None
    cells: tuple[JudgedCell, ...]
    anew: tuple[ChosenAnew, ...]
    reweighing: Reweighing | None = None

    def count(self, verdict: Survival) -> int:
        """Return the number of cells with a verdict."""
        return sum(cell.verdict is verdict for cell in self.cells)
