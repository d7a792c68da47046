"""Loading of checkpoints that are quantized already, in any format that transformers or this package reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger
from torch import Tensor, nn

# Importing this registers our own format with transformers.
import lmms_plugin.quant_backends.checkpoints.own_format  # noqa: F401
from lmms_plugin.quant_backends.backend import CheckpointBackend, LoadedCheckpoint
from lmms_plugin.quant_backends.checkpoints.arrival import ArrivalConfig
from lmms_plugin.quant_backends.checkpoints.compressors import quantization_of, stored_format
from lmms_plugin.quant_backends.checkpoints.scaled_layouts import scaled_format
from lmms_plugin.quant_backends.checkpoints.several_schemes import SeveralSchemes, several_schemes
from lmms_plugin.quant_backends.extras import require
from lmms_plugin.quant_backends.layers.library import TensorLinear
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.methods.bitsandbytes import FourBitLinear, Int8Linear
from lmms_plugin.quant_backends.methods.torchao import Int4Linear
from lmms_plugin.quant_backends.plans.plan import UNTOUCHED_BITS, QuantPlan
from lmms_plugin.quant_backends.structure.model_class import class_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUNTIMES = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "torchao": ("torchao.quantization", "torchao"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
}
"""Formats that transformers runs with a library: quant_method -> what to import and the extra that installs it."""

ROTATIONS = ("transform_config", "rotation_config")
"""What configs call Hadamard and other rotations that belong to the weights (SpinQuant, QuIP)."""


@dataclass(frozen=True)
class PrequantizedBackend(CheckpointBackend):
    """Any checkpoint with a quantization_config: nothing is quantized here, and the report says what was found.

    GPTQ, AWQ, auto-round, HQQ, FP8, and integers, NVFP4 and MXFP4 of compressed-tensors are repacked while loading and
    need no library, and inputs are rounded as the config says; bitsandbytes and torchao run on theirs; transformers
    loads any other format that it can. Checkpoints saved with ``save_quantized`` load as they were.
    """

    name = "prequantized"
    bits = frozenset()
    default_bits = UNTOUCHED_BITS

    def check(self, plan: QuantPlan) -> None:
        """Refuse a plan: the checkpoint is quantized already."""
        if plan.specs:
            raise ValueError(
                f"prequantized takes weights as the checkpoint has them, but the plan asks for {plan.specs[0].bits} "
                "bits; leave out bits and plan"
            )

    def load(self, path: str, config: Any, options: Mapping[str, Any]) -> LoadedCheckpoint:
        """Load a quantized checkpoint.

        Raises:
            ValueError: The checkpoint is not quantized, or in a way that cannot be run faithfully.
            ImportError: The library that runs its format is missing; the message holds the install command.
        """
        quantization = quantization_of(config)
        if not quantization:
            raise ValueError(
                f"{path} is not quantized: its config has no quantization_config; use quant_none, quant_rtn, ..."
            )
        method = str(quantization.get("quant_method"))
        several = several_schemes(quantization)
        label = method if several is None else several.label
        label = f"{label}, KV scheme not taken" if leaves_cache(quantization) else label
        extra = _prepare(path, config, quantization, several)
        model, info = class_of(config).from_pretrained(
            path, config=config, output_loading_info=True, **options, **extra
        )
        adopt_library_layers(model)
        _expect_quantized(path, method, model)
        packed = any(isinstance(module, QuantizedLinear) for module in model.modules())
        dense = "the checkpoint has it dense" if packed else _why_dense(quantization)
        return LoadedCheckpoint(model, info, label, dense)


def leaves_cache(quantization: Mapping[str, Any]) -> bool:
    """Return whether a config asks for a quantized key-value cache, which is not taken from it; a warning says so."""
    asked = quantization.get("kv_cache_scheme")
    if asked:
        logger.warning("its config asks for a key-value cache of {}, which is not taken from it: see kv_format", asked)
    return bool(asked)


def _expect_quantized(path: str, method: str, model: nn.Module) -> None:
    # Formats of compressed-tensors other than packed integers are dense in memory, and reported as such.
    if method == "compressed-tensors" or any(isinstance(module, QuantizedLinear) for module in model.modules()):
        return
    kinds = sorted({type(module).__name__ for module in model.modules() if "inear" in type(module).__name__})
    raise ValueError(
        f"{path} says {method}, but no layer that transformers made of it is known to be quantized (linear layers are "
        f"{', '.join(kinds)})"
    )


def _why_dense(quantization: Mapping[str, Any]) -> str:
    name = f"{quantization['quant_method']} ({quantization.get('format')})"
    groups = quantization.get("config_groups", {}).values()
    inputs = any(isinstance(group, Mapping) and group.get("input_activations") for group in groups)
    missing = "memory is not saved" + (" and inputs are not rounded, as it asks" if inputs else "")
    return f"{name} runs dense: values are rounded, {missing}"


def _prepare(path: str, config: Any, quantization: Mapping[str, Any], several: SeveralSchemes | None) -> dict[str, Any]:
    """Return further keyword arguments for ``from_pretrained``, and remove from `config` what would mislead it."""
    method = quantization.get("quant_method")
    turned = next((key for key in ROTATIONS if quantization.get(key)), None)
    if turned is not None:
        raise ValueError(f"{path} ({method}) rotates inputs before its layers ({turned}), which cannot be done here")
    stored = several or scaled_format(quantization) or stored_format(quantization)
    if stored is not None:
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        return {"quantization_config": ArrivalConfig(stored)}
    if method in RUNTIMES:
        module, extra = RUNTIMES[method]
        require(module, extra=extra, user=f"{path} ({method})")
    if method == "compressed-tensors":
        if not quantization.get("config_groups"):
            raise ValueError(f"{path} says {method}, but its config names no config_groups: nothing in it is quantized")
        # Otherwise weights would be dense from the first forward pass on, or fail to load at all.
        config.quantization_config = {**quantization, "dequantize": True}
    elif getattr(config, "quantization_config", None) is None:
        config.quantization_config = dict(quantization)
    return {}


def adopt_library_layers(model: PreTrainedModel) -> None:
    """Wrap layers made by libraries in layers that count their bytes.

    Raises:
        ValueError: A library's layer holds a dense weight: the checkpoint has it dense, and its list of layers to keep
            dense does not match this model.
    """
    turned = 0
    for name, module in list(model.named_modules()):
        turned += _turn_scales_back(module)
        layer = _adopted(name, module, model.dtype)
        if layer is not None:
            model.set_submodule(name, layer)
    if turned:
        logger.warning(
            "bitsandbytes wrote the scales of {} layers transposed and rounded to bfloat16, as it does after a model "
            "has run on a processor with avx512_bf16; they are read in the right order. Write the checkpoint again "
            "before the model runs to have the scales unrounded",
            turned,
        )


def _adopted(name: str, module: nn.Module, dtype: torch.dtype) -> QuantizedLinear | None:
    kind = type(module).__name__
    library = type(module).__module__.partition(".")[0]
    weight = getattr(module, "weight", None)
    if library == "bitsandbytes" and kind in ("Linear4bit", "Linear8bitLt"):
        return _from_bitsandbytes(name, module, dtype)
    if isinstance(module, nn.Linear) and weight is not None and type(weight.data) is not Tensor:
        return _from_torchao(name, module)
    return None


def _turn_scales_back(module: nn.Module) -> bool:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    # Scales form a single row, except the transposed ones, (columns / block size, rows) (bitsandbytes 0.50).
    if state is None or state.absmax.ndim != 2:
        return False
    state.absmax = state.absmax.T.reshape(-1).to(torch.float32)
    return True


def _from_bitsandbytes(name: str, module: Any, dtype: torch.dtype) -> QuantizedLinear:
    weight, bias = module.weight, module.bias
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return FourBitLinear(weight.data, state, bias=bias)
    library = getattr(module, "state", None)
    scale = getattr(weight, "SCB", None)
    scale = getattr(library, "SCB", None) if scale is None else scale
    if weight.dtype is not torch.int8 or scale is None or library is None:
        raise ValueError(
            f"{name} is dense in the checkpoint, but bitsandbytes expects it quantized: llm_int8_skip_modules of its "
            "config does not match the names of this model's layers"
        )
    return Int8Linear(weight.data, scale, bias=bias, dtype=dtype, outlier_threshold=library.threshold)


def _from_torchao(name: str, module: nn.Linear) -> QuantizedLinear:
    weight: Any = module.weight.data
    if not type(weight).__module__.startswith("torchao."):
        raise ValueError(f"{name} has a weight of type {type(weight).__name__}, which is not known here")
    block = getattr(weight, "block_size", None)
    if block is None or block[0] != 1:
        raise ValueError(f"{name}: torchao's {type(weight).__name__} in blocks of {block}, expected groups along rows")
    bits = _torchao_bits(weight)
    kind = Int4Linear if bits == 4 and "Int4" in type(weight).__name__ else TensorLinear
    return kind(weight, module.in_features, bias=module.bias, bits=bits, group_size=block[-1], library="torchao")


def _torchao_bits(weight: Any) -> int:
    if "Int4" in type(weight).__name__:
        return 4
    target = str(getattr(weight, "target_dtype", torch.int8))
    return int(target.rpartition("int")[2])
