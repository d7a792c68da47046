"""Whether a run used all documents of its tasks: what was measured on some of them goes on no leaderboard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lmms_plugin.analysis.logs import ALL, LoggedRun
from lmms_plugin.analysis.records import TaskRecords
from lmms_plugin.export import facts
from lmms_plugin.export.definitions import is_ours

LIMITS = ("limit", "offset")
"""Options of lmms-eval that leave documents out."""


def expect_whole(run: LoggedRun, results: Mapping[str, Any]) -> None:
    """Check that a run answered all documents of its tasks.

    Args:
        run: As read.
        results: Content of its results file.

    Raises:
        ValueError: If it did not, as far as the files tell.
    """
    config = results.get("config") or {}
    for told in (config, config.get("resolved_cli_args") or {}, facts.cell(run.file)):
        given = [f"--{name} {told[name]:g}" for name in LIMITS if told.get(name) not in ALL]
        if given:
            raise ValueError(f"expected a run of all documents, got one with {' and '.join(given)}")
    for task in filter(is_ours, run.others):
        raise ValueError(f"task {task}: expected its log of samples, which is missing")
    for task, records in run.tasks.items():
        _expect_all(records, results["n-samples"][task])


def _expect_all(records: TaskRecords, size: Mapping[str, int]) -> None:
    logged = records.ids.size
    if not size.get("original") == size["effective"] == logged:
        raise ValueError(
            f"task {records.task}: expected all {size.get('original')} documents, got {size['effective']} scored and"
            f" {logged} logged"
        )
    if not np.array_equal(np.sort(records.numbers), np.arange(logged)):
        raise ValueError(f"task {records.task}: expected documents numbered 0 to {logged - 1}, each once")
