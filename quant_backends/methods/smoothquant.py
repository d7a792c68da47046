"""SmoothQuant: inputs divided by a factor per channel, and weights multiplied by it, before both are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.methods.awq import UNFOLDED
from lmms_plugin.quant_backends.methods.scale_search import RowError, least_error
from lmms_plugin.quant_backends.methods.scaled_inputs import ScaledInputsBackend
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics

ALPHAS = tuple(step / 20 for step in range(21))
"""Migration strengths that a search compares."""


@dataclass(frozen=True)
class SmoothQuantBackend(ScaledInputsBackend):
    """SmoothQuant (Xiao et al., ICML 2023, arXiv:2211.10438): outliers moved from inputs into weights, then rounding.

    Layers that share an input tensor share s_j = max|X_j|^α / max|W_j|^(1−α), with the maximum of X over all
    calibration inputs and that of W over the rows of all of these layers. Inputs are divided by s and then rounded;
    columns of the weights are multiplied by s and rounded to nearest.

    Where no α is given, it is chosen for each group of layers, as the one of `ALPHAS` with the least squared error of
    the outputs over a sample of `lmms_plugin.quant_backends.statistics.SAMPLE_ROWS` inputs, all roundings included.
    s = 1 is compared too, so that the error over the sample is never above round-to-nearest.

    1/s stays with the layer, which works for every architecture. With `fold` every s is a power of two, and layers that
    no other could take it over from are rounded as they are, as in `awq`: when the model is saved, norms and up
    projections absorb the scales, and not one bit of any output changes
    (`lmms_plugin.quant_backends.checkpoints.folding`).

    Attributes:
        activation_format: Format that the layers' inputs are rounded to at run time.
        alpha: Migration strength α, 0 to 1; None to search it. The authors take 0.5, and 0.75 to 0.9 where inputs have
            larger outliers.
        fold: Whether to choose scales that preceding layers can absorb.
    """

    activation_format: str | None = "int8"
    alpha: float | None = None
    fold: bool = False

    name = "smoothquant"
    bits = frozenset(range(2, 9))
    default_bits = 8
    can_fold = True
    keeps_rows = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_format is None:
            raise ValueError(
                "smoothquant: expected an activation_format, got None; without rounded inputs there is nothing to"
                " smooth (awq searches scales for weights alone)"
            )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"smoothquant: alpha must be a number from 0 to 1, got {self.alpha!r}")
        if self.fold:
            self.expect_foldable()

    def in_scale(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> Tensor | None:
        """Return 1/s."""
        if self.fold and any(UNFOLDED.match(name.rpartition(".")[2]) for name in statistics.names):
            return None
        weights, dtype = [layer.weight for layer in layers], layers[0].weight.dtype
        largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).float()
        assert statistics.largest is not None
        strengths = ALPHAS if self.alpha is None else (self.alpha,)
        factors = torch.stack([smoothing(statistics.largest, largest, alpha) for alpha in strengths])
        if self.fold:
            factors = factors.log2().round().exp2()
        inverses = (1 / factors).to(dtype).float()
        if self.alpha is not None:
            return inverses[0].to(dtype)
        inverses = torch.cat([torch.ones_like(inverses[:1]), inverses])
        rows = statistics.sampled
        rounding, reach = self.rounding_of(statistics), self.largest_of(statistics)
        objective = RowError(rows, torch.ones_like(rows[:, 0]), 2, rounding, reach, statistics.sampled_images)
        asked = [self.spec_of(spec) for spec in specs]
        return inverses[least_error(weights, asked, inverses, objective, self.stored)].to(dtype)


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return s = max|X|^α / max|W|^(1−α) of each column, 1 where either is always zero.

    Args:
        inputs: Largest |x| (columns,), float32.
        weights: Largest |w| (columns,), float32.
        alpha: Migration strength, 0 to 1.

    Returns:
        (columns,) float32.
    """
    used = (inputs > 0) & (weights > 0)
    one = torch.ones_like(inputs)
    return torch.where(used, inputs, one).pow(alpha) / torch.where(used, weights, one).pow(1 - alpha)
