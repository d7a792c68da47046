"""Causes in what engines were given and read: settings, weights, prompts and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_plugin.analysis.parity.parity_evidence import (
    Cause,
    ParityEvidence,
    computes_alike,
    prompts_agree,
    traces,
    trials,
)
from lmms_plugin.analysis.parity.prompts_apart import Place, PromptDifference

_PIXELS = "other pixel limits"


def drawn(evidence: ParityEvidence) -> Cause | None:
    """Look for other generation settings, and for answers that are drawn at random."""
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


def checkpoint(evidence: ParityEvidence) -> Cause | None:
    """Look for other weights."""
    if computes_alike(evidence):
        return None
    names = [str(facts.get("checkpoint") or "an unnamed one") for facts in evidence.facts]
    if evidence.differs("weights"):
        digests = " and ".join(str(facts["weights"]) for facts in evidence.facts)
        return Cause("another checkpoint", f"the weights are others: {names[0]} and {names[1]}, digests {digests}")
    # Names that are places, as `demo` is, differ for one checkpoint.
    unknown = not all(facts.get("weights") for facts in evidence.facts)
    if unknown and evidence.differs("checkpoint") and not any(name.startswith(("/", ".", "demo")) for name in names):
        return Cause("another checkpoint", f"the first run loaded {names[0]}, the second {names[1]}")
    return None


def quantization(evidence: ParityEvidence) -> Cause | None:
    """Look for weights that are quantized in another way."""
    both = evidence.differs("quantization")
    # Names of one format differ between engines; only whether there is any is certain.
    if computes_alike(evidence) or both is None or ("none" not in both and both[0].split()[0] != both[1].split()[0]):
        return None
    return Cause("other quantization", f"quantization is {both[0]} in the first run and {both[1]} in the second")


def system_prompt(evidence: ParityEvidence) -> Cause | None:
    """Look for a system prompt that only one run has, given by its user or by the server's template."""
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


def template(evidence: ParityEvidence) -> Cause | None:
    """Look for another chat template."""
    if evidence.differs("template"):
        return Cause("other chat template", "the chat templates of the two checkpoints differ, by their digests")
    systems = {str(facts.get("system", "")) for facts in evidence.facts}
    if prompts_agree(evidence) or (all(evidence.facts) and len(systems) > 1):
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
    return [other.tokens - one.tokens for _, one, other in traces(evidence.pairs)]


def pixel_limits(evidence: ParityEvidence) -> Cause | None:
    """Look for other limits of pixels, in facts and in numbers of image tokens."""
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
    counts = [(one.image_tokens, other.image_tokens) for _, one, other in traces(evidence.pairs)]
    shown = list(trials(evidence).values())
    counts += [(one.image_tokens, other.image_tokens) for one, other, _ in shown if one and other]
    if all(None in pair for pair in counts):
        counts = [(one.tokens, other.tokens) for one, other, _ in shown if one and other]
    return [(one, other) for one, other in counts if one is not None and other is not None]


def image_size(evidence: ParityEvidence) -> Cause | None:
    """Look for images of other sizes, or of other numbers of tokens, that no limit explains."""
    if pixel_limits(evidence) is not None:
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
    if not prompts_agree(evidence) and len(set(_length_differences(evidence))) > 1:
        return Cause(
            "other number of image tokens",
            f"prompts differ in length by amounts that vary with the document: {read.prompt_lengths.example}",
        )
    return None
