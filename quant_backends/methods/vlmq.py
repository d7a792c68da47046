"""GPTQ with a weight for every token, from the gradient of the answers' loss, after VLMQ."""

from __future__ import annotations

from dataclasses import dataclass

from lmms_plugin.quant_backends.backend import expect_token_weights
from lmms_plugin.quant_backends.methods.gptq import GptqBackend
from lmms_plugin.quant_backends.statistics import InputStatistics


@dataclass(frozen=True)
class VlmqBackend(GptqBackend):
    """GPTQ with a Hessian Σ w_t x_t x_tᵀ of weighted tokens, after VLMQ (Xue et al., arXiv:2508.03351).

    VLMQ weighs tokens by importance, so that many redundant image tokens do not drown the others in the Hessian. Its
    weights come from a backward pass through each block; its formula was not at hand. Here w_t is the mean |gradient|
    of the answers' loss at token t of the output of the layer's attention or MLP, which is the measure by which MBQ
    weighs whole modalities (`lmms_plugin.quant_backends.calibration.gradients`). Rounding errors count as Σ w_t ‖Δ
    x_t‖², on the inputs held out too. Equal weights give `gptq`.

    Layers whose inputs are no positions of the sequence (the vision tower, the connector) have no weights; the report
    calls them unweighted.

    Attributes:
        token_weights: ``gradient`` for a weight of each token's own; ``modality`` for MBQ's: all image tokens weigh the
            same, and so do all answer tokens, while the prompt's text has weight 0.
    """

    token_weights: str = "gradient"

    name = "vlmq"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_token_weights(self.name, self.token_weights)

    @property
    def weighs_tokens_by(self) -> str | None:
        """Return what the weights come from."""
        return self.token_weights

    def fitted_to(self, statistics: InputStatistics) -> InputStatistics:
        """Return the statistics of weighted inputs, or of all alike where no weights are known."""
        return statistics.by_importance

    def method(self, statistics: InputStatistics) -> str | None:
        """Return that the layer's inputs have no weights, where that is so."""
        return self.unweighted(statistics)
