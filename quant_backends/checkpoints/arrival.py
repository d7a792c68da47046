"""Loading of checkpoints that other tools quantized: stored tensors become packed layers.

transformers can run most such formats only with libraries that do not install beside lmms-eval, or dequantizes the
weights at the first forward pass. Here it only assigns each tensor to its place in the model; the meaning of the
tensors is defined in `lmms_plugin.quant_backends.checkpoints.compressors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lmms_plugin.quant_backends.checkpoints.compressors import StoredFormat, StoredLinear
from lmms_plugin.quant_backends.layers.format_linear import FormatCodes, FormatLinear
from lmms_plugin.quant_backends.layers.int8_inputs import INT8_TOKENS, Int8InputLinear
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.layers.rounded_inputs import RoundedInputLinear
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.quantization import untie

QUANT_METHOD = "lmms_plugin_arrival"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
SMALL_FLOATS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
DTYPES = FLOATS | INTEGERS | SMALL_FLOATS | {"BOOL": torch.bool}
"""As safetensors writes them."""


class StoredLayers(Protocol):
    """Formats of a checkpoint's layers: one for all (`StoredFormat`), or one for each."""

    @property
    def label(self) -> str:
        """Return the name in reports."""

    @property
    def tensors(self) -> frozenset[str]:
        """Return all tensors that a quantized layer may have besides the bias."""

    @property
    def markers(self) -> frozenset[str]:
        """Return the tensors of which a quantized layer has at least one."""

    def of_layer(self, names: Sequence[str], dense: nn.Module) -> StoredFormat:
        """Return the format of one layer, given its names in the checkpoint and in the model."""


@register_quantization_config(QUANT_METHOD)
class ArrivalConfig(QuantizationConfigMixin):
    """Quantization config that carries the format of a checkpoint through ``from_pretrained``."""

    def __init__(self, stored: StoredLayers) -> None:
        self.quant_method = QUANT_METHOD
        self.stored = stored

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {"quant_method": QUANT_METHOD, "format": self.stored.label}


class ArrivingLinear(nn.Module):
    """Placeholder that holds a layer's stored tensors, under their own names, until all are loaded.

    Args:
        dense: Dense layer of the model.
        tensors: Name -> empty tensor for it.
        stored: Format that they are stored in.
    """

    def __init__(self, dense: nn.Linear, tensors: Mapping[str, Tensor], stored: StoredFormat) -> None:
        super().__init__()
        self.stored = stored
        self.in_features, self.out_features = dense.in_features, dense.out_features
        # transformers initialises the weights of blocks that it misses; a layout without one gets an empty one.
        empty = {} if "weight" in tensors else {"weight": torch.empty(dense.weight.shape, device="meta")}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        for name, tensor in empty.items():
            self.register_buffer(name, tensor, persistent=False)
        self.bias = dense.bias


class OrderedLinear(PackedLinear):
    """Packed layer with reordered columns, as activation-ordered GPTQ groups them.

    Attributes:
        order: (columns,) int32, input column of each stored column.
    """

    order: Tensor

    @classmethod
    def in_order(cls, order: Tensor, *args: Any, **kwargs: Any) -> OrderedLinear:
        """Pack a weight in stored order (see `PackedLinear.from_codes`)."""
        layer = cls.from_codes(*args, **kwargs)
        assert isinstance(layer, OrderedLinear)
        layer.register_buffer("order", order.to(torch.int32))
        return layer

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the weight in the order of the input, (stop - start, in_features)."""
        return super().dense_rows(start, stop)[:, torch.argsort(self.order)]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of `x`, shape (..., out_features)."""
        return super().forward(x.index_select(-1, self.order))


