"""Layouts of compressed-tensors and of ``quant_method: fp8`` for weights with scales whose inputs may be rounded, too.

One description per layout serves both ways: what a layer is written as, and what a layer that was read becomes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmms_plugin.quant_backends.checkpoints.compressors import StoredFormat, StoredLinear
from lmms_plugin.quant_backends.formats.compressed import (
    BLOCKED,
    EIGHT_BITS,
    PACKED,
    fits,
    has_inputs,
    strategy_of,
    why_not_compressed,
)
from lmms_plugin.quant_backends.formats.entries import FORMATS, NumberFormat
from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.format_linear import FormatCodes, FormatLinear
from lmms_plugin.quant_backends.layers.input_rounding import BLOCK, GROUP, TENSOR, TOKEN, InputRounding
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.layers.packing import pack_stream, unpack_stream
from lmms_plugin.quant_backends.layers.rounded_inputs import RoundsInputs
from lmms_plugin.quant_backends.plans.specs import is_int

INTEGERS, FLOATS, WEIGHTS_ALONE = "int-quantized", "float-quantized", "naive-quantized"
LAYOUTS = (INTEGERS, FLOATS, WEIGHTS_ALONE, *BLOCKED.values())
"""The layouts of compressed-tensors that are written and read here."""

_SCALES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
"""Type of a format's scales -> what compressed-tensors calls it."""

_SEARCHED = ("observer", "observer_kwargs", "actorder")


class WrittenLayer(NamedTuple):
    """Layer as compressed-tensors holds it.

    Attributes:
        layout: One of `LAYOUTS`.
        weights: Arguments of its weights, as in a config group.
        inputs: Arguments of its inputs; None where they are not rounded.
        tensors: Name below the layer -> tensor.
    """

    layout: str
    weights: dict[str, Any]
    inputs: dict[str, Any] | None
    tensors: dict[str, Tensor]


def written_layer(layer: QuantizedLinear) -> WrittenLayer | None:
    """Return what compressed-tensors holds of a layer; None if it has no layout for it."""
    rounding = layer.rounding if isinstance(layer, RoundsInputs) else None
    inputs = None if rounding is None else input_arguments(rounding)
    if getattr(layer, "in_scale", None) is not None or (rounding is not None and inputs is None):
        return None
    static = {} if not isinstance(layer, RoundsInputs) else _static_tensor(layer)
    if isinstance(layer, FormatLinear):
        found = _written_format(layer, inputs)
    elif isinstance(layer, PackedLinear) and rounding is not None:
        found = _written_integers(layer, inputs)
    else:
        return None
    return None if found is None else found._replace(tensors=found.tensors | static)


def _written_format(layer: FormatLinear, inputs: dict[str, Any] | None) -> WrittenLayer | None:
    codes, form = layer.quantized, layer.format
    if not fits(form.name, layer.rounding) or (form.name in BLOCKED and layer.padded_columns):
        return None
    arguments = weight_arguments(form)
    if form.name in PACKED:
        tensors = {"weight_packed": pack_stream(codes.codes, form.bits), "weight_scale": codes.scale.contiguous()}
        if codes.global_scale is not None:
            tensors["weight_global_scale"] = codes.global_scale.view(1)
        return WrittenLayer(PACKED[form.name], arguments, inputs, tensors)
    # Whole tensors have one number, not a matrix of one.
    scale = codes.scale.view(1) if form.block == (None, None) else codes.scale.contiguous()
    tensors = {"weight": codes.codes.view(torch.float8_e4m3fn).contiguous(), "weight_scale": scale}
    layout = BLOCKED.get(form.name, WEIGHTS_ALONE if inputs is None else FLOATS)
    return WrittenLayer(layout, arguments, inputs, tensors)


def _written_integers(layer: PackedLinear, inputs: dict[str, Any] | None) -> WrittenLayer | None:
    codes, scale, zero = layer.quantized
    rounding: InputRounding = layer.rounding  # type: ignore[assignment]
    whole = layer.group_size == layer.in_features
    if layer.bits != 8 or not whole or zero is not None or why_not_compressed(None, rounding):
        return None
    weights = _arguments(8, "int", strategy="channel", dynamic=False)
    # Offset binary to two's complement, which wraps around to the same bits.
    stored = (codes.flatten(1) - 128).view(torch.int8)
    return WrittenLayer(INTEGERS, weights, inputs, {"weight": stored, "weight_scale": scale.contiguous()})


