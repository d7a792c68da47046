"""Changes of weights in place, a few rows at a time, computed in float64 and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lmms_plugin.quant_backends.layers.codes import rows_per_block

Step = Callable[[Tensor], Tensor]


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a name fits one of some patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def by_head(rotation: Step, size: int) -> Step:
    """Return the rotation of each head, or of each token of several side by side, of (..., heads · size)."""
    return lambda x: rotation(x.unflatten(-1, (-1, size))).flatten(-2)


def change(layer: Any, step: Step) -> None:
    """Replace each row of a weight, a few at a time."""
    weight = layer.weight
    size = rows_per_block(weight.shape[1])
    weight.data = torch.cat([step(rows.double()).to(weight.dtype) for rows in weight.data.split(size)])


def change_outputs(layer: Any, step: Step) -> None:
    """Replace each column of a weight, a few at a time, and the bias."""
    weight = layer.weight
    size = rows_per_block(weight.shape[0])
    parts = [step(columns.double()).to(weight.dtype) for columns in weight.data.T.split(size)]
    weight.data = torch.cat(parts).T.contiguous()
    if getattr(layer, "bias", None) is not None:
        layer.bias.data = step(layer.bias.double()).to(layer.bias.dtype)
