"""Images as rows of numbers that need no label, by which they are weighted: kept features, or confidences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from lmms_plugin.analysis.guarantees.covariate import Covariate
from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.records import Bools, Floats, TaskRecords


class KeptFeatures(Protocol):
    """Reader of the features that runs kept."""

    def kept(self, run: LoggedRun) -> bool:
        """Return whether the run was asked to keep features."""

    def __call__(self, name: str, run: LoggedRun, records: TaskRecords) -> Floats:
        """Return the features of all answers of a task, shape (n, features), NaN where one is unknown.

        Raises:
            ValueError: Some are missing, or belong to other answers; it tells the run's name, and what to do.
        """


class ToWeigh(NamedTuple):
    """Documents whose images are described.

    Attributes:
        name: Name of the run.
        run: The run.
        records: Its answers to a task.
        keep: Mask of the documents, shape (n,).
    """

    name: str
    run: LoggedRun
    records: TaskRecords
    keep: Bools


@dataclass(frozen=True)
class Covariates:
    """What images are weighted by.

    Attributes:
        by: What it is.
        lacking: Name of a run that kept no features, which is why it is the confidences; "" for no such reason.
        features: Reader of features; None where they are not used.
    """

    by: Covariate
    lacking: str = ""
    features: KeptFeatures | None = None

    def both(self, source: ToWeigh, target: ToWeigh) -> tuple[Floats, Floats]:
        """Return the images of two sets of documents as rows, sorted by name, shapes (images, k) and (others, k).

        Raises:
            ValueError: Features are missing, or of another number in the other run, or no confidence is in both.
        """
        if self.features is None:
            common = sorted(set(source.records.confidence) & set(target.records.confidence))
            if not common:
                raise ValueError(
                    f"--reweigh: answers of {source.name} to {source.records.task} and of {target.name} to "
                    f"{target.records.task} have no confidence in common to weigh by: leave out --reweigh or that run"
                )
            columns = [np.stack([one.records.confidence[each] for each in common], axis=1) for one in (source, target)]
        else:
            columns = [self.features(*one[:3]) for one in (source, target)]
            if columns[0].shape[1] != columns[1].shape[1]:
                raise ValueError(
                    f"expected features of one model, got {columns[0].shape[1]} numbers per answer of {source.name} and"
                    f" {columns[1].shape[1]} of {target.name}: judge that run by itself, or --reweigh-by confidences"
                )
        # Which of them are known tells as much, but is constant for almost all.
        ours, theirs = (described(of, one) for of, one in zip(columns, (source, target), strict=True))
        varied = np.ptp(np.concatenate([ours, theirs]), axis=0) > 0.0
        return ours[:, varied], theirs[:, varied]


def covariates(runs: Mapping[str, LoggedRun], asked: Covariate | None, features: KeptFeatures | None) -> Covariates:
    """Choose what images are weighted by: what is asked for, else features if all runs kept some.

    Raises:
        ValueError: Features are asked for, and a run kept none.
    """
    if features is None or asked is Covariate.CONFIDENCES:
        return Covariates(Covariate.CONFIDENCES)
    without = [name for name, run in runs.items() if not features.kept(run)]
    if not without:
        return Covariates(Covariate.FEATURES, features=features)
    if asked is Covariate.FEATURES:
        raise ValueError(
            f"--reweigh-by features: {without[0]} kept none ({runs[without[0]].file}): run it again with features=DIR"
            " among its --model_args, or take confidences"
        )
    return Covariates(Covariate.CONFIDENCES, lacking=without[0])


def described(columns: Floats, of: ToWeigh) -> Floats:
    """Return what answers are described by as means over the answers of each image, and shares of those known.

    Args:
        columns: Numbers of all answers, shape (n, k), NaN where one is unknown.
        of: Documents that count.

    Returns:
        Rows of the images of these documents, sorted by name, shape (images, 2 * k).
    """
    _, index, sizes = np.unique(of.records.image[of.keep], return_inverse=True, return_counts=True)
    told = columns[of.keep][np.argsort(index, kind="stable")]
    known = ~np.isnan(told)
    starts = np.cumsum(sizes) - sizes
    there, total = (np.add.reduceat(each, starts, dtype=np.float64) for each in (known, np.where(known, told, 0.0)))
    return np.concatenate([total / np.maximum(there, 1.0), there / sizes[:, None]], axis=1)
