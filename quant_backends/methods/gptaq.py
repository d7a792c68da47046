"""GPTAQ: GPTQ whose target is the unquantized model's output for the inputs that the quantized model gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmms_plugin.quant_backends.methods.gptq import Factor, GptqBackend, permuted
from lmms_plugin.quant_backends.statistics import InputStatistics


@dataclass(frozen=True)
class GptaqBackend(GptqBackend):
    """GPTAQ (Li et al., ICML 2025, arXiv:2504.02692; also GPTQv2): GPTQ with asymmetric calibration.

    Calibration is sequential. With x̃ an input of the layer in the unquantized model and x the same one after quantized
    blocks, ‖Ŵx − Wx̃‖ is made small, where GPTQ has ‖Ŵx − Wx‖. While columns are rounded one after another, each also
    passes on w_q (x̃_q − x_q), its own share of the mismatch, to the columns that are still to be rounded: with H⁻¹ =
    UᵀU (U upper triangular) and D = Σ (x̃ − x) xᵀ, column j moves by α w_q P_qj, P = triu(D Uᵀ, 1) U.

    All layers of a block are calibrated together, on inputs from the quantized blocks before it; the authors' code does
    the query, key and value projections first and runs the block again for the rest. So the first block is GPTQ's. Held
    out inputs judge by ‖Ŵx − Wx̃‖. Experts, to which quantized blocks may send other tokens, are GPTQ's too; the report
    calls them symmetric.

    Attributes:
        alpha: Share α of the mismatch that is passed on, 0 to 1. 0.25 is the default of the authors' code, 1 the
            paper's formula; 0 leaves sequential GPTQ.
    """

    alpha: float = 0.25

    name = "gptaq"
    sequential = True
    asymmetric = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"gptaq: alpha must be a number from 0 to 1, got {self.alpha!r}")

    def factor(self, statistics: InputStatistics, rounding: Tensor) -> Factor:
        """Return GPTQ's coefficients and those by which columns pass on the mismatch of their inputs."""
        factor = super().factor(statistics, rounding)
        mismatch = statistics.fitting_mismatch
        if mismatch is None or self.alpha == 0:
            return factor
        return factor._replace(pull=self.alpha * pull_of(mismatch, factor))

    def judge(self, delta: Tensor, weight: Tensor, statistics: InputStatistics) -> Tensor:
        """Return Σ ‖Ŵx − Wx̃‖² − ‖Wx − Wx̃‖² of each row over the inputs held out."""
        errors = super().judge(delta, weight, statistics)
        mismatch = statistics.judging_mismatch
        if mismatch is None:
            return errors
        return errors - 2 * (delta * (weight.float() @ mismatch)).sum(1, dtype=torch.float64)

    def method(self, statistics: InputStatistics) -> str | None:
        """Return that the layer's inputs could not be compared, where that is so."""
        return None if statistics.mismatch is not None else f"{self.name}, symmetric"


def pull_of(mismatch: Tensor, factor: Factor) -> Tensor:
    """Return P = triu(D Uᵀ, 1) U in the order of rounding.

    With H = FᵀMF (F the feedback, M the pivots), U = M^(−½) F⁻ᵀ and P = triu(D F⁻¹, 1) M⁻¹ F⁻ᵀ: no inverse is taken.

    Args:
        mismatch: D = Σ (x̃ − x) xᵀ (columns, columns) float32, over the inputs of the Hessian.
        factor: Factor of the Hessian.

    Returns:
        (columns, columns) float32, strictly upper triangular.
    """
    ordered = permuted(mismatch, factor.order)
    solved = torch.linalg.solve_triangular(factor.feedback, ordered, upper=False, left=False, unitriangular=True)
    solved = solved.triu_(1).div_(factor.pivots)
    pull: Tensor = torch.linalg.solve_triangular(factor.feedback.T, solved, upper=True, left=False, unitriangular=True)
    return pull
