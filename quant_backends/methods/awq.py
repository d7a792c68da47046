"""AWQ, activation-aware weight quantization: scales per input channel that protect the salient ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.backend import expect_token_weights
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.methods.scale_search import GramError, search_clipping, search_scales
from lmms_plugin.quant_backends.methods.scaled_inputs import ScaledInputsBackend
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics

UNCLIPPED = re.compile(r"^(q_|k_|query|key|wqkv|qkv)", re.IGNORECASE)
"""Layers that the authors do not clip: attention scores multiply two of them, and the error of either tells little."""

UNFOLDED = re.compile(r"^(o_proj|out_proj|wo|c_proj|proj|dense|dense_4h_to_h|fc2|linear_fc2|linear_2)$", re.IGNORECASE)
"""Layers before which no layer can take over a scale: outputs of attention, and of perceptrons without a gate."""


@dataclass(frozen=True)
class AwqBackend(ScaledInputsBackend):
    """AWQ (Lin et al., MLSys 2024): the scale search, and the clipping search on request.

    Layers that share an input tensor share a scale per input column, s = mean|x|^t normalised by sqrt(max s · min s),
    with t from a grid of 20. The search keeps the t with the smallest squared error of the layers' outputs over the
    calibration inputs; t = 0 is in the grid, so that the error of a group is never above round-to-nearest. 1/s stays
    with the packed layer instead of being folded into the norm before it, which works for every architecture.

    Two statistics that the authors estimate from samples are exact here: the squared output error is tr(ΔW G ΔWᵀ) with
    G = XᵀX, for any number of samples.

    With `fold` every scale is a power of two, by which multiplying rounds nothing: when the model is saved, the norm or
    the up projection before a layer can absorb it (`lmms_plugin.quant_backends.checkpoints.folding`), and not one bit
    of any answer changes. Layers without a preceding layer that could absorb a scale are rounded to nearest: the output
    projection of attention, whose value channels serve several query heads in most families (the authors omit it there,
    too), and layers after an activation function.

    With `token_weights` an output error counts by the importance of its token, Σ w_t ‖Δ x_t‖², in both searches: equal
    weights are AWQ, and those of `modality` are `mbq` with its squared loss. Where w_t comes from is told in
    `lmms_plugin.quant_backends.methods.vlmq`, which fits GPTQ to the same sums. The mean |x| of the scales stays that
    of all tokens alike. Layers whose inputs are no positions of the sequence have no weights; the report calls them
    unweighted.

    Attributes:
        clip: Whether to narrow the range of each group of weights too where that lowers the output error; layers named
            like a query or key projection are excluded, as in the authors' code.
        fold: Whether to choose scales that preceding layers can absorb, so that compressed-tensors can hold the model.
        token_weights: ``gradient`` for a weight of each token's own, ``modality`` for MBQ's two, as in `vlmq`; None for
            all tokens alike.
    """

    name = "awq"
    bits = frozenset(range(2, 9))
    can_fold = True
    clip: bool = False
    fold: bool = False
    token_weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_token_weights(self.name, self.token_weights)
        if self.fold:
            self.expect_foldable()
        if self.clip and self.stored is not None:
            raise ValueError(
                f"awq: clip=True narrows the ranges of groups of integers, which format={self.format} has not"
            )

    @property
    def weighs_tokens_by(self) -> str | None:
        """Return what the weights come from; None for none."""
        return self.token_weights

    def label(self, statistics: InputStatistics) -> str | None:
        """Call layers unweighted whose tokens were to have weights and have none."""
        return self.unweighted(statistics)

    def in_scale(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> Tensor | None:
        """Search the scale with the least error of the outputs."""
        if self.fold and any(UNFOLDED.match(name.rpartition(".")[2]) for name in statistics.names):
            return None
        weights, objective = [layer.weight for layer in layers], GramError(statistics.by_importance.gram)
        asked = [self.spec_of(spec) for spec in specs]
        magnitude, form = statistics.mean_magnitude, self.stored
        return search_scales(weights, asked, magnitude, objective, powers_of_two=self.fold, form=form).in_scale

    def scaled(
        self, layer: nn.Linear, name: str, spec: QuantSpec, in_scale: Tensor | None, statistics: InputStatistics
    ) -> QuantizedLinear:
        """Return a layer with the input scale, its weights rounded to nearest within ranges that are searched."""
        if not self.clip or UNCLIPPED.match(name.rpartition(".")[2]):
            return super().scaled(layer, name, spec, in_scale, statistics)
        inverse = torch.ones_like(layer.weight[0]).float() if in_scale is None else in_scale.float()
        fed, dtype = statistics.by_importance.gram * inverse * inverse.unsqueeze(1), layer.weight.dtype
        codes = search_clipping(layer.weight.float() / inverse, self.spec_of(spec), fed, dtype)
        return self.assemble(
            codes, spec, layer.in_features, dtype, bias=layer.bias, in_scale=in_scale, statistics=statistics
        )
