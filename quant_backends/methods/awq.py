"""Activation-aware weight quantization: input channels that matter get a finer grid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.backend import CalibratedBackend, Solution
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.methods.rtn import nearest, round_by_blocks
from lmms_plugin.quant_backends.methods.scale_search import GramError, search_clipping, search_scales
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics

UNCLIPPED = re.compile(r"^(q_|k_|query|key|wqkv|qkv)", re.IGNORECASE)
"""Layers that the authors do not clip: attention scores multiply two of them, and the error of either tells little."""

UNFOLDED = re.compile(r"^(o_proj|out_proj|wo|c_proj|proj|dense|dense_4h_to_h|fc2|linear_fc2|linear_2)$", re.IGNORECASE)
"""Layers before which no layer can take over a scale: outputs of attention, and of perceptrons without a gate."""


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

    With `fold` every scale is a power of two, by which multiplying rounds nothing: so the norm or the up projection
    before a layer can take it over when the model is saved (`lmms_plugin.quant_backends.checkpoints.folding`), and not
    one bit of any answer changes. Layers that nothing could take a scale over from are rounded to nearest: the output
    projection of attention, whose value channels serve several query heads in most families (the authors leave it out
    there, too), and what follows an activation.

    Attributes:
        clip: Also narrow the range of each group of weights where that lowers the output error; layers named like a
            query or key projection are left out, as in the authors' code.
        fold: Choose scales that other layers can take over, so that compressed-tensors can hold the model.
    """

    name = "awq"
    bits = frozenset(range(2, 9))
    clip: bool = False
    fold: bool = False

    @property
    def uncompressed(self) -> str | None:
        """Input scales need this package's own format, unless other layers take them over."""
        return None if self.fold else "its layers multiply their inputs by a scale; fold=True avoids that"

    @torch.no_grad()
    def solve(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> list[Solution]:
        """Search the input scale of layers that are fed one tensor, then the ranges of each."""
        statistics.expect_finite()
        in_scale = self._search(layers, specs, statistics)
        return [
            Solution(self._pack(layer, name, spec, in_scale, statistics.gram))
            for layer, name, spec in zip(layers, statistics.names, specs, strict=True)
        ]

    def without_inputs(self, layer: nn.Linear, spec: QuantSpec) -> QuantizedLinear:
        """Round to nearest: no channel matters more than another."""
        return nearest(layer, spec)

    def _search(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> Tensor | None:
        if self.fold and any(UNFOLDED.match(name.rpartition(".")[2]) for name in statistics.names):
            return None
        weights, objective = [layer.weight for layer in layers], GramError(statistics.gram)
        magnitude = statistics.mean_magnitude
        return search_scales(weights, specs, magnitude, objective, powers_of_two=self.fold).in_scale

    def _pack(
        self, layer: nn.Linear, name: str, spec: QuantSpec, in_scale: Tensor | None, gram: Tensor
    ) -> PackedLinear:
        if self.clip and not UNCLIPPED.match(name.rpartition(".")[2]):
            inverse = torch.ones_like(layer.weight[0]).float() if in_scale is None else in_scale.float()
            fed = gram * inverse * inverse.unsqueeze(1)
            codes = search_clipping(layer.weight.float() / inverse, spec, fed, layer.weight.dtype)
        else:
            codes = round_by_blocks(layer.weight, spec, in_scale)
        own = None if in_scale is None else in_scale.clone()
        return PackedLinear.from_codes(codes, spec, layer.in_features, bias=layer.bias, in_scale=own)
