"""RTN, round to nearest: a uniform grid over the range of each group, without calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.backend import CodesBackend
from lmms_plugin.quant_backends.layers.codes import Codes, rows_per_block, split_groups
from lmms_plugin.quant_backends.layers.int8_inputs import (
    UNQUANTIZED,
    Int8InputLinear,
    check_act_bits,
    rounded_inputs_apart,
)
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.plans.plan import QuantSpec


@dataclass(frozen=True)
class RtnBackend(CodesBackend):
    """Round-to-nearest weights, symmetric or asymmetric, in groups along the input.

    Attributes:
        act_bits: Number of bits of the layers' inputs. 8 rounds them at run time, each token by its own largest
            magnitude (W8A8, W4A8); 16 leaves them as they are.
    """

    name = "rtn"
    bits = frozenset(range(2, 9))
    act_bits: int = UNQUANTIZED

    def __post_init__(self) -> None:
        check_act_bits(self.act_bits)

    @property
    def uncompressed(self) -> str | None:
        """Return the reason: rounded inputs need this package's own format."""
        return rounded_inputs_apart(self.act_bits)

    def quantize_linear(self, weight: Tensor, bias: nn.Parameter | None, spec: QuantSpec) -> QuantizedLinear:
        """Quantize one layer into a packed layer."""
        kind = PackedLinear if self.act_bits == UNQUANTIZED else Int8InputLinear
        return kind.from_codes(self.quantize(weight, spec), spec, weight.shape[1], bias=bias)

    def quantize(self, weight: Tensor, spec: QuantSpec) -> Codes:
        """Round a weight (rows, columns) to the nearest codes."""
        return round_by_blocks(weight, spec)


def nearest(
    layer: nn.Linear, spec: QuantSpec, kind: type[PackedLinear] = PackedLinear, *, in_scale: Tensor | None = None
) -> PackedLinear:
    """Return a packed layer with the weight of a layer rounded to nearest.

    Args:
        layer: Dense layer.
        spec: Bits, group size, symmetry.
        kind: Class of the packed layer.
        in_scale: Factors (columns,) of the packed layer's input, by which the weight's columns are divided first.
    """
    codes = round_by_blocks(layer.weight, spec, in_scale)
    return kind.from_codes(codes, spec, layer.in_features, bias=layer.bias, in_scale=in_scale)


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

    Asymmetric grids cover [min(w, 0), max(w, 0)] with an integer zero point. Symmetric grids use all 2**bits levels:
    step 2·max|w| / (2**bits − 1), zero point 2**(bits − 1) (the convention of compressed-tensors).

    Args:
        weight: (rows, columns) float32.
        spec: Bits, group size, symmetry.
        scale_dtype: Dtype of the returned scale. Steps are rounded up to it, never down: a step too small would clip
            the ends of the range.
    """
    groups = split_groups(weight, spec.group_size)
    scale, zero = _grid(groups, spec, scale_dtype)
    codes = _nearest_codes(groups / scale.float().unsqueeze(-1), zero, spec.bits).to(torch.uint8)
    return Codes(codes, scale, None if spec.symmetric else zero.to(torch.uint8))


def nearest_values(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> Tensor:
    """Return a weight after `round_to_nearest`, (rows, columns) float32; overwrites the weight."""
    groups = split_groups(weight, spec.group_size)
    grid = _grid(groups, spec, scale_dtype)
    scale, zero = grid[0].float().unsqueeze(-1), grid[1]
    values = _nearest_codes(groups.div_(scale), zero, spec.bits).sub_(zero.unsqueeze(-1)).mul_(scale)
    return values.flatten(1)[:, : weight.shape[1]]


def _grid(groups: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scale of each group, in `scale_dtype`, and its zero point, an integer in float32."""
    highest = (1 << spec.bits) - 1
    low, high = groups.aminmax(dim=-1)
    if spec.symmetric:
        scale = _round_up(torch.maximum(-low, high) * (2 / highest), scale_dtype)
        zero = torch.full_like(low, 1 << (spec.bits - 1))
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _round_up((high - low) / highest, scale_dtype)
        zero = (-low / scale.float()).round().clamp(0, highest)
    return scale, zero


def _nearest_codes(steps: Tensor, zero: Tensor, bits: int) -> Tensor:
    return steps.round_().add_(zero.unsqueeze(-1)).clamp_(0, (1 << bits) - 1)


def _round_up(step: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the smallest positive number of `dtype` that is not below `step`; 1 where a group is all zero."""
    step = torch.where(step == 0, torch.ones_like(step), step)
    rounded = step.to(dtype)
    bits = torch.int16 if rounded.element_size() == 2 else torch.int32
    following = (rounded.view(bits) + 1).view(dtype)
    return torch.where(rounded.float() < step, following, rounded)
