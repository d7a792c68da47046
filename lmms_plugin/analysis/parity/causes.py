"""Causes of a difference between two engines, found from evidence in a fixed order.

Inputs come first: an engine that reads another prompt cannot be expected to write the same. Then what is written, then
arithmetic, which explains small differences only. A cause is named where something measured or logged shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lmms_plugin.analysis.parity.gaps import (
    LogprobGap,
    ReadGap,
    WrittenGap,
    equal_tokens,
    logprob_gap,
    read_gap,
    written_gap,
)
from lmms_plugin.analysis.parity.pairs import AnswerPair, TaskPairs
from lmms_plugin.analysis.parity.prompts_apart import Place, PromptDifference, difference_of
from lmms_plugin.protocol.response import Response
from lmms_plugin.protocol.traces import Trace

_PASSED_OVER = 1e-3
"""Probability by which a token must be likelier than the chosen one: alternatives are rounded to five decimals."""
_LEGIBLE = 0.005
"""Probability from which five decimals give its logarithm within 0.001."""
_MOST = 0.8
"""Share of the cases that must show a cause's mark."""
_SIXTEEN_BITS = 0.3
"""Difference of log-probabilities in nats that bfloat16 or float16 alone do not explain (0.05 was measured)."""
_PIXELS = "other pixel limits"


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
        for _, one, other in _traces(self.pairs):
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


def _traces(pairs: Sequence[AnswerPair]) -> Iterator[tuple[AnswerPair, Trace, Trace]]:
    for pair in pairs:
        if pair.first.trace is not None and pair.second.trace is not None:
            yield pair, pair.first.trace, pair.second.trace


def _drawn(evidence: ParityEvidence) -> Cause | None:
    for task in evidence.tasks:
        names = {name for given in task.settings for name in given} - {"max_new_tokens", "max_gen_toks"}
        unlike = [name for name in sorted(names) if task.settings[0].get(name) != task.settings[1].get(name)]
        if unlike:
            said = "; ".join(
                f"{name} {task.settings[0].get(name)!r} and {task.settings[1].get(name)!r}" for name in unlike
            )
            return Cause("other generation settings", f"task {task.task} was asked with {said}")
        if any(_samples(given) for given in task.settings):
            return Cause("sampling", f"task {task.task} draws its answers at random (temperature above 0) in both runs")
    return None


def _samples(settings: Mapping[str, Any]) -> bool:
    temperature = settings.get("temperature")
    warm = isinstance(temperature, int | float) and temperature > 0
    return bool(settings.get("do_sample", warm)) and (temperature is None or warm)


def _computes_alike(evidence: ParityEvidence) -> bool:
    """Return whether all log-probabilities agree, so that weights and arithmetic cannot be the cause."""
    return evidence.gap.tokens > 0 and evidence.gap.largest <= evidence.tolerance


def _checkpoint(evidence: ParityEvidence) -> Cause | None:
    if _computes_alike(evidence):
        return None
    names = [str(facts.get("checkpoint") or "an unnamed one") for facts in evidence.facts]
    if evidence.differs("weights"):
        digests = " and ".join(str(facts["weights"]) for facts in evidence.facts)
        return Cause("another checkpoint", f"the weights are others: {names[0]} and {names[1]}, digests {digests}")
    unknown = not all(facts.get("weights") for facts in evidence.facts)
    if unknown and evidence.differs("checkpoint") and not any(name.startswith(("/", ".", "demo")) for name in names):
        return Cause("another checkpoint", f"the first run loaded {names[0]}, the second {names[1]}")
    return None


def _quantization(evidence: ParityEvidence) -> Cause | None:
    both = evidence.differs("quantization")
    # Names of one format differ between engines; only whether there is any is certain.
    if _computes_alike(evidence) or both is None or ("none" not in both and both[0].split()[0] != both[1].split()[0]):
        return None
    return Cause("other quantization", f"quantization is {both[0]} in the first run and {both[1]} in the second")


def _prompts_agree(evidence: ParityEvidence) -> bool:
    """Return whether both read the same prompts, as far as they tell."""
    read = evidence.read
    return not read.prompts.different and not read.prompt_lengths.different


def _system_prompt(evidence: ParityEvidence) -> Cause | None:
    systems = [str(facts.get("system", "")) for facts in evidence.facts]
    if all(evidence.facts) and systems[0] != systems[1]:
        said = " and ".join("one" if text else "none" for text in systems)
        return Cause("other system prompt", f"system prompts as given differ: {said}, digests {systems}")
    found = evidence.prompt_difference
    if found is not None and found.place is Place.HEAD and not evidence.differs("template"):
        return Cause(
            "other system prompt",
            f"after {found.at} equal tokens, in front of the image, {_only(evidence, found)}; all else is equal",
        )
    return None


