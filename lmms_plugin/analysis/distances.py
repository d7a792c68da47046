"""Distance of a run from the unquantized model, without labels, with intervals over images.

Exact where the run forced the reference's answers through the model (`reference=` among its model arguments): its log
of samples holds the measures of every answer. From two runs that each answered for themselves, what their logs keep
makes bounds. Where labels are at hand, how well a measure predicts which answers flip between right and wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lmms_plugin.analysis import logs
from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.analysis.parity.pairs import AnswerPair, common, pairs_of
from lmms_plugin.analysis.records import Bools, Floats, TaskRecords
from lmms_plugin.confidence.departure import MEASURES, KeptDeparture, kept_departure
from lmms_plugin.metrics.bootstrap import Clusters, Draws, Interval, bootstrap, interval
from lmms_plugin.metrics.divergence import FlipsPredicted
from lmms_plugin.metrics.paired import flips
from lmms_plugin.metrics.sums import KnownMeans
from lmms_plugin.protocol.dialects import DIALECTS, Parsed
from lmms_plugin.protocol.response import Response

RIGHT = 0.5
"""Score from which an answer counts as right: an IoU, or the agreement of people with an answer in words."""
_FALLING = ("token_agreement", "answer_agreement", "answer_probability_change")
"""Measures of which less is a larger distance."""
_HOW = "run it with --model_args reference=none and --log_samples, or name the unquantized model's run before it"


class Distance(NamedTuple):
    """One measure of the distance on one task.

    Attributes:
        task: Name of the task.
        measure: Name of the measure, one of `lmms_plugin.confidence.departure.MEASURES`.
        value: Mean over answers; where only bounds are known, the lower one.
        upper: Upper bound of the mean; equal to `value` where that is exact.
        interval: Interval over images; of bounds, from the lower end of the lower to the upper end of the upper one.
        flips_predicted: Share of the flipped answers that are among as many of the largest distance; NaN where nothing
            flipped, or nothing can.
        flips_interval: Its interval over images.
        records: Number of answers that have the measure.
        images: Number of their images.
    """

    task: str
    measure: str
    value: float
    upper: float
    interval: Interval
    flips_predicted: float
    flips_interval: Interval
    records: int
    images: int


class TaskDistance(NamedTuple):
    """Distance on one task.

    Attributes:
        task: Name of the task.
        exact: Whether the reference's answers were forced through the model.
        measures: Measures with their intervals.
        lost: Number of answers that are right in the reference and wrong here; None where no answer is right or wrong.
        won: Number of answers that are wrong in the reference and right here.
        records: Number of answers.
        images: Number of their images.
        compared: Number of tokens at which distributions are compared.
        tokens: Number of tokens of the reference's answers; that of `compared` where the distance is exact.
    """

    task: str
    exact: bool
    measures: list[Distance]
    lost: int | None
    won: int | None
    records: int
    images: int
    compared: int
    tokens: int


class _Answers(NamedTuple):
    """Bounds of each measure of the n answers of a task, sorted by id, and both models' scores.

    Attributes:
        bounds: Name → lower and upper bounds, NaN where unknown, shape (2, n).
        scores: Scores of the reference and of the model, shape (2, n); None where no answer is right or wrong.
        compared: Number of tokens at which distributions are compared.
        tokens: Number of tokens of the reference's answers.
    """

    bounds: Mapping[str, Floats]
    scores: Floats | None
    compared: int
    tokens: int


def of_run(run: LoggedRun, settings: MeasurementSettings) -> list[TaskDistance]:
    """Return the distance of a run from its reference.

    Args:
        run: Run with `reference=` among its model arguments.
        settings: Resamples, seed and level of the intervals.

    Raises:
        ValueError: It had no reference, or a log is damaged.
    """
    found = []
    for task, records in run.tasks.items():
        answers = _forced(run, task, records)
        if answers is not None:
            found.append(_measured(records, records.reported, answers, settings, exact=True))
    if not found:
        raise ValueError(f"expected a run with a reference in {run.file}, got none: {_HOW}")
    return found


def of_runs(first: LoggedRun, second: LoggedRun, settings: MeasurementSettings) -> list[TaskDistance]:
    """Bound the distance of a run from another on the same documents, from what their logs keep.

    Args:
        first: Run of the reference, the unquantized model.
        second: Run in question.
        settings: Resamples, seed and level of the intervals.

    Raises:
        ValueError: They have no documents in common or are of different families, a log is damaged, or answers have no
            probabilities.
    """
    both = common(first, second)
    found = []
    for task, records in both[0].tasks.items():
        other = both[1].tasks[task]
        pairs = {pair.id: pair for pair in pairs_of(task, *both).pairs}
        _expect_one_family(task, pairs.values())
        kept = [_kept(pairs[name]) for name in records.ids.tolist()]
        if not any(one.compared for one in kept):
            raise ValueError(
                f"expected probabilities with the answers to {task}, got none in common: both must be models of this "
                "package, or one of them answers nothing alike"
            )
        scores = None if records.kind.outcome else np.stack([records.score, other.score])
        sizes = [sum(getattr(one, name) for one in kept) for name in ("compared", "tokens")]
        answers = _Answers(_stacked(kept), scores, *sizes)
        found.append(_measured(records, records.reported, answers, settings, exact=False))
    return found


def _expect_one_family(task: str, pairs: Iterable[AnswerPair]) -> None:
    """Refuse answers in different formats: tokens of two families have nothing to do with each other."""
    for pair in pairs:
        formats = pair.first.dialect, pair.second.dialect
        if None not in formats and formats[0] != formats[1]:
            raise ValueError(
                f"expected two runs of one model family, quantized in different ways, but answers to {task} have the"
                f" formats {formats[0]} and {formats[1]}: lmms-plugin compare compares their accuracy"
            )


def _forced(run: LoggedRun, task: str, records: TaskRecords) -> _Answers | None:
    told = logs.references(run, task)
    lacking = [name for name, one in told.items() if one is None]
    if len(lacking) == len(told):
        return None
    if lacking:
        raise ValueError(
            f"expected the reference's answer to every document in {run.log(task)}, got none to {lacking[0]}"
        )
    rows = [told[name] or {} for name in records.ids.tolist()]
    bounds = {name: _column(rows, name) for name in MEASURES}
    scores = np.stack([_column(rows, "score"), records.score]) if not records.kind.outcome else None
    return _Answers({name: np.stack([values, values]) for name, values in bounds.items()}, scores, 0, 0)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> Floats:
    return np.array([row.get(name, math.nan) for row in rows], np.float64)


def _stacked(kept: Sequence[KeptDeparture]) -> dict[str, Floats]:
    nothing = (math.nan, math.nan)
    return {name: np.array([one.measures.get(name, nothing) for one in kept]).T for name in MEASURES}


def _kept(pair: AnswerPair) -> KeptDeparture:
    first, second = (_parsed(one) for one in (pair.first, pair.second))
    if first is None or second is None or first.box is None or second.box is None:
        of_first = () if first is None or first.box is None else first.coordinates
        return kept_departure(pair.first, pair.second, (of_first, ()))
    dialect = DIALECTS[pair.first.dialect or ""]
    read = partial(dialect.boxes, original_size=pair.first.original_size, model_size=pair.first.model_size)
    spans = first.coordinates, second.coordinates
    return kept_departure(pair.first, pair.second, spans, read, dialect.largest)


def _parsed(response: Response) -> Parsed | None:
    if response.dialect is None or not response.tokens:
        return None
    sizes: dict[str, Any] = {"original_size": response.original_size, "model_size": response.model_size}
    return DIALECTS[response.dialect].parse(response.text, opened=response.opened, **sizes)


def _measured(
    records: TaskRecords, keep: Bools, answers: _Answers, settings: MeasurementSettings, *, exact: bool
) -> TaskDistance:
    clusters = Clusters.of(records.image[keep])
    if clusters.count < 2:
        raise ValueError(
            f"expected at least 2 images in task {records.task} to make intervals from, got {clusters.count}"
        )
    right = None if answers.scores is None else (answers.scores[:, keep] >= RIGHT).astype(np.float64)
    changed = None if right is None else flips(*right)
    flipped = None if right is None else np.abs(right[1] - right[0])
    measures = [
        _distance(records.task, name, bounds[:, keep], flipped, clusters, settings)
        for name, bounds in answers.bounds.items()
        if not np.isnan(bounds[0, keep]).all()
    ]
    lost, won = (None, None) if changed is None else changed
    sizes = int(keep.sum()), clusters.count, answers.compared, answers.tokens
    return TaskDistance(records.task, exact, measures, lost, won, *sizes)


def _distance(
    task: str,
    name: str,
    bounds: Floats,
    flipped: Floats | None,
    clusters: Clusters,
    settings: MeasurementSettings,
) -> Distance:
    known = ~np.isnan(bounds[0])
    finite = np.where(np.isinf(bounds), np.nan, bounds)
    size = np.unique(clusters.index[known]).size
    means, *predicted = _draws(name, finite, known, flipped, clusters, settings)
    ends = [
        interval(*means.of(end), level=settings.level) if size > 1 else Interval(math.nan, math.nan)
        for end in ("low", "high")
    ]
    share = share_interval = None
    if predicted and size > 1:
        share = predicted[0].of("flips_predicted")
        share_interval = interval(*share, level=settings.level)
    nothing = Interval(math.nan, math.nan)
    return Distance(
        *(task, name, means.of("low")[0], means.of("high")[0], Interval(ends[0].low, ends[1].high)),
        *(math.nan if share is None else share[0], share_interval or nothing, int(known.sum()), size),
    )


def _draws(
    name: str,
    bounds: Floats,
    known: Bools,
    flipped: Floats | None,
    clusters: Clusters,
    settings: MeasurementSettings,
) -> Iterator[Draws]:
    statistics: list[Any] = [KnownMeans({"low": bounds[0], "high": bounds[1]}, clusters)]
    if flipped is not None and flipped[known].any():
        score = -bounds[0] if name in _FALLING else bounds[0]
        inside = Clusters(clusters.index[known], clusters.count)
        statistics.append(FlipsPredicted(score[known], flipped[known], inside))
    return iter(
        bootstrap(
            statistics, clusters.count, resamples=settings.resamples, seed=settings.seed, workers=settings.workers
        )
    )
