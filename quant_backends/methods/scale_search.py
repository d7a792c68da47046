"""AWQ-style searches: the scale per input column and the clipping range per group with the smallest output error.

Candidates are rounded together, many per tensor operation, and compared by an `Objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor

from lmms_plugin.quant_backends.formats.codec import fake_quantize, find_global_scale, find_scale
from lmms_plugin.quant_backends.formats.entries import NumberFormat
from lmms_plugin.quant_backends.layers.codes import Codes, columns_per_group, rows_per_block
from lmms_plugin.quant_backends.layers.input_rounding import InputRounding
from lmms_plugin.quant_backends.methods.rtn_grid import nearest_values, round_to_nearest
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import squared_errors

EXPONENTS = tuple(step / 20 for step in range(20))
"""The grid of scales, as in the authors' code. 0 is round-to-nearest."""

CLIPPING_RATIOS = tuple(1 - step / 20 for step in range(10))
"""The grid of clipping ranges, as in the authors' code: parts of a group's largest magnitude, down to about a half."""

STAGES = ((0, 16), (8, 16), (4, 8), (2, 4), (1, 2))
"""Rows that are compared in turns: those with this remainder of their position by this divisor."""

FEWEST_COMPARED = 64
"""Rows that must have been compared before a candidate is given up."""

GIVEN_UP = 4.0
"""Standard errors by which a candidate must be worse than the best one to be given up."""

SEARCH_ELEMENTS = {"cpu": 1 << 20}
"""Weights in flight while candidates of one layer are compared, by device: on a CPU what its caches hold."""

SEARCH_ELEMENTS_ELSEWHERE = 1 << 24

Errors = Callable[[Tensor, Tensor], Tensor]
"""From W·s rounded (candidates, rows, columns), which may be overwritten, and W (rows, columns), both float32 and of
some rows of a layer, to the error of each row (candidates, rows) float64."""


class Objective(Protocol):
    """Objective that a search minimises: a sum over the rows of the weights."""

    @property
    def at_once(self) -> int:
        """Return the number of candidates that it compares at once."""

    def errors_of(self, inverses: Tensor) -> Errors:
        """Return the function that compares candidates, given 1/s (candidates, columns)."""


@dataclass(frozen=True)
class GramError:
    """Σ ‖Δ x‖² over all calibration inputs x, where Δ is the change of the weight: tr(Δ G Δᵀ).

    Attributes:
        gram: (columns, columns) float32, G = Σ x xᵀ, or a weighted sum of such.
    """

    gram: Tensor
    at_once: ClassVar[int] = len(EXPONENTS)

    def errors_of(self, inverses: Tensor) -> Errors:
        """Compare candidates by the second moments of the inputs."""

        def errors(rounded: Tensor, weight: Tensor) -> Tensor:
            delta = _changes(rounded, inverses, weight)
            return squared_errors(delta, self.gram).view(len(inverses), -1)

        return errors


