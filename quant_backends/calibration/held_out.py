"""How far quantized layers are from the dense ones on inputs that no calibration has seen."""

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

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _ErrorSums:
    """‖Y − Ŷ‖² and ‖Y‖² of one layer, over everything that flows through the dense one."""

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
    dense: nn.Module, quantized: nn.Module, names: Iterable[str], batches: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """Return ‖Y − Ŷ‖ / ‖Y‖ of layers, all fed what flows through the dense model.

    Outputs are those of the layers as they run, with their kernel, bias and rounded inputs.

    Args:
        dense: The unquantized model; experts that are apart in the other one are taken apart.
        quantized: The same model with some layers replaced, on the same device.
        names: Of those layers.
        batches: Keyword arguments of one forward pass each.

    Returns:
        Module name -> relative error; None for a layer that no input reached.
    """
    sums = {name: _ErrorSums(quantized.get_submodule(name)) for name in names}
    split_experts(dense, [name for name, module in quantized.named_modules() if isinstance(module, SplitExperts)])
    with ExitStack() as hooks:
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
    """Return the output errors of layers on made-up images with questions and answers of the dense model's own.

    Args:
        dense: The unquantized model.
        quantized: The same model, quantized.
        names: Of the quantized layers.
        processor: Of the checkpoint.
        dialect: Of the model.
        samples: How many images.
        seed: Another one than that of the calibration.
    """
    spec = CalibrationSpec("self", samples=samples, seed=seed, degenerate=ALLOW)
    batches, _ = build_batches(dense, processor, spec, spec.load_samples(), dialect, keep_logits=True)
    return output_errors(dense, quantized, names, batches)
