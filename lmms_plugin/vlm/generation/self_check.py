"""Whether two ways of computing an answer agree: how far rounding may set them apart, and what differs beyond it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmms_plugin.vlm.contracts.engine import ContinuationScore, Generated
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.generation.decoding import Decoder


class Tolerances(NamedTuple):
    """How far two ways may be apart.

    Attributes:
        logprob: difference of a log-probability.
        keys: difference of a prefix's keys, as a share of their norm.
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
    # Activations of few bits turn the last bit of a sum into a whole step, whatever the precision around them.
    if any(getattr(module, "act_bits", 16) < 16 for module in model.modules()):
        return LOW_PRECISION_TOLERANCE
    # A few parameters may be kept in float32 where the rest is not.
    dtypes = {model.dtype, *(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())}
    return max(TOLERANCES.get(dtype, LOW_PRECISION_TOLERANCE) for dtype in dtypes)


def difference(expected: Generated, found: ContinuationScore, tolerance: float, ways: tuple[str, str]) -> str | None:
    """Say where the same answer has other log-probabilities.

    Args:
        expected: by the first way.
        found: the same tokens scored by the second.
        tolerance: of a log-probability.
        ways: how the two are called.
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
    """Say what a padded batch makes of answers that each row gets alone; None if the same, up to rounding.

    Args:
        decoder: the model.
        alone: arguments of the model for each row by itself.
        padded: arguments for all of them at once, on the same device.
    """
    tolerance = tolerances_of(decoder.model).logprob
    greedy = GenerationSettings(max_new_tokens=PADDED_TOKENS)
    expected = [decoder.generate(inputs, greedy)[0] for inputs in alone]
    scores = decoder.score(padded, [answer.ids for answer in expected])
    found = (difference(*pair, tolerance, ("alone", "in a batch")) for pair in zip(expected, scores, strict=True))
    return next(filter(None, found), None)
