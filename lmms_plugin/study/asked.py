"""Reading what a study file asks of an analysis."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def expect_names(given: Mapping[str, Any], known: Collection[str], needed: Collection[str]) -> None:
    """Refuse what is unknown or missing.

    Raises:
        ValueError: Says what was expected and what came.
    """
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"analysis: unknown {unknown[0]!r}; known: {', '.join(sorted(known))}")
    if missing := sorted(set(needed) - set(given)):
        raise ValueError(f"analysis: expected {', '.join(sorted(needed))}, got no {missing[0]}")


def texts(given: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of names, at least one.

    Raises:
        ValueError: It is something else.
    """
    values = given[name]
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"analysis: {name} should be a list of names, got {values!r}")
    return tuple(values)
