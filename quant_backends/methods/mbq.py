"""Modality-balanced quantization: image and answer tokens weigh as much as the loss reacts to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lmms_plugin.quant_backends.backend import CalibratedBackend, Solution
from lmms_plugin.quant_backends.layers.int8_inputs import UNQUANTIZED, Int8InputLinear, check_act_bits
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.methods.rtn import nearest
from lmms_plugin.quant_backends.methods.scale_search import GramError, Objective, RowError, search_scales
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import WEIGHED, InputStatistics

POWERS = {"mae": 1, "mse": 2}


@dataclass(frozen=True)
class MbqBackend(CalibratedBackend):
    """MBQ (Li et al., CVPR 2025): AWQ's scale search with the errors of two modalities balanced by gradients.

    ρ, the weight of an image position against an answer position, is the ratio of the mean magnitudes of the loss
    gradient there (`lmms_plugin.quant_backends.calibration.gradients`). The prompt's text has no weight of its own.
    With Δ the change of the layers' outputs, the candidates of AWQ's grid are compared by

    * mae: (Σ_answer |Δ| + ρ Σ_image |Δ|) / (N_answer + N_image), in which the number of tokens of a modality counts;
    * mse: Σ_answer Δ² / N_answer + ρ Σ_image Δ² / N_image, in which it does not.

    Both forms are the authors'. Errors are those of the linear layers' own outputs, as in the paper's formula (the
    authors' code looks at the whole attention or MLP behind them). mse is exact over all calibration inputs, being a
    quadratic form of their second moments; mae is summed over a sample of
    `lmms_plugin.quant_backends.statistics.SAMPLE_ROWS` tokens of each modality. The grid holds t = 0, so neither is
    ever above that of round-to-nearest.

    Layers whose inputs cannot be told apart, those of the vision tower and the connector, or that no gradient is known
    for, are compared over all of their inputs alike; the report calls them unbalanced. With mse that is AWQ.

    Attributes:
        loss: mae or mse.
        act_bits: 8 rounds the inputs of the layers to 8 bits too, each token by itself, and the search takes the error
            of that into account, over the same sample; 16 leaves them as they are.
    """

    name = "mbq"
    bits = frozenset(range(2, 9))
    by_role = True
    loss: str = "mae"
    act_bits: int = UNQUANTIZED

    def __post_init__(self) -> None:
        if self.loss not in POWERS:
            raise ValueError(f"mbq's loss must be mae or mse, got {self.loss!r}")
        check_act_bits(self.act_bits)

    @property
    def uncompressed(self) -> str | None:
        """Input scales need this package's own format."""
        return "its layers multiply their inputs by a scale"

    @torch.no_grad()
    def solve(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> list[Solution]:
        """Search the input scale of layers that are fed one tensor."""
        statistics.expect_finite()
        weights = [layer.weight for layer in layers]
        found = search_scales(weights, specs, statistics.mean_magnitude, self.objective(statistics))
        method = None if _is_balanced(statistics) else f"{self.name}, unbalanced"
        return [
            Solution(nearest(layer, spec, self._kind, in_scale=found.in_scale.clone()), method)
            for layer, spec in zip(layers, specs, strict=True)
        ]

    def without_inputs(self, layer: nn.Linear, spec: QuantSpec) -> QuantizedLinear:
        """Round to nearest: no channel matters more than another."""
        return nearest(layer, spec, self._kind)

    def objective(self, statistics: InputStatistics) -> Objective:
        """Return what candidates are compared by.

        Args:
            statistics: By role, with rows sampled.
        """
        parts = _balanced(statistics, self.loss)
        if self.loss == "mse" and self.act_bits == UNQUANTIZED:
            return GramError(torch.stack([share * part.gram for part, share in parts]).sum(0))
        # The sample stands for all rows of its part.
        rows = [part.sampled for part, _ in parts]
        shares = [
            share * part.rows / len(sampled) * torch.ones(len(sampled), device=sampled.device)
            for (part, share), sampled in zip(parts, rows, strict=True)
        ]
        return RowError(torch.cat(rows), torch.cat(shares), POWERS[self.loss], self.act_bits)

    @property
    def _kind(self) -> type[PackedLinear]:
        return PackedLinear if self.act_bits == UNQUANTIZED else Int8InputLinear


def _is_balanced(statistics: InputStatistics) -> bool:
    return statistics.sensitivity is not None and set(statistics.roles) == set(WEIGHED)


def _balanced(statistics: InputStatistics, loss: str) -> list[tuple[InputStatistics, float]]:
    """Return the parts of the inputs that count, and the weight of each of their rows."""
    if statistics.sensitivity is None or not _is_balanced(statistics):
        return [(statistics, 1.0)]
    image, answer = (statistics.roles[role] for role in WEIGHED)
    ratio = statistics.sensitivity.ratio
    if loss == "mae":
        # Over one number of tokens for both, which changes no comparison.
        return [(image, ratio), (answer, 1.0)]
    return [(image, ratio / image.rows), (answer, 1 / answer.rows)]
