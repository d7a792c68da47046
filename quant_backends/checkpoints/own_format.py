"""This package's checkpoint format: each layer's tensors under their own names; the config describes the empty layers.

It holds what other formats cannot: input scales, padded groups, real-valued zero points, ternary weights, rounded
inputs. Importing this module registers the format with transformers' ``from_pretrained``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lmms_plugin.quant_backends.formats.entries import format_of
from lmms_plugin.quant_backends.layers.format_linear import FormatLinear
from lmms_plugin.quant_backends.layers.input_rounding import MODALITY, InputRounding
from lmms_plugin.quant_backends.layers.int8_inputs import Int8InputLinear
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.layers.rounded_inputs import RoundedInputLinear
from lmms_plugin.quant_backends.layers.ternary import TritPlaneLinear
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.quantization import untie
from lmms_plugin.quant_backends.rotations.hadamard import Rotation, input_rotation, rotate_inputs
from lmms_plugin.quant_backends.structure.blocks import within
from lmms_plugin.quant_backends.structure.components import dense_linear
from lmms_plugin.quant_backends.structure.experts import is_fused, split_experts
from lmms_plugin.quant_backends.structure.telling import tell_modalities

QUANT_METHOD = "lmms_plugin"
FORMAT_VERSION = 3
"""Version 2 has layers that rotate their inputs, version 3 static scales per modality, and blocks of other shapes than
their format's: older readers know neither."""

KINDS: dict[str, type[PackedLinear] | type[TritPlaneLinear] | type[FormatLinear]] = {
    "packed": PackedLinear,
    "packed, 8-bit inputs": Int8InputLinear,
    "packed, rounded inputs": RoundedInputLinear,
    "format": FormatLinear,
    "trits": TritPlaneLinear,
}


def describe_layers(layers: Mapping[str, QuantizedLinear]) -> dict[str, dict[str, Any]]:
    """Return for each layer what `empty_layer` needs, JSON-ready.

    Raises:
        ValueError: Only a layer's library can write it.
    """
    return {name: _describe(name, layer) | _describe_rotation(layer) for name, layer in layers.items()}


