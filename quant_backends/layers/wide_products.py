"""Dense 16-bit layers on processors without 16-bit arithmetic, where torch's own products take eight times as long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmms_plugin.quant_backends.layers.codes import rows_per_block
from lmms_plugin.quant_backends.layers.kernels import arithmetic_dtype


class WideProducts(TorchFunctionMode):
    """Computes the products of linear layers in float32 where that is quicker, and rounds them once.

    For the time of a ``with`` block, in the thread that entered it. Weights are converted a few rows at a time, and
    again on the way back where gradients go through; weights that want gradients themselves, and processors and
    devices that compute in 16 bits, are left to torch.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take over ``torch.nn.functional.linear``."""
        if func is functional.linear and not kwargs:
            x, weight, bias = (*args, None)[:3]
            frozen = not torch.is_grad_enabled() or not (
                weight.requires_grad or (bias is not None and bias.requires_grad)
            )
            if frozen and type(weight.data) is Tensor and arithmetic_dtype(x.dtype, x.device.type) != x.dtype:
                return WideLinear.apply(x, weight, bias)
        return func(*args, **(kwargs or {}))


class WideLinear(torch.autograd.Function):
    """A linear layer whose product, and that of its gradient, is computed in `arithmetic_dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply (…, n) by a weight (m, n), a few of its rows at a time."""
        ctx.save_for_backward(weight)
        wide = x.to(arithmetic_dtype(x.dtype, x.device.type))
        y = x.new_empty(*x.shape[:-1], len(weight))
        for rows in _blocks(weight):
            part = None if bias is None else bias[rows].to(wide.dtype)
            y[..., rows] = functional.linear(wide, weight[rows].to(wide.dtype), part)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the input alone."""
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        wide = gradient.to(arithmetic_dtype(gradient.dtype, gradient.device.type))
        total = wide.new_zeros(*gradient.shape[:-1], weight.shape[1])
        for rows in _blocks(weight):
            total += wide[..., rows] @ weight[rows].to(wide.dtype)
        return total.to(gradient.dtype), None, None


def _blocks(weight: Tensor) -> list[slice]:
    step = rows_per_block(weight.shape[1])
    return [slice(start, start + step) for start in range(0, len(weight), step)]
