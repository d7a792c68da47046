"""Element types of quantized tensors: the value of every code, as the specification of the type gives it. Pure Python.

Small floats are those of OCP's 8-bit Floating Point (OFP8 1.0) and Microscaling Formats (MX 1.0) specifications: a sign
bit, then exponent, then mantissa. NF4 is that of QLoRA (arXiv:2305.14314), FP4 that of bitsandbytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Element:
    """Type of the single numbers of a format.

    Attributes:
        name: Name.
        bits: Number of bits of a code.
        values: (2**bits) value of each code; NaN and infinities where the type has them.
        integer: Whether codes are integers, in offset binary: the value is the code minus 2**(bits - 1).
        mantissa: Number of mantissa bits; 0 for types that are no floats.
    """

    name: str
    bits: int
    values: tuple[float, ...]
    integer: bool = False
    mantissa: int = 0

    @cached_property
    def largest(self) -> float:
        """Return the largest finite value."""
        return max(value for value in self.values if math.isfinite(value))

    @cached_property
    def signed(self) -> bool:
        """Return whether the highest bit is a sign: value(code + half) = -value(code) for every code."""
        half = len(self.values) // 2
        pairs = zip(self.values[:half], self.values[half:], strict=True)
        return not self.integer and all(a == -b or (math.isnan(a) and math.isnan(b)) for a, b in pairs)

    @cached_property
    def nan(self) -> int | None:
        """Return the first code that is NaN; None if the type has none."""
        return next((code for code, value in enumerate(self.values) if math.isnan(value)), None)

    @cached_property
    def ladder(self) -> tuple[tuple[float, int], ...]:
        """Return (value, code) of the finite values in rising order; of those without the sign bit if there is one."""
        codes = range(len(self.values) // 2) if self.signed else range(len(self.values))
        return tuple(sorted((self.values[code], code) for code in codes if math.isfinite(self.values[code])))


def integer(bits: int) -> Element:
    """Return the integers from -2**(bits - 1) to 2**(bits - 1) - 1, in offset binary."""
    return Element(f"int{bits}", bits, tuple(float(code - (1 << (bits - 1))) for code in range(1 << bits)), True)


def small_float(name: str, exponent: int, mantissa: int, *, infinities: bool = False, nan: int = 0) -> Element:
    """Return a float of one sign bit and some bits of exponent and mantissa, with subnormals.

    Args:
        name: Name of the type.
        exponent: Number of bits of the exponent, whose bias is 2**(exponent - 1) - 1.
        mantissa: Number of bits of the mantissa.
        infinities: Whether the smallest mantissa under the highest exponent is infinity, as in IEEE 754.
        nan: Number of highest codes that are NaN, per sign.
    """
    bias, half = (1 << (exponent - 1)) - 1, 1 << (exponent + mantissa)
    positive = []
    for code in range(half):
        power, part = code >> mantissa, code & ((1 << mantissa) - 1)
        value = math.ldexp((1 << mantissa) * (power > 0) + part, max(power, 1) - bias - mantissa)
        positive.append(math.nan if code >= half - nan else value)
    if infinities:
        positive[half - nan - 1] = math.inf
    return Element(
        name, 1 + exponent + mantissa, tuple(positive) + tuple(-value for value in positive), False, mantissa
    )


E4M3 = small_float("e4m3", 4, 3, nan=1)
"""OFP8's E4M3, torch's ``float8_e4m3fn``: no infinity, largest value 448."""
E5M2 = small_float("e5m2", 5, 2, infinities=True, nan=3)
"""OFP8's E5M2, torch's ``float8_e5m2``: as IEEE 754, largest finite value 57344."""
E3M2 = small_float("e3m2", 3, 2)
"""Largest value 28."""
E2M3 = small_float("e2m3", 2, 3)
"""Largest value 7.5."""
E2M1 = small_float("e2m1", 2, 1)
"""0, 0.5, 1, 1.5, 2, 3, 4, 6 with either sign."""

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4 = Element("nf4", 4, _NF4)
"""Quantiles of the normal distribution, as the appendix of QLoRA lists them."""

# bitsandbytes divides 0, 0.0625, 8, 12, 4, 6, 2, 3 by the largest.
_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = Element("fp4", 4, _FP4 + tuple(-value for value in _FP4))
"""bitsandbytes' 4-bit float, whose largest value is 1."""
