"""Which formats of weights and inputs compressed-tensors has layouts for. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from lmms_plugin.quant_backends.formats.entries import FORMATS, NumberFormat

EIGHT_BITS = ("fp8_e4m3", "fp8_e4m3_tensor", "fp8_e4m3_block")
"""Formats of E4M3 with float scales, in blocks of any shape: compressed-tensors' four strategies."""

PACKED = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "mxfp6_e2m3": "mxfp6-pack-quantized"}
"""Format of less than 8 bits -> layout."""

BLOCKED = PACKED | {"mxfp8": "mxfp8-quantized"}
"""Format whose blocks have scales of 8 bits -> layout."""

INPUTS_BESIDE: dict[str, tuple[tuple[str, str], ...]] = {
    "nvfp4": (("nvfp4", "block"),),
    "mxfp4": (("mxfp4", "block"), ("fp8_e4m3", "block")),
    "mxfp6_e2m3": (("mxfp8", "block"),),
    "mxfp8": (("mxfp8", "block"),),
    "fp8_e4m3": (("fp8_e4m3", "token"), ("fp8_e4m3", "tensor")),
    "fp8_e4m3_tensor": (("fp8_e4m3", "token"), ("fp8_e4m3", "tensor")),
    "fp8_e4m3_block": (("fp8_e4m3", "block"),),
}
"""Format of weights -> (format, granularity) of the inputs beside it in the preset schemes of compressed-tensors."""


class Rounding(Protocol):
    """What is asked of a rounding of inputs (`lmms_plugin.quant_backends.layers.input_rounding.InputRounding`)."""

    @property
    def name(self) -> str:
        """Return the name of its format."""

    @property
    def granularity(self) -> str:
        """Return what shares a scale."""

    @property
    def static(self) -> bool:
        """Return whether a number comes from calibration."""

    @property
    def label(self) -> str:
        """Return a few words for messages."""


def strategy_of(form: NumberFormat) -> str:
    """Return what compressed-tensors calls the blocks of a format."""
    if form.global_scale:
        return "tensor_group"
    height, width = form.block
    if height == 1:
        return "channel" if width is None else "group"
    return "tensor" if height is None and width is None else "block"


def has_inputs(rounding: Rounding) -> bool:
    """Return whether compressed-tensors knows such inputs: a global scale has to be static, and one for all tokens."""
    if rounding.granularity == "modality":
        return False
    if rounding.name in BLOCKED:
        return rounding.static or not FORMATS[rounding.name].global_scale
    return rounding.name in ("fp8_e4m3", "int8")


def fits(form: str, rounding: Rounding | None) -> bool:
    """Return whether a layout holds weights of a format of floats with such inputs."""
    if form not in INPUTS_BESIDE:
        return False
    return rounding is None or (rounding.name, rounding.granularity) in INPUTS_BESIDE[form]


def default_layout(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> str:
    """Return the layout that compressed-tensors takes for a scheme whose config names none.

    Args:
        weights: Arguments of the weights in a config group.
        inputs: Arguments of the inputs; None where they are not rounded.
    """
    bits, floats, width = weights.get("num_bits"), weights.get("type") == "float", weights.get("group_size")
    for name, layout in BLOCKED.items():
        form = FORMATS[name]
        exponents = bits != 8 or weights.get("scale_dtype") == "torch.uint8"
        if floats and exponents and (bits, width) == (form.bits, form.block[1]):
            return layout
    if inputs is not None:
        return "float-quantized" if floats else "int-quantized"
    return "naive-quantized" if floats else "pack-quantized"


def why_not_compressed(form: str | None, rounding: Rounding | None) -> str | None:
    """Return why compressed-tensors has no layout, as far as formats alone tell; None if it may have one.

    Args:
        form: Name of the format of the weights; None for integers.
        rounding: Rounding of the inputs; None for none.
    """
    inputs = "" if rounding is None else rounding.label
    if rounding is not None and not has_inputs(rounding):
        return f"it has no {inputs}"
    if form is None:
        return None if rounding is None or rounding.name == "int8" else f"it has no integers with {inputs}"
    if form not in INPUTS_BESIDE:
        return f"it has no {form}"
    return None if fits(form, rounding) else f"it has no {form} with {inputs}"