@dataclass(frozen=True)
class RowError:
    """Σ share · |ŷ − y|^power over some calibration inputs, with y = W x the outputs without quantization.

    Attributes:
        rows: Inputs (rows, columns) float32.
        shares: Weights (rows,) of the inputs, float32.
        power: Exponent, 1 for absolute errors, 2 for squared ones.
        rounding: Rounding of the layer's inputs; None for none.
        largest: Largest |x| over all calibration inputs, for a static scale: (columns,), or (modalities, columns).
        is_image: (rows,) bool, which rows are image tokens, where modalities are scaled apart.
    """

    rows: Tensor
    shares: Tensor
    power: int
    rounding: InputRounding | None = None
    largest: Tensor | None = None
    is_image: Tensor | None = None

    @property
    def at_once(self) -> int:
        """Return all candidates, or a few where each rounds the inputs differently."""
        return len(EXPONENTS) if self.rounding is None else 5

    def errors_of(self, inverses: Tensor) -> Errors:
        """Compare candidates by the outputs for a sample of the inputs."""
        if self.rounding is None:

            def errors(rounded: Tensor, weight: Tensor) -> Tensor:
                blocks = _changes(rounded, inverses, weight).split(rows_per_block(len(self.rows)))
                costs = torch.cat([self._costs(self.rows @ block.T) for block in blocks])
                return costs.view(len(inverses), -1).double()

            return errors
        inputs = [self._rounded_inputs(inverse) for inverse in inverses]

        def errors_of_rounded_inputs(rounded: Tensor, weight: Tensor) -> Tensor:
            exact = self.rows @ weight.T
            costs = [self._costs(x @ part.T - exact) for x, part in zip(inputs, rounded, strict=True)]
            return torch.stack(costs).double()

        return errors_of_rounded_inputs

    def _costs(self, outputs: Tensor) -> Tensor:
        """Return the contribution of each output, given its change for each input; overwrites `outputs`."""
        return self.shares @ outputs.abs_().pow_(self.power)

    def _rounded_inputs(self, inverse: Tensor) -> Tensor:
        assert self.rounding is not None
        static = None
        if self.rounding.static and self.largest is not None:
            static = self.rounding.static_scale((self.largest * inverse).amax(-1))
        return self.rounding.round(self.rows * inverse, static, self.is_image)


class Scales(NamedTuple):
    """Result of a search.

    Attributes:
        in_scale: 1/s (columns,), in the dtype of the weights; multiplies the layer's input.
        exponent: Chosen t.
    """

    in_scale: Tensor
    exponent: float


def search_scales(
    weights: Sequence[Tensor],
    specs: Sequence[QuantSpec],
    mean_magnitude: Tensor,
    objective: Objective,
    *,
    powers_of_two: bool = False,
    form: NumberFormat | None = None,
) -> Scales:
    """Find the input scale of layers that share it.

    Args:
        weights: Weights, each (rows, columns), with the same inputs.
        specs: Specs, one per weight.
        mean_magnitude: Mean |x| (columns,) of these inputs.
        objective: Objective; its errors are summed over the weights.
        powers_of_two: Whether to round every scale to the nearest power of two.
        form: Format of the weights; None for integers by the specs.
    """
    inverses = candidates(mean_magnitude, weights[0].dtype, powers_of_two=powers_of_two)
    best = least_error(weights, specs, inverses, objective, form)
    return Scales(inverses[best].to(weights[0].dtype), EXPONENTS[best])


def least_error(
    weights: Sequence[Tensor],
    specs: Sequence[QuantSpec],
    inverses: Tensor,
    objective: Objective,
    form: NumberFormat | None = None,
) -> int:
    """Return the index of the first candidate with the least error.

    Errors are sums over the rows of the weights, which are compared in `STAGES`. A candidate that is clearly worse than
    the best one in the rows so far, by `GIVEN_UP` standard errors, is not compared in the others. The first candidate
    is never given up, so that the result is never worse than it.

    Args:
        weights: Weights, each (rows, columns), with the same inputs.
        specs: Specs, one per weight.
        inverses: Candidates of 1/s (candidates, columns) float32.
        objective: Objective; its errors are summed over the weights.
        form: Format of the weights; None for integers by the specs.
    """
    alive = torch.arange(len(inverses), device=inverses.device)
    errors = inverses.new_empty(len(inverses), 0, dtype=torch.float64)
    rows = sum(len(weight) for weight in weights)
    for stage in STAGES:
        found = [
            _candidate_errors(weight, _part(weight, *stage, form), spec, inverses[alive], objective, form)
            for weight, spec in zip(weights, specs, strict=True)
        ]
        errors = torch.cat([errors, *found], 1)
        kept = _worth_comparing(errors, rows)
        alive, errors = alive[kept], errors[kept]
    # The first of equals, on every device.
    sums = errors.sum(1).tolist()
    return int(alive[sums.index(min(sums))])


