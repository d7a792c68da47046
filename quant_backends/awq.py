"""Activation-aware weight quantization: input channels that matter get a finer grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.activations import InputStatistics
from lmms_plugin.quant_backends.backend import CalibratedBackend, Solution
from lmms_plugin.quant_backends.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.plan import QuantSpec
from lmms_plugin.quant_backends.rtn import round_by_blocks, round_to_nearest

EXPONENTS = tuple(step / 20 for step in range(20))
"""The grid of the search, as in the authors' code. 0 is round-to-nearest."""

SEARCH_ELEMENTS = 1 << 22
"""Weights in flight while candidate scales of one layer are compared."""


class Scales(NamedTuple):
    """The outcome of one search.

    Attributes:
        in_scale: (columns,) in the dtype of the weights, 1/s; multiplies the layer's input.
        exponent: The chosen t.
        output_errors: Per layer of the group, ‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖.
    """

    in_scale: Tensor
    exponent: float
    output_errors: tuple[float, ...]


@dataclass(frozen=True)
class AwqBackend(CalibratedBackend):
    """AWQ (Lin et al., MLSys 2024), the scale search.

    Layers that are fed the same tensor share a scale per input column, s = mean|x|^t normalised by
    sqrt(max s · min s), with t from a grid of 20. The t that is kept has the smallest squared error of
    the layers' outputs over the calibration inputs; t = 0 is in the grid, so that the error of a group is
    never above round-to-nearest. 1/s stays with the packed layer instead of being folded into the
    norm before it, which works for every architecture.

    Two layers of statistics that the authors sample are exact here: the squared output error is
    tr(ΔW G ΔWᵀ) with G = XᵀX, whatever the number of samples.
    """

    name = "awq"
    bits = frozenset(range(2, 9))

    @torch.no_grad()
    def solve(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> list[Solution]:
        """Search the input scale of layers that are fed one tensor."""
        best = search([layer.weight for layer in layers], specs, statistics)
        return [
            Solution(_pack(layer, spec, best.in_scale), error)
            for layer, spec, error in zip(layers, specs, best.output_errors, strict=True)
        ]

    def without_inputs(self, layer: nn.Linear, spec: QuantSpec) -> QuantizedLinear:
        """Round to nearest: no channel matters more than another."""
        return _pack(layer, spec, None)


def search(weights: Sequence[Tensor], specs: Sequence[QuantSpec], statistics: InputStatistics) -> Scales:
    """Find the input scale of a group of layers.

    Args:
        weights: Each (rows, columns), all fed the same inputs.
        specs: One per weight.
        statistics: Of those inputs.

    Raises:
        ValueError: The inputs hold NaN or infinite values.
    """
    if not torch.isfinite(statistics.gram).all():
        raise ValueError(f"{statistics.names[0]}: its calibration inputs hold NaN or infinite values")
    inverses = candidates(statistics.mean_magnitude, weights[0].dtype)
    errors = torch.stack(
        [_squared_errors(weight, spec, inverses, statistics.gram) for weight, spec in zip(weights, specs, strict=True)]
    )
    totals = errors.sum(0).tolist()
    best = totals.index(min(totals))
    norms = [_quadratic(weight.float(), statistics.gram) for weight in weights]
    relative = [
        (float(error) / float(norm)) ** 0.5 if norm > 0 else 0.0
        for error, norm in zip(errors[:, best], norms, strict=True)
    ]
    return Scales(inverses[best].to(weights[0].dtype), EXPONENTS[best], tuple(relative))


def candidates(mean_magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1/s for every exponent of the grid.

    Args:
        mean_magnitude: (columns,), mean |x|.
        dtype: What the layer computes in; the inverses are rounded to it before they are used, so that
            the error that is measured is the one that is got.

    Returns:
        (exponents, columns) float32.
    """
    exponents = torch.tensor(EXPONENTS, device=mean_magnitude.device).unsqueeze(1)
    scale = mean_magnitude.clamp(min=torch.finfo(torch.float32).tiny).pow(exponents).clamp(min=1e-4)
    scale = scale / (scale.amax(1, keepdim=True) * scale.amin(1, keepdim=True)).sqrt()
    return (1 / scale).to(dtype).float()


def _squared_errors(weight: Tensor, spec: QuantSpec, inverses: Tensor, gram: Tensor) -> Tensor:
    """Return ‖X(W − Ŵ)ᵀ‖² for each candidate, (candidates,) float64."""
    dense = weight.float()
    rows, columns = dense.shape
    step = max(1, SEARCH_ELEMENTS // dense.numel())
    errors = []
    for inverse in inverses.split(step):
        inverse = inverse.unsqueeze(1)
        scaled = (dense / inverse).reshape(-1, columns)
        rounded = round_to_nearest(scaled, spec, weight.dtype).dequantize(spec.bits, torch.float32)
        delta = rounded[:, :columns].view(-1, rows, columns) * inverse - dense
        errors += [_quadratic(part, gram) for part in delta]
    return torch.stack(errors)


def _quadratic(delta: Tensor, gram: Tensor) -> Tensor:
    """Return tr(Δ G Δᵀ) as a float64 scalar."""
    return ((delta @ gram) * delta).sum(dtype=torch.float64)


def _pack(linear: nn.Linear, spec: QuantSpec, in_scale: Tensor | None) -> PackedLinear:
    codes = round_by_blocks(linear.weight, spec, in_scale)
    in_scale = None if in_scale is None else in_scale.clone()
    return PackedLinear.from_codes(codes, spec, linear.in_features, bias=linear.bias, in_scale=in_scale)
