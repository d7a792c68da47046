"""GPTQ: weights are rounded one input column after another, each making up for the errors of those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from loguru import logger
from torch import Tensor, nn

from lmms_plugin.quant_backends.activations import InputStatistics, squared_errors
from lmms_plugin.quant_backends.backend import CalibratedBackend, Solution
from lmms_plugin.quant_backends.codes import Codes
from lmms_plugin.quant_backends.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.plan import QuantSpec
from lmms_plugin.quant_backends.rtn import nearest, round_by_blocks

LARGEST_DAMPING = 10.0
"""Times the mean diagonal: beyond it the Hessian is all damping, and the result no better than rounding."""


class Factor(NamedTuple):
    """How rounding errors of one column are made up for by later ones.

    Attributes:
        order: (columns,) int64, the columns in the order in which they are rounded.
        feedback: (columns, columns) float32, lower triangular with a diagonal of ones. Row i, in that order: how
            far column i moves against each unit of error in the columns before it.
        damping: The fraction of the mean diagonal that was added to the Hessian.
    """

    order: Tensor
    feedback: Tensor
    damping: float


@dataclass(frozen=True)
class GptqBackend(CalibratedBackend):
    """GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323) on the grid of round-to-nearest.

    Each weight is rounded to the point of its group's grid that is nearest once the errors already made in its row are
    taken into account, so that ‖X(W − Ŵ)ᵀ‖ is small rather than ‖W − Ŵ‖. Grids are those of the dense weight and
    stay fixed: codes lie in the columns' own order whatever the order of rounding, which costs nothing at run time.

    Rows in which this does worse than plain rounding on the calibration inputs (possible where grids are so coarse
    that a correction is clipped) keep their rounded codes, so that no output's error is above round-to-nearest; the
    report counts them.

    Attributes:
        act_order: Round the columns with the largest inputs first, while there are others left to correct them.
        damping: Fraction of the mean diagonal that is added to the diagonal of the Hessian XᵀX: how much to distrust
            correlations seen in the calibration inputs. When the factorization still fails, ten times as much is tried.
        block_size: Columns per block; between blocks errors are passed on by one matrix product. Only for speed.
    """

    act_order: bool = True
    damping: float = 0.01
    block_size: int = 128

    name = "gptq"
    bits = frozenset(range(2, 9))

    def __post_init__(self) -> None:
        expect_damping(self.name, self.damping)
        if self.block_size < 1:
            raise ValueError(f"gptq: block_size must be a positive integer, got {self.block_size!r}")

    @torch.no_grad()
    def solve(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> list[Solution]:
        """Round the weights of layers that are fed one tensor."""
        factor = factorize(statistics, self.act_order, self.damping)
        return [self._solve(layer, spec, factor, statistics.gram) for layer, spec in zip(layers, specs, strict=True)]

    @torch.no_grad()
    def without_inputs(self, layer: nn.Linear, spec: QuantSpec) -> QuantizedLinear:
        """Round to nearest: without inputs there are no correlations by which columns could make up for one another."""
        return nearest(layer, spec)

    def _solve(self, layer: nn.Linear, spec: QuantSpec, factor: Factor, gram: Tensor) -> Solution:
        weight = layer.weight
        plain = round_by_blocks(weight, spec)
        corrected = round_with_feedback(weight, plain, spec.bits, factor, self.block_size)
        before, after = (
            squared_errors(codes.dequantize(spec.bits, weight.dtype)[:, : layer.in_features].float() - weight, gram)
            for codes in (plain, corrected)
        )
        better = after <= before
        codes = plain._replace(codes=torch.where(better.view(-1, 1, 1), corrected.codes, plain.codes))
        packed = PackedLinear.from_codes(codes, spec, layer.in_features, bias=layer.bias)
        return Solution(packed, plain_rows=int((~better).sum()))


def expect_damping(backend: str, damping: float) -> None:
    """Refuse a fraction that `factorize` cannot start from.

    Raises:
        ValueError: It is negative, NaN or above `LARGEST_DAMPING`.
    """
    if not 0 <= damping <= LARGEST_DAMPING:
        raise ValueError(f"{backend}: damping must be a number from 0 to {LARGEST_DAMPING:g}, got {damping!r}")


def factorize(statistics: InputStatistics, act_order: bool = True, damping: float = 0.01) -> Factor:
    """Turn second moments of inputs into what each column owes to the errors of the columns before it.

    With H = MᵀM and M lower triangular, ‖X δ‖² = Σ_i (M_ii δ_i + Σ_{j<i} M_ij δ_j)² for the error δ of one row, taken
    in rounding order: column i is best rounded from w_i − Σ_{j<i} (M_ij / M_ii) δ_j. In exact arithmetic these are the
    updates of GPTQ by way of the inverse Hessian's Cholesky factor (arXiv:2507.18553), for one factorization instead
    of two and an inverse. M is the flipped Cholesky factor of the flipped H.

    Args:
        statistics: Of the layer's inputs; any positive multiple of `gram` gives the same result.
        act_order: Order columns by falling mean square of their input; ties by their position.
        damping: First fraction of the mean diagonal to add.

    Raises:
        ValueError: The moments are not finite or those of no real input, or no damping helps.
    """
    statistics.expect_finite()
    gram = statistics.gram
    diagonal = gram.diagonal().double()
    order = torch.arange(len(gram), device=gram.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    backwards = order.flip(0)
    # float64: at the usual damping float32 finds the same codes, but at a hundredth of it errors 1 % larger. The factor
    # is computed once for all layers that share their inputs, and takes less time than rounding them.
    hessian = gram[backwards.unsqueeze(1), backwards].double()
    diagonal = diagonal[backwards]
    mean = diagonal.mean() if diagonal.any() else torch.ones_like(diagonal[0])
    # A column that is always zero is tied to no other one; any positive number lets it be rounded on its own.
    diagonal = torch.where(diagonal == 0, mean, diagonal)
    asked = damping
    while damping <= LARGEST_DAMPING:
        hessian.diagonal().copy_(diagonal + damping * mean)
        lower, info = torch.linalg.cholesky_ex(hessian)
        if int(info) == 0:
            del hessian
            if damping > asked:
                logger.warning(
                    f"{statistics.names[0]}: its {statistics.rows} calibration inputs take more damping than "
                    f"{asked:g}: {damping:g} was added; damping={damping:g} or more samples spare trying"
                )
            lower /= lower.diagonal().clone()
            # Row i of M is column n - 1 - i of `lower` read backwards, its diagonal element at the end.
            lower = lower.float()
            return Factor(order, lower.T.flip(0, 1), damping)
        damping = max(10 * damping, 1e-6)
    raise ValueError(
        f"{statistics.names[0]}: the second moments of its calibration inputs have no Cholesky factor, even with "
        f"{LARGEST_DAMPING:g} times their mean diagonal added; they cannot come from real inputs"
    )


def pass_on_errors(
    weight: Tensor, factor: Factor, choose: Callable[[int, Tensor], Tensor], block_size: int = 128
) -> None:
    """Go through the columns of a weight, asking for each to be stored as near as possible to what would be best.

    Args:
        weight: (rows, columns), any float dtype.
        factor: From `factorize`.
        choose: Is told a column's position in the weight and the values (rows,) that would make up for all errors so
            far, float32; returns the values that are stored, float32.
        block_size: Columns between two matrix products.
    """
    # Transposed, so that what one step reads and writes is contiguous. float32: sums of at most some ten thousand
    # products decide between steps of a grid of at most 256.
    dense = weight.T[factor.order].float()
    error = torch.zeros_like(dense)
    positions = factor.order.tolist()
    for start in range(0, len(dense), block_size):
        stop = min(start + block_size, len(dense))
        wanted = dense[start:stop] - factor.feedback[start:stop, :start] @ error[:start]
        for step in range(start, stop):
            moved = wanted[step - start] - error[start:step].T @ factor.feedback[step, start:step]
            error[step] = choose(positions[step], moved) - dense[step]


def round_with_feedback(weight: Tensor, nearest: Codes, bits: int, factor: Factor, block_size: int = 128) -> Codes:
    """Round a weight column by column onto a given grid.

    Args:
        weight: (rows, columns), any float dtype.
        nearest: Its codes by round-to-nearest, whose scales and zero points are used.
        bits: Of the codes.
        factor: From `factorize`.
        block_size: Columns between two matrix products.

    Returns:
        Codes with the same scales and zero points; columns of padding keep theirs.
    """
    dtype, size = nearest.scale.dtype, nearest.codes.shape[-1]
    scales = nearest.scale.T.float().contiguous()
    zeros = _zero_points(nearest, bits).T.float().contiguous()
    codes = nearest.codes.flatten(1).T.clone(memory_format=torch.contiguous_format)

    def choose(column: int, wanted: Tensor) -> Tensor:
        scale, zero = scales[column // size], zeros[column // size]
        code = ((wanted / scale).round_() + zero).clamp_(0, (1 << bits) - 1)
        codes[column] = code
        # What the layer will compute with, including the rounding of the product to its dtype.
        return ((code - zero) * scale).to(dtype).float()

    pass_on_errors(weight, factor, choose, block_size)
    return nearest._replace(codes=codes.T.reshape(nearest.codes.shape))


def _zero_points(codes: Codes, bits: int) -> Tensor:
    return torch.full_like(codes.scale, 1 << (bits - 1)) if codes.zero_point is None else codes.zero_point
