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
from lmms_plugin.quant_backends.formats.compressed import PACKED, STRATEGIES, fits, has_inputs, why_not_compressed
from lmms_plugin.quant_backends.formats.entries import FORMATS, NumberFormat
from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.format_linear import FormatCodes, FormatLinear
from lmms_plugin.quant_backends.layers.input_rounding import BLOCK, GROUP, TENSOR, TOKEN, InputRounding
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.layers.rounded_inputs import RoundsInputs

INTEGERS, FLOATS, WEIGHTS_ALONE = "int-quantized", "float-quantized", "naive-quantized"
LAYOUTS = (INTEGERS, FLOATS, WEIGHTS_ALONE, *PACKED.values())
"""The layouts of compressed-tensors that are written and read here."""

_SCALES = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8", "mxfp8": "torch.uint8"}


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
    if not fits(form.name, layer.rounding):
        return None
    arguments = weight_arguments(form)
    if form.name in PACKED:
        if layer.padded_columns:
            return None
        pairs = codes.codes.view(len(codes.codes), -1, 2)
        tensors = {"weight_packed": pairs[..., 0] | (pairs[..., 1] << 4), "weight_scale": codes.scale.contiguous()}
        if codes.global_scale is not None:
            tensors["weight_global_scale"] = codes.global_scale.view(1)
        return WrittenLayer(PACKED[form.name], arguments, inputs, tensors)
    # Whole tensors have one number, not a matrix of one.
    scale = codes.scale.view(1) if form.name == "fp8_e4m3_tensor" else codes.scale.contiguous()
    tensors = {"weight": codes.codes.view(torch.float8_e4m3fn).contiguous(), "weight_scale": scale}
    return WrittenLayer(WEIGHTS_ALONE if inputs is None else FLOATS, arguments, inputs, tensors)


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
    if form.name in STRATEGIES:
        strategy = STRATEGIES[form.name]
        block = {"block_structure": list(form.block)} if strategy == "block" else {}
        return _arguments(8, "float", strategy=strategy, dynamic=False, **block)
    return _grouped(form, dynamic=False)


def input_arguments(rounding: InputRounding) -> dict[str, Any] | None:
    """Return the arguments of rounded inputs in a config group; None where compressed-tensors has none."""
    form = rounding.format
    if not has_inputs(rounding):
        return None
    if rounding.name in PACKED:
        return _grouped(form, dynamic="local" if form.global_scale else True)
    kind = {"fp8_e4m3": "float", "int8": "int"}[rounding.name]
    if rounding.granularity == BLOCK:
        return _arguments(8, kind, strategy="group", group_size=GROUP, dynamic=True)
    strategy = {TOKEN: "token", TENSOR: "tensor"}[rounding.granularity]
    return _arguments(8, kind, strategy=strategy, dynamic=not rounding.static)


def _grouped(form: NumberFormat, dynamic: bool | str) -> dict[str, Any]:
    strategy, scales = "tensor_group" if form.global_scale else "group", _SCALES[form.name]
    width = form.block[1]
    made = _arguments(form.bits, "float", strategy=strategy, group_size=width, dynamic=dynamic)
    return made | {"scale_dtype": scales, "zp_dtype": scales}


