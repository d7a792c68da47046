"""QIG: AWQ's scale search with each token's error weighted by its share in the quantization error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.methods.mbq import POWERS
from lmms_plugin.quant_backends.methods.scale_search import RowError, search_scales
from lmms_plugin.quant_backends.methods.scaled_inputs import ScaledInputsBackend
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics

FENCE = 1.5
"""Interquartile ranges beyond the quartiles at which importance is clipped, as in the paper."""


@dataclass(frozen=True)
class QigBackend(ScaledInputsBackend):
    """QIG (Xiang et al., CVPR 2026, arXiv:2603.17809), weights only: AWQ's scale search with weighted tokens.

    The quantization-aware integrated gradients of a token attribute the error of rounding to its elements: (x − x') ∫
    ∂F/∂x dα along the path from a reference x' to x, with F the mean |f(x, W) − f(x, Ŵ)| over the outputs and Ŵ the
    weights rounded to nearest. A token's importance is the mean magnitude of these over its elements, as a share of
    all tokens, clipped at `FENCE` interquartile ranges beyond the quartiles and normalised again. Scales of AWQ's grid
    are compared by Σ λ_t |Δ x_t|, or |Δ x_t|².

    x' is zero, as in the authors' code where inputs are not rounded, and f is the layers that share the input. Then the
    integral has a closed form (`token_importance`), for which the authors take 32 steps, since their f is the whole
    attention or MLP before the output projections. Tokens are a sample of
    `lmms_plugin.quant_backends.statistics.SAMPLE_ROWS` of all calibration samples together; the authors take the shares
    and quartiles of each sample by itself. The grid holds t = 0, so that the weighted error is never above
    round-to-nearest.

    Attributes:
        loss: Loss of the search, mae or mse.
    """

    name = "qig"
    bits = frozenset(range(2, 9))
    keeps_rows = True
    loss: str = "mae"

    def __post_init__(self) -> None:
        if self.loss not in POWERS:
            raise ValueError(f"qig's loss must be {' or '.join(POWERS)}, got {self.loss!r}")
        if self.activation_format is not None:
            raise ValueError(
                f"qig: activation_format={self.activation_format} was asked for, but its importance is that of rounded"
                " weights with inputs as they are; leave it out, or take mbq or smoothquant"
            )
        super().__post_init__()

    def in_scale(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> Tensor | None:
        """Search the scale with the least error of the outputs, by the importance of tokens."""
        weights, asked = [layer.weight for layer in layers], [self.spec_of(spec) for spec in specs]
        objective = self.objective(layers, specs, statistics)
        return search_scales(weights, asked, statistics.mean_magnitude, objective, form=self.stored).in_scale

    def objective(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> RowError:
        """Return the objective by which candidates are compared."""
        rows = statistics.sampled
        errors = [
            self.round(layer.weight, spec).dequantize(spec.bits, torch.float32)[:, : layer.in_features]
            - layer.weight.float()
            for layer, spec in zip(layers, specs, strict=True)
        ]
        return RowError(rows, clipped_shares(token_importance(rows, errors)), POWERS[self.loss])


def token_importance(rows: Tensor, errors: Sequence[Tensor]) -> Tensor:
    """Return the mean |integrated gradient| of each token, up to one factor for all.

    F(x) = Σ |E x| has the gradient Eᵀ sign(E x), which is the same at every point α x, α > 0, of the path from zero. So
    the integrated gradients are x ⊙ Eᵀ sign(E x), and add up to F(x).

    Args:
        rows: Tokens x (rows, columns) float32.
        errors: E = Ŵ − W (outputs, columns) float32, of each layer.

    Returns:
        (rows,) float32.
    """
    gradient = torch.zeros_like(rows)
    for error in errors:
        gradient += (rows @ error.T).sign_() @ error
    return gradient.mul_(rows).abs_().mean(1)


def clipped_shares(importance: Tensor) -> Tensor:
    """Return the importance of tokens as shares of all, without outliers, (rows,) float32.

    All tokens weigh the same where nothing is left, as where rounding changes nothing.

    Args:
        importance: (rows,) float32, 0 or above.
    """
    low, high = torch.quantile(importance, importance.new_tensor([0.25, 0.75]))
    reach = FENCE * (high - low)
    clipped = importance.clamp(low - reach, high + reach)
    return clipped / clipped.sum() if clipped.any() else torch.full_like(importance, 1 / len(importance))
