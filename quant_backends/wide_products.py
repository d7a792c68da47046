"""Dense 16-bit layers on processors without 16-bit arithmetic, where torch's own products take eight times as long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmms_plugin.quant_backends.codes import rows_per_block
from lmms_plugin.quant_backends.kernels import arithmetic_dtype


class WideProducts(TorchFunctionMode):
    """Computes the products of linear layers in float32 where that is quicker, and rounds them once.

    For the time of a ``with`` block, in the thread that entered it. Weights are converted a few rows at a time. Where
    the processor or the device computes in 16 bits, and under gradients, which would keep the converted weights,
    nothing changes.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take over ``torch.nn.functional.linear``."""
        if func is functional.linear and not kwargs and not torch.is_grad_enabled():
            x, weight, bias = (*args, None)[:3]
            dtype = arithmetic_dtype(x.dtype, x.device.type)
            if dtype != x.dtype and type(weight.data) is Tensor:
                return _linear(x, weight, bias, dtype)
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    wide, step = x.to(dtype), rows_per_block(weight.shape[1])
    y = x.new_empty(*x.shape[:-1], len(weight))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        y[..., rows] = functional.linear(wide, weight[rows].to(dtype), None if bias is None else bias[rows].to(dtype))
    return y
