"""PTQTP: every weight is the sum of two trits, each with a scale per group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.backend import Backend, CalibratedBackend, DataFreeBackend, Solution
from lmms_plugin.quant_backends.layers.codes import columns_per_group, rows_per_block, split_groups
from lmms_plugin.quant_backends.layers.ternary import TritPlaneLinear, TritPlanes
from lmms_plugin.quant_backends.methods.gptq import (
    Factor,
    GptqBackend,
    choose_factor,
    expect_damping,
    pass_on_errors,
    sum_of_squares,
)
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics, squared_errors

STARTS = 5
"""How many initial pairs of scales there are (see `_starts`)."""

TRIAL_ITERATIONS = 12
"""After so many only the first start and the best so far go on: errors are 0.1 % above what all of them would come to,
in less than half the time."""


@dataclass(frozen=True)
class _TritPlaneBackend(Backend):
    """What the two variants share.

    Attributes:
        starts: From how many initial pairs of scales each group is fitted; the best end is kept. 1: the paper's alone.
        max_iterations: Of alternating between scales and trits, per start. A group that has not settled by then keeps
            the best scales that it has seen.
    """

    starts: int = STARTS
    max_iterations: int = 50

    bits = frozenset({TritPlaneLinear.bits})
    default_bits = TritPlaneLinear.bits

    def __post_init__(self) -> None:
        if not 1 <= self.starts <= STARTS:
            raise ValueError(f"{self.name}: starts must be an integer from 1 to {STARTS}, got {self.starts!r}")
        if self.max_iterations < 1:
            raise ValueError(f"{self.name}: max_iterations must be a positive integer, got {self.max_iterations!r}")

    @property
    def uncompressed(self) -> str | None:
        """Trits need this package's own format."""
        return "its weights are sums of two planes of trits"

    def fit(self, weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> TritPlanes:
        """Fit two planes to a weight with this backend's options (see `fit_planes`)."""
        return fit_planes(weight, spec.group_size, importance, starts=self.starts, max_iterations=self.max_iterations)


@dataclass(frozen=True)
class PtqtpBackend(_TritPlaneBackend, DataFreeBackend):
    """PTQTP (Xiao et al., arXiv:2509.16989): two trit planes with the least squared error of the weights.

    Scales and trits are found in turn, each the best for the other, row by row and group by group. Two liberties: more
    than one start, and the scales are rounded to the layer's dtype before the trits are chosen a last time.
    """

    name = "ptqtp"

    @torch.no_grad()
    def quantize_linear(self, weight: Tensor, bias: nn.Parameter | None, spec: QuantSpec) -> TritPlaneLinear:
        """Fit the planes of one layer."""
        return TritPlaneLinear.from_planes(self.fit(weight, spec), spec, bias)


@dataclass(frozen=True)
class WeightedPtqtpBackend(_TritPlaneBackend, CalibratedBackend):
    """PTQTP fitted to what the layer's inputs make of its weights, which goes beyond the paper.

    Scales are fitted with each column weighed by the mean square of its input. With `feedback` the trits are then
    chosen column after column as in GPTQ, each making up for the errors before it. Every row keeps whichever it is of
    these and the unweighted fit that has the smallest output error on the calibration inputs held back from fitting, as
    in GPTQ; the report counts the rows that keep the latter.

    Attributes:
        feedback: Let later columns make up for the errors of earlier ones.
        damping: Of the feedback, as in GPTQ.
    """

    feedback: bool = True
    damping: float | None = None

    name = "ptqtp_weighted"
    holds_back = True
    fits_correlations = True
    rows_per_column = GptqBackend.rows_per_column
    default_samples = GptqBackend.default_samples

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_damping(self.name, self.damping)

    @torch.no_grad()
    def solve(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> list[Solution]:
        """Fit the planes of layers that are fed one tensor."""
        plain = [self.fit(layer.weight, spec) for layer, spec in zip(layers, specs, strict=True)]
        rounding = sum_of_squares(
            layer.weight - fit.dequantize(spec.group_size, layer.weight.dtype)
            for layer, spec, fit in zip(layers, specs, plain, strict=True)
        )
        factor = choose_factor(statistics, rounding, damping=self.damping)
        return [
            self._solve(layer, spec, fit, factor, statistics)
            for layer, spec, fit in zip(layers, specs, plain, strict=True)
        ]

    @torch.no_grad()
    def without_inputs(self, layer: nn.Linear, spec: QuantSpec) -> TritPlaneLinear:
        """Fit with all columns weighing the same."""
        return TritPlaneLinear.from_planes(self.fit(layer.weight, spec), spec, layer.bias)

    def _solve(
        self, layer: nn.Linear, spec: QuantSpec, plain: TritPlanes, factor: Factor, statistics: InputStatistics
    ) -> Solution:
        weight, gram = layer.weight, statistics.judging_gram
        weighted = self.fit(weight, spec, statistics.fitting_gram.diagonal())
        candidates = [plain, weighted]
        if self.feedback:
            candidates.append(choose_with_feedback(weight, weighted.scale, spec.group_size, factor))
        stored = (each.dequantize(spec.group_size, weight.dtype) for each in candidates)
        errors = torch.stack([squared_errors(dense.float() - weight, gram) for dense in stored])
        best, rows = errors.argmin(0), torch.arange(len(weight), device=weight.device)
        planes = torch.stack([each.planes for each in candidates])[best, :, rows].transpose(0, 1)
        scale = torch.stack([each.scale for each in candidates])[best, rows]
        packed = TritPlaneLinear.from_planes(TritPlanes(planes, scale), spec, layer.bias)
        return Solution(packed, plain_rows=int((best == 0).sum()))


def fit_planes(
    weight: Tensor,
    group_size: int | None,
    importance: Tensor | None = None,
    *,
    starts: int = STARTS,
    max_iterations: int = 50,
) -> TritPlanes:
    """Find two trit planes and their scales with a small Σ importance · (w − ŵ)² in each group of each row.

    Every group is a problem of its own, the same for any other rows or groups beside it. A weight's value depends on
    the scales and its magnitude alone, so that a group sorted once gives the sums that belong to any scales by looking
    up four borders: as exact as comparing every weight with nine values, and quick enough for many starts.

    Args:
        weight: (rows, columns), finite, any float dtype, which is also that of the returned scales.
        group_size: Columns per pair of scales, None for all of them.
        importance: (columns,), not negative; None for all the same.
        starts: How many initial pairs of scales to try, 1 to 5.
        max_iterations: Of scales after trits after scales, per start.
    """
    columns = weight.shape[1]
    if importance is None:
        importance = torch.ones(columns, device=weight.device)
    largest = importance.max()
    # A group whose inputs were all zero is fitted as if they were all the same.
    importance = (importance / largest if largest > 0 else importance).double().clamp(min=1e-6)
    counted = split_groups(importance.unsqueeze(0), group_size)
    parts = []
    for block in weight.split(rows_per_block(columns)):
        groups = split_groups(block.float(), group_size)
        sums = _MagnitudeSums.of(groups.abs().flatten(0, 1), counted.expand(groups.shape).flatten(0, 1))
        scale = _best_scales(sums, starts, max_iterations).view(*groups.shape[:2], 2).to(weight.dtype)
        parts.append(TritPlanes(TernaryGrid.of(scale).nearest(groups).flatten(2)[..., :columns], scale))
    return TritPlanes(torch.cat([part.planes for part in parts], 1), torch.cat([part.scale for part in parts]))


class TernaryGrid(NamedTuple):
    """The nine values that pairs of scales make, as the layer will compute them.

    Attributes:
        borders: (..., 4) float32, between the five magnitudes in rising order.
        trits: (2, ..., 5) int8, of each magnitude.
    """

    borders: Tensor
    trits: Tensor

    @classmethod
    def of(cls, scale: Tensor) -> TernaryGrid:
        """Return the grids of scales (..., 2), the larger one first."""
        levels, trits = _levels(scale)
        levels = levels.float()
        return cls((levels[..., 1:] + levels[..., :-1]) / 2, trits.movedim(-1, 0).to(torch.int8))

    def nearest(self, values: Tensor) -> Tensor:
        """Choose the trits whose scaled sum is nearest to each value.

        Args:
            values: (..., n) float32, n for each grid.

        Returns:
            (2, ..., n) int8; of equally near sums the smaller one.
        """
        magnitude, level = values.abs(), torch.zeros_like(values, dtype=torch.int64)
        for border in self.borders.split(1, -1):
            level += magnitude > border
        sign = values.sign().to(torch.int8)
        return torch.stack([plane.gather(-1, level) * sign for plane in self.trits])


def choose_with_feedback(weight: Tensor, scale: Tensor, group_size: int | None, factor: Factor) -> TritPlanes:
    """Choose trits column after column for given scales, each column making up for the errors before it (GPTQ).

    Args:
        weight: (rows, columns), in the dtype of `scale`.
        scale: (rows, groups, 2).
        group_size: Columns per pair of scales, None for all of them.
        factor: Of the inputs' second moments.
    """
    rows, columns = weight.shape
    size = columns_per_group(group_size, columns)
    planes = torch.empty(columns, 2, rows, dtype=torch.int8, device=weight.device)
    # One group at a time is contiguous.
    scales = scale.permute(1, 2, 0).contiguous()
    grids = TernaryGrid.of(scale.transpose(0, 1).contiguous())

    def choose(column: int, wanted: Tensor) -> Tensor:
        group = column // size
        grid = TernaryGrid(grids.borders[group], grids.trits[:, group])
        planes[column] = grid.nearest(wanted.unsqueeze(1)).squeeze(2)
        # The sum of two exact products, rounded once, as in the layer.
        return (planes[column] * scales[group]).sum(0).float()

    pass_on_errors(weight, factor, choose)
    return TritPlanes(planes.permute(1, 2, 0), scale)


class _MagnitudeSums(NamedTuple):
    """Of the magnitudes of each group in rising order, with a zero before the first; all (groups, ...) float64.

    float64, so that the order of summation, which differs between devices, does not show in the rounded scales.
    """

    magnitude: Tensor
    importance: Tensor
    weighted: Tensor
    squares: Tensor

    @classmethod
    def of(cls, magnitude: Tensor, importance: Tensor) -> _MagnitudeSums:
        magnitude, order = magnitude.sort(1)
        magnitude, importance = magnitude.double(), importance.gather(1, order)
        zero = magnitude.new_zeros(len(magnitude), 1)
        weighted = importance * magnitude
        return cls(
            magnitude,
            torch.cat([zero, importance.cumsum(1)], 1),
            torch.cat([zero, weighted.cumsum(1)], 1),
            (weighted * magnitude).sum(1, keepdim=True),
        )


def _best_scales(sums: _MagnitudeSums, starts: int, max_iterations: int) -> Tensor:
    """Return the scales with the smallest error that was found, (groups, 2) float64."""
    scale, error = _alternate(sums, _starts(sums)[:, :starts], min(TRIAL_ITERATIONS, max_iterations))
    if starts > 1:
        scale = torch.stack([scale[:, 0], _chosen(scale, error)], 1)
    return _chosen(*_alternate(sums, scale, max(0, max_iterations - TRIAL_ITERATIONS)))


def _chosen(scale: Tensor, error: Tensor) -> Tensor:
    """Return of scales (groups, starts, 2) those with the smallest error (groups, starts), the first of equals."""
    return scale.gather(1, error.argmin(1).view(-1, 1, 1).expand(-1, 1, 2)).squeeze(1)


def _alternate(sums: _MagnitudeSums, scale: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Refit scales (groups, starts, 2) so many times; return the best ones seen and their errors (groups, starts)."""
    best, least = scale.clone(), torch.full_like(scale[..., 0], torch.inf)
    going = torch.arange(len(scale), device=scale.device)
    for _ in range(iterations + 1):
        error, refitted = _refit(sums, scale)
        better = error < least[going]
        least[going] = torch.where(better, error, least[going])
        best[going] = torch.where(better.unsqueeze(-1), scale, best[going])
        # Once its trits stay the same a group's scales do too, to the last bit, and the others can go on without it.
        moving = (refitted != scale).flatten(1).any(1)
        if not moving.any():
            break
        if 2 * int(moving.sum()) < len(moving):
            going, refitted, sums = going[moving], refitted[moving], _MagnitudeSums(*(part[moving] for part in sums))
        scale = refitted
    return best, least


def _starts(sums: _MagnitudeSums) -> Tensor:
    """Return the initial scales, (groups, 5, 2).

    The first are where the paper's initialization T1 = T2 = sign(w) leads. With M the largest and m the smallest
    magnitude above zero, a group that is a sum of two planes has M as the scales' sum and m as either their difference
    (the second) or the smaller one (the last). For other weights the three in the middle are those of 48 pairs over
    all ratios and heights that won nearly all there was to win: errors on normal, Laplace, Student-t and uniform
    weights were 3 to 13 % below those from the first alone.
    """
    mean = sums.weighted[:, -1] / sums.importance[:, -1]
    largest = sums.magnitude[:, -1]
    zeros = (sums.magnitude == 0).sum(1, keepdim=True).clamp(max=sums.magnitude.shape[1] - 1)
    smallest = sums.magnitude.gather(1, zeros).squeeze(1)
    pairs = (
        (mean / 2, mean / 2),
        ((largest + smallest) / 2, (largest - smallest) / 2),
        (0.6 * largest, 0.1 * largest),
        (largest * 2 / 3, largest / 3),
        (largest - smallest, smallest),
    )
    return torch.stack([torch.stack(pair, -1) for pair in pairs], 1).sort(-1, descending=True).values


def _refit(sums: _MagnitudeSums, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the error of scales (groups, starts, 2) with their best trits, and the best scales for those trits."""
    levels, trits = _levels(scale)
    borders = (levels[..., 1:] + levels[..., :-1]) / 2
    index = torch.searchsorted(sums.magnitude, borders.flatten(1), right=True)
    count, weighted = (_between(part, index).view_as(levels) for part in (sums.importance, sums.weighted))
    error = sums.squares + (levels * (levels * count - 2 * weighted)).sum(-1)
    # Normal equations of two unknowns. Where they do not tell the planes apart, as at the first start, both get the
    # same share: the solution of least norm, and the limit of the paper's ridge regression.
    first, second = trits.unbind(-1)
    a, b, c = (count * first**2).sum(-1), (count * first * second).sum(-1), (count * second**2).sum(-1)
    u, v = (weighted * first).sum(-1), (weighted * second).sum(-1)
    determinant, trace = (a * c - b * b).unsqueeze(-1), (a + c).unsqueeze(-1)
    solved = torch.where(
        determinant > 1e-9 * trace**2,
        torch.stack([c * u - b * v, a * v - b * u], -1) / determinant,
        torch.stack([u, v], -1) / trace.clamp(min=torch.finfo(trace.dtype).tiny),
    )
    # The nine values are the same for either sign and order of the scales.
    return error, solved.abs().sort(-1, descending=True).values


def _between(sums: Tensor, index: Tensor) -> Tensor:
    """Return what lies between four borders each, (groups, starts * 5), from running sums (groups, columns + 1)."""
    groups = len(sums)
    at = sums.gather(1, index).view(groups, -1, 4)
    ends = sums[:, None, -1:].expand(-1, at.shape[1], 1)
    return torch.cat([torch.zeros_like(ends), at, ends], -1).diff(dim=-1).flatten(1)


def _levels(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the five magnitudes of a pair of scales in rising order, (..., 5), and their trits, (..., 5, 2)."""
    first, second = scale.unbind(-1)
    difference = first - second
    crossed = (second > difference).to(scale.dtype)
    zero, one = torch.zeros_like(first), torch.ones_like(first)
    low, high = torch.minimum(second, difference), torch.maximum(second, difference)
    levels = torch.stack([zero, low, high, first, first + second], -1)
    of_first = torch.stack([zero, crossed, 1 - crossed, one, one], -1)
    of_second = torch.stack([zero, 1 - 2 * crossed, 2 * crossed - 1, zero, one], -1)
    return levels, torch.stack([of_first, of_second], -1)
