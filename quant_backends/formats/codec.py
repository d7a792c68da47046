"""Encoding and decoding of tensors in any format of `lmms_plugin.quant_backends.formats.entries`.

Weights, activations and key-value caches are quantized by these three functions alone::

    from lmms_plugin.quant_backends.formats.codec import decode, encode, fake_quantize
    from lmms_plugin.quant_backends.formats.entries import FORMATS

    found = encode(weight, FORMATS["nvfp4"])              # codes uint8, scale, zero_point, global_scale
    dense = decode(found, FORMATS["nvfp4"])               # float32
    keys = fake_quantize(keys, FORMATS["fp8_e4m3"])       # decode(encode(keys)), in the dtype of keys
    values = encode(values, FORMATS["int4_asym"].in_blocks(1, 32))   # groups of 32 along the last dimension

The last two dimensions of a tensor are the rows and columns that a format's blocks cut; all dimensions before them
stack matrices, each with a global scale or a tensor scale of its own. Per-channel scales are those of the transposed
tensor: ``encode(keys.transpose(-1, -2), format)``. Codes take a byte each; `lmms_plugin.quant_backends.layers.packing`
packs them into exactly `NumberFormat.bits` bits.

Elements are rounded to nearest, ties to the even code, and saturate: values beyond the largest, infinities included,
become the largest (OFP8's saturating mode). NaN becomes the element's NaN where it has one. A block that holds NaN or
infinity gets a scale that is not finite, so that all of it decodes to NaN rather than to plausible numbers.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from lmms_plugin.quant_backends.formats.elements import Element
from lmms_plugin.quant_backends.formats.entries import NumberFormat
from lmms_plugin.quant_backends.formats.integers import integer_grid, nearest_codes

NATIVE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
"""Element -> torch's dtype whose bytes are its codes."""

BIAS, E8M0_NAN = 127, 255
"""Of a scale that is a power of two: its code is the exponent plus 127, and 255 is NaN."""

EMPTY_SCALE = 0.125
"""E4M3 scale of a block whose own would be zero, as in compressed-tensors."""


class EncodedTensor(NamedTuple):
    """Quantized tensor.

    Attributes:
        codes: (..., rows, columns) uint8, a code per element.
        scale: (..., row blocks, column blocks), as it is stored: float32 or the tensor's own dtype, uint8 for powers of
            two, float8_e4m3fn.
        zero_point: (..., row blocks, column blocks) uint8; None for symmetric formats.
        global_scale: (...) float32, by which `scale` was multiplied before it was rounded; None for formats without.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None


def encode(
    tensor: Tensor, format: NumberFormat, *, scale: Tensor | None = None, global_scale: Tensor | None = None
) -> EncodedTensor:
    """Quantize a tensor.

    Args:
        tensor: (..., rows, columns), any float dtype; a vector is one row.
        format: Format.
        scale: Scales to use, as `EncodedTensor.scale`; None to derive them from the tensor.
        global_scale: Global scale to use, as `EncodedTensor.global_scale`; None to derive it from the tensor.
    """
    x = tensor.float() if tensor.dim() > 1 else tensor.float().unsqueeze(0)
    zero = None
    if format.global_scale and global_scale is None:
        global_scale = find_global_scale(x.abs().amax((-2, -1)), format)
    if scale is None and format.element.integer and format.reach is None:
        low, high = (extreme(_in_blocks(x, format)) for extreme in (_lowest, _highest))
        scale, zero = integer_grid(low, high, format.bits, format.symmetric, tensor.dtype)
    elif scale is None:
        scale = find_scale(_highest(_in_blocks(x.abs(), format)), format, global_scale)
    steps = x / spread(effective_scale(scale, global_scale, format), x, format)
    if zero is not None and not format.symmetric:
        codes = nearest_codes(steps, spread(zero, x, format), format.bits).to(torch.uint8)
        zero = zero.to(torch.uint8)
    else:
        codes, zero = to_codes(steps, format.element, format.reach), None
    return EncodedTensor(codes.view(tensor.shape), scale, zero, global_scale)


def decode(encoded: EncodedTensor, format: NumberFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of a quantized tensor, computed in float32 and rounded once to `dtype`."""
    codes = encoded.codes if encoded.codes.dim() > 1 else encoded.codes.unsqueeze(0)
    if encoded.zero_point is None:
        values = to_values(codes, format.element)
    else:
        values = codes.float() - spread(encoded.zero_point.float(), codes, format)
    values *= spread(effective_scale(encoded.scale, encoded.global_scale, format), codes, format)
    return values.view(encoded.codes.shape).to(dtype)


def fake_quantize(
    tensor: Tensor, format: NumberFormat, *, scale: Tensor | None = None, global_scale: Tensor | None = None
) -> Tensor:
    """Return a tensor after quantization, ``decode(encode(tensor))`` in the tensor's own dtype; NaN stays NaN."""
    values = decode(encode(tensor, format, scale=scale, global_scale=global_scale), format)
    if scale is not None and format.element.nan is None:
        values = torch.where(tensor.isnan(), torch.nan, values)
    return values.to(tensor.dtype)


def find_global_scale(largest: Tensor, format: NumberFormat) -> Tensor:
    """Return the global scale of tensors with these largest magnitudes, float32; 1 for a tensor of zeros.

    It maps the scale of the block with the largest magnitude to E4M3's largest number, 448, as in compressed-tensors.
    """
    found = (torch.finfo(torch.float8_e4m3fn).max * format.target) / largest.float()
    return torch.where(found.isfinite(), found, torch.ones_like(found))


