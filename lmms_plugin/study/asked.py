"""Reading what a study file asks of an analysis."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

Question = TypeVar("Question")


def expect_names(given: Mapping[str, Any], known: Collection[str], needed: Collection[str]) -> None:
    """Refuse what is unknown or missing.

    Raises:
        ValueError: Says what was expected and what came.
    """
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"analysis: unknown {unknown[0]!r}; known: {', '.join(sorted(known))}")
    if missing := sorted(set(needed) - set(given)):
        raise ValueError(f"analysis: expected {', '.join(sorted(needed))}, got no {missing[0]}")


def about_metrics(kind: type[Question], given: Mapping[str, Any]) -> Question:
    """Make a question from what a study file says of it: `question` and `metrics` at least.

    Args:
        kind: A dataclass; its `metrics` and `tasks` are tuples of names.
        given: `analysis` of the study file.

    Raises:
        ValueError: Something is missing, unknown or of the wrong kind.
    """
    expect_names(given, {field.name for field in fields(kind)}, ("question", "metrics"))  # type: ignore[arg-type]
    return kind(**{**given, **{name: _texts(given, name) for name in ("metrics", "tasks") if name in given}})


def _texts(given: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = given[name]
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"analysis: {name} should be a list of names, got {values!r}")
    return tuple(values)
