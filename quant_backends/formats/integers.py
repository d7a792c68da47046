"""Uniform grids of integers over the range of each block."""

from __future__ import annotations

import torch
from torch import Tensor


def integer_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scale of each block and its zero point.

    Asymmetric grids cover [min(low, 0), max(high, 0)] with an integer zero point. Symmetric grids use all 2**bits
    levels: step 2·max(|low|, |high|) / (2**bits − 1), zero point 2**(bits − 1) (the convention of compressed-tensors).

    Args:
        low: Smallest value of each block, float32.
        high: Largest value of each block, float32.
        bits: Number of bits.
        symmetric: Whether zero points are fixed.
        dtype: Dtype of the scale. Steps are rounded up to it, never down: a step too small would clip the ends.

    Returns:
        Scale in `dtype`, and zero point, an integer in float32, both of the shape of `low`.
    """
    highest = (1 << bits) - 1
    if symmetric:
        scale = _round_up(torch.maximum(-low, high) * (2 / highest), dtype)
        return scale, torch.full_like(low, 1 << (bits - 1))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _round_up((high - low) / highest, dtype)
    return scale, (-low / scale.float()).round().clamp(0, highest)


def nearest_codes(steps: Tensor, zero: Tensor | int, bits: int) -> Tensor:
    """Return the codes, in float32, nearest to values in steps of the grid; overwrites `steps`."""
    return steps.round_().add_(zero).clamp_(0, (1 << bits) - 1)


def _round_up(step: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the smallest positive number of `dtype` that is not below `step`; 1 where a block is all zero."""
    step = torch.where(step == 0, torch.ones_like(step), step)
    rounded = step.to(dtype)
    bits = torch.int16 if rounded.element_size() == 2 else torch.int32
    following = (rounded.view(bits) + 1).view(dtype)
    return torch.where(rounded.float() < step, following, rounded)
