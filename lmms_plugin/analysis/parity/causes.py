"""Causes of a difference between two engines, found from evidence in a fixed order.

Inputs come first: an engine that reads another prompt cannot be expected to write the same. Then what is written, then
arithmetic, which explains small differences only. A cause is named where something measured or logged shows it.
"""

from __future__ import annotations

from collections.abc import Callable

from lmms_plugin.analysis.parity.causes_in_input import (
    checkpoint,
    drawn,
    image_size,
    pixel_limits,
    quantization,
    system_prompt,
    template,
)
from lmms_plugin.analysis.parity.causes_in_output import detokenization, dtype, leaking, resized_again, truncated
from lmms_plugin.analysis.parity.parity_evidence import SIXTEEN_BITS, Cause, ParityEvidence

_IN_ORDER: tuple[Callable[[ParityEvidence], Cause | None], ...] = (
    *(drawn, checkpoint, quantization),
    *(system_prompt, pixel_limits, image_size, template),
    *(truncated, detokenization, leaking, resized_again, dtype),
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
    if "dtype" in untold and evidence.gap.largest <= SIXTEEN_BITS:
        return "an engine does not tell its dtype, and 16-bit arithmetic makes differences of this size"
    if untold:
        return f"an engine does not tell its {' and '.join(untold)}: other weights would look like this"
    return ""