def _static_tensor(layer: RoundsInputs) -> dict[str, Tensor]:
    if layer.static_scale is None or layer.rounding is None:
        return {}
    name = "input_global_scale" if layer.rounding.format.global_scale else "input_scale"
    return {name: layer.static_scale.view(1).clone()}


def weight_arguments(form: NumberFormat) -> dict[str, Any]:
    """Return the arguments of a format's weights in a config group."""
    if form.scale in _SCALES:
        return _grouped(form, dynamic=False)
    strategy = strategy_of(form)
    block: dict[str, Any] = {"block_structure": list(form.block)} if strategy == "block" else {}
    block |= {"group_size": form.block[1]} if strategy == "group" else {}
    return _arguments(form.bits, "float", strategy=strategy, dynamic=False, **block)


def input_arguments(rounding: InputRounding) -> dict[str, Any] | None:
    """Return the arguments of rounded inputs in a config group; None where compressed-tensors has none."""
    form = rounding.format
    if not has_inputs(rounding):
        return None
    if form.scale in _SCALES:
        return _grouped(form, dynamic="local" if form.global_scale else True)
    kind = "int" if form.element.integer else "float"
    if rounding.granularity == BLOCK:
        return _arguments(8, kind, strategy="group", group_size=form.block[1], dynamic=True)
    strategy = {TOKEN: "token", TENSOR: "tensor"}[rounding.granularity]
    return _arguments(8, kind, strategy=strategy, dynamic=not rounding.static)


def _grouped(form: NumberFormat, dynamic: bool | str) -> dict[str, Any]:
    scales, width = _SCALES[form.scale], form.block[1]
    made = _arguments(form.bits, "float", strategy=strategy_of(form), group_size=width, dynamic=dynamic)
    return made | {"scale_dtype": scales, "zp_dtype": scales}