def _only(evidence: ParityEvidence, found: PromptDifference) -> str:
    """Say what only one of two prompts has."""
    sides = zip(("first", "second"), evidence.facts, (found.first, found.second), strict=True)
    return " and ".join(f"only the {name} has {_spelled(facts, ids)!r:.90}" for name, facts, ids in sides if ids)


def _spelled(facts: Mapping[str, Any], ids: Sequence[int]) -> str:
    words = facts.get("words") or {}
    return "".join(str(words.get(str(index), f"[{index}]")) for index in ids)


def _template(evidence: ParityEvidence) -> Cause | None:
    if evidence.differs("template"):
        return Cause("other chat template", "the chat templates of the two checkpoints differ, by their digests")
    systems = {str(facts.get("system", "")) for facts in evidence.facts}
    if _prompts_agree(evidence) or (all(evidence.facts) and len(systems) > 1):
        return None
    found = evidence.prompt_difference
    if found is not None:
        if found.place is not Place.ELSEWHERE:
            return None
        return Cause(
            "other chat template",
            f"prompts differ from token {found.at} on, beyond image tokens: {_only(evidence, found)}",
        )
    read, apart = evidence.read, _length_differences(evidence)
    if read.image_tokens.different:
        return None
    if len(set(apart)) == 1 or read.image_tokens.same:
        added = f"by {apart[0]:+d} tokens in every document" if len(set(apart)) == 1 else "though images take the same"
        return Cause("other chat template", f"prompts differ {added}; parity=True shows where")
    return None


def _length_differences(evidence: ParityEvidence) -> list[int]:
    return [other.tokens - one.tokens for _, one, other in _traces(evidence.pairs)]


def _pixel_limits(evidence: ParityEvidence) -> Cause | None:
    if both := evidence.differs("pixels"):
        return Cause(_PIXELS, f"the image processors have {both[0]} and {both[1]}")
    counts = _image_counts(evidence)
    if any(one != other for one, other in counts) and (limit := _limit(counts)):
        return Cause(_PIXELS, f"the second run's images take {limit} tokens, the first run's do not stop there")
    turned = [(other, one) for one, other in counts]
    if any(one != other for one, other in counts) and (limit := _limit(turned)):
        return Cause(_PIXELS, f"the first run's images take {limit} tokens, the second run's do not stop there")
    return None


def _limit(counts: Sequence[tuple[int, int]]) -> str:
    """Return the limit that turns the first counts into the second ones, in words; "" if none does.

    A limit leaves some counts as they are, and brings all others close to itself: a grid has whole rows and columns.
    """
    kept = [other for one, other in counts if one == other]
    fewer, more = ([other for one, other in counts if sign * other < sign * one] for sign in (1, -1))
    if not kept or bool(fewer) == bool(more):
        return ""
    if fewer and min(fewer) >= 0.8 * max(fewer) and max(kept) <= max(fewer) * 1.05:
        return f"at most {max(fewer)}"
    if more and max(more) <= 1.25 * min(more) and min(kept) >= min(more) * 0.95:
        return f"at least {min(more)}"
    return ""


def _image_counts(evidence: ParityEvidence) -> list[tuple[int, int]]:
    counts = [(one.image_tokens, other.image_tokens) for _, one, other in _traces(evidence.pairs)]
    trials = _trials(evidence)
    counts += [(one.image_tokens, other.image_tokens) for one, other, _ in trials.values() if one and other]
    if all(None in pair for pair in counts):
        counts = [(one.tokens, other.tokens) for one, other, _ in trials.values() if one and other]
    return [(one, other) for one, other in counts if one is not None and other is not None]


def _image_size(evidence: ParityEvidence) -> Cause | None:
    if _pixel_limits(evidence) is not None:
        return None
    read = evidence.read
    if read.image_sizes.different:
        return Cause("other image size", f"images reach the models in other sizes, e.g. {read.image_sizes.example}")
    if read.image_tokens.different:
        size = "though the image was sent in the same size" if read.image_sizes.same else "which is another image size"
        return Cause(
            "other number of image tokens",
            f"in {read.image_tokens.different} of {read.image_tokens.known} prompts images take other numbers of "
            f"tokens, {size}, e.g. {read.image_tokens.example}",
        )
    if not _prompts_agree(evidence) and len(set(_length_differences(evidence))) > 1:
        return Cause(
            "other number of image tokens",
            f"prompts differ in length by amounts that vary with the document: {read.prompt_lengths.example}",
        )
    return None


