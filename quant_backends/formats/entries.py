"""Formats of quantized tensors as data: adding a format is one entry of `FORMATS`. Pure Python.

A format says what its elements are, which of them share a scale, what the scale is and how it is rounded
(`lmms_plugin.quant_backends.formats.codec` does all of it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from lmms_plugin.quant_backends.formats import elements
from lmms_plugin.quant_backends.formats.elements import Element
from lmms_plugin.utils import suggest

Scale = Literal["own", "float32", "e8m0", "e4m3"]
"""Type of a scale: the tensor's own dtype, float32, a power of two in a byte, or an E4M3 float."""

Rounding = Literal["nearest", "up", "floor", "even"]

SCALE_BITS = {"float32": 32, "e8m0": 8, "e4m3": 8}
"""Bits of a scale; one in the tensor's own dtype has that dtype's."""


@dataclass(frozen=True)
class NumberFormat:
    """Format of a quantized tensor.

    Attributes:
        name: Name in options and reports.
        element: Type of the single numbers.
        block: (rows, columns) that share a scale; None for all of them. The last block may be smaller.
        scale: Type of the scales.
        rounding: Rounding of a scale to its type: ``nearest``; ``up``, so that no end of a range is cut off; for powers
            of two ``floor`` (MX 1.0, section 6.3) or ``even``, where the largest magnitude is first rounded to the
            element's mantissa, so that it is cut off less (compressed-tensors and Quark).
        symmetric: Whether zero has a fixed code; otherwise each block has an integer zero point.
        global_scale: Whether one float32 number multiplies all scales of a tensor before they are rounded.
        reach: Value to which the largest magnitude of a block is scaled; None for the element's largest, and for the
            middle between both ends of an integer range (127.5 for 8 bits).
        source: Specification.
    """

    name: str
    element: Element
    block: tuple[int | None, int | None]
    scale: Scale
    rounding: Rounding = "nearest"
    symmetric: bool = True
    global_scale: bool = False
    reach: float | None = None
    source: str = ""

    @property
    def bits(self) -> int:
        """Return the number of bits of a code, without scales."""
        return self.element.bits

    @property
    def target(self) -> float:
        """Return the value to which the largest magnitude of a block is scaled."""
        if self.reach is not None:
            return self.reach
        return ((1 << self.bits) - 1) / 2 if self.element.integer else self.element.largest

    def blocks(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the number of blocks along the rows and the columns of a matrix."""
        sizes = self.block_of(rows, columns)
        return -(-rows // sizes[0]), -(-columns // sizes[1])

    def block_of(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the (rows, columns) of a block in a matrix, never more than it has, and at least 1."""
        height, width = self.block
        return max(1, min(height or rows, rows)), max(1, min(width or columns, columns))

    def bits_per_weight(self, rows: int, columns: int, own: int = 16) -> float:
        """Return the bits per element of a matrix, scales, zero points and global scale included.

        Args:
            rows: Number of rows.
            columns: Number of columns.
            own: Bits of the tensor's own dtype.
        """
        per_block = SCALE_BITS.get(self.scale, own) + (0 if self.symmetric else 8)
        blocks = math.prod(self.blocks(rows, columns))
        return self.bits + (blocks * per_block + 32 * self.global_scale) / (rows * columns)

    def in_blocks(self, rows: int | None, columns: int | None) -> NumberFormat:
        """Return this format with blocks of another shape."""
        return replace(self, block=(rows, columns))

    @property
    def label(self) -> str:
        """Return a few words for reports: the name, and the blocks where they are not those that it stands for."""
        if self.block == FORMATS[self.name].block:
            return self.name
        rows, columns = ("all" if size is None else str(size) for size in self.block)
        return f"{self.name} of {rows} x {columns}"


MX = "OCP Microscaling Formats 1.0"
OFP8 = "OCP 8-bit Floating Point 1.0"
NVIDIA = "NVIDIA NVFP4, as compressed-tensors writes it"
ROW, TENSOR, SQUARE = (1, None), (None, None), (128, 128)


def _integers() -> list[NumberFormat]:
    found = []
    for bits in range(2, 9):
        whole = NumberFormat(
            f"int{bits}", elements.integer(bits), ROW, "own", "up", source="compressed-tensors' integers"
        )
        found += [whole, replace(whole, name=f"int{bits}_asym", symmetric=False)]
    return found


def _eights(name: str, element: Element) -> list[NumberFormat]:
    return [
        NumberFormat(name, element, ROW, "float32", source=OFP8),
        NumberFormat(f"{name}_tensor", element, TENSOR, "float32", source=OFP8),
        NumberFormat(f"{name}_block", element, SQUARE, "float32", source=f"{OFP8}; blocks of DeepSeek-V3"),
    ]


def _mx(name: str, element: Element) -> NumberFormat:
    return NumberFormat(name, element, (1, 32), "e8m0", "even", source=MX)


FORMATS: dict[str, NumberFormat] = {
    one.name: one
    for one in (
        *_integers(),
        *_eights("fp8_e4m3", elements.E4M3),
        *_eights("fp8_e5m2", elements.E5M2),
        _mx("mxfp8", elements.E4M3),
        _mx("mxfp8_e5m2", elements.E5M2),
        _mx("mxfp6_e3m2", elements.E3M2),
        _mx("mxfp6_e2m3", elements.E2M3),
        _mx("mxfp4", elements.E2M1),
        NumberFormat("nvfp4", elements.E2M1, (1, 16), "e4m3", global_scale=True, source=NVIDIA),
        NumberFormat("nf4", elements.NF4, (1, 64), "float32", source="QLoRA, arXiv:2305.14314"),
        NumberFormat("fp4", elements.FP4, (1, 64), "float32", source="bitsandbytes"),
    )
}
"""Name -> format. Blocks of the integers are whole rows here; methods cut rows into groups of ``group_size``."""


def format_of(name: str) -> NumberFormat:
    """Return the format of a name.

    Raises:
        ValueError: There is none; the message names the nearest and lists all.
    """
    if name not in FORMATS:
        raise suggest.unknown("format", name, FORMATS)
    return FORMATS[name]
