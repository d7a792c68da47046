"""GPTQ: column-by-column rounding, in which each column compensates for the errors of the previous ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from loguru import logger
from torch import Tensor, nn

from lmms_plugin.quant_backends.backend import CalibratedBackend, Solution
from lmms_plugin.quant_backends.formats.codec import effective_scale, spread, to_codes, to_values
from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.format_linear import FormatCodes
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.methods.format_options import FormatBackend
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics, squared_errors

DAMPINGS = (0.01, 0.1, 1.0)
"""Fractions of the mean diagonal that are tried on the inputs held back; the first one is GPTQ's own."""

LARGEST_DAMPING = 10.0
"""Times the mean diagonal: beyond it the Hessian is all damping, and the result no better than rounding."""


PROBES = 64
"""Random rounding errors that a damping is judged by."""

NEAR_COLUMNS = 16
"""Columns between two matrix products within a block: only errors nearer than that are passed on one by one."""

JOINED_ROWS = 8192
"""Rows of layers with one input that are rounded together, at most: each column is a handful of small operations."""


class Factor(NamedTuple):
    """Coefficients by which later columns compensate for the rounding errors of earlier ones.

    Attributes:
        order: (columns,) int64, the columns in the order in which they are rounded.
        feedback: (columns, columns) float32, lower triangular with a diagonal of ones. Row i, in that order: how far
            column i moves per unit of error in the columns before it.
        damping: Fraction of the mean diagonal that was added to the Hessian.
        pivots: (columns,) float32, D of H = FᵀDF, with F the feedback and H the damped Hessian in that order.
        pull: (columns, columns) float32, strictly upper triangular. Element (i, j), in that order: how far column j
            moves per unit of column i before rounding (GPTAQ); None for no such movement.
    """

    order: Tensor
    feedback: Tensor
    damping: float
    pivots: Tensor
    pull: Tensor | None = None