def find_scale(largest: Tensor, format: NumberFormat, global_scale: Tensor | None = None) -> Tensor:
    """Return the stored scales of blocks from their largest magnitudes, (..., row blocks, column blocks)."""
    if format.scale == "e8m0":
        return _powers_of_two(largest, format)
    step = torch.where(largest.isfinite(), largest, torch.nan) / format.target
    if global_scale is not None:
        step = step * global_scale[..., None, None]
    if format.scale == "e4m3":
        step = step.clamp(max=torch.finfo(torch.float8_e4m3fn).max).to(torch.float8_e4m3fn).float()
        return torch.where(step == 0, EMPTY_SCALE, step).to(torch.float8_e4m3fn)
    return torch.where(step == 0, torch.ones_like(step), step)


def effective_scale(scale: Tensor, global_scale: Tensor | None, format: NumberFormat) -> Tensor:
    """Return the factor of each block's elements, float32, from the stored scale."""
    if format.scale == "e8m0":
        power = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - BIAS)
        return torch.where(scale == E8M0_NAN, torch.nan, power)
    return scale.float() if global_scale is None else scale.float() / global_scale[..., None, None]


def to_codes(steps: Tensor, element: Element, reach: float | None = None) -> Tensor:
    """Return the codes nearest to some values, uint8; ties go to the even code, values beyond the largest to it.

    Args:
        steps: Values in units of the scale, float32; may be overwritten.
        element: Type.
        reach: Largest magnitude of an integer's code, where it is not the element's own.
    """
    if element.integer:
        if reach is not None:
            steps = steps.clamp_(-reach, reach)
        # A block whose scale is not finite decodes to NaN whatever its codes are.
        return nearest_codes(steps.nan_to_num_(0.0), 1 << (element.bits - 1), element.bits).to(torch.uint8)
    if element.name in NATIVE:
        return steps.clamp(-element.largest, element.largest).to(NATIVE[element.name]).view(torch.uint8)
    boundaries, order = _boundaries(element, steps.device)
    found = torch.bucketize(steps.abs() if element.signed else steps, boundaries, out_int32=True)
    codes = order[found]
    if element.signed:
        codes = codes | (steps.signbit().to(torch.uint8) << (element.bits - 1))
    return codes


def to_values(codes: Tensor, element: Element) -> Tensor:
    """Return the value of each code, float32."""
    if element.integer:
        return codes.float() - (1 << (element.bits - 1))
    if element.name in NATIVE:
        return codes.view(NATIVE[element.name]).float()
    values: Tensor = _table(element, codes.device)[codes.int()]
    return values


@cache
def _boundaries(element: Element, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the values (float32) up to which each step of the ladder is the nearest, and the code of each step."""
    steps = element.ladder
    middles = torch.tensor([(a + b) / 2 for (a, _), (b, _) in pairwise(steps)])
    # A value in the middle belongs to the even step: below an odd one the boundary moves one float down.
    below = torch.nextafter(middles, torch.full_like(middles, -torch.inf))
    even = torch.arange(len(middles)) % 2 == 0
    codes = torch.tensor([code for _, code in steps], dtype=torch.uint8)
    return torch.where(even, middles, below).to(device), codes.to(device)


@cache
def _table(element: Element, device: torch.device) -> Tensor:
    return torch.tensor(element.values, device=device)


def _powers_of_two(largest: Tensor, format: NumberFormat) -> Tensor:
    """Return the exponent of each block's scale, biased, uint8."""
    bits = largest.float().contiguous().view(torch.int32)
    if format.rounding == "even":
        bits = bits + (1 << (22 - format.element.mantissa))
    # The exponent of a subnormal is below -126: either is less than the smallest scale.
    exponent = (bits >> 23) - BIAS - _exponent(format.target)
    found = (exponent + BIAS).clamp(0, E8M0_NAN - 1).to(torch.uint8)
    return torch.where(largest.isfinite(), found, E8M0_NAN).to(torch.uint8)


@cache
def _exponent(value: float) -> int:
    return int(torch.frexp(torch.tensor(value)).exponent) - 1


def _in_blocks(x: Tensor, format: NumberFormat) -> Tensor:
    """Cut (..., rows, columns) into (..., row blocks, height, column blocks, width), padded with zeros."""
    rows, columns = x.shape[-2:]
    height, width = format.block_of(rows, columns)
    padding = (0, -columns % width, 0, -rows % height)
    x = functional.pad(x, padding) if any(padding) else x
    blocks: Tensor = x.unflatten(-1, (x.shape[-1] // width, width)).unflatten(-3, (x.shape[-2] // height, height))
    return blocks


def _highest(blocks: Tensor) -> Tensor:
    return blocks.amax((-3, -1))


def _lowest(blocks: Tensor) -> Tensor:
    return blocks.amin((-3, -1))


def spread(scale: Tensor, x: Tensor, format: NumberFormat) -> Tensor:
    """Return the scale of each element of x, from those of blocks, in x's shape or one that broadcasts to it."""
    rows, columns = x.shape[-2:]
    height, width = format.block_of(rows, columns)
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(width, -1)[..., :columns]
    return scale.repeat_interleave(height, -2)[..., :rows, :] if scale.shape[-2] > 1 and height > 1 else scale