def _truncated(evidence: ParityEvidence) -> Cause | None:
    for k, name in ((1, "second"), (0, "first")):
        both = [(pair.first, pair.second) for pair in evidence.differing]
        cut = [answers[k] for answers in both if _begins(answers[k], answers[1 - k])]
        if cut and len(cut) >= _MOST * len(evidence.differing):
            lengths = sorted({len(answer.tokens) for answer in cut})
            said = f"after {lengths[0]} tokens" if len(lengths) == 1 else "early"
            limits = {str(task.settings[k].get("max_new_tokens", "not given")) for task in evidence.tasks}
            return Cause(
                "answers cut off (max_tokens)",
                f"{len(cut)} of {len(evidence.differing)} answers that differ are the beginning of the other run's, "
                f"and end {said} in the {name} run (max_new_tokens {', '.join(sorted(limits))})",
            )
    return None


def _begins(short: Response, whole: Response) -> bool:
    """Return whether an answer is the beginning of another, without an end of its own."""
    count = len(short.tokens)
    if not count:
        return bool(short.text) and whole.text != short.text and whole.text.startswith(short.text)
    texts = [token.text for token in short.tokens]
    return texts == [token.text for token in whole.tokens[:count]] and count < len(whole.tokens) and texts[-1] != ""


def _leaking(evidence: ParityEvidence) -> Cause | None:
    if _drawn(evidence) is not None:
        return None
    for k, name in ((1, "second"), (0, "first")):
        mine = [_passed_over((pair.first, pair.second)[k]) for pair in evidence.pairs]
        others = [_passed_over((pair.first, pair.second)[1 - k]) for pair in evidence.pairs]
        written = [again for one in mine for again in one]
        if not written or any(others):
            continue
        documents = sum(bool(one) for one in mine)
        said = f"in {documents} answers of the {name} run a token was written that was not the likeliest"
        if np.mean(written) >= _MOST:
            return Cause(
                "penalties leaking in",
                f"{said}; {sum(written)} of {len(written)} tokens passed over had been written before, which "
                "repetition, presence and frequency penalties avoid",
            )
        return Cause("sampling leaking in", f"{said}, though greedy answers were asked for")
    return _penalised_probabilities(evidence)


def _passed_over(response: Response) -> list[bool]:
    """Return, for each number that was likelier than the one written, whether it had been written before."""
    found: list[bool] = []
    before: set[str] = set()
    for token in response.tokens:
        if token.alternatives is not None and token.alternatives.probabilities:
            listed = token.alternatives.probabilities
            best = max(listed, key=lambda digits: listed[digits])
            if listed[best] > max(math.exp(token.logprob), listed.get(_digits(token.text), 0.0)) + _PASSED_OVER:
                found.append(best in before)
        before.add(_digits(token.text))
    return found


def _penalised_probabilities(evidence: ParityEvidence) -> Cause | None:
    """Look for probabilities that were taken after penalties.

    A penalty lowers the logits of what was written before and leaves all others as they are. So the odds between two
    numbers that were not written stay the same, and those between a written and an unwritten one change; with other
    weights all of them change.
    """
    if not _prompts_agree(evidence):
        return None
    shifts, spreads = [], []
    for pair in evidence.pairs:
        for written, unwritten in _changed_odds(pair):
            shifts += [float(np.mean(unwritten)) - change for change in written]
            spreads += [change - float(np.mean(unwritten)) for change in unwritten]
    if not shifts or not spreads:
        return None
    shift, spread = float(np.mean(shifts)), float(np.sqrt(np.mean(np.square(spreads))))
    if abs(shift) < 0.05 or spread > 0.1 * abs(shift):
        return None
    name = "second" if shift > 0 else "first"
    return Cause(
        "penalties leaking in",
        f"digits that had been written before have {abs(shift):.2f} nats less in the {name} run, and the odds between "
        f"all others stay within {spread:.2g}: probabilities were taken after a penalty",
    )


def _changed_odds(pair: AnswerPair) -> Iterator[tuple[list[float], list[float]]]:
    """Yield changes of log-probability of digits that were written before and that were not, position by position."""
    before: set[str] = set()
    for one, other in list(zip(pair.first.tokens, pair.second.tokens, strict=False))[: equal_tokens(pair) + 1]:
        if one.alternatives is not None and other.alternatives is not None:
            listed = one.alternatives.probabilities, other.alternatives.probabilities
            likely = [digits for digits, p in listed[0].items() if min(p, listed[1].get(digits, 0.0)) >= _LEGIBLE]
            changes = {digits: math.log(listed[1][digits] / listed[0][digits]) for digits in likely}
            written = [change for digits, change in changes.items() if digits in before]
            unwritten = [change for digits, change in changes.items() if digits not in before]
            if len(unwritten) > 1:
                yield written, unwritten
        before.add(_digits(one.text))


