"""Rounding of keys and values to what a format can store, computed in float32 and returned in the dtype they came in.

The values are those that the format holds, scales and zero points included, which are rounded to 16 bits; codes are not
packed. A model therefore computes exactly what it would with a packed cache, and needs no less memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmms_plugin.quant_backends.plans.cache_spec import CacheFormat, CacheSpec
from lmms_plugin.quant_backends.rotations.hadamard import Rotation

ROTATION_SEED = 0
"""Of the random signs of a head's rotation, which is the same in all heads."""

_FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def rounded(states: Tensor, spec: CacheSpec, bits: int, *, by_channel: bool) -> Tensor:
    """Round keys or values of some groups of tokens.

    With a rotation Q of each head, x becomes round(x Q) Qᵀ. Attention over such keys has the logits of QuaRot's R3,
    which rotates queries and keys after their position embedding: (q Q) · round(k Q) = q · round(k Q) Qᵀ.

    Args:
        states: (groups, tokens, heads, width) keys or values.
        spec: Storage.
        bits: Bits per element.
        by_channel: Whether the tokens of a group share a scale for each channel of a head; otherwise each token has
            scales of its own, for every `spec.group_of(width)` channels of a head.

    Returns:
        As `states`, in their dtype.
    """
    dense = states.float()
    rotation = Rotation(states.shape[-1], ROTATION_SEED) if spec.rotated else None
    # In bfloat16 there are models whose keys exceed float16.
    stored = torch.bfloat16 if states.dtype == torch.bfloat16 else torch.float16
    found = _rounded(dense if rotation is None else rotation(dense), spec, bits, by_channel=by_channel, stored=stored)
    return (found if rotation is None else rotation.inverse(found)).to(states.dtype)


def _rounded(dense: Tensor, spec: CacheSpec, bits: int, *, by_channel: bool, stored: torch.dtype) -> Tensor:
    """Round as `rounded` does, without rotation and in float32, with scales stored in a dtype of 16 bits."""
    shape = dense.shape
    if not spec.scaled:
        return _to_float8(dense, spec.format)
    if not by_channel:
        dense = dense.unflatten(-1, (-1, spec.group_of(shape[-1])))
    axis = 1 if by_channel else -1
    if spec.format == "int":
        found = _to_grid(dense, bits, axis, stored)
    else:
        found = _to_scaled_float8(dense, spec.format, axis, stored)
    return found.reshape(shape)


def _to_grid(dense: Tensor, bits: int, axis: int, stored: torch.dtype) -> Tensor:
    """Round to `zero + scale * code` with codes from 0 to 2**bits - 1; a group of equal elements has scale 0."""
    low, high = dense.aminmax(dim=axis, keepdim=True)
    zero = low.to(stored).float()
    scale = ((high - low) / ((1 << bits) - 1)).to(stored).float()
    codes = ((dense - zero) / scale.masked_fill(scale == 0, 1)).round_().clamp_(0, (1 << bits) - 1)
    return codes * scale + zero


def _to_scaled_float8(dense: Tensor, format: CacheFormat, axis: int, stored: torch.dtype) -> Tensor:
    largest = torch.finfo(_FLOATS[format]).max
    scale = (dense.abs().amax(dim=axis, keepdim=True) / largest).to(stored).float()
    return _to_float8(dense / scale.masked_fill(scale == 0, 1), format) * scale


def _to_float8(dense: Tensor, format: CacheFormat) -> Tensor:
    """Round to the nearest 8-bit float; magnitudes above the largest become the largest."""
    kind = _FLOATS[format]
    largest = torch.finfo(kind).max
    return dense.clamp(-largest, largest).to(kind).float()
