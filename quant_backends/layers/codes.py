"""Canonical form of a quantized weight, which quantizers return and from which every kernel derives its layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor


class Codes(NamedTuple):
    """Quantized weight in its canonical form: ``weight = (codes - zero_point) * scale``.

    Attributes:
        codes: (rows, groups, group_size) uint8 in [0, 2**bits); columns are padded with zeros of the weight to a whole
            number of groups.
        scale: (rows, groups), in the dtype the layer computes in.
        zero_point: (rows, groups), uint8, or the scale's dtype for a real-valued zero. None means 2**(bits - 1)
            everywhere.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @classmethod
    def stacked(cls, parts: Sequence[Codes]) -> Codes:
        """Return the concatenation of some weights along their rows."""
        codes, scale = (torch.cat([getattr(part, field) for part in parts]) for field in ("codes", "scale"))
        zeros = [part.zero_point for part in parts if part.zero_point is not None]
        return cls(codes, scale, torch.cat(zeros) if zeros else None)

    def dequantize(self, bits: int, dtype: torch.dtype) -> Tensor:
        """Return the weight as (rows, groups * group_size), computed in `dtype`.

        Codes and integer zero points are exact in bfloat16, so their difference is too; the only rounding is that of
        the product. Real zero points are rounded to `dtype` first, as in HQQ's own layers.
        """
        zero = self.zero_point
        if zero is None:
            # Wraps around in a byte, which is the int8 with the same bits.
            weight = (self.codes - (1 << (bits - 1))).view(torch.int8).to(dtype)
        elif bits < 8 and zero.dtype == torch.uint8 and zero.device.type == "cpu" and int(zero.max()) <= 128:
            # A pass over bytes is a quarter of one over floats, with the same differences.
            weight = (self.codes - zero.unsqueeze(-1)).view(torch.int8).to(dtype)
        else:
            weight = self.codes.to(dtype)
            weight -= zero.to(dtype).unsqueeze(-1)
        weight *= self.scale.to(dtype).unsqueeze(-1)
        return weight.flatten(-2)


def all_finite(x: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity, by its extremes, in a thirtieth of the usual time."""
    return not x.numel() or bool(torch.isfinite(torch.stack(x.aminmax())).all())


def rows_per_block(columns: int) -> int:
    """Return the number of rows of a weight to process at once: about a million elements, and at least one row."""
    return max(1, (1 << 20) // columns)


def columns_per_group(group_size: int | None, columns: int) -> int:
    """Return the group size as a number: all columns of a weight if it is None, and never more than there are."""
    return columns if group_size is None else min(group_size, columns)


def split_groups(weight: Tensor, group_size: int | None) -> Tensor:
    """Cut the columns of a weight into groups, padding the last one with zeros.

    Args:
        weight: (rows, columns).
        group_size: Number of columns per group, None for all of them.

    Returns:
        (rows, groups, group_size).
    """
    rows, columns = weight.shape
    size = columns_per_group(group_size, columns)
    padding = -columns % size
    if padding:
        weight = functional.pad(weight, (0, padding))
    return weight.reshape(rows, -1, size)