@dataclass(frozen=True)
class GptqBackend(FormatBackend, CalibratedBackend):
    """GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323) on the grid of round-to-nearest, of integers or any format.

    Each weight is rounded to the nearest point of its group's grid after correction for the errors already made in its
    row, so that ‖X(W − Ŵ)ᵀ‖ is small rather than ‖W − Ŵ‖. Grids are those of the dense weight and stay fixed: codes are
    stored in the columns' own order whatever the order of rounding, which costs nothing at run time.

    Correlations among few inputs do not generalise: with fewer inputs than columns some correction fits any data. So a
    quarter of the calibration inputs is held out. Rows in which plain rounding is no worse on these keep their rounded
    codes, and so do all rows of a layer in which it is no worse altogether: no output's error there is above
    round-to-nearest. The report counts such rows.

    Attributes:
        act_order: Whether to round the columns with the largest inputs first, while others are left to correct them.
        damping: Fraction of the mean diagonal that is added to the diagonal of the Hessian XᵀX, which regularises
            correlations seen in the calibration inputs. None for the one of `DAMPINGS` that is best on the held-out
            inputs. When the factorization still fails, ten times as much is tried.
        block_size: Number of columns per block; between blocks one matrix product propagates errors. Only for speed.
    """

    act_order: bool = True
    damping: float | None = None
    block_size: int = 128

    name = "gptq"
    bits = frozenset(range(2, 9))
    holds_back = True
    fits_correlations = True
    rows_per_column = 8
    default_samples = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_damping(self.name, self.damping)
        if self.block_size < 1:
            raise ValueError(f"{self.name}: block_size must be a positive integer, got {self.block_size!r}")

    @torch.no_grad()
    def solve(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> list[Solution]:
        """Round the weights of layers that share an input tensor."""
        plain = [self.round(layer.weight, spec) for layer, spec in zip(layers, specs, strict=True)]
        rounding = sum_of_squares(
            layer.weight - codes.dequantize(spec.bits, layer.weight.dtype)[:, : layer.in_features]
            for layer, spec, codes in zip(layers, specs, plain, strict=True)
        )
        factor = self.factor(self.fitted_to(statistics), rounding)
        corrected = self._corrected(layers, specs, plain, factor)
        return [
            self._solve(layer, spec, codes, moved, statistics)
            for layer, spec, codes, moved in zip(layers, specs, plain, corrected, strict=True)
        ]

    @torch.no_grad()
    def without_inputs(self, layer: nn.Linear, spec: QuantSpec) -> QuantizedLinear:
        """Round to nearest: without inputs there are no correlations for columns to compensate each other."""
        return self.nearest(layer, spec)

    def fitted_to(self, statistics: InputStatistics) -> InputStatistics:
        """Return the statistics whose Hessian is used: those of equally weighted inputs."""
        return statistics

    def factor(self, statistics: InputStatistics, rounding: Tensor) -> Factor:
        """Return the coefficients of the correction; see `choose_factor`."""
        return choose_factor(statistics, rounding, self.act_order, self.damping)

    def judge(self, delta: Tensor, weight: Tensor, statistics: InputStatistics) -> Tensor:
        """Return the squared output error of each row, (rows,) float64, up to a constant of the row.

        Args:
            delta: Ŵ − W (rows, columns) float32.
            weight: W (rows, columns).
            statistics: Result of `fitted_to`, whose held-out rows judge.
        """
        return squared_errors(delta, statistics.judging_gram)

    def method(self, statistics: InputStatistics) -> str | None:
        """Return what the report calls the method where it could not do its part; None where it could."""
        return None

    def _solve(
        self,
        layer: nn.Linear,
        spec: QuantSpec,
        plain: Codes | FormatCodes,
        corrected: Codes | FormatCodes,
        statistics: InputStatistics,
    ) -> Solution:
        weight, fitted = layer.weight, self.fitted_to(statistics)
        before, after = (
            self.judge(
                codes.dequantize(spec.bits, weight.dtype)[:, : layer.in_features].float() - weight, weight, fitted
            )
            for codes in (plain, corrected)
        )
        # The sum over all rows shows a common effect long before single rows are significant. Where nothing was held
        # out, or only zeros, there is no evidence for a correction either.
        better = (after < before) & (after.sum() < before.sum())
        moved = (corrected.codes != plain.codes).flatten(1).any(1)
        rows = better.view(-1, *(1,) * (plain.codes.dim() - 1))
        codes = plain._replace(codes=torch.where(rows, corrected.codes, plain.codes))
        packed = self.assemble(codes, spec, layer.in_features, weight.dtype, bias=layer.bias, statistics=statistics)
        return Solution(packed, self.method(statistics), int((moved & ~better).sum()))

    def _corrected(
        self,
        layers: Sequence[nn.Linear],
        specs: Sequence[QuantSpec],
        plain: Sequence[Codes | FormatCodes],
        factor: Factor,
    ) -> list[Codes | FormatCodes]:
        """Return the codes of all layers after correction; those of one spec are rounded together, row by row alike."""
        found: list[Codes | FormatCodes] = []
        for first, last in joined(layers, specs, plain):
            weights, codes = [layer.weight for layer in layers[first:last]], plain[first:last]
            if isinstance(codes[0], FormatCodes):
                found.append(round_to_format(weights[0], codes[0], factor, self.block_size))
                continue
            together = Codes.stacked([each for each in codes if isinstance(each, Codes)])
            moved = round_with_feedback(torch.cat(weights), together, specs[first].bits, factor, self.block_size)
            parts = moved.codes.split([len(weight) for weight in weights])
            found += [each._replace(codes=part) for each, part in zip(codes, parts, strict=True)]
        return found


def joined(
    layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], plain: Sequence[Codes | FormatCodes]
) -> list[tuple[int, int]]:
    """Return runs of neighbouring layers that can be rounded together, each as (first, after the last)."""
    runs: list[tuple[int, int]] = []
    for index, (layer, spec, codes) in enumerate(zip(layers, specs, plain, strict=True)):
        first = runs[-1][0] if runs else index
        alike = specs[first] == spec and layers[first].weight.dtype == layer.weight.dtype
        rows = sum(len(each.weight) for each in layers[first : index + 1])
        if runs and isinstance(codes, Codes) and alike and rows <= JOINED_ROWS:
            runs[-1] = (first, index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def expect_damping(backend: str, damping: float | None) -> None:
    """Refuse a fraction that `factorize` cannot start from.

    Raises:
        ValueError: It is negative, NaN or above `LARGEST_DAMPING`.
    """
    if damping is not None and not 0 <= damping <= LARGEST_DAMPING:
        raise ValueError(f"{backend}: damping must be a number from 0 to {LARGEST_DAMPING:g}, got {damping!r}")


def choose_factor(
    statistics: InputStatistics, rounding: Tensor, act_order: bool = True, damping: float | None = None
) -> Factor:
    """Factorize with the damping that has the smallest expected error on the held-out inputs.

    With F the feedback, rounding errors ε give errors δ of the weights where F δ = ε. ε is nearly independent between
    columns: a damping is judged by ‖X δ‖² for random ones, the same for each, without rounding anything. More damping
    is tried as long as it does better.

    Args:
        statistics: Statistics of the layer's inputs.
        rounding: (columns,) float64, in place of the variance: squared errors of plain rounding, summed over rows.
        act_order: Order of rounding, as in `factorize`.
        damping: Damping; None to choose among `DAMPINGS`, or the first of them where no input is held out.

    Raises:
        ValueError: As in `factorize`.
    """
    held_back, hessian = statistics.held_back, _Hessian.of(statistics, act_order)
    if damping is not None or held_back is None or not held_back.rows:
        return hessian.factorize(DAMPINGS[0] if damping is None else damping)
    order = hessian.order
    gram, probes = permuted(held_back.gram, order), rounding_errors(rounding[order])
    best = hessian.factorize(DAMPINGS[0])
    least = expected_error(best.feedback, gram, probes)
    # One after another: in wide layers each takes more than a gigabyte.
    for each in DAMPINGS[1:]:
        factor = hessian.factorize(each)
        expected = expected_error(factor.feedback, gram, probes)
        if expected >= least:
            # Less damping leaves more correlations that are learned by heart, more damping fewer of those that hold:
            # the error falls, then rises.
            break
        best, least = factor, expected
    return best


def permuted(gram: Tensor, order: Tensor) -> Tensor:
    """Return G[order, order], rows first and then columns: indexing both at once takes three times as long."""
    return gram.index_select(0, order).index_select(1, order)


def rounding_errors(variance: Tensor) -> Tensor:
    """Return errors of random sign and given variances, (columns, probes) float32, always the same ones.

    Random signs estimate a trace with the least variance (Hutchinson, 1989). Of few columns, the errors of each by
    itself give it exactly.

    Args:
        variance: (columns,) float64.
    """
    count = len(variance)
    if count <= PROBES:
        signs = math.sqrt(count) * torch.eye(count, dtype=torch.float64)
    else:
        generator = torch.Generator().manual_seed(0)
        signs = 2.0 * torch.randint(2, (count, PROBES), generator=generator, dtype=torch.float64) - 1.0
    return (signs.to(variance.device) * variance.sqrt().unsqueeze(1)).float()


def expected_error(feedback: Tensor, gram: Tensor, errors: Tensor) -> float:
    """Return the mean of ‖X δ‖² over rounding errors ε, where F δ = ε for the feedback F.

    For independent errors it estimates Σ_i var(ε_i) (F⁻ᵀ G F⁻¹)_ii.

    Args:
        feedback: F (columns, columns) float32.
        gram: G = XᵀX (columns, columns) float32, in the order of F.
        errors: ε (columns, probes) float32, in the order of F.
    """
    weight_errors = torch.linalg.solve_triangular(feedback, errors, upper=False, unitriangular=True)
    return float(squared_errors(weight_errors.T, gram).mean())


def sum_of_squares(errors: Iterable[Tensor]) -> Tensor:
    """Return the squares of each column of some matrices (rows, columns), summed over all rows, (columns,) float64."""
    return torch.stack([error.float().square().sum(0, dtype=torch.float64) for error in errors]).sum(0)


def factorize(statistics: InputStatistics, act_order: bool = True, damping: float = 0.01) -> Factor:
    """Compute from second moments of inputs how each column compensates for the errors of the columns before it.

    With H = MᵀM and M lower triangular, ‖X δ‖² = Σ_i (M_ii δ_i + Σ_{j<i} M_ij δ_j)² for the error δ of one row, taken
    in rounding order: column i is best rounded from w_i − Σ_{j<i} (M_ij / M_ii) δ_j. In exact arithmetic these are the
    updates of GPTQ by way of the inverse Hessian's Cholesky factor (arXiv:2507.18553), for one factorization instead of
    two and an inverse. M is the flipped Cholesky factor of the flipped H.

    Args:
        statistics: Statistics of the layer's inputs, without the held-out ones; any positive multiple of the moments
            gives the same result.
        act_order: Whether to order columns by falling mean square of their input; ties by their position.
        damping: First fraction of the mean diagonal to add.

    Raises:
        ValueError: The moments are not finite or those of no real input, or no damping helps.
    """
    return _Hessian.of(statistics, act_order).factorize(damping)


class _Hessian(NamedTuple):
    """Hessian in backward rounding order, which is factorized with one or more dampings.

    Attributes:
        statistics: Statistics that it comes from.
        order: (columns,) int64, the order of rounding.
        moments: (columns, columns) float64, in backward order; its diagonal is overwritten.
        diagonal: (columns,) float64, its diagonal without damping.
        mean: Mean of the diagonal, which damping is a fraction of.
    """

    statistics: InputStatistics
    order: Tensor
    moments: Tensor
    diagonal: Tensor
    mean: Tensor

    @classmethod
    def of(cls, statistics: InputStatistics, act_order: bool) -> _Hessian:
        """Return that of the inputs that are fitted to."""
        statistics.expect_finite()
        gram = statistics.fitting_gram
        diagonal = gram.diagonal().double()
        order = torch.arange(len(gram), device=gram.device)
        if act_order:
            order = diagonal.argsort(descending=True, stable=True)
        backwards = order.flip(0)
        # In float64: at the usual damping float32 finds the same codes, but at a hundredth of it errors 1 % larger. The
        # factor is computed once for all layers that share their inputs.
        moments = permuted(gram, backwards).double()
        diagonal = diagonal[backwards]
        mean = diagonal.mean() if diagonal.any() else torch.ones_like(diagonal[0])
        # A column that is always zero is correlated with no other; any positive number lets it be rounded on its own.
        return cls(statistics, order, moments, torch.where(diagonal == 0, mean, diagonal), mean)

    def factorize(self, damping: float) -> Factor:
        """Return the factor, with more damping where less does not do; see the function `factorize`."""
        asked = damping
        while damping <= LARGEST_DAMPING:
            self.moments.diagonal().copy_(self.diagonal + damping * self.mean)
            lower, info = torch.linalg.cholesky_ex(self.moments)
            if int(info) == 0:
                _warn_if_more(damping, asked, self.statistics)
                diagonal = lower.diagonal().clone()
                lower /= diagonal
                # Row i of M is column n - 1 - i of `lower` read backwards, its diagonal element at the end.
                feedback = lower.float().T.flip(0, 1)
                return Factor(self.order, feedback, damping, diagonal.square().float().flip(0))
            damping = max(10 * damping, 1e-6)
        raise ValueError(
            f"{self.statistics.names[0]}: the second moments of its calibration inputs have no Cholesky factor, even"
            f" with {LARGEST_DAMPING:g} times their mean diagonal added; they cannot come from real inputs"
        )


def _warn_if_more(damping: float, asked: float, statistics: InputStatistics) -> None:
    if damping > asked:
        logger.warning(
            f"{statistics.names[0]}: its {statistics.rows} calibration inputs take more damping than "
            f"{asked:g}: {damping:g} was added; damping={damping:g} or more samples spare trying"
        )


def pass_on_errors(
    weight: Tensor, factor: Factor, choose: Callable[[int, Tensor], Tensor], block_size: int = 128
) -> None:
    """Round the columns of a weight in order, correcting each for the errors of those before it.

    Args:
        weight: (rows, columns), any float dtype.
        factor: Factor from `factorize`.
        choose: Function of a column's position in the weight and the corrected values (rows,), float32, that would
            compensate for all errors so far; returns the values that are stored, float32. With a pull, errors are those
            against the pulled weight.
        block_size: Number of columns between two matrix products.
    """
    # Transposed, so that each step reads and writes contiguous memory. float32: sums of at most some ten thousand
    # products decide between steps of a grid of at most 256.
    dense = weight.T[factor.order].float()
    error = torch.zeros_like(dense)
    wanted_so_far = torch.zeros_like(dense) if factor.pull is not None else None
    positions = factor.order.tolist()
    # A step is little arithmetic: the views of all its rows are made at once.
    dense_rows, error_rows, error_by_row = dense.unbind(), error.unbind(), error.T
    for start in range(0, len(dense), block_size):
        stop = min(start + block_size, len(dense))
        if wanted_so_far is not None and factor.pull is not None:
            dense[start:stop] += factor.pull[:start, start:stop].T @ wanted_so_far[:start]
        wanted = torch.addmm(dense[start:stop], factor.feedback[start:stop, :start], error[:start], alpha=-1)
        wanted_rows, feedback_rows = wanted.unbind(), factor.feedback[start:stop].unbind()
        for step in range(start, stop):
            near = step - (step - start) % NEAR_COLUMNS
            if step == near > start:
                next_near = min(near + NEAR_COLUMNS, stop)
                wanted[near - start : next_near - start].addmm_(
                    factor.feedback[near:next_near, start:near], error[start:near], alpha=-1
                )
            row, before = (
                feedback_rows[step - start].narrow(0, near, step - near),
                error_by_row.narrow(1, near, step - near),
            )
            moved = torch.addmv(wanted_rows[step - start], before, row, alpha=-1)
            if wanted_so_far is not None and factor.pull is not None:
                pulled = wanted_so_far[start:step].T @ factor.pull[start:step, step]
                dense[step] += pulled
                moved = moved + pulled
                wanted_so_far[step] = moved
            torch.sub(choose(positions[step], moved), dense_rows[step], out=error_rows[step])


def round_with_feedback(weight: Tensor, nearest: Codes, bits: int, factor: Factor, block_size: int = 128) -> Codes:
    """Round a weight column by column onto a given grid.

    Args:
        weight: (rows, columns), any float dtype.
        nearest: Codes of the weight by round-to-nearest, whose scales and zero points are used.
        bits: Number of bits of the codes.
        factor: Factor from `factorize`.
        block_size: Number of columns between two matrix products.

    Returns:
        Codes with the same scales and zero points; columns of padding keep theirs.
    """
    dtype, size = nearest.scale.dtype, nearest.codes.shape[-1]
    scales = nearest.scale.T.float().contiguous().unbind()
    zeros = _zero_points(nearest, bits).T.float().contiguous().unbind()
    codes = nearest.codes.flatten(1).T.clone(memory_format=torch.contiguous_format)
    code_rows, largest, rounded = codes.unbind(), (1 << bits) - 1, dtype != torch.float32

    def choose(column: int, wanted: Tensor) -> Tensor:
        scale, zero = scales[column // size], zeros[column // size]
        code = (wanted / scale).round_().add_(zero).clamp_(0, largest)
        code_rows[column].copy_(code)
        value = code.sub_(zero).mul_(scale)
        # The value that the layer will compute with, rounded to its dtype.
        return value.to(dtype).float() if rounded else value

    pass_on_errors(weight, factor, choose, block_size)
    return nearest._replace(codes=codes.T.reshape(nearest.codes.shape))


def round_to_format(weight: Tensor, nearest: FormatCodes, factor: Factor, block_size: int = 128) -> FormatCodes:
    """Round a weight column by column to the elements of a format; see `round_with_feedback`."""
    form = nearest.format
    scales = spread(effective_scale(nearest.scale, nearest.global_scale, form), weight, form).expand(weight.shape)
    scales, codes = scales.T.contiguous(), nearest.codes.T.clone(memory_format=torch.contiguous_format)

    def choose(column: int, wanted: Tensor) -> Tensor:
        codes[column] = to_codes(wanted / scales[column], form.element)
        return (to_values(codes[column], form.element) * scales[column]).to(weight.dtype).float()

    pass_on_errors(weight, factor, choose, block_size)
    return nearest._replace(codes=codes.T.contiguous())


def _zero_points(codes: Codes, bits: int) -> Tensor:
    return torch.full_like(codes.scale, 1 << (bits - 1)) if codes.zero_point is None else codes.zero_point
