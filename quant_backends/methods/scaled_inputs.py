"""What methods share that multiply each input channel of a layer by a factor, and its weights by the inverse."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.backend import CalibratedBackend, Solution
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.methods.format_options import FormatBackend
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics

_SCALED = "its layers multiply their inputs by a scale"


@dataclass(frozen=True)
class ScaledInputsBackend(FormatBackend, CalibratedBackend):
    """Method that chooses a factor for each channel of an input tensor, the same for all layers that share it."""

    can_fold = False
    """Whether `fold` is an option: preceding layers can absorb the factors."""
    fold = False

    @property
    def uncompressed(self) -> str | None:
        """Return the reason: input scales need this package's own format, unless preceding layers absorb them."""
        if not self.can_fold:
            return _SCALED
        return super().uncompressed if self.fold else f"{_SCALED}; fold=True avoids that"

    @torch.no_grad()
    def solve(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> list[Solution]:
        """Choose the input scale of layers that share an input tensor, then round each."""
        statistics.expect_finite()
        in_scale, label = self.in_scale(layers, specs, statistics), self.label(statistics)
        return [
            Solution(self.scaled(layer, name, spec, None if in_scale is None else in_scale.clone(), statistics), label)
            for layer, name, spec in zip(layers, statistics.names, specs, strict=True)
        ]

    @abstractmethod
    def in_scale(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> Tensor | None:
        """Return what inputs are multiplied by, (columns,) in the dtype of the weights; None for nothing.

        Args:
            layers: Layers that share an input tensor.
            specs: Specification of each.
            statistics: Statistics of their inputs.
        """

    def label(self, statistics: InputStatistics) -> str | None:
        """Return the name of the method in the report, where these inputs make it another one; None for its own."""
        return None

    def scaled(
        self,
        layer: nn.Linear,
        name: str,
        spec: QuantSpec,
        in_scale: Tensor | None,
        statistics: InputStatistics,
    ) -> QuantizedLinear:
        """Return a layer with the input scale, its weights rounded to nearest.

        Args:
            layer: Layer.
            name: Name of its module.
            spec: Its specification.
            in_scale: What its inputs are multiplied by (columns,); None for nothing.
            statistics: Statistics of its inputs.
        """
        return self.nearest(layer, spec, in_scale=in_scale, statistics=statistics)

    def without_inputs(self, layer: nn.Linear, spec: QuantSpec) -> QuantizedLinear:
        """Round to nearest: without inputs, all channels are equally important."""
        return self.nearest(layer, spec)
