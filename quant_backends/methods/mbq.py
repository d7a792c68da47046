"""MBQ, modality-balanced quantization: errors of image and answer tokens weighted by the loss's sensitivity to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.methods.format_options import act_bits_of
from lmms_plugin.quant_backends.methods.scale_search import GramError, Objective, RowError, search_scales
from lmms_plugin.quant_backends.methods.scaled_inputs import ScaledInputsBackend
from lmms_plugin.quant_backends.plans.plan import UNTOUCHED_BITS, QuantSpec
from lmms_plugin.quant_backends.statistics import WEIGHED, InputStatistics

POWERS = {"mae": 1, "mse": 2}


@dataclass(frozen=True)
class MbqBackend(ScaledInputsBackend):
    """MBQ (Li et al., CVPR 2025): AWQ's scale search with the errors of two modalities balanced by gradients.

    ρ, the weight of an image position against an answer position, is the ratio of the mean magnitudes of the loss
    gradient there (`lmms_plugin.quant_backends.calibration.gradients`). The prompt's text has no weight of its own.
    With Δ the change of the layers' outputs, the candidates of AWQ's grid are compared by

    * mae: (Σ_answer |Δ| + ρ Σ_image |Δ|) / (N_answer + N_image), in which a modality's number of tokens counts;
    * mse: Σ_answer Δ² / N_answer + ρ Σ_image Δ² / N_image, in which it does not.

    Both forms are the authors'. Errors are those of the linear layers' own outputs, as in the paper's formula (the
    authors' code compares outputs of the whole attention or MLP around them). mse is exact over all calibration inputs,
    being a quadratic form of their second moments; mae is summed over a sample of
    `lmms_plugin.quant_backends.statistics.SAMPLE_ROWS` tokens of each modality. The grid holds t = 0, so neither is
    ever above that of round-to-nearest.

    Layers whose inputs have no roles (those of the vision tower and the connector), and layers without a known
    gradient, are compared over all of their inputs alike; the report calls them unbalanced. With mse that is AWQ.

    Attributes:
        loss: Loss of the search, mae or mse.
        act_bits: Number of bits of the layers' inputs, an older form of `activation_format`: 8 is int8, each token by
            itself; 16 leaves them as they are. The search includes the error of rounded inputs, over the same sample.
    """

    name = "mbq"
    bits = frozenset(range(2, 9))
    by_role = True
    loss: str = "mae"
    act_bits: int = UNTOUCHED_BITS

    def __post_init__(self) -> None:
        if self.loss not in POWERS:
            raise ValueError(f"mbq's loss must be mae or mse, got {self.loss!r}")
        object.__setattr__(self, "activation_format", act_bits_of(self.act_bits, self.activation_format))
        super().__post_init__()

    def in_scale(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> Tensor | None:
        """Search the scale with the least error of the outputs, by the sensitivity of both modalities."""
        weights, asked = [layer.weight for layer in layers], [self.spec_of(spec) for spec in specs]
        objective = self.objective(statistics)
        return search_scales(weights, asked, statistics.mean_magnitude, objective, form=self.stored).in_scale

    def label(self, statistics: InputStatistics) -> str | None:
        """Call layers unbalanced that have no weight for each modality."""
        return None if _is_balanced(statistics) else f"{self.name}, unbalanced"

    def objective(self, statistics: InputStatistics) -> Objective:
        """Return the objective by which candidates are compared.

        Args:
            statistics: Statistics by role, with sampled rows.
        """
        parts = _balanced(statistics, self.loss)
        if self.loss == "mse" and self.rounding is None:
            return GramError(torch.stack([share * part.gram for part, share in parts]).sum(0))
        # The sample represents all rows of its part.
        rows = [part.sampled for part, _ in parts]
        shares = [
            share * part.rows / len(sampled) * torch.ones(len(sampled), device=sampled.device)
            for (part, share), sampled in zip(parts, rows, strict=True)
        ]
        rounding, reach = self.rounding_of(statistics), self.largest_of(statistics)
        images = torch.cat([part.sampled_images for part, _ in parts])
        return RowError(torch.cat(rows), torch.cat(shares), POWERS[self.loss], rounding, reach, images)


def _is_balanced(statistics: InputStatistics) -> bool:
    return statistics.sensitivity is not None and set(statistics.roles) == set(WEIGHED)


def _balanced(statistics: InputStatistics, loss: str) -> list[tuple[InputStatistics, float]]:
    """Return the parts of the inputs that count, and the weight of each of their rows."""
    if statistics.sensitivity is None or not _is_balanced(statistics):
        return [(statistics, 1.0)]
    image, answer = (statistics.roles[role] for role in WEIGHED)
    ratio = statistics.sensitivity.ratio
    if loss == "mae":
        # One common number of tokens divides both, which changes no comparison.
        return [(image, ratio), (answer, 1.0)]
    return [(image, ratio / image.rows), (answer, 1 / answer.rows)]
