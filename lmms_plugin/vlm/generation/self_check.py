"""Agreement of two computations of an answer: the tolerance for rounding, and differences beyond it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmms_plugin.vlm.contracts.engine import ContinuationScore, Generated
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.generation.decoding import Decoder


class Tolerances(NamedTuple):
    """Tolerances between two computations.

    Attributes:
        logprob: Largest difference of a log-probability.
        keys: Largest difference of a prefix's keys, as a share of their norm.
    """

    logprob: float
    keys: float


# Rounding in another order of additions stays well below, a wrong position or mask far above.
TOLERANCES = {torch.float64: Tolerances(1e-6, 1e-6), torch.float32: Tolerances(1e-3, 1e-3)}
LOW_PRECISION_TOLERANCE = Tolerances(0.35, 0.1)
PADDED_TOKENS = 8
"""How much of an answer is compared: a position that counts padding is wrong from the first new token on."""


def tolerances_of(model: Any) -> Tolerances:
    """Return the tolerances of a model's least precise part."""
    # Low-bit activations turn the last bit of a sum into a whole step, whatever the precision around them.
    if any(getattr(module, "act_bits", 16) < 16 for module in model.modules()):
        return LOW_PRECISION_TOLERANCE
    # A few parameters may be kept in float32 where the rest is not.
    dtypes = {model.dtype, *(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())}
    return max(TOLERANCES.get(dtype, LOW_PRECISION_TOLERANCE) for dtype in dtypes)


def difference(expected: Generated, found: ContinuationScore, tolerance: float, ways: tuple[str, str]) -> str | None:
    """Return where the log-probabilities of the same answer differ.

    Args:
        expected: Tokens scored by the first computation.
        found: Same tokens scored by the second.
        tolerance: Tolerance of a log-probability.
        ways: Names of the two.
    """
    for position, (token, logprob) in enumerate(zip(expected.tokens, found.logprobs, strict=True)):
        if not abs(token.logprob - logprob) <= tolerance:
            return (
                f"token {position + 1}, {token.text!r}, has log-probability {token.logprob:.6f} {ways[0]} and "
                f"{logprob:.6f} {ways[1]} (tolerance {tolerance:g})"
            )
    return None


def padded_difference(
    decoder: Decoder, alone: Sequence[Mapping[str, Tensor]], padded: Mapping[str, Tensor]
) -> str | None:
    """Return how answers in a padded batch differ from those of each row alone; None if equal up to rounding.

    Args:
        decoder: Decoder of the model.
        alone: Keyword arguments of the model for each row by itself.
        padded: Keyword arguments for all of them at once, on the same device.
    """
    settings = GenerationSettings(max_new_tokens=PADDED_TOKENS)
    checked = [(decoder.with_plain_cache, tolerances_of(decoder.model))]
    if decoder.cache_quantizer is not None:
        # The last bit of a sum can become a step of the grid.
        checked.append((decoder, LOW_PRECISION_TOLERANCE))
    for one, tolerances in checked:
        expected = [one.generate(inputs, settings)[0] for inputs in alone]
        scores = one.score(padded, [answer.ids for answer in expected])
        pairs = zip(expected, scores, strict=True)
        found = (difference(*pair, tolerances.logprob, ("alone", "in a batch")) for pair in pairs)
        if told := next(filter(None, found), None):
            return told
    return None


def parted_difference(decoder: Decoder, inputs: Mapping[str, Tensor]) -> str | None:
    """Return how an answer changes if the last token of its prompt is read after the others; None if it does not.

    Args:
        decoder: Decoder of the model, with quantized caches.
        inputs: Keyword arguments of the model for one prompt.
    """
    assert decoder.cache_quantizer is not None
    tolerance = tolerances_of(decoder.model).logprob
    expected = decoder.with_plain_cache.generate(inputs, GenerationSettings(max_new_tokens=PADDED_TOKENS))
    parted = replace(decoder, cache_quantizer=decoder.cache_quantizer.computed)
    (score,) = parted.score(inputs, [expected[0].ids])
    return difference(expected[0], score, tolerance, ("read at once", "with its last token apart"))
