"""Searches of AWQ's kind: which scale per input column and which clipping range per group cost the output least.

Candidates are rounded together, many per tensor operation, and compared by an `Objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lmms_plugin.quant_backends.codes import Codes, columns_per_group
from lmms_plugin.quant_backends.int8_inputs import UNQUANTIZED, round_inputs
from lmms_plugin.quant_backends.plan import QuantSpec
from lmms_plugin.quant_backends.rtn import round_to_nearest

EXPONENTS = tuple(step / 20 for step in range(20))
"""The grid of scales, as in the authors' code. 0 is round-to-nearest."""

CLIPPING_RATIOS = tuple(1 - step / 20 for step in range(10))
"""The grid of clipping ranges, as in the authors' code: parts of a group's largest magnitude, down to about a half."""

SEARCH_ELEMENTS = 1 << 22
"""Weights in flight while candidates of one layer are compared."""

Errors = Callable[[Tensor, Tensor], Tensor]
"""From W·s rounded (candidates, rows, columns) and 1/s (candidates, columns) to errors (candidates,), float64."""


class Objective(Protocol):
    """What a search makes small."""

    def errors_of(self, weight: Tensor) -> Errors:
        """Return the function that compares candidates for a weight (rows, columns), float32."""


@dataclass(frozen=True)
class GramError:
    """Σ ‖Δ x‖² over all calibration inputs x, where Δ is the change of the weight: tr(Δ G Δᵀ).

    Attributes:
        gram: (columns, columns) float32, G = Σ x xᵀ, or a weighted sum of such.
    """

    gram: Tensor

    def errors_of(self, weight: Tensor) -> Errors:
        """Compare candidates for a weight."""

        def errors(rounded: Tensor, inverses: Tensor) -> Tensor:
            delta = (rounded * inverses.unsqueeze(1)).sub_(weight)
            return torch.stack([quadratic(part, self.gram).sum() for part in delta])

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

    def errors_of(self, weight: Tensor) -> Errors:
        """Compare candidates for a weight."""
        exact = self.rows @ weight.T

        def errors(rounded: Tensor, inverses: Tensor) -> Tensor:
            return torch.stack(
                [
                    (self.shares @ (self._inputs(inverse) @ part.T - exact).abs().pow(self.power)).sum(
                        dtype=torch.float64
                    )
                    for part, inverse in zip(rounded, inverses, strict=True)
                ]
            )

        return errors

    def _inputs(self, inverse: Tensor) -> Tensor:
        scaled = self.rows * inverse
        if self.act_bits == UNQUANTIZED:
            return scaled
        codes, scale = round_inputs(scaled)
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
    weights: Sequence[Tensor], specs: Sequence[QuantSpec], mean_magnitude: Tensor, objective: Objective
) -> Scales:
    """Find the input scale that layers share.

    Args:
        weights: Each (rows, columns), all fed the same inputs.
        specs: One per weight.
        mean_magnitude: (columns,), mean |x| of these inputs.
        objective: Its errors are summed over the weights.
    """
    inverses = candidates(mean_magnitude, weights[0].dtype)
    errors = torch.zeros(len(inverses), dtype=torch.float64, device=inverses.device)
    for weight, spec in zip(weights, specs, strict=True):
        errors += _candidate_errors(weight, spec, inverses, objective)
    # The first of equals, on every device.
    best = errors.tolist().index(float(errors.min()))
    return Scales(inverses[best].to(weights[0].dtype), EXPONENTS[best])


def candidates(mean_magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1/s for every exponent of the grid.

    Args:
        mean_magnitude: (columns,), mean |x|.
        dtype: What the layer computes in; the inverses are rounded to it before they are used, so that
            the error that is measured is the one that is got.

    Returns:
        (exponents, columns) float32.
    """
    exponents = torch.tensor(EXPONENTS, device=mean_magnitude.device).unsqueeze(1)
    scale = mean_magnitude.clamp(min=torch.finfo(torch.float32).tiny).pow(exponents).clamp(min=1e-4)
    scale = scale / (scale.amax(1, keepdim=True) * scale.amin(1, keepdim=True)).sqrt()
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
    step = max(1, SEARCH_ELEMENTS // (weight.shape[1] * len(CLIPPING_RATIOS)))
    return Codes.stacked([_clip(block, spec, gram, scale_dtype) for block in weight.split(step)])


def quadratic(delta: Tensor, gram: Tensor) -> Tensor:
    """Return δ G δᵀ of each row of delta (rows, columns), (rows,) float64."""
    return ((delta @ gram) * delta).sum(-1, dtype=torch.float64)


def _candidate_errors(weight: Tensor, spec: QuantSpec, inverses: Tensor, objective: Objective) -> Tensor:
    dense = weight.float()
    rows, columns = dense.shape
    errors = objective.errors_of(dense)
    found = []
    for piece in inverses.split(max(1, SEARCH_ELEMENTS // dense.numel())):
        scaled = (dense / piece.unsqueeze(1)).reshape(-1, columns)
        rounded = round_to_nearest(scaled, spec, weight.dtype).dequantize(spec.bits, torch.float32)
        found.append(errors(rounded[:, :columns].view(-1, rows, columns), piece))
    return torch.cat(found)


def _clip(weight: Tensor, spec: QuantSpec, gram: Tensor, scale_dtype: torch.dtype) -> Codes:
    """Search the ranges of some rows, all groups in turn."""
    columns = weight.shape[1]
    size = columns_per_group(spec.group_size, columns)
    best = round_to_nearest(weight, spec, scale_dtype)
    delta = best.dequantize(spec.bits, torch.float32)[:, :columns] - weight
    for group, start in enumerate(range(0, columns, size)):
        inside = slice(start, min(start + size, columns))
        block, part = gram[inside, inside], weight[:, inside]
        tried = _clipped(part, spec, scale_dtype)
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
    """Round a group of each row after clipping it to every range of the grid, (ranges · rows, columns of the group)."""
    ratios = torch.tensor(CLIPPING_RATIOS, device=part.device).view(-1, 1, 1)
    limits = part.abs().amax(1, keepdim=True) * ratios
    clipped = torch.minimum(torch.maximum(part, -limits), limits)
    return round_to_nearest(clipped.flatten(0, 1), spec, scale_dtype)
