"""Evidence on two engines that are to give the same answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from lmms_plugin.analysis.parity.gaps import LogprobGap, ReadGap, WrittenGap, logprob_gap, read_gap, written_gap
from lmms_plugin.analysis.parity.pairs import AnswerPair, TaskPairs
from lmms_plugin.analysis.parity.prompts_apart import PromptDifference, difference_of
from lmms_plugin.protocol.traces import Trace

SIXTEEN_BITS = 0.3
"""Difference of log-probabilities in nats that bfloat16 or float16 alone do not explain (0.05 was measured)."""


class Cause(NamedTuple):
    """A cause of differences.

    Attributes:
        name: Name of the cause.
        evidence: What shows it, in one sentence.
    """

    name: str
    evidence: str


@dataclass(frozen=True)
class ParityEvidence:
    """All that causes are found from.

    Attributes:
        tasks: Answers by task.
        tolerance: Largest difference of log-probabilities in nats that counts as none.
    """

    tasks: tuple[TaskPairs, ...]
    tolerance: float

    @cached_property
    def pairs(self) -> tuple[AnswerPair, ...]:
        """Return the answers of all tasks."""
        return tuple(pair for task in self.tasks for pair in task.pairs)

    @cached_property
    def read(self) -> ReadGap:
        """Return what both engines read."""
        return read_gap(self.pairs)

    @cached_property
    def written(self) -> WrittenGap:
        """Return what both engines wrote."""
        return written_gap(self.pairs)

    @cached_property
    def gap(self) -> LogprobGap:
        """Return the differences of log-probabilities."""
        return logprob_gap(self.pairs)

    @cached_property
    def facts(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return the facts about both engines, empty where none are logged."""
        found = [next((task.facts[k] for task in self.tasks if task.facts[k]), {}) for k in (0, 1)]
        return found[0], found[1]

    @cached_property
    def differing(self) -> tuple[AnswerPair, ...]:
        """Return the answers that differ."""
        return tuple(pair for pair in self.pairs if pair.first.text.strip() != pair.second.text.strip())

    @cached_property
    def prompt_difference(self) -> PromptDifference | None:
        """Locate the first difference between two prompts; None where no ids of such are kept."""
        for _, one, other in traces(self.pairs):
            if one.digest != other.digest and (found := difference_of(one, other)) is not None:
                return found
        return None

    @property
    def same(self) -> bool:
        """Return whether answers are equal and log-probabilities within the tolerance."""
        gap = self.gap.largest
        return not self.written.texts.different and not self.written.tokens.different and not gap > self.tolerance

    def differs(self, name: str) -> tuple[str, str] | None:
        """Return the values of a fact that both engines tell differently; None if not so."""
        one, other = (str(facts.get(name, "")) for facts in self.facts)
        return (one, other) if one and other and one != other else None


def traces(pairs: Sequence[AnswerPair]) -> Iterator[tuple[AnswerPair, Trace, Trace]]:
    """Yield the answers of which both engines tell what they read, with these traces."""
    for pair in pairs:
        if pair.first.trace is not None and pair.second.trace is not None:
            yield pair, pair.first.trace, pair.second.trace


def trials(evidence: ParityEvidence) -> dict[str, tuple[Trace | None, Trace | None, float]]:
    """Return trial pictures by name: both traces and the largest difference of log-probabilities, NaN if unknown."""
    one, other = (facts.get("trials") or {} for facts in evidence.facts)
    return {name: _trial(one[name], other[name]) for name in one if name in other}


def _trial(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Trace | None, Trace | None, float]:
    traces = [None if not told.get("trace") else Trace.read(told["trace"]) for told in (one, other)]
    apart = []
    # The likeliest tokens of two distributions are no further apart than the distributions, be they the same or not:
    # the first token that differs counts, and none after it.
    for a, b, p, q in zip(one["tokens"], other["tokens"], one["logprobs"], other["logprobs"], strict=False):
        if p is None or q is None:
            return traces[0], traces[1], math.nan
        apart.append(abs(p - q))
        if a != b:
            break
    return traces[0], traces[1], max(apart, default=math.nan)


def prompts_agree(evidence: ParityEvidence) -> bool:
    """Return whether both read the same prompts, as far as they tell."""
    read = evidence.read
    return not read.prompts.different and not read.prompt_lengths.different


def computes_alike(evidence: ParityEvidence) -> bool:
    """Return whether all log-probabilities agree, so that weights and arithmetic cannot be the cause."""
    return evidence.gap.tokens > 0 and evidence.gap.largest <= evidence.tolerance
