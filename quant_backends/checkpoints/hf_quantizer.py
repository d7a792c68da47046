"""Quantization inside ``from_pretrained``: each layer is packed as soon as its weight is on the device.

transformers reads checkpoints tensor by tensor and passes each one to a registered quantizer, so that with a data-free
backend no more than one dense layer exists at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lmms_plugin.quant_backends.backend import Backend, DataFreeBackend
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.quant_backends.quantization import Quantization

QUANT_METHOD = "lmms_plugin_packing"


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Quantization config that carries backend and plan through ``from_pretrained``."""

    def __init__(self, backend: Backend, plan: QuantPlan) -> None:
        self.quant_method = QUANT_METHOD
        self.backend = backend
        self.plan = plan

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, as transformers writes them into config.json."""
        options = dataclasses.asdict(self.backend)
        plan = self.plan.to_dict()
        return {"quant_method": QUANT_METHOD, "method": self.backend.name, "options": options, "plan": plan}


@register_quantizer(QUANT_METHOD)
class PackedQuantizer(HfQuantizer):
    """Quantizer that runs a backend of this package while transformers loads a model."""

    requires_calibration = False
    work: Quantization

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.backend = quantization_config.backend
        self.failure: Exception | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse offloading to disk, which would write dense weights back."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("a quantized model cannot be offloaded to disk; use a device_map without 'disk'")

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Return bytes per weight after packing, so that transformers does not reserve dense memory."""
        if self._is_expert(param_name):
            # The stack that the experts come from is counted instead.
            return 0
        if self._is_stack(param_name):
            return self._stack_element_size(param_name, param)
        spec = self.work.specs.get(param_name.removesuffix(".weight"))
        on_arrival = spec is not None and self.param_needs_quantization(model, param_name)
        return spec.bits / 8 if spec is not None and on_arrival else param.element_size()

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Return whether this tensor is the weight of a layer to pack on arrival."""
        name, _, key = param_name.rpartition(".")
        return self._is_stack(param_name) or (
            key == "weight"
            and isinstance(self.backend, DataFreeBackend)
            and name in self.work.specs
            and name not in self.work.tied
            and name not in self.work.unrotated
        )

    def _is_stack(self, param_name: str) -> bool:
        """Return whether a parameter is a stack of experts that is split on arrival."""
        name, _, key = param_name.rpartition(".")
        return name in self.work.split and "." not in key

    def _is_expert(self, param_name: str) -> bool:
        place = self.work.places.get(param_name.rpartition(".")[0])
        return place is not None and place.experts in self.work.split

    def _stack_element_size(self, param_name: str, param: Tensor) -> float:
        name, _, key = param_name.rpartition(".")
        layers = [f"{name}.{index}.{key}" for index in range(self.work.split[name].num_experts)]
        dense = param.element_size()
        if not isinstance(self.backend, DataFreeBackend):
            return dense
        specs = [self.work.specs.get(layer) for layer in layers]
        return sum(dense if spec is None else spec.bits / 8 for spec in specs) / len(specs)

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that packs one arriving weight."""
        return PackOnArrival(self)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # The model is on the meta device here: a plan that does not fit fails before a byte is read.
        self.work = Quantization(model, self.backend, self.quantization_config.plan)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.failure is not None:
            raise self.failure
        self.work.prepare()
        if isinstance(self.backend, DataFreeBackend):
            self.work.finish()
        return model

    def is_serializable(self) -> bool:
        """Return False: `lmms_plugin.quant_backends.checkpoints.saving` writes packed models."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Return False: packed weights have no gradient."""
        return False


class PackOnArrival(ConversionOps):
    """Operation that packs each weight that the plan names and passes every other tensor on."""

    def __init__(self, quantizer: PackedQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *args: Any, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Convert tensors, given under their full parameter names; return those that stay dense."""
        dense = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if not self.quantizer.param_needs_quantization(self.quantizer.work.model, name):
                dense[name] = weight
                continue
            arrived = self._pack(name, weight)
            if missing_keys is not None:
                missing_keys -= {name, *arrived}
        return dense

    @torch.no_grad()
    def _pack(self, name: str, weight: Tensor) -> Iterable[str]:
        """Pack a layer's weight or a stack of expert weights; return the parameter names that a stack became."""
        # transformers turns an error raised here into a log entry and a general RuntimeError at the end; the first
        # error is kept and raised unchanged once loading is over.
        work = self.quantizer.work
        if self.quantizer.failure is not None:
            return ()
        try:
            if name.rpartition(".")[0] in work.split:
                return work.take_stack(name, weight)
            work.quantize(name.removesuffix(".weight"), weight)
        except (ValueError, RuntimeError) as error:
            self.quantizer.failure = error
        return ()
