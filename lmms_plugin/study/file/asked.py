"""Reading what a study file asks of an analysis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from lmms_plugin.confidence.estimators import ESTIMATORS, LEARNED, TEXT_ESTIMATORS
from lmms_plugin.metrics.bootstrap import MOST_RESAMPLES
from lmms_plugin.study.file.tasks import known
from lmms_plugin.utils.suggest import near, unknown

Question = TypeVar("Question")
_ESTIMATORS = frozenset((*ESTIMATORS, *TEXT_ESTIMATORS, *LEARNED))


class AskedError(ValueError):
    """Something is wrong with one entry of an `analysis`.

    Attributes:
        name: Of the entry.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"analysis: {name}: {problem}")
        self.name = name


def located(error: ValueError, places: Mapping[str, str]) -> ValueError:
    """The same error with the place of the entry that it is about.

    Args:
        error: About an `analysis`.
        places: Name of an entry → where it stands in the study file; "" → where the `analysis` does.
    """
    name = error.name if isinstance(error, AskedError) else ""
    return ValueError(f"{places.get(name, places[''])}: {error}")


class _Check(NamedTuple):
    fits: Callable[[Any], bool]
    expected: str


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _are_arms(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(wanted, dict) for wanted in value.values())


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_are_names(pair) and len(pair) == 2 for pair in value)


def _is_estimator(value: Any) -> bool:
    return isinstance(value, str) and value in _ESTIMATORS


_CHECKS: Mapping[str, _Check] = MappingProxyType(
    {
        "question": _Check(_is_text, "a text"),
        "clean": _Check(_is_text, "the name of a task"),
        "shifted": _Check(_are_names, "a list of at least one task"),
        "metrics": _Check(_are_names, "a list of names"),
        "tasks": _Check(_are_names, "a list of names"),
        "arms": _Check(_are_arms, "a mapping from names to mappings from axes to values"),
        "contrasts": _Check(_are_pairs, "a list of pairs of arms"),
        "margin": _Check(lambda value: _is_number(value) and value > 0, "a number above 0"),
        "level": _Check(lambda value: _is_number(value) and 0.5 < value < 1, "a number in (0.5, 1)"),
        "resamples": _Check(
            lambda value: _is_whole(value) and 1 <= value <= MOST_RESAMPLES,
            f"a whole number from 1 to {MOST_RESAMPLES}",
        ),
        "seed": _Check(lambda value: _is_whole(value) and value >= 0, "a whole number from 0"),
        "estimator": _Check(_is_estimator, "an estimator of `lmms-plugin estimators`"),
    }
)


def parse(kind: type[Question], given: Mapping[str, Any], needed: Collection[str]) -> Question:
    """Make a question from what a study file says of it.

    Args:
        kind: A dataclass whose fields are checked by their names.
        given: `analysis` of the study file.
        needed: Names that have to be there.

    Raises:
        AskedError: Something is missing, unknown or of the wrong kind.
    """
    default = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in default:
            raise AskedError(name, str(unknown("setting", name, sorted(default))))
        if value is None and default[name] is None:
            continue
        if not _CHECKS[name].fits(value):
            hint = near(value, _ESTIMATORS) if name == "estimator" and isinstance(value, str) else ""
            raise AskedError(name, f"expected {_CHECKS[name].expected}, got {value!r}{hint}")
    if missing := sorted(set(needed) - set(given)):
        raise AskedError(missing[0], f"expected {', '.join(sorted(needed))}, got none")
    return kind(**{name: _frozen(value) for name, value in given.items()})


def expect_metrics(metrics: Iterable[str], tasks: Collection[str], cells: Iterable[Collection[str]]) -> None:
    """Refuse tasks that no cell answers, and metrics that none of them has.

    Args:
        metrics: Asked for.
        tasks: Asked for; none for all.
        cells: Tasks and groups of each cell.

    Raises:
        AskedError: Names the first of them.
    """
    names = {name for cell in cells for name in cell}
    measured = {task: found for one in known(sorted(names)).values() for task, found in one.metrics.items()}
    if missing := [task for task in tasks if task not in measured]:
        raise AskedError("tasks", f"expected a task of the study, got {missing[0]!r}{near(missing[0], measured)}")
    asked = [found for task, found in measured.items() if not tasks or task in tasks]
    there = {metric for found in asked for metric in found}
    # A task that declares no metrics may have any.
    if all(asked) and (missing := [metric for metric in metrics if metric not in there]):
        raise AskedError("metrics", f"expected a metric of the tasks, got {missing[0]!r}{near(missing[0], there)}")


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