def _digits(text: str) -> str:
    return "".join(letter for letter in text if letter.isdecimal())


def _detokenization(evidence: ParityEvidence) -> Cause | None:
    alike = [pair for pair in evidence.differing if _same_tokens(pair, evidence.tolerance)]
    if not alike or len(alike) < _MOST * len(evidence.differing):
        return None
    by_ids = sum(_same_ids(pair) for pair in alike)
    shown = f"by their ids in {by_ids}" if by_ids else "by number and log-probabilities"
    one, other = alike[0].first.text.strip(), alike[0].second.text.strip()
    return Cause(
        "detokenization",
        f"{len(alike)} of {len(evidence.differing)} answers that differ have the same tokens ({shown}) and other "
        f"texts, e.g. {one!r:.60} and {other!r:.60}",
    )


def _same_ids(pair: AnswerPair) -> bool:
    one, other = pair.first.trace, pair.second.trace
    return one is not None and other is not None and one.written != "" and one.written == other.written


def _same_tokens(pair: AnswerPair, tolerance: float) -> bool:
    if _same_ids(pair):
        return True
    traces = pair.first.trace, pair.second.trace
    if all(trace is not None and trace.written for trace in traces):
        return False
    one, other = pair.first.tokens, pair.second.tokens
    if not one or len(one) != len(other):
        return False
    return all(abs(a.logprob - b.logprob) <= tolerance for a, b in zip(one, other, strict=True))


def _dtype(evidence: ParityEvidence) -> Cause | None:
    both = evidence.differs("dtype")
    if both is None or _computes_alike(evidence):
        return None
    by = "" if not evidence.gap.tokens else f"; log-probabilities differ by {evidence.gap.mean:.2g} on average"
    return Cause("other dtype", f"the first run computes in {both[0]}, the second in {both[1]}{by}")


def _resized_again(evidence: ParityEvidence) -> Cause | None:
    gaps = {name: gap for name, (_, _, gap) in _trials(evidence).items() if not math.isnan(gap)}
    flat = [gap for name, gap in gaps.items() if name.startswith("flat")]
    fine = [gap for name, gap in gaps.items() if name.startswith("fine")]
    if not flat or not fine:
        return None
    known = all(facts.get("dtype") for facts in evidence.facts) and not evidence.differs("dtype")
    least = max(evidence.tolerance, 10 * max(flat)) if known else max(_SIXTEEN_BITS, 10 * max(flat))
    if max(fine) <= least:
        return None
    return Cause(
        "images resized twice",
        f"drawn pictures of one colour give log-probabilities within {max(flat):.2g}, fine patterns up to "
        f"{max(fine):.2g} apart: pixels are resampled in another way or once more",
    )


def _trials(evidence: ParityEvidence) -> dict[str, tuple[Trace | None, Trace | None, float]]:
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


_IN_ORDER: tuple[Callable[[ParityEvidence], Cause | None], ...] = (
    *(_drawn, _checkpoint, _quantization),
    *(_system_prompt, _pixel_limits, _image_size, _template),
    *(_truncated, _detokenization, _leaking, _resized_again, _dtype),
)


def causes(evidence: ParityEvidence) -> list[Cause]:
    """Return the causes that evidence shows, in the order in which they are looked for; the first is the verdict."""
    found = [cause for look in _IN_ORDER if (cause := look(evidence)) is not None]
    names = [cause.name for cause in found]
    return [cause for k, cause in enumerate(found) if cause.name not in names[:k]]


def hint(evidence: ParityEvidence) -> str:
    """Return what helps where no cause is found."""
    if any(not facts for facts in evidence.facts):
        return "a run logs no facts about its engine: run it again with this version"
    if not all(facts.get("trials") for facts in evidence.facts):
        return "parity=True among both runs' model arguments keeps more evidence"
    untold = [name for name in ("dtype", "weights") if not all(facts.get(name) for facts in evidence.facts)]
    if "dtype" in untold and evidence.gap.largest <= _SIXTEEN_BITS:
        return "an engine does not tell its dtype, and 16-bit arithmetic makes differences of this size"
    if untold:
        return f"an engine does not tell its {' and '.join(untold)}: other weights would look like this"
    return ""
