"""Reasons why an accuracy may differ from a published one, as far as the run's own facts go.

A reason is `shown` where a fact of the run supports it, and `open` where the run does not exclude it and the source of
the published number says nothing to compare with. What the facts exclude is not named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import NamedTuple

from lmms_plugin.analysis.reproduction.published import NamedBy
from lmms_plugin.analysis.reproduction.run_facts import RunFacts
from lmms_plugin.protocol.dialects import DIALECTS

_PIXELS = ("min_pixels", "max_pixels")
_PROMPT = ("dialect", "system_prompt")
_TEMPLATE = ("enable_thinking", "template_args")
_DTYPE = "dtype"
_USUAL_DTYPE = "bfloat16"


class Standing(StrEnum):
    """Standing of a reason."""

    SHOWN = "shown"
    OPEN = "open"


class DeviationReason(NamedTuple):
    """A reason why an accuracy may differ.

    Attributes:
        name: What may differ.
        standing: Whether the run's facts support it or leave it open.
        evidence: What the run says, in one sentence.
    """

    name: str
    standing: Standing
    evidence: str


def reasons(facts: RunFacts, difference: float) -> list[DeviationReason]:
    """Return the reasons that the facts support, then those that they leave open.

    Args:
        facts: Facts of the run.
        difference: Our accuracy minus the published one.
    """
    looks: tuple[Callable[[RunFacts, float], Iterator[DeviationReason]], ...] = (
        *(_answers, _checkpoint, _prompt, _template, _pixels),
        *(_processor, _dtype, _others, _dataset),
    )
    found = [reason for look in looks for reason in look(facts, difference)]
    return sorted(found, key=lambda reason: reason.standing is Standing.OPEN)


def _answers(facts: RunFacts, difference: float) -> Iterator[DeviationReason]:
    if difference < 0 and facts.without_box > 0:
        most = min(1.0, facts.without_box / -difference)
        said = f"{facts.without_box:.1%} of the answers hold no box and count as wrong: up to {most:.0%} of the gap"
        yield DeviationReason("answers", Standing.SHOWN, f"{said}.")
    if difference < 0 and facts.unfinished > 0:
        said = f"{facts.unfinished:.1%} of the answers end inside their reasoning"
        yield DeviationReason("reasoning", Standing.SHOWN, f"{said}.")


def _checkpoint(facts: RunFacts, _: float) -> Iterator[DeviationReason]:
    if facts.named_by is not NamedBy.ID:
        said = f"{facts.named_by} alone says which model this is; its weights may be others"
        yield DeviationReason("checkpoint", Standing.OPEN, f"{said}.")


def _prompt(facts: RunFacts, _: float) -> Iterator[DeviationReason]:
    if given := _given(facts, _PROMPT):
        yield DeviationReason("prompt", Standing.SHOWN, f"{given} changes what the model is asked.")
    elif facts.generic:
        said = f"Its family publishes no way to ask for a box: it was asked in generic words ({facts.dialect})"
        yield DeviationReason("prompt", Standing.SHOWN, f"{said}.")
    elif facts.dialect in DIALECTS:
        said = f"Asked in dialect {facts.dialect} ({DIALECTS[facts.dialect].source}); the source's is not on record"
        yield DeviationReason("prompt", Standing.OPEN, f"{said}.")
    else:
        yield DeviationReason("prompt", Standing.OPEN, "The run does not log how boxes were asked for.")


def _template(facts: RunFacts, _: float) -> Iterator[DeviationReason]:
    if given := _given(facts, _TEMPLATE):
        yield DeviationReason("template", Standing.SHOWN, f"{given} changes the chat template's text.")
    elif digest := facts.engine.get("template"):
        said = f"The checkpoint's own chat template (digest {digest}); the source's is not on record"
        yield DeviationReason("template", Standing.OPEN, f"{said}.")


def _pixels(facts: RunFacts, _: float) -> Iterator[DeviationReason]:
    if given := _given(facts, _PIXELS):
        yield DeviationReason("pixel limits", Standing.SHOWN, f"{given} replaces the checkpoint's own.")
        return
    sizes = _sizes(str(facts.engine.get("pixels") or ""))
    said = f"The checkpoint's own{f' ({sizes})' if sizes else ''}; the source's are not on record"
    yield DeviationReason("pixel limits", Standing.OPEN, f"{said}.")


def _sizes(pixels: str) -> str:
    """Return sizes as the engine told them, in one line; "" if it told none."""
    if not pixels or pixels == "{}":
        return ""
    told = json.loads(pixels)
    flat = {
        (f"{name}.{key}" if key else name): one
        for name, value in told.items()
        for key, one in (value.items() if isinstance(value, dict) else [("", value)])
    }
    return ", ".join(f"{name} {value}" for name, value in flat.items())


def _processor(facts: RunFacts, _: float) -> Iterator[DeviationReason]:
    said = facts.engine.get("software") or "an unknown version"
    yield DeviationReason("processor", Standing.OPEN, f"Images were resized by {said}; others resize otherwise.")


def _dtype(facts: RunFacts, _: float) -> Iterator[DeviationReason]:
    dtype = str(facts.engine.get("dtype") or facts.given.get(_DTYPE) or "")
    if dtype != _USUAL_DTYPE:
        said = f"Computed in {dtype}" if dtype else "The run does not tell its data type"
        yield DeviationReason("dtype", Standing.OPEN, f"{said}; that of the source is not on record.")


def _others(facts: RunFacts, _: float) -> Iterator[DeviationReason]:
    rest = [name for name in facts.given if name not in (*_PIXELS, *_PROMPT, *_TEMPLATE, _DTYPE)]
    if given := _given(facts, rest):
        yield DeviationReason("arguments", Standing.OPEN, f"{given} was given.")


def _dataset(facts: RunFacts, _: float) -> Iterator[DeviationReason]:
    if facts.local_copy:
        yield DeviationReason("dataset", Standing.OPEN, "A local copy was read; its labels were not compared.")


def _given(facts: RunFacts, names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"{name}={facts.given[name]}" for name in names if name in facts.given)