def _part(weight: Tensor, remainder: int, divisor: int, form: NumberFormat | None) -> Tensor:
    """Return some rows of a weight, or some blocks of rows where these share a scale."""
    size = 1 if form is None or form.block[0] is None else form.block[0]
    return weight[torch.arange(len(weight), device=weight.device) // size % divisor == remainder]


def _worth_comparing(errors: Tensor, rows: int) -> Tensor:
    """Return the mask (candidates,) of the first one and of all that are not clearly worse than the best.

    Args:
        errors: Errors so far (candidates, rows compared) float64, the first candidate's first.
        rows: Number of all rows.
    """
    compared, sums = errors.shape[1], errors.sum(1)
    best = int(sums.argmin())
    if not FEWEST_COMPARED <= compared < rows or not sums[best] > 0:
        return torch.ones(len(errors), dtype=torch.bool, device=errors.device)
    # The ratio of two sums: rows with large errors have so with every candidate, which says nothing about either. Of
    # finitely many rows: once all are compared there is no doubt.
    ratio = sums / sums[best]
    residual = errors - ratio.unsqueeze(1) * errors[best]
    doubt = residual.std(1) * (1 / compared - 1 / rows) ** 0.5
    kept: Tensor = (sums - sums[best]) / compared <= GIVEN_UP * doubt
    kept[0] = True
    return kept


def candidates(mean_magnitude: Tensor, dtype: torch.dtype, *, powers_of_two: bool = False) -> Tensor:
    """Return 1/s for every exponent of the grid.

    Args:
        mean_magnitude: Mean |x| (columns,).
        dtype: Dtype of the layer's arithmetic; the inverses are rounded to it before use, so that the measured error is
            the actual one.
        powers_of_two: Whether to round every scale to the nearest power of two.

    Returns:
        (exponents, columns) float32.
    """
    exponents = torch.tensor(EXPONENTS, device=mean_magnitude.device).unsqueeze(1)
    scale = mean_magnitude.clamp(min=torch.finfo(torch.float32).tiny).pow(exponents).clamp(min=1e-4)
    scale = scale / (scale.amax(1, keepdim=True) * scale.amin(1, keepdim=True)).sqrt()
    if powers_of_two:
        scale = scale.log2().round().exp2()
    return (1 / scale).to(dtype).float()


def search_clipping(weight: Tensor, spec: QuantSpec, gram: Tensor, scale_dtype: torch.dtype) -> Codes:
    """Quantize a weight, clipping each group to the range with the smallest output error.

    The authors compare the ranges of a group by the group's own contribution to the output. Here the groups of a row
    are clipped in turn, and each range is compared by the error of the whole output given the other groups' results. So
    the error of a row never rises, and is never above that of rounding without clipping.

    Args:
        weight: (rows, columns) float32, as it is to be rounded (times s).
        spec: Bits, group size, symmetry.
        gram: (columns, columns) float32, Σ x xᵀ of this weight's inputs (x / s).
        scale_dtype: Dtype of the returned scale.
    """
    widest = max(weight.shape[1], columns_per_group(spec.group_size, weight.shape[1]) * len(CLIPPING_RATIOS))
    blocks = weight.split(max(1, _in_flight(weight) // widest))
    return Codes.stacked([_clip(block, spec, gram, scale_dtype) for block in blocks])


def _candidate_errors(
    weight: Tensor, part: Tensor, spec: QuantSpec, inverses: Tensor, objective: Objective, form: NumberFormat | None
) -> Tensor:
    """Return the errors of each row of a part of a weight, (candidates, rows of the part) float64."""
    if not len(part):
        return inverses.new_empty(len(inverses), 0, dtype=torch.float64)
    found = []
    for piece in inverses.split(objective.at_once):
        errors = objective.errors_of(piece)
        rows = max(1, _in_flight(weight) // (weight.shape[1] * len(piece)))
        shared = {} if form is None else _shared_scales(weight, piece, form)
        if form is not None and form.block[0] is not None:
            rows = -(-rows // form.block[0]) * form.block[0]
        blocks = part.split(rows)
        # One buffer for all blocks: allocating and freeing in turns would fragment the heap.
        place = piece.new_empty(len(piece), *blocks[0].shape)

        def rounded(scaled: Tensor, shared: dict[str, Tensor] = shared) -> Tensor:
            if form is not None:
                return fake_quantize(scaled, form, **shared)
            return nearest_values(scaled.flatten(0, 1), spec, weight.dtype).view(scaled.shape)

        found.append(torch.cat([_block_errors(block, piece, errors, place, rounded) for block in blocks], 1))
    return torch.cat(found)


def _shared_scales(weight: Tensor, inverses: Tensor, form: NumberFormat) -> dict[str, Tensor]:
    """Return what `fake_quantize` needs to know of all rows of W·s to round some of them, for every candidate s."""
    if not form.global_scale and form.block[0] is not None:
        return {}
    columns = torch.stack([block.abs().amax(0) for block in weight.split(rows_per_block(weight.shape[1]))]).amax(0)
    largest = (columns.float() / inverses).amax(1)
    if form.global_scale:
        return {"global_scale": find_global_scale(largest, form)}
    return {"scale": find_scale(largest[:, None, None], form)}


def _block_errors(
    block: Tensor, inverses: Tensor, errors: Errors, place: Tensor, rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    dense, rows = block.float(), len(block)
    # Only the last block is smaller than the buffer.
    scaled = place if rows == place.shape[1] else place[:, :rows].clone()
    torch.div(dense, inverses.unsqueeze(1), out=scaled)
    return errors(rounded(scaled), dense)


def _changes(rounded: Tensor, inverses: Tensor, weight: Tensor) -> Tensor:
    """Return Ŵ − W, candidates stacked along the rows, (candidates · rows, columns); overwrites `rounded`."""
    return rounded.mul_(inverses.unsqueeze(1)).sub_(weight).flatten(0, 1)


def _in_flight(weight: Tensor) -> int:
    return SEARCH_ELEMENTS.get(weight.device.type, SEARCH_ELEMENTS_ELSEWHERE)


def _clip(weight: Tensor, spec: QuantSpec, gram: Tensor, scale_dtype: torch.dtype) -> Codes:
    """Search the ranges of some rows, one group after another."""
    columns = weight.shape[1]
    size = columns_per_group(spec.group_size, columns)
    best = round_to_nearest(weight, spec, scale_dtype)
    delta = best.dequantize(spec.bits, torch.float32)[:, :columns] - weight
    for group, start in enumerate(range(0, columns, size)):
        inside = slice(start, min(start + size, columns))
        block, part = gram[inside, inside], weight[:, inside]
        tried = _clipped(functional.pad(part, (0, size - part.shape[1])), spec, scale_dtype)
        change = tried.dequantize(spec.bits, torch.float32).view(len(CLIPPING_RATIOS), len(weight), -1)
        change = change[..., : part.shape[1]] - part
        others = delta @ gram[:, inside] - delta[:, inside] @ block
        errors = ((change @ block + 2 * others) * change).sum(-1, dtype=torch.float64)
        chosen = errors.argmin(0)
        picked = chosen * len(weight) + torch.arange(len(weight), device=weight.device)
        delta[:, inside] = change.flatten(0, 1)[picked]
        best.codes[:, group], best.scale[:, group] = tried.codes[picked, 0], tried.scale[picked, 0]
        if best.zero_point is not None and tried.zero_point is not None:
            best.zero_point[:, group] = tried.zero_point[picked, 0]
    return best


def _clipped(part: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> Codes:
    """Round a group of each row after clipping it to every range of the grid, (ranges · rows, 1, group size)."""
    ratios = torch.tensor(CLIPPING_RATIOS, device=part.device).view(-1, 1, 1)
    limits = part.abs().amax(1, keepdim=True) * ratios
    clipped = torch.minimum(torch.maximum(part, -limits), limits)
    return round_to_nearest(clipped.flatten(0, 1), spec, scale_dtype)
