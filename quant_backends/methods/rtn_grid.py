"""Rounding of weights to the nearest point of a uniform grid of integers, in groups along the input."""

from __future__ import annotations

import torch
from torch import Tensor

from lmms_plugin.quant_backends.formats.integers import integer_grid, nearest_codes
from lmms_plugin.quant_backends.layers.codes import Codes, rows_per_block, split_groups
from lmms_plugin.quant_backends.plans.plan import QuantSpec


def round_by_blocks(weight: Tensor, spec: QuantSpec, in_scale: Tensor | None = None) -> Codes:
    """Quantize a weight a few rows at a time, so that float32 copies of it stay small.

    Args:
        weight: (rows, columns), any float dtype, which is also that of the returned scales.
        spec: Bits, group size, symmetry.
        in_scale: Factors (columns,) of the layer's input, by which the weight's columns are divided first.
    """
    parts = []
    for block in weight.split(rows_per_block(weight.shape[1])):
        dense = block.float() if in_scale is None else block.float() / in_scale.float()
        parts.append(round_to_nearest(dense, spec, weight.dtype))
    return Codes.stacked(parts)


def round_to_nearest(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> Codes:
    """Quantize each group of a weight onto a uniform grid, with an error of at most half a step.

    The grid is that of `lmms_plugin.quant_backends.formats.integers.integer_grid`.

    Args:
        weight: (rows, columns) float32.
        spec: Bits, group size, symmetry.
        scale_dtype: Dtype of the returned scale.
    """
    groups = split_groups(weight, spec.group_size)
    scale, zero = integer_grid(*groups.aminmax(dim=-1), spec.bits, spec.symmetric, scale_dtype)
    codes = nearest_codes(groups / scale.float().unsqueeze(-1), zero.unsqueeze(-1), spec.bits).to(torch.uint8)
    return Codes(codes, scale, None if spec.symmetric else zero.to(torch.uint8))


def nearest_values(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> Tensor:
    """Return a weight after `round_to_nearest`, (rows, columns) float32; overwrites the weight."""
    groups = split_groups(weight, spec.group_size)
    scale, zero = integer_grid(*groups.aminmax(dim=-1), spec.bits, spec.symmetric, scale_dtype)
    scale, zero = scale.float().unsqueeze(-1), zero.unsqueeze(-1)
    values = nearest_codes(groups.div_(scale), zero, spec.bits).sub_(zero).mul_(scale)
    return values.flatten(1)[:, : weight.shape[1]]