def _arguments(bits: int, kind: str, *, strategy: str, dynamic: bool | str, **others: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": dynamic, **others}


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScaledFormat(StoredFormat):
    """Weights with scales: ``int-quantized``, ``float-quantized``, ``naive-quantized``, ``quant_method: fp8``.

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
        blocks = self.form.blocks(rows, columns)
        if scale.numel() != blocks[0] * blocks[1]:
            raise ValueError(
                f"scales {tuple(scale.shape)}, expected {blocks} of {self.form.name} for {rows} x {columns}"
            )
        codes = FormatCodes(weight.view(torch.uint8), scale.float().view(blocks), None, self.form)
        return StoredLinear(codes, 8, None, self.rounding, static)

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
    """``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``: two 4-bit floats to a byte.

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
        if packed.shape[1] * 2 != columns or tuple(scale.shape) != self.form.blocks(rows, columns):
            raise ValueError(
                f"weight_packed {tuple(packed.shape)} and weight_scale {tuple(scale.shape)} are not {self.form.name}"
                f" for a width of {columns}"
            )
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
        total = tensors["weight_global_scale"].float().view(()) if self.form.global_scale else None
        static = None
        if self.rounding is not None and self.rounding.static:
            if "input_global_scale" not in tensors:
                raise ValueError(f"{self.rounding.label}, but its input_global_scale is missing")
            static = tensors["input_global_scale"].float().amax()
        return StoredLinear(FormatCodes(codes, scale, total, self.form), 4, None, self.rounding, static)


def scaled_format(config: Mapping[str, Any]) -> StoredFormat | None:
    """Return the layout that a checkpoint's ``quantization_config`` names; None if none of this module fits it.

    A scheme that cannot be reproduced exactly, such as asymmetric inputs or a dynamic scale over a whole tensor, has
    no layout here.
    """
    method = config.get("quant_method")
    if method == "fp8":
        return _fp8(config)
    if method != "compressed-tensors" or config.get("format") not in LAYOUTS:
        return None
    schemes = [
        (group.get("weights"), group.get("input_activations"), group.get("output_activations"))
        for group in (config.get("config_groups") or {}).values()
    ]
    if not schemes or any(scheme != schemes[0] for scheme in schemes):
        return None
    weights, inputs, outputs = schemes[0]
    if not weights or outputs:
        return None
    rounding = None if inputs is None else _reproduced(inputs)
    if inputs is not None and rounding is None:
        return None
    label = f"compressed-tensors ({config['format']})"
    if config["format"] == INTEGERS:
        known = weights.get("type", "int") == "int" and weights.get("strategy") in ("channel", "tensor", "group")
        return ScaledFormat(label, None, int(weights.get("num_bits", 8)), rounding) if known else None
    form = next((form for form in FORMATS.values() if _is(form, weights)), None)
    if form is None:
        return None
    if form.name in PACKED:
        return PackedFloats(label, form, rounding)
    return ScaledFormat(label, form, 8, rounding)


def _is(form: NumberFormat, weights: Mapping[str, Any]) -> bool:
    """Return whether a config's arguments are those of a format."""
    if form.name not in (*STRATEGIES, *PACKED):
        return False
    expected = weight_arguments(form)
    keys = [key for key in expected if key not in ("scale_dtype", "zp_dtype")]
    given = {"type": "int", "symmetric": True, "dynamic": False, **weights}
    return all(given.get(key) == expected[key] for key in keys)


def _reproduced(inputs: Mapping[str, Any]) -> InputRounding | None:
    """Return the rounding that the arguments of inputs ask for; None if it is not one of those here."""
    asked = {"type": "int", "symmetric": True, "dynamic": False, **inputs}
    known = [InputRounding(name, BLOCK, name == "nvfp4") for name in ("nvfp4", "mxfp4")]
    for name in ("int8", "fp8_e4m3"):
        known += [
            InputRounding(name, TOKEN, False),
            InputRounding(name, TENSOR, True),
            InputRounding(name, BLOCK, False),
        ]
    for rounding in known:
        expected = input_arguments(rounding)
        assert expected is not None
        keys = [key for key in expected if key not in ("scale_dtype", "zp_dtype")]
        if all(asked.get(key) == expected[key] for key in keys):
            return rounding
    return None


def _fp8(config: Mapping[str, Any]) -> StoredFormat | None:
    """Return the layout of ``quant_method: fp8``; None for block sizes and element types that are not known here."""
    block, static = config.get("weight_block_size"), config.get("activation_scheme", "dynamic") == "static"
    if block is not None and list(block) != [GROUP, GROUP]:
        return None
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn") or config.get("expert_dtype", "fp8") != "fp8":
        return None
    granularity = TENSOR if static else (TOKEN if block is None else BLOCK)
    form = FORMATS["fp8_e4m3_tensor" if block is None else "fp8_e4m3_block"]
    return ScaledFormat("fp8", form, 8, InputRounding("fp8_e4m3", granularity, static))
