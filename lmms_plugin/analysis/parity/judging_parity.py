"""Comparison of two engines on the same documents, and its verdict."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmms_plugin.analysis.comparison import Change, compare
from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.analysis.parity.causes import causes, hint
from lmms_plugin.analysis.parity.gaps import (
    BoxGap,
    LogprobGap,
    ReadGap,
    WrittenGap,
    box_gap,
    logprob_gap,
    read_gap,
    written_gap,
)
from lmms_plugin.analysis.parity.pairs import TaskPairs, common, pairs_of
from lmms_plugin.analysis.parity.parity_evidence import Cause, ParityEvidence
from lmms_plugin.analysis.parity.prompts_apart import PromptDifference
from lmms_plugin.utils.messages import counted

TOLERANCE = 1e-3
"""Difference of log-probabilities in nats that counts as none: two float32 engines differ by 1e-5, float16 by 8e-3."""
UNEXPLAINED = "unexplained"


class TaskParity(NamedTuple):
    """Comparison of two engines on one task.

    Attributes:
        task: Name of the task.
        documents: Number of common documents.
        first_only: Number of documents that only the first run has.
        second_only: Number that only the second run has.
        read: Differences of what was read.
        written: Differences of what was written.
        logprobs: Differences of log-probabilities.
        boxes: Differences between predicted boxes.
    """

    task: str
    documents: int
    first_only: int
    second_only: int
    read: ReadGap
    written: WrittenGap
    logprobs: LogprobGap
    boxes: BoxGap


class Parity(NamedTuple):
    """Comparison of two engines.

    Attributes:
        same: Whether answers are equal and log-probabilities within the tolerance.
        sentence: Verdict in one sentence.
        causes: Causes in order of evidence; empty where the runs are the same or nothing explains the difference.
        hint: What helps where no cause is found.
        tolerance: Tolerance in nats.
        first: Model and arguments of the first run.
        second: Model and arguments of the second run.
        left_out: Tasks that only one run has.
        whole: Comparison over all tasks.
        tasks: Comparison of each task.
        changes: Differences of accuracy and calibration with paired intervals; empty with fewer than 2 images.
        prompt: First difference between two prompts, where their ids are kept.
        facts: Facts about both engines.
    """

    same: bool
    sentence: str
    causes: list[Cause]
    hint: str
    tolerance: float
    first: str
    second: str
    left_out: list[str]
    whole: TaskParity
    tasks: list[TaskParity]
    changes: list[Change]
    prompt: PromptDifference | None
    facts: tuple[dict[str, object], dict[str, object]]


def judge(first: LoggedRun, second: LoggedRun, settings: MeasurementSettings, tolerance: float = TOLERANCE) -> Parity:
    """Compare two runs of what is to be one model.

    Args:
        first: Reference run.
        second: Run in question.
        settings: Estimator, resamples, seed and level of the intervals.
        tolerance: Largest difference of log-probabilities in nats that counts as none.

    Raises:
        ValueError: The runs have no tasks or documents in common, ask different things about a document, or a log is
            damaged.
    """
    if not tolerance >= 0.0:
        raise ValueError(f"expected a tolerance of at least 0, got {tolerance}")
    shared = common(first, second)
    tasks = tuple(pairs_of(task, *shared) for task in shared[0].tasks)
    evidence = ParityEvidence(tasks, tolerance)
    found = [] if evidence.same else causes(evidence)
    helps = "" if evidence.same or found else hint(evidence)
    alone = [sum(task.alone[k] for task in tasks) for k in (0, 1)]
    whole = _task(TaskPairs("all", evidence.pairs, (alone[0], alone[1])))
    return Parity(
        evidence.same,
        _sentence(evidence, whole, found, helps),
        found,
        helps,
        tolerance,
        first.label,
        second.label,
        sorted(set(first.tasks) ^ set(second.tasks)),
        whole,
        [_task(one) for one in tasks],
        _changes(*shared, settings),
        None if evidence.same else evidence.prompt_difference,
        (dict(evidence.facts[0]), dict(evidence.facts[1])),
    )


def _task(one: TaskPairs) -> TaskParity:
    pairs = one.pairs
    read, written = read_gap(pairs), written_gap(pairs)
    return TaskParity(one.task, len(pairs), *one.alone, read, written, logprob_gap(pairs), box_gap(pairs))


def _changes(first: LoggedRun, second: LoggedRun, settings: MeasurementSettings) -> list[Change]:
    enough = [task for task, one in first.tasks.items() if np.unique(one.images[one.reported]).size > 1]
    if len(enough) < len(first.tasks):
        return []
    return compare(first, second, settings).changes


def _sentence(evidence: ParityEvidence, whole: TaskParity, found: list[Cause], helps: str) -> str:
    texts, gap = whole.written.texts, whole.logprobs
    equal = f"{whole.documents - texts.different} of {counted(whole.documents, 'answer')} are equal"
    apart = f"log-probabilities differ by at most {gap.largest:.2g} nats (tolerance {evidence.tolerance:g})"
    if not gap.tokens:
        apart = "none begins alike" if whole.written.tokens.known else "log-probabilities are not logged by both"
    if evidence.same:
        return f"Same: {equal}, and {apart}."
    if not found:
        return f"Different, {UNEXPLAINED}: {equal}, and {apart}{f'; {helps}' if helps else ''}."
    more = f" Also: {', '.join(cause.name for cause in found[1:])}." if found[1:] else ""
    return f"Different: {found[0].name}. {equal[0].upper()}{equal[1:]}, and {apart}; {found[0].evidence}.{more}"
