"""Activation-aware weight quantization: input channels that matter get a finer grid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.activations import InputStatistics
from lmms_plugin.quant_backends.backend import CalibratedBackend, Solution
from lmms_plugin.quant_backends.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.plan import QuantSpec
from lmms_plugin.quant_backends.rtn import nearest, round_by_blocks
from lmms_plugin.quant_backends.scale_search import GramError, search_clipping, search_scales

UNCLIPPED = re.compile(r"^(q_|k_|query|key|wqkv|qkv)", re.IGNORECASE)
"""Layers that the authors do not clip: attention scores multiply two of them, and the error of either tells little."""


@dataclass(frozen=True)
class AwqBackend(CalibratedBackend):
    """AWQ (Lin et al., MLSys 2024): the scale search, and the clipping search when asked for.

    Layers that are fed the same tensor share a scale per input column, s = mean|x|^t normalised by
    sqrt(max s · min s), with t from a grid of 20. The t that is kept has the smallest squared error of
    the layers' outputs over the calibration inputs; t = 0 is in the grid, so that the error of a group is
    never above round-to-nearest. 1/s stays with the packed layer instead of being folded into the
    norm before it, which works for every architecture.

    Two layers of statistics that the authors sample are exact here: the squared output error is
    tr(ΔW G ΔWᵀ) with G = XᵀX, whatever the number of samples.

    Attributes:
        clip: Also narrow the range of each group of weights where that lowers the output error; layers named like a
            query or key projection are left out, as in the authors' code.
    """

    name = "awq"
    bits = frozenset(range(2, 9))
    clip: bool = False

    @torch.no_grad()
    def solve(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> list[Solution]:
        """Search the input scale of layers that are fed one tensor, then the ranges of each."""
        statistics.expect_finite()
        weights = [layer.weight for layer in layers]
        found = search_scales(weights, specs, statistics.mean_magnitude, GramError(statistics.gram))
        return [
            Solution(self._pack(layer, name, spec, found.in_scale, statistics.gram))
            for layer, name, spec in zip(layers, statistics.names, specs, strict=True)
        ]

    def without_inputs(self, layer: nn.Linear, spec: QuantSpec) -> QuantizedLinear:
        """Round to nearest: no channel matters more than another."""
        return nearest(layer, spec)

    def _pack(self, layer: nn.Linear, name: str, spec: QuantSpec, in_scale: Tensor, gram: Tensor) -> PackedLinear:
        if self.clip and not UNCLIPPED.match(name.rpartition(".")[2]):
            inverse = in_scale.float()
            fed = gram * inverse * inverse.unsqueeze(1)
            codes = search_clipping(layer.weight.float() / inverse, spec, fed, layer.weight.dtype)
        else:
            codes = round_by_blocks(layer.weight, spec, in_scale)
        return PackedLinear.from_codes(codes, spec, layer.in_features, bias=layer.bias, in_scale=in_scale.clone())
