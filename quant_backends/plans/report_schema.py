"""What `quant_report.json` says of a quantization, as far as other programs read it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lmms_plugin.utils.reading.accounts import Account

REPORT = "quant_report.json"
"""Name of the file, beside saved checkpoints and results."""


class Module(Account):
    """One layer in an account of quantization."""

    name: str
    relative_error: float | None = None


class Experts(Account):
    """How many tokens the experts of one layer were sent."""

    name: str
    tokens: list[Annotated[int, Field(ge=0)]]


class Quantized(Account):
    """`quant_report.json`: what quantization did."""

    bits_per_weight: float | None = None
    bytes_after: float | None = None
    seconds: float | None = None
    modules: list[Module] | None = None
    experts: list[Experts] | None = None
