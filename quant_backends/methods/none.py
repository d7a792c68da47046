"""Unquantized baseline: the same code path, with nothing quantized."""

from __future__ import annotations

from dataclasses import dataclass

from lmms_plugin.quant_backends.backend import Backend
from lmms_plugin.quant_backends.plans.plan import UNTOUCHED_BITS, QuantPlan


@dataclass(frozen=True)
class NoneBackend(Backend):
    """Baseline that leaves every layer as the checkpoint has it."""

    name = "none"
    bits = frozenset()
    default_bits = UNTOUCHED_BITS
    unsaved = "it quantizes nothing; copy the checkpoint instead"

    def check(self, plan: QuantPlan) -> None:
        """Refuse a plan that asks for quantization, which would be ignored silently."""
        if plan.specs:
            raise ValueError(f"none leaves every layer at 16 bits, but the plan asks for {plan.specs[0].bits}")