def _arguments(bits: int, kind: str, *, strategy: str, dynamic: bool | str, **others: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": dynamic, **others}


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScaledFormat(StoredFormat):
    """Weights with scales: ``int-``, ``float-``, ``naive-`` and ``mxfp8-quantized``, ``quant_method: fp8``.

    Attributes:
        form: Format of the weights; None for integers.
        bits: Number of bits of integers.
        rounding: Rounding of the inputs, as the config says; None for none.
    """

    marker = "weight_scale"
    tensors = frozenset(
        {"weight", "weight_scale", "weight_scale_inv", "weight_zero_point", "input_scale", "activation_scale"}
    )

    form: NumberFormat | None
    bits: int
    rounding: InputRounding | None

    @property
    def markers(self) -> frozenset[str]:
        """Return both names of the scales."""
        return frozenset({"weight_scale", "weight_scale_inv"})

    def read(self, tensors: Mapping[str, Tensor], columns: int) -> StoredLinear:
        """Convert one layer."""
        weight = tensors["weight"]
        scale = tensors["weight_scale_inv"] if "weight_scale_inv" in tensors else tensors["weight_scale"]
        static = tensors.get("input_scale", tensors.get("activation_scale"))
        static = self._static(static)
        rows = len(weight)
        if self.form is None:
            return self._integers(weight, scale, tensors.get("weight_zero_point"), static)
        if weight.dtype is not torch.float8_e4m3fn:
            raise ValueError(f"its weight should be float8_e4m3fn, got {weight.dtype}")
        scale = self._scale(scale, self.form.blocks(rows, columns), weight)
        codes = FormatCodes(weight.view(torch.uint8), scale, None, self.form)
        return StoredLinear(codes, 8, None, self.rounding, static)

    def _scale(self, scale: Tensor, blocks: tuple[int, int], weight: Tensor) -> Tensor:
        assert self.form is not None
        # A single row or column of scales is stored as a vector, too; a matrix of another shape is one of other blocks.
        matrix = scale.dim() > 1 and scale.numel() > 1
        if scale.numel() != blocks[0] * blocks[1] or (matrix and tuple(scale.shape) != blocks):
            raise ValueError(
                f"scales {tuple(scale.shape)}, expected {blocks} of {self.form.label} for"
                f" {weight.shape[0]} x {weight.shape[1]}"
            )
        exponents = self.form.scale == "e8m0"
        if exponents != (scale.dtype is torch.uint8):
            kind = "exponents (uint8)" if exponents else "floats"
            raise ValueError(f"its scales should be {kind} for {self.form.label}, got {scale.dtype}")
        return scale.view(blocks) if exponents else scale.float().view(blocks)

    def _integers(self, weight: Tensor, scale: Tensor, zero: Tensor | None, static: Tensor | None) -> StoredLinear:
        if weight.dtype is not torch.int8:
            raise ValueError(f"its weight should be int8, got {weight.dtype}")
        rows, columns = weight.shape
        scale = scale.reshape(-1, scale.shape[-1] if scale.dim() > 1 else 1).expand(rows, -1)
        groups = scale.shape[1]
        if columns % groups:
            raise ValueError(f"{groups} scales per row do not divide its {columns} columns")
        middle = 1 << (self.bits - 1)
        codes = (weight.to(torch.int16) + middle).to(torch.uint8).view(rows, groups, -1)
        if zero is not None:
            zero = (zero.to(torch.int16) + middle).to(torch.uint8).reshape(-1, groups).expand(rows, -1).contiguous()
        return StoredLinear(Codes(codes, scale.contiguous(), zero), self.bits, None, self.rounding, static)

    def _static(self, scale: Tensor | None) -> Tensor | None:
        if self.rounding is None or not self.rounding.static:
            return None
        if scale is None:
            raise ValueError(f"{self.rounding.label} by a static scale, but its input_scale is missing")
        return scale.float().amax()


@dataclass(frozen=True)
class PackedFloats(StoredFormat):
    """``nvfp4-``, ``mxfp4-`` and ``mxfp6-pack-quantized``: two floats of 4 bits to a byte, four of 6 bits to three.

    Attributes:
        form: Format of the weights.
        rounding: Rounding of the inputs, as the config says; None for none.
    """

    marker = "weight_packed"
    tensors = frozenset({"weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"})

    form: NumberFormat
    rounding: InputRounding | None

    def read(self, tensors: Mapping[str, Tensor], columns: int) -> StoredLinear:
        """Convert one layer."""
        packed, scale = tensors["weight_packed"], tensors["weight_scale"]
        rows = len(packed)
        if packed.shape[1] * 8 != columns * self.form.bits or tuple(scale.shape) != self.form.blocks(rows, columns):
            raise ValueError(
                f"weight_packed {tuple(packed.shape)} and weight_scale {tuple(scale.shape)} are not {self.form.label}"
                f" for a width of {columns}"
            )
        codes = unpack_stream(packed, self.form.bits, columns)
        total = tensors["weight_global_scale"].float().view(()) if self.form.global_scale else None
        static = None
        if self.rounding is not None and self.rounding.static:
            if "input_global_scale" not in tensors:
                raise ValueError(f"{self.rounding.label}, but its input_global_scale is missing")
            static = tensors["input_global_scale"].float().amax()
        return StoredLinear(FormatCodes(codes, scale, total, self.form), self.form.bits, None, self.rounding, static)


def scaled_format(config: Mapping[str, Any]) -> StoredFormat | None:
    """Return the layout that a checkpoint's ``quantization_config`` names; None if none of this module fits it.

    A scheme that cannot be reproduced exactly, such as asymmetric inputs or a dynamic scale over a whole tensor, has
    no layout here.

    Raises:
        ValueError: The config names blocks that are none.
    """
    method = config.get("quant_method")
    if method == "fp8":
        return _fp8(config)
    if method != "compressed-tensors":
        return None
    schemes = [group_scheme(group) for group in (config.get("config_groups") or {}).values()]
    if not schemes or any(scheme != schemes[0] for scheme in schemes):
        return None
    return stored_scheme(str(config.get("format")), schemes[0])


class GroupScheme(NamedTuple):
    """What a config group says of its layers; any of them may be missing.

    Attributes:
        weights: Arguments of the weights.
        inputs: Arguments of the inputs.
        outputs: Arguments of the outputs.
    """

    weights: Mapping[str, Any] | None
    inputs: Mapping[str, Any] | None
    outputs: Mapping[str, Any] | None


def group_scheme(group: Mapping[str, Any]) -> GroupScheme:
    """Return the scheme of a config group, without what only says how its numbers were found."""

    def told(part: str) -> dict[str, Any] | None:
        arguments = group.get(part)
        if not isinstance(arguments, Mapping):
            return None
        return {key: value for key, value in arguments.items() if key not in _SEARCHED and value is not None}

    return GroupScheme(told("weights"), told("input_activations"), told("output_activations"))


def stored_scheme(layout: str, scheme: GroupScheme) -> StoredFormat | None:
    """Return the layout of a scheme of compressed-tensors; None if none of this module fits it.

    Args:
        layout: Name of the layout, as compressed-tensors has it.
        scheme: Scheme.

    Raises:
        ValueError: It names blocks that are none.
    """
    weights, inputs, outputs = scheme
    if layout not in LAYOUTS or not weights or outputs:
        return None
    rounding = None if inputs is None else _reproduced(inputs)
    if inputs is not None and rounding is None:
        return None
    label = f"compressed-tensors ({layout})"
    if layout == INTEGERS:
        known = weights.get("type", "int") == "int" and weights.get("strategy") in ("channel", "tensor", "group")
        return ScaledFormat(label, None, int(weights.get("num_bits", 8)), rounding) if known else None
    form = _format_of(weights)
    if form is None or BLOCKED.get(form.name, FLOATS) != (layout if layout != WEIGHTS_ALONE else FLOATS):
        return None
    return PackedFloats(label, form, rounding) if form.name in PACKED else ScaledFormat(label, form, 8, rounding)


def _format_of(weights: Mapping[str, Any]) -> NumberFormat | None:
    """Return the format of floats that a config's arguments describe; None if there is none."""
    given = {"type": "int", "symmetric": True, "dynamic": False, **weights}
    for name in (*BLOCKED, *EIGHT_BITS):
        form = FORMATS[name]
        if name == "fp8_e4m3_block" and given.get("strategy") == "block":
            form = form.in_blocks(*_block("block_structure", given.get("block_structure")))
        elif name == "fp8_e4m3" and given.get("strategy") == "group":
            form = form.in_blocks(1, given.get("group_size"))
        if _says(given, weight_arguments(form)):
            return form
    return None


def _says(given: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Return whether arguments that were given are the expected ones."""
    # Eight bits in groups of 32 are MXFP8 if their scales are bytes; for other bits the layout tells, and configs of
    # earlier versions do not name the dtype.
    are_bytes = [arguments.get("scale_dtype") == _SCALES["e8m0"] for arguments in (given, expected)]
    told = given.get("num_bits") != 8 or are_bytes[0] == are_bytes[1]
    keys = [key for key in expected if key not in ("scale_dtype", "zp_dtype")]
    return told and all(given.get(key) == expected[key] for key in keys)


def _block(key: str, block: Any) -> tuple[int, int]:
    """Return the (rows, columns) of a block, which earlier versions write as ``128x128``.

    Raises:
        ValueError: It is none.
    """
    sizes = block.split("x") if isinstance(block, str) else block
    try:
        rows, columns = (int(size) for size in sizes)
        whole = min(rows, columns) > 0
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{key} should be two positive whole numbers, rows and columns, got {block!r}")
    return rows, columns


def _reproduced(inputs: Mapping[str, Any]) -> InputRounding | None:
    """Return the rounding that the arguments of inputs ask for; None if it is not one of those here."""
    asked = {"type": "int", "symmetric": True, "dynamic": False, **inputs}
    known = [InputRounding(name, BLOCK, FORMATS[name].global_scale) for name in BLOCKED]
    size = asked.get("group_size")
    blocks = size if is_int(size) and size > 0 else None
    for name in ("int8", "fp8_e4m3"):
        known += [
            InputRounding(name, TOKEN, False),
            InputRounding(name, TENSOR, True),
            InputRounding(name, BLOCK, False, None if blocks == GROUP else blocks),
        ]
    for rounding in known:
        expected = input_arguments(rounding)
        if expected is not None and _says(asked, expected):
            return rounding
    return None


def _fp8(config: Mapping[str, Any]) -> StoredFormat | None:
    """Return the layout of ``quant_method: fp8``; None for element types that are not known here."""
    named, static = config.get("weight_block_size"), config.get("activation_scheme", "dynamic") == "static"
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn") or config.get("expert_dtype", "fp8") != "fp8":
        return None
    if config.get("scale_fmt", "float") != "float":
        return None
    if named is None:
        rounding = InputRounding("fp8_e4m3", TENSOR if static else TOKEN, static)
        return ScaledFormat("fp8", FORMATS["fp8_e4m3_tensor"], 8, rounding)
    block = _block("weight_block_size", named)
    # Inputs share a scale over as many columns as weights do (transformers, vLLM).
    width = None if block[1] == GROUP else block[1]
    rounding = InputRounding("fp8_e4m3", TENSOR, True) if static else InputRounding("fp8_e4m3", BLOCK, False, width)
    return ScaledFormat("fp8", FORMATS["fp8_e4m3_block"].in_blocks(*block), 8, rounding)
