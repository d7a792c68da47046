"""Causes in what engines wrote and how they computed it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from lmms_plugin.analysis.parity.causes_in_input import drawn
from lmms_plugin.analysis.parity.gaps import equal_tokens
from lmms_plugin.analysis.parity.pairs import AnswerPair
from lmms_plugin.analysis.parity.parity_evidence import (
    SIXTEEN_BITS,
    Cause,
    ParityEvidence,
    computes_alike,
    prompts_agree,
    trials,
)
from lmms_plugin.protocol.response import Response

_PASSED_OVER = 1e-3
"""Probability by which a token must be likelier than the chosen one: alternatives are rounded to five decimals."""
_LEGIBLE = 0.005
"""Probability from which five decimals give its logarithm within 0.001."""
_MOST = 0.8
"""Share of the cases that must show a cause's mark."""


def truncated(evidence: ParityEvidence) -> Cause | None:
    """Look for answers that end too early in one run."""
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


def detokenization(evidence: ParityEvidence) -> Cause | None:
    """Look for equal tokens with other texts."""
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


def leaking(evidence: ParityEvidence) -> Cause | None:
    """Look for penalties or sampling that nobody asked for."""
    if drawn(evidence) is not None:
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
    if not prompts_agree(evidence):
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


def dtype(evidence: ParityEvidence) -> Cause | None:
    """Look for another precision of the arithmetic."""
    both = evidence.differs("dtype")
    if both is None or computes_alike(evidence):
        return None
    by = "" if not evidence.gap.tokens else f"; log-probabilities differ by {evidence.gap.mean:.2g} on average"
    return Cause("other dtype", f"the first run computes in {both[0]}, the second in {both[1]}{by}")


def resized_again(evidence: ParityEvidence) -> Cause | None:
    """Look for images that are resampled in another way, or once more."""
    gaps = {name: gap for name, (_, _, gap) in trials(evidence).items() if not math.isnan(gap)}
    flat = [gap for name, gap in gaps.items() if name.startswith("flat")]
    fine = [gap for name, gap in gaps.items() if name.startswith("fine")]
    if not flat or not fine:
        return None
    known = all(facts.get("dtype") for facts in evidence.facts) and not evidence.differs("dtype")
    least = max(evidence.tolerance, 10 * max(flat)) if known else max(SIXTEEN_BITS, 10 * max(flat))
    if max(fine) <= least:
        return None
    return Cause(
        "images resized twice",
        f"drawn pictures of one colour give log-probabilities within {max(flat):.2g}, fine patterns up to "
        f"{max(fine):.2g} apart: pixels are resampled in another way or once more",
    )
