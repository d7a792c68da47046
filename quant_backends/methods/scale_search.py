"""Searches of AWQ's kind: which scale per input column and which clipping range per group cost the output least.

Candidates are rounded together, many per tensor operation, and compared by an `Objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor

from lmms_plugin.quant_backends.layers.codes import Codes, columns_per_group, rows_per_block
from lmms_plugin.quant_backends.layers.int8_inputs import UNQUANTIZED, round_inputs
from lmms_plugin.quant_backends.methods.rtn import nearest_values, round_to_nearest
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import squared_errors

EXPONENTS = tuple(step / 20 for step in range(20))
"""The grid of scales, as in the authors' code. 0 is round-to-nearest."""

CLIPPING_RATIOS = tuple(1 - step / 20 for step in range(10))
"""The grid of clipping ranges, as in the authors' code: parts of a group's largest magnitude, down to about a half."""

SEARCH_ELEMENTS = {"cpu": 1 << 20}
"""Weights in flight while candidates of one layer are compared, by device: on a CPU what its caches hold."""

SEARCH_ELEMENTS_ELSEWHERE = 1 << 24

Errors = Callable[[Tensor, Tensor], Tensor]
"""From W·s rounded (candidates, rows, columns), which may be overwritten, and W (rows, columns), both float32 and of
some rows of a layer, to errors (candidates,) float64."""


class Objective(Protocol):
    """What a search makes small: a sum over the rows of the weights."""

    @property
    def at_once(self) -> int:
        """How many candidates it compares at once."""

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
            return squared_errors(delta, self.gram).view(len(inverses), -1).sum(1)

        return errors


@dataclass(frozen=True)
class RowError:
    """Σ share · |ŷ − y|^power over some calibration inputs, y = W x being the outputs without quantization.

    Attributes:
        rows: (rows, columns) float32, the inputs.
        shares: (rows,) float32, what each of them weighs.
        power: 1 for absolute errors, 2 for squared ones.
        act_bits: The layer rounds its inputs to 8 bits; 16 for not at all.
    """

    rows: Tensor
    shares: Tensor
    power: int
    act_bits: int = UNQUANTIZED

    @property
    def at_once(self) -> int:
        """All candidates, or a few where each takes the inputs rounded in its own way."""
        return len(EXPONENTS) if self.act_bits == UNQUANTIZED else 5

    def errors_of(self, inverses: Tensor) -> Errors:
        """Compare candidates by the outputs for a sample of the inputs."""
        if self.act_bits == UNQUANTIZED:

            def errors(rounded: Tensor, weight: Tensor) -> Tensor:
                blocks = _changes(rounded, inverses, weight).split(rows_per_block(len(self.rows)))
                costs = torch.cat([self._costs(self.rows @ block.T) for block in blocks])
                return costs.view(len(inverses), -1).sum(1, dtype=torch.float64)

            return errors
        inputs = [self._rounded_inputs(inverse) for inverse in inverses]

        def errors_of_rounded_inputs(rounded: Tensor, weight: Tensor) -> Tensor:
            exact = self.rows @ weight.T
            costs = [self._costs(x @ part.T - exact) for x, part in zip(inputs, rounded, strict=True)]
            return torch.stack(costs).sum(1, dtype=torch.float64)

        return errors_of_rounded_inputs

    def _costs(self, outputs: Tensor) -> Tensor:
        """Return what each output contributes, given how it changes for each input; overwrites `outputs`."""
        return self.shares @ outputs.abs_().pow_(self.power)

    def _rounded_inputs(self, inverse: Tensor) -> Tensor:
        codes, scale = round_inputs(self.rows * inverse)
        return codes.float() * scale


