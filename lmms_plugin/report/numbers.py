"""Everything that a report takes from the logs of one run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.analysis import reliability, results
from lmms_plugin.analysis.reliability import Number, Settings
from lmms_plugin.analysis.results import TaskRecords
from lmms_plugin.report import columns
from lmms_plugin.report.columns import Answers, UnusualLogError
from lmms_plugin.report.measuring import Measured, measure


class Numbers(NamedTuple):
    """What a report takes from the logs of a run.

    Attributes:
        measured: All numbers of tasks with right and wrong answers.
        rejection: Those of tasks in which nothing is right or wrong, but expressions are to be rejected.
        others: Tasks that log no records of ours.
    """

    measured: Measured
    rejection: tuple[Number, ...]
    others: tuple[str, ...]


def of(file: Path, settings: Settings) -> Numbers:
    """Read and measure the logs of a run.

    Args:
        file: Its results file.
        settings: Estimator, intervals.

    Raises:
        ValueError: As `lmms_plugin.analysis.results.read`.
    """
    read = _read(file, results.table(file), settings)
    # A run of the first documents of a task that brings its own split may hold none that are reported on.
    empty = [one.task for one in read.answers if not one.reported.any()]
    return Numbers(
        measure([one for one in read.answers if one.task not in empty], settings),
        tuple(number for records in read.rejection for number in reliability.rejection(records, settings)),
        (*read.others, *empty),
    )


class _Read(NamedTuple):
    answers: list[Answers]
    rejection: list[TaskRecords]
    others: tuple[str, ...]


def _read(file: Path, said: Mapping[str, Any], settings: Settings) -> _Read:
    try:
        return _by_columns(file, said, settings)
    # Whatever stops the fast reader, the other one reads it or names what is wrong.
    except (UnusualLogError, ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
        run = results.read(file)
        rejection = [records for records in run.tasks.values() if records.kind is results.REJECTION]
        kept = [records for records in run.tasks.values() if records.kind is not results.REJECTION]
        return _Read([columns.of(records, settings.estimator) for records in kept], rejection, run.others)


def _by_columns(file: Path, said: Mapping[str, Any], settings: Settings) -> _Read:
    found: list[Answers] = []
    rejection: list[TaskRecords] = []
    others: list[str] = []
    for task, samples in said["n-samples"].items():
        scores, log = said["results"].get(task, {}), results.log_of(file, task)
        mean = scores.get("mean_iou,none", scores.get("accuracy,none"))
        one = columns.read(task, said["configs"][task], log, settings.estimator, samples["effective"], mean)
        if one is not None:
            found.append(one)
        elif records := results.read_task(file, said, task):
            rejection.append(records)
        else:
            others.append(task)
    return _Read(found, rejection, tuple(others))
