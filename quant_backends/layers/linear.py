"""The packed low-bit linear layer that every quantizer of this package stores its result in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.codes import Codes, columns_per_group, rows_per_block, split_groups
from lmms_plugin.quant_backends.layers.kernel_choice import fastest
from lmms_plugin.quant_backends.layers.kernels import Dequantize, Kernel
from lmms_plugin.quant_backends.plans.plan import QuantSpec

__all__ = ["Codes", "PackedLinear", "QuantizedLinear", "rows_per_block", "split_groups"]


class QuantizedLinear(nn.Module, ABC):
    """A linear layer that holds its weight in fewer bits: same input, same output as the ``nn.Linear`` it replaces.

    Attributes:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        bits: Bits per code, without scales and zero points.
        group_size: Columns that share a scale.
        bias: (out_features,), or None.
    """

    in_features: int
    out_features: int
    bits: int
    group_size: int
    bias: nn.Parameter | None

    @abstractmethod
    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the weight that this layer stands for, (stop - start, in_features), computed at each call."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of all that replaces the dense weight: codes, scales, zero points and the like."""

    @property
    def kernel(self) -> str:
        """What the forward pass runs on."""
        return "dequantize"

    @property
    def padded_columns(self) -> int:
        """Columns added so that groups are whole."""
        return -self.in_features % self.group_size

    @property
    def weight(self) -> Tensor:
        """The dense weight (out_features, in_features) that this layer stands for, computed at each call."""
        return self.dense_rows(0, self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


class PackedLinear(QuantizedLinear):
    """A linear layer whose weight takes exactly `bits` bits, plus a scale and a zero point per group.

    It replaces an ``nn.Linear``: same input, same output, same bias. Codes are held once, in the layout of the best
    kernel there is for bits, group size, dtype and device (`lmms_plugin.quant_backends.layers.kernels`). The canonical
    layout is exchanged for it when the layer is first used or asked what it runs on, and comes back when the layer is
    moved; a state dict always holds the canonical one.

    Args:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        spec: Bits and group size; a symmetric spec stores no zero points.
        bias: Whether there is one.
        dtype: Of scale, bias and `in_scale`: the dtype the layer computes in.
        device: Where the buffers live.
        float_zero_point: Zero points are real numbers in `dtype` instead of uint8.
        with_in_scale: The input is multiplied by a vector first (activation-aware methods).
    """

    packed: Kernel
    in_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        float_zero_point: bool = False,
        with_in_scale: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.bits = spec.bits
        self.group_size = columns_per_group(spec.group_size, in_features)
        self.packed = Dequantize(
            spec.bits,
            out_features,
            in_features + self.padded_columns,
            self.group_size,
            symmetric=spec.symmetric,
            float_zero_point=float_zero_point,
            dtype=dtype,
            device=device,
        )
        in_scale = torch.empty(in_features, dtype=dtype, device=device) if with_in_scale else None
        self.register_buffer("in_scale", in_scale)
        empty = torch.empty(out_features, dtype=dtype, device=device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None
        self._chosen = False

    @classmethod
    def from_codes(
        cls,
        quantized: Codes,
        spec: QuantSpec,
        in_features: int,
        *,
        bias: nn.Parameter | None = None,
        in_scale: Tensor | None = None,
    ) -> PackedLinear:
        """Pack a quantized weight.

        Args:
            quantized: Codes (rows, groups, group_size), scale and zero point.
            spec: Bits and group size that the codes were made for.
            in_features: Columns of the weight without padding.
            bias: Taken over as it is, shape (rows,).
            in_scale: (in_features,), multiplied into the input.

        Raises:
            ValueError: Codes, scale, zero point and input scale do not fit each other or `spec`.
        """
        layer = cls(in_features, quantized.codes.shape[0], spec, dtype=quantized.scale.dtype, device="meta")
        layer._expect(quantized, in_scale)
        layer.packed = Dequantize.from_codes(quantized, spec.bits)
        layer.in_scale = None if in_scale is None else in_scale.detach().contiguous()
        layer.bias = bias
        return layer

    def choose_kernel(self) -> None:
        """Bring the weight into the layout of the best kernel for its device and dtype."""
        if not self._chosen:
            self.packed = fastest(self.packed)
            self._chosen = True

    @property
    def kernel(self) -> str:
        """What the forward pass runs on."""
        self.choose_kernel()
        return self.packed.name

    @property
    def quantized(self) -> Codes:
        """The canonical form, unpacked at each call."""
        return self.packed.codes(0, self.out_features)

    @property
    def dtype(self) -> torch.dtype:
        """Of scales and input scale: what the layer computes in."""
        return self.packed.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, scales, zero points and input scale: all that replaces the dense weight."""
        self.choose_kernel()
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the weight, the input scale included, in the dtype of the scales."""
        weight = self.packed.codes(start, stop).dequantize(self.bits, self.dtype)[:, : self.in_features]
        return weight if self.in_scale is None else weight * self.in_scale

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the stored weight, (out_features, in_features), without the input scale."""
        return self.quantized.dequantize(self.bits, dtype)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of `x`, shape (..., out_features)."""
        self.choose_kernel()
        if self.in_scale is not None:
            x = x * self.in_scale.to(x.dtype)
        rows = x.reshape(-1, self.in_features)
        if self.padded_columns:
            rows = functional.pad(rows, (0, self.padded_columns))
        y = self.packed.matmul(rows)
        if self.bias is not None:
            y += self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _canonicalize(self) -> None:
        self.packed = self.packed.canonical()
        self._chosen = False

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        # What moves may need another kernel there.
        self._canonicalize()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._canonicalize()
        super()._load_from_state_dict(*args, **kwargs)

    def _expect(self, quantized: Codes, in_scale: Tensor | None) -> None:
        codes, scale, zero = quantized
        groups = (self.out_features, (self.in_features + self.padded_columns) // self.group_size)
        _expect_shape(self, "codes", codes, (*groups, self.group_size), (torch.uint8,))
        _expect_shape(self, "scale", scale, groups, (scale.dtype,))
        if (zero is None) != self.spec.symmetric:
            raise ValueError(
                f"symmetric={self.spec.symmetric}, but the zero points are {'' if zero is None else 'not '}None"
            )
        if zero is not None:
            _expect_shape(self, "zero_point", zero, groups, (torch.uint8, scale.dtype))
        if in_scale is not None:
            _expect_shape(self, "in_scale", in_scale, (self.in_features,), (scale.dtype,))


def _expect_shape(
    layer: PackedLinear, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise ValueError(
            f"{name} of a packed layer ({layer.extra_repr()}) should be {shape} {' or '.join(map(str, dtypes))}, "
            f"got {tuple(tensor.shape)} {tensor.dtype}"
        )