class Scales(NamedTuple):
    """The outcome of a search.

    Attributes:
        in_scale: (columns,) in the dtype of the weights, 1/s; multiplies the layer's input.
        exponent: The chosen t.
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
) -> Scales:
    """Find the input scale that layers share.

    Args:
        weights: Each (rows, columns), all fed the same inputs.
        specs: One per weight.
        mean_magnitude: (columns,), mean |x| of these inputs.
        objective: Its errors are summed over the weights.
        powers_of_two: Round every scale to the nearest power of two.
    """
    inverses = candidates(mean_magnitude, weights[0].dtype, powers_of_two=powers_of_two)
    errors = torch.zeros(len(inverses), dtype=torch.float64, device=inverses.device)
    for weight, spec in zip(weights, specs, strict=True):
        errors += _candidate_errors(weight, spec, inverses, objective)
    # The first of equals, on every device.
    best = errors.tolist().index(float(errors.min()))
    return Scales(inverses[best].to(weights[0].dtype), EXPONENTS[best])


def candidates(mean_magnitude: Tensor, dtype: torch.dtype, *, powers_of_two: bool = False) -> Tensor:
    """Return 1/s for every exponent of the grid.

    Args:
        mean_magnitude: (columns,), mean |x|.
        dtype: What the layer computes in; the inverses are rounded to it before they are used, so that
            the error that is measured is the one that is got.
        powers_of_two: Round every scale to the nearest power of two.

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
    """Quantize a weight, clipping each group to the range that costs the least at the output.

    The authors compare the ranges of a group by the group's own contribution to the output. Here the groups of a row
    take their turns, and each is compared by the error of the whole output given what the others have become. So the
    error of a row never rises, and is never above that of rounding without clipping.

    Args:
        weight: (rows, columns) float32, as it is to be rounded (times s).
        spec: Bits, group size, symmetry.
        gram: (columns, columns) float32, Σ x xᵀ of what this weight is fed (x / s).
        scale_dtype: Of the returned scale.
    """
    widest = max(weight.shape[1], columns_per_group(spec.group_size, weight.shape[1]) * len(CLIPPING_RATIOS))
    blocks = weight.split(max(1, _in_flight(weight) // widest))
    return Codes.stacked([_clip(block, spec, gram, scale_dtype) for block in blocks])


def _candidate_errors(weight: Tensor, spec: QuantSpec, inverses: Tensor, objective: Objective) -> Tensor:
    found = []
    for piece in inverses.split(objective.at_once):
        errors = objective.errors_of(piece)
        blocks = weight.split(max(1, _in_flight(weight) // (weight.shape[1] * len(piece))))
        # One place for all blocks, one after another: what is allocated and freed in turns leaves holes on the heap.
        place = piece.new_empty(len(piece), *blocks[0].shape)
        found.append(torch.stack([_block_errors(block, spec, piece, errors, place) for block in blocks]).sum(0))
    return torch.cat(found)


def _block_errors(block: Tensor, spec: QuantSpec, inverses: Tensor, errors: Errors, place: Tensor) -> Tensor:
    dense, rows = block.float(), len(block)
    # Only the last block is smaller than the place.
    scaled = place if rows == place.shape[1] else place[:, :rows].clone()
    torch.div(dense, inverses.unsqueeze(1), out=scaled)
    rounded = nearest_values(scaled.flatten(0, 1), spec, block.dtype)
    return errors(rounded.view(len(inverses), *dense.shape), dense)


def _changes(rounded: Tensor, inverses: Tensor, weight: Tensor) -> Tensor:
    """Return Ŵ − W, one candidate below the other, (candidates · rows, columns); overwrites `rounded`."""
    return rounded.mul_(inverses.unsqueeze(1)).sub_(weight).flatten(0, 1)


def _in_flight(weight: Tensor) -> int:
    return SEARCH_ELEMENTS.get(weight.device.type, SEARCH_ELEMENTS_ELSEWHERE)


def _clip(weight: Tensor, spec: QuantSpec, gram: Tensor, scale_dtype: torch.dtype) -> Codes:
    """Search the ranges of some rows, all groups in turn."""
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