@register_quantizer(QUANT_METHOD)
class ArrivalQuantizer(HfQuantizer):
    """Quantizer that makes room for stored tensors before transformers loads them, and packs the layers afterwards."""

    requires_calibration = False

    def __init__(self, quantization_config: ArrivalConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.stored: StoredLayers = quantization_config.stored

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Iterable[str] = (), **kwargs: Any
    ) -> nn.Module:
        found = _find(model, self.stored, checkpoint_files)
        if not found:
            raise ValueError(
                f"its config says {self.stored.label}, but no file holds a tensor called "
                f"{' or '.join(sorted(self.stored.markers))}: nothing in this checkpoint is quantized"
            )
        for name, (prefix, tensors) in found.items():
            dense = model.get_submodule(name)
            if not isinstance(dense, nn.Linear):
                raise ValueError(f"{name} is stored quantized ({self.stored.label}), but is no nn.Linear: {dense}")
            own = self.stored.of_layer((prefix, name), dense)
            if not own.markers & tensors.keys():
                held, markers = (", ".join(sorted(names)) for names in (tensors, own.markers))
                raise ValueError(f"{name} should be stored as {own.label}, with {markers}, but it holds {held}")
            model.set_submodule(name, ArrivingLinear(dense, tensors, own))
            untie(model, name)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        dtype: torch.dtype = model.dtype  # type: ignore[assignment]
        for name, module in list(model.named_modules()):
            if isinstance(module, ArrivingLinear):
                model.set_submodule(name, self._packed(name, module, dtype))
        return model

    @torch.no_grad()
    def _packed(self, name: str, arrived: ArrivingLinear, dtype: torch.dtype) -> QuantizedLinear:
        stored = arrived.stored
        tensors = {key: value for key, value in arrived.named_buffers(recurse=False) if key in stored.tensors}
        try:
            read = stored.read(tensors, arrived.in_features)
        except KeyError as error:
            raise ValueError(f"{name} ({stored.label}): its {error.args[0]} is missing") from error
        except ValueError as error:
            raise ValueError(f"{name} ({stored.label}): {error}") from error
        rows = len(read.codes.codes)
        if rows != arrived.out_features:
            raise ValueError(f"{name} ({stored.label}): has {rows} rows, the model wants {arrived.out_features}")
        return _layer_of(read, arrived, dtype)

    def is_serializable(self) -> bool:
        """Return False: the format is only read."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Return False: packed weights have no gradient."""
        return False


def _layer_of(read: StoredLinear, arrived: ArrivingLinear, dtype: torch.dtype) -> QuantizedLinear:
    codes, bits, order, rounding, static = read
    if isinstance(codes, FormatCodes):
        return FormatLinear.from_codes(codes, dtype, bias=arrived.bias, rounding=rounding, static_scale=static)
    zeros = codes.zero_point
    if zeros is not None and zeros.is_floating_point():
        zeros = zeros.to(dtype)
    codes = codes._replace(scale=codes.scale.to(dtype), zero_point=zeros)
    spec = QuantSpec(bits, codes.codes.shape[2], symmetric=zeros is None)
    if order is not None:
        return OrderedLinear.in_order(order, codes, spec, arrived.in_features, bias=arrived.bias)
    if rounding == INT8_TOKENS:
        return Int8InputLinear.from_codes(codes, spec, arrived.in_features, bias=arrived.bias)
    if rounding is not None:
        return RoundedInputLinear.rounding_inputs(
            codes, spec, arrived.in_features, rounding=rounding, static_scale=static, bias=arrived.bias
        )
    return PackedLinear.from_codes(codes, spec, arrived.in_features, bias=arrived.bias)


def _find(model: nn.Module, stored: StoredLayers, files: Iterable[str]) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """Return module -> its name in the files, and tensor name -> empty tensor, for every layer in a known format."""
    placed = _Places(model)
    stored_as: dict[str, dict[str, Tensor]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file} is no safetensors file; quantized checkpoints are read from safetensors alone")
        with safe_open(file, framework="pt") as content:
            for key in content.keys():  # noqa: SIM118
                prefix, _, tensor = key.rpartition(".")
                if tensor in stored.tensors:
                    part = content.get_slice(key)
                    empty = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
                    stored_as.setdefault(prefix, {})[tensor] = empty
    # Dense layers have a weight, too, and no place is looked for on their behalf.
    quantized = {prefix: tensors for prefix, tensors in stored_as.items() if stored.markers & tensors.keys()}
    return {placed.find(prefix): (prefix, tensors) for prefix, tensors in quantized.items()}


class _Places:
    """Mapping from the names in a checkpoint to those of the transformers model."""

    def __init__(self, model: Any) -> None:
        transforms = get_model_conversion_mapping(model)
        self.renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self.converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self.prefix = model.base_model_prefix
        self.tensors = {f"{name}.weight": True for name, _ in model.named_modules()}

    def find(self, stored_name: str) -> str:
        """Return the module name for the checkpoint's `stored_name`."""
        key: str = rename_source_key(
            f"{stored_name}.weight", self.renamings, self.converters, self.prefix, self.tensors
        )[0]
        if key not in self.tensors:
            raise ValueError(f"the checkpoint holds a quantized {stored_name}, for which the model has no place")
        return key.removesuffix(".weight")
