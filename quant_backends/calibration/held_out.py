"""Output error of quantized layers on inputs that were not used for calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmms_plugin.protocol.dialects import Dialect
from lmms_plugin.quant_backends.calibration.inputs import build_batches
from lmms_plugin.quant_backends.calibration.sources import ALLOW, CalibrationSpec
from lmms_plugin.quant_backends.structure.components import dense_linear
from lmms_plugin.quant_backends.structure.experts import SplitExperts, split_experts
from lmms_plugin.quant_backends.structure.telling import tell_modalities

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _ErrorSums:
    """Sums ‖Y − Ŷ‖² and ‖Y‖² of one layer over all inputs of the dense one."""

    def __init__(self, quantized: nn.Module) -> None:
        self.quantized = quantized
        self.difference = self.norm = 0.0

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        other = self.quantized(inputs[0])
        self.difference += float((output - other).float().square().sum(dtype=torch.float64))
        self.norm += float(output.float().square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float | None:
        return (self.difference / self.norm) ** 0.5 if self.norm else None


@torch.no_grad()
def output_errors(
    dense: PreTrainedModel, quantized: nn.Module, names: Iterable[str], batches: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """Return ‖Y − Ŷ‖ / ‖Y‖ of layers, with the dense model's activations as inputs.

    Outputs are those of the layers as they run, with their kernel, bias and rounded inputs.

    Args:
        dense: Unquantized model; experts that are separate in the other model are separated.
        quantized: Same model with some layers replaced, on the same device.
        names: Names of those layers.
        batches: Keyword arguments of one forward pass each.

    Returns:
        Module name -> relative error; None for a layer that no input reached.
    """
    sums = {name: _ErrorSums(quantized.get_submodule(name)) for name in names}
    split_experts(dense, [name for name, module in quantized.named_modules() if isinstance(module, SplitExperts)])
    rounds = (getattr(quantized.get_submodule(name), "rounding", None) for name in sums)
    with ExitStack() as hooks:
        if any(one is not None and one.by_modality for one in rounds):
            hooks.enter_context(tell_modalities(dense))
        for name, sum_of_layer in sums.items():
            handle = dense_linear(dense, name).register_forward_hook(sum_of_layer)
            hooks.callback(handle.remove)
        for batch in batches:
            dense(**batch)
    return {name: sum_of_layer.relative for name, sum_of_layer in sums.items()}


@torch.no_grad()
def held_out_errors(
    dense: PreTrainedModel,
    quantized: PreTrainedModel,
    names: Iterable[str],
    *,
    processor: Any,
    dialect: Dialect,
    samples: int,
    seed: int,
) -> dict[str, float | None]:
    """Return the output errors of layers on synthetic images with questions and answers written by the dense model.

    Args:
        dense: Unquantized model.
        quantized: Same model, quantized.
        names: Names of the quantized layers.
        processor: Processor of the checkpoint.
        dialect: Dialect of the model.
        samples: Number of images.
        seed: Seed, different from that of the calibration.
    """
    spec = CalibrationSpec("self", samples=samples, seed=seed, degenerate=ALLOW)
    batches, _ = build_batches(dense, processor, spec, spec.load_samples(), dialect, keep_logits=True)
    return output_errors(dense, quantized, names, batches)