def version_of(layers: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the first version of the format that can describe these layers."""
    if _scales_by_modality(layers) or any("block" in layer for layer in layers.values()):
        return FORMAT_VERSION
    return 2 if any("input_rotation" in layer for layer in layers.values()) else 1


def _scales_by_modality(layers: Mapping[str, Mapping[str, Any]]) -> bool:
    return any((layer.get("inputs") or {}).get("granularity") == MODALITY for layer in layers.values())


def _describe_rotation(layer: QuantizedLinear) -> dict[str, Any]:
    rotation = input_rotation(layer)
    return {} if rotation is None else {"input_rotation": asdict(rotation)}


def empty_layer(description: Mapping[str, Any], dense: nn.Linear) -> QuantizedLinear:
    """Return a layer without values on the meta device, of the size of the dense one it replaces.

    Args:
        description: Description from `describe_layers`.
        dense: Dense layer on the meta device.
    """
    kind = KINDS[description["kind"]]
    sizes: dict[str, Any] = {
        "in_features": dense.in_features,
        "out_features": dense.out_features,
        "bias": dense.bias is not None,
        "dtype": dense.weight.dtype,
        "device": "meta",
    }
    rounding = InputRounding(**description["inputs"]) if description.get("inputs") else None
    if kind is FormatLinear:
        form, scaled = format_of(description["format"]), description["with_in_scale"]
        form = form.in_blocks(*description["block"]) if "block" in description else form
        return FormatLinear(form=form, with_in_scale=scaled, rounding=rounding, **sizes)
    sizes["spec"] = QuantSpec(description["bits"], description["group_size"], description["symmetric"])
    if kind is TritPlaneLinear:
        return TritPlaneLinear(**sizes)
    extra: dict[str, Any] = {key: description[key] for key in ("float_zero_point", "with_in_scale")}
    if kind is RoundedInputLinear:
        extra["rounding"] = rounding
    return kind(**sizes, **extra)


def _describe(name: str, layer: QuantizedLinear) -> dict[str, Any]:
    kind = next((kind for kind, known in KINDS.items() if type(layer) is known), None)
    if kind is None:
        raise ValueError(
            f"save_quantized: {name} is a {type(layer).__name__} ({layer.kernel}), whose weight is in a library's own "
            "form; methods that store it in this package's layers (rtn, hqq, awq, ...) can be saved"
        )
    assert isinstance(layer, PackedLinear | TritPlaneLinear | FormatLinear)
    rounding = getattr(layer, "rounding", None)
    inputs = {} if rounding is None else {"inputs": _written(rounding)}
    if isinstance(layer, FormatLinear):
        form = layer.format
        block = {} if form.block == format_of(form.name).block else {"block": list(form.block)}
        return {"kind": kind, "format": form.name, "with_in_scale": layer.in_scale is not None, **block, **inputs}
    described = {
        "kind": kind,
        "bits": layer.spec.bits,
        "group_size": layer.spec.group_size,
        "symmetric": layer.spec.symmetric,
    }
    if isinstance(layer, PackedLinear):
        zero = layer.packed.codes(0, 1).zero_point
        described["float_zero_point"] = zero is not None and zero.is_floating_point()
        described["with_in_scale"] = layer.in_scale is not None
    return described | inputs


def _written(rounding: InputRounding) -> dict[str, Any]:
    # An older package knows no group sizes of inputs, and need not, where there are none.
    return {key: value for key, value in asdict(rounding).items() if key != "group_size" or value is not None}


@register_quantization_config(QUANT_METHOD)
class SavedConfig(QuantizationConfigMixin):
    """Quantization config of a model in our own format, as in ``config.json``.

    Args:
        version: Version of the format.
        layers: Module name -> description.
        method: Method that quantized the model.

    Raises:
        ValueError: The format is newer than this package.
    """

    def __init__(
        self,
        version: int = FORMAT_VERSION,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        method: str = "",
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if version > FORMAT_VERSION:
            raise ValueError(f"saved in version {version} of the format, this package reads up to {FORMAT_VERSION}")
        if not layers:
            raise ValueError(
                f"a checkpoint in the format {QUANT_METHOD} should list its quantized layers, got {layers!r}"
            )
        self.quant_method = quant_method
        self.version, self.layers, self.method = version, layers, method

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "quant_method": self.quant_method,
            "version": self.version,
            "method": self.method,
            "layers": {name: dict(description) for name, description in self.layers.items()},
        }


@register_quantizer(QUANT_METHOD)
class SavedQuantizer(HfQuantizer):
    """Quantizer that puts empty layers into a model before the files are read, so that no dense weight is ever made."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        layers: Mapping[str, Mapping[str, Any]] = self.quantization_config.layers
        fused = {name for name, module in model.named_modules() if is_fused(module)}
        split = split_experts(model, [name for name in fused if any(within(layer, name) for layer in layers)])
        for experts in split.values():
            experts.release()
        for name, description in layers.items():
            try:
                layer = empty_layer(description, dense_linear(model, name))
                if "input_rotation" in description:
                    rotate_inputs(layer, Rotation(**description["input_rotation"]))
            except (AttributeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{name}: the description of a quantized layer does not fit the model ({error})"
                ) from error
            model.set_submodule(name, layer)
            untie(model, name)
        if _scales_by_modality(layers):
            tell_modalities(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Return only the renamings: weights were written under the model's own names, so none is to be stacked."""
        return [conversion for conversion in weight_conversions if not isinstance(conversion, WeightConverter)]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Return the bytes of an element: tensors are loaded as stored."""
        return param.element_size()

    def is_serializable(self) -> bool:
        """Return False: only `save_quantized` writes this format."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Return False: packed weights have no gradient."""
        return False
