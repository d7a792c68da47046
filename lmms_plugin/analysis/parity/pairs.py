"""Answers of two runs to the same documents, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from lmms_plugin.analysis import logs
from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.records import match
from lmms_plugin.protocol.boxes import Box
from lmms_plugin.protocol.response import Response
from lmms_plugin.utils.reading import accounts
from lmms_plugin.utils.reading.accounts import Account


class _Trial(Account):
    trace: list[int | str | None] | None
    tokens: list[str]
    logprobs: list[float | None]


class _Facts(Account):
    """Schema of the facts about an engine; all of them may be missing."""

    template: str = ""
    system: str = ""
    pixels: str = ""
    checkpoint: str = ""
    weights: str = ""
    dtype: str = ""
    quantization: str = ""
    software: str = ""
    words: dict[str, str] = Field(default_factory=dict)
    trials: dict[str, _Trial] = Field(default_factory=dict)


class AnswerPair(NamedTuple):
    """Two answers to one document.

    Attributes:
        id: Id of the document.
        first: Answer of the first run.
        second: Answer of the second run.
        boxes: Predicted boxes in fractions of the original image, None without one.
    """

    id: str
    first: Response
    second: Response
    boxes: tuple[Box | None, Box | None]


@dataclass(frozen=True)
class TaskPairs:
    """Answers of two runs to one task.

    Attributes:
        task: Name of the task.
        pairs: Answers to the common documents, sorted by id.
        alone: Number of documents that only the first run has, and that only the second has.
        settings: Generation settings of the task in both runs.
        facts: Facts about both engines; empty where a run does not log them.
    """

    task: str
    pairs: tuple[AnswerPair, ...]
    alone: tuple[int, int]
    settings: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})
    facts: tuple[Mapping[str, Any], Mapping[str, Any]] = field(default=({}, {}))


def common(first: LoggedRun, second: LoggedRun) -> tuple[LoggedRun, LoggedRun]:
    """Restrict two runs to the tasks and documents that both have.

    Raises:
        ValueError: They have no task or no document in common, or ask different things about a document.
    """
    shared = [task for task in first.tasks if task in second.tasks]
    if not shared:
        named = [", ".join(sorted(run.tasks)) or "no task of this package" for run in (first, second)]
        raise ValueError(f"expected a task that both runs have; the first has {named[0]}, the second {named[1]}")
    tasks: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for task in shared:
        one, other = first.tasks[task], second.tasks[task]
        kept = one.only(np.isin(one.ids, other.ids)), other.only(np.isin(other.ids, one.ids))
        if not kept[0].ids.size:
            continue
        match(*kept)
        for of, records in zip(tasks, kept, strict=True):
            of[task] = records
    if not tasks[0]:
        raise ValueError(
            f"expected documents that both runs answered in {', '.join(shared)}, got none in common, e.g. "
            f"{first.tasks[shared[0]].ids[0]} and {second.tasks[shared[0]].ids[0]}"
        )
    return replace(first, tasks=tasks[0]), replace(second, tasks=tasks[1])


def pairs_of(task: str, first: LoggedRun, second: LoggedRun) -> TaskPairs:
    """Read the answers of two runs to one task.

    Raises:
        ValueError: A log or the trailer of an answer is damaged.
    """
    sides = [answers_of(run, task) for run in (first, second)]
    ids = sorted(sides[0][0].keys() & sides[1][0].keys())
    made = []
    for name in ids:
        (one, box), (other, other_box) = sides[0][0][name], sides[1][0][name]
        made.append(AnswerPair(name, one, other, (box, other_box)))
    alone = len(sides[0][0]) - len(ids), len(sides[1][0]) - len(ids)
    settings = _settings(first, task), _settings(second, task)
    return TaskPairs(task, tuple(made), alone, settings, (sides[0][1], sides[1][1]))


def answers_of(run: LoggedRun, task: str) -> tuple[dict[str, tuple[Response, Box | None]], Mapping[str, Any]]:
    """Return the answers of a run by document, and the facts about its engine, empty where it logs none.

    Raises:
        ValueError: A log or the trailer of an answer is damaged.
    """
    found: dict[str, tuple[Response, Box | None]] = {}
    facts: Mapping[str, Any] = {}
    for one in logs.answers(run, task):
        try:
            response = Response.decode(one.answer)
        except ValueError as error:
            raise ValueError(f"{run.log(task)}, document {one.id}: {error}") from error
        if response.engine and not facts:
            accounts.expect(response.engine, _Facts, f"{run.log(task)}, document {one.id}, engine")
            facts = response.engine
        found[one.id] = response, None if one.box is None else Box(*one.box)
    return found, facts


def _settings(run: LoggedRun, task: str) -> Mapping[str, Any]:
    settings = run.content["configs"][task].get("generation_kwargs") or {}
    return settings if isinstance(settings, Mapping) else {}
