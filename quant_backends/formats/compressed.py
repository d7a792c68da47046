"""Which formats of weights and inputs compressed-tensors has layouts for. Pure Python."""

from __future__ import annotations

from typing import Protocol

from lmms_plugin.quant_backends.formats.entries import FORMATS

STRATEGIES = {"fp8_e4m3": "channel", "fp8_e4m3_tensor": "tensor", "fp8_e4m3_block": "block"}
"""FP8 format -> what compressed-tensors calls its blocks."""

PACKED = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
"""4-bit format -> layout."""


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


def has_inputs(rounding: Rounding) -> bool:
    """Return whether compressed-tensors knows such inputs: a global scale has to be static, and one for all tokens."""
    if rounding.granularity == "modality":
        return False
    if rounding.name in PACKED:
        return rounding.static or not FORMATS[rounding.name].global_scale
    return rounding.name in ("fp8_e4m3", "int8")


def fits(form: str, rounding: Rounding | None) -> bool:
    """Return whether a layout holds weights of a format of floats with such inputs."""
    if form in PACKED:
        return rounding is None or rounding.name == form
    if form not in STRATEGIES or rounding is None:
        return form in STRATEGIES
    blocks = rounding.granularity == "block"
    return rounding.name == "fp8_e4m3" and blocks == (form == "fp8_e4m3_block")


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
    if form not in (*STRATEGIES, *PACKED):
        return f"it has no {form}"
    return None if fits(form, rounding) else f"it has no {form} with {inputs}"
